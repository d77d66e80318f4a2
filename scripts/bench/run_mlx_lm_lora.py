"""Steps of mlx-lm-lora's `train_dpo`. Its reference is a second model, run in every step."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import mlx_lora
import numpy as np

if not mx.metal.is_available():
    # It asks the device for a size that only Metal states.
    _device_info = mx.device_info
    mx.device_info = lambda *args: {
        "max_recommended_working_set_size": 8 << 30,
        **_device_info(*args),
    }
    mx.set_wired_limit = lambda *_: 0

import mlx.optimizers as optim
from mlx_lm import load
from mlx_lm_lora.trainer import dpo_trainer
from mlx_lm_lora.trainer.datasets import CacheDataset
from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo
from mlx_lm_lora.utils import from_pretrained


class Rows:
    """Tokenised pairs, as its batch iterator wants them."""

    def __init__(self, pairs: Sequence[common.Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {
            "chosen": pair.prompt + pair.chosen,
            "rejected": pair.prompt + pair.rejected,
            "chosen_prompt_length": len(pair.prompt),
            "rejected_prompt_length": len(pair.prompt),
        }

    def process(self, row: dict[str, Any]) -> dict[str, Any]:
        """Nothing is left to do."""
        return row


class Batches:
    """Its batches, of the pairs in their order; it would sort them and draw with replacement.

    Attributes:
        sizes: Rows and width of each batch.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self._own = dpo_trainer.iterate_dpo_batches

    def __call__(self, dataset: Any, batch_size: int, max_seq_length: int, **_: Any) -> Any:
        """The next batch, padded by its own code."""
        first = len(self.sizes) * batch_size
        rows = [dataset[first + i] for i in range(batch_size)]
        batch = next(self._own(rows, batch_size, max_seq_length))
        rows, width = batch[0].shape
        self.sizes.append((2 * rows, width))
        yield batch


class Callback:
    """Told of every update, as `steps_per_report` is its number of batches."""

    def __init__(self, clock: common.StepClock, losses: list[float]) -> None:
        self.clock = clock
        self.losses = losses

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """An update has ended; the loss is the mean over its batches."""
        self.clock.tick()
        self.losses.append(float(info["train_loss"]))

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """There is no validation data."""


def main() -> None:
    job = common.read_job()
    result = common.Result(f"mlx-lm-lora {version('mlx-lm-lora')}")
    dpo_trainer.iterate_dpo_batches = batches = Batches()
    np.random.seed(0)
    mx.random.seed(0)
    lora = {"rank": job.rank, "dropout": 0.0, "scale": job.scale}
    model, _, adapter = from_pretrained(
        job.model,
        new_adapter_path=str(Path(job.out) / "adapters"),
        lora_config={**lora, "use_dora": False, "num_layers": -1},
    )
    # What its command line does for a reference.
    mlx_lora.set_start(model, job)
    reference, _ = load(job.model)
    reference.freeze()
    mx.eval(model.parameters(), reference.parameters())
    result.model_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    clock = common.StepClock()
    clock.start()
    train_dpo(
        model=model,
        ref_model=reference,
        optimizer=optim.AdamW(
            learning_rate=job.learning_rate, weight_decay=job.weight_decay, bias_correction=True
        ),
        train_dataset=CacheDataset(Rows(job.pairs)),
        val_dataset=None,
        args=DPOTrainingArgs(
            batch_size=job.batch_size,
            iters=job.updates * job.accumulation,
            gradient_accumulation_steps=job.accumulation,
            steps_per_report=job.accumulation,
            steps_per_save=sys.maxsize,
            beta=job.beta,
            max_seq_length=common.MAX_LENGTH,
            grad_checkpoint=job.grad_checkpoint,
            adapter_file=str(adapter),
        ),
        training_callback=Callback(clock, result.losses),
        loss_type="sigmoid",
    )
    result.steps, result.cpu = clock.seconds, clock.cpu
    result.pairs = [job.batch_size * job.accumulation] * job.updates
    result.peak_bytes = mx.get_peak_memory()
    result.tokens = sum(rows * width for rows, width in batches.sizes)
    result.shapes = len(set(batches.sizes))
    mlx_lora.save(model, job)
    result.note = "reference computed in every update"
    result.print()


if __name__ == "__main__":
    main()
