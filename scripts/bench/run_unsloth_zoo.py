"""Steps of unsloth_zoo's `MLXDPOTrainer`, with precomputed reference log-probs."""

import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common

# It offers its mlx half on Apple silicon only; elsewhere nothing else stops it.
_runtime = types.ModuleType("unsloth_zoo.mlx.runtime")
_runtime.is_mlx_available = lambda: True
sys.modules["unsloth_zoo.mlx.runtime"] = _runtime

import mlx.core as mx
import mlx_lora
from transformers import TrainerCallback
from unsloth_zoo.mlx import preference, trainer
from unsloth_zoo.mlx.loader import FastMLXModel


def main() -> None:
    job = common.read_job()
    result = common.Result(f"unsloth_zoo {version('unsloth_zoo')}")
    mx.random.seed(0)
    model, tokenizer = FastMLXModel.from_pretrained(
        job.model,
        max_seq_length=common.MAX_LENGTH,
        dtype="float32",
        load_in_4bit=False,
        load_in_16bit=True,
        text_only=True,
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.rank * job.scale,
        use_gradient_checkpointing=job.grad_checkpoint,
        random_state=0,
    )
    mlx_lora.set_start(model, job)
    mx.eval(model.parameters())

    def tokenised(_tokenizer: Any, row: dict[str, str], **_options: Any) -> Any:
        pair = job.pairs[int(row["prompt"])]
        prompt = tuple(pair.prompt)
        return preference.TokenizedPreferenceRow(
            prompt, tuple(pair.chosen), prompt, tuple(pair.rejected)
        )

    materialize = preference.FinitePreferenceBatchPlan.materialize
    sizes: dict[int, tuple[int, int]] = {}

    def counted(self: Any, index: int, **options: Any) -> Any:
        batch = materialize(self, index, **options)
        sizes[index] = batch[0].shape
        return batch

    preference.FinitePreferenceBatchPlan.materialize = counted
    preference.tokenize_preference_row = tokenised
    config = trainer.MLXDPOConfig(
        output_dir=str(Path(job.out) / "run"),
        beta=job.beta,
        learning_rate=job.learning_rate,
        weight_decay=job.weight_decay,
        lr_scheduler_type="constant",
        warmup_steps=0,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.updates,
        logging_steps=1,
        save_steps=0,
        seed=0,
        max_grad_norm=0.0,
        max_grad_leaf_norm=0.0,
        dataset_order="sequential",
        max_seq_length=common.MAX_LENGTH,
        max_length=common.MAX_LENGTH,
        max_prompt_length=None,
        gradient_checkpointing=job.grad_checkpoint,
        compile=True,
        use_cce=True,
        precompute_ref_log_probs=True,
        loss_type="sigmoid",
    )
    run = trainer.MLXDPOTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=common.rows_of_numbers(len(job.pairs)),
        args=config,
    )
    clock = common.StepClock()

    class Listener(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            # All that its `train` does before: the reference pass and little else.
            result.reference_seconds = time.perf_counter() - began
            result.reference_pairs = len(job.pairs)
            clock.start()

        def on_log(
            self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any
        ) -> None:
            if logs and "loss" in logs:
                clock.tick()
                result.losses.append(float(logs["loss"]))

    run.add_callback(Listener())
    result.model_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    run.train()
    result.steps, result.cpu = clock.seconds, clock.cpu
    result.pairs = [job.batch_size * job.accumulation] * job.updates
    result.peak_bytes = mx.get_peak_memory()
    result.tokens = sum(rows * width for rows, width in sizes.values())
    result.shapes = len(set(sizes.values()))
    mlx_lora.save(model, job)
    result.print()


if __name__ == "__main__":
    main()
