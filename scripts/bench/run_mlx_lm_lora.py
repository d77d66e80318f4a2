"""Steps of mlx-lm-lora's `train_dpo`. Its reference is a second model, run in every step."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
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


class Callback:
    """Told of every step, as `steps_per_report` is 1."""

    def __init__(self, clock: common.StepClock, losses: list[float]) -> None:
        self.clock = clock
        self.losses = losses

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """A step has ended."""
        self.clock.tick()
        self.losses.append(float(info["train_loss"]))

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """There is no validation data."""


def main() -> None:
    args = common.runner_arguments()
    result = common.Result(f"mlx-lm-lora {version('mlx-lm-lora')}")
    np.random.seed(0)
    mx.random.seed(0)
    lora = {"rank": common.RANK, "dropout": 0.0, "scale": common.SCALE}
    model, _, adapter = from_pretrained(
        args.model,
        new_adapter_path=str(Path(args.out) / "adapter"),
        lora_config={**lora, "use_dora": False, "num_layers": -1},
    )
    # What its command line does for a reference.
    reference, _ = load(args.model)
    reference.freeze()
    mx.eval(model.parameters(), reference.parameters())
    result.model_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    clock = common.StepClock()
    clock.start()
    train_dpo(
        model=model,
        ref_model=reference,
        optimizer=optim.AdamW(learning_rate=common.LEARNING_RATE, weight_decay=common.WEIGHT_DECAY),
        train_dataset=CacheDataset(Rows(common.synthetic_pairs(args))),
        val_dataset=None,
        args=DPOTrainingArgs(
            batch_size=args.batch_size,
            iters=args.steps,
            steps_per_report=1,
            steps_per_save=sys.maxsize,
            beta=common.BETA,
            max_seq_length=common.MAX_LENGTH,
            grad_checkpoint=args.grad_checkpoint,
            adapter_file=str(adapter),
        ),
        training_callback=Callback(clock, result.losses),
        loss_type="sigmoid",
    )
    result.steps, result.cpu = clock.seconds, clock.cpu
    result.peak_bytes = mx.get_peak_memory()
    result.note = "reference computed in every step"
    result.print()


if __name__ == "__main__":
    main()
