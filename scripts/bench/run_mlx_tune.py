"""Steps of mlx-tune's `DPOTrainer`; its reference log-probs are computed before step 1."""

import builtins
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import mlx.core as mx
import mlx.optimizers as optim
import mlx_lora
from mlx_tune import FastLanguageModel, rl_trainers


def main() -> None:
    job = common.read_job()
    if job.accumulation > 1:
        sys.exit("mlx-tune ignores the number of batches of an update")
    result = common.Result(f"mlx-tune {version('mlx-tune')}")
    mx.random.seed(0)
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=common.MAX_LENGTH
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.rank * job.scale,
        use_gradient_checkpointing=job.grad_checkpoint,
    )
    mx.eval(model.model.parameters())

    def tokenised(_self: Any, row: dict[str, str]) -> dict[str, Any]:
        pair = job.pairs[int(row["prompt"])]
        return {
            "chosen_ids": pair.prompt + pair.chosen,
            "rejected_ids": pair.prompt + pair.rejected,
            "chosen_length": len(pair.prompt + pair.chosen),
            "rejected_length": len(pair.prompt + pair.rejected),
            "prompt_length": len(pair.prompt),
        }

    apply_lora, pad = model._apply_lora, rl_trainers.DPOTrainer._pad_to_length
    widths: list[int] = []

    def apply(*values: Any, **options: Any) -> bool:
        done: bool = apply_lora(*values, **options)
        mlx_lora.set_start(model.model, job)
        return done

    def pad_to_length(self: Any, ids: list[int], length: int, *values: Any) -> list[int]:
        widths.append(length)
        padded: list[int] = pad(self, ids, length, *values)
        return padded

    model._apply_lora = apply
    rl_trainers.DPOTrainer._pad_to_length = pad_to_length
    rl_trainers.DPOTrainer._tokenize_preference_pair = tokenised
    # Its own are a cosine schedule, and AdamW as mlx has it: without bias correction, with decay.
    rl_trainers.optim = SimpleNamespace(
        cosine_decay=lambda rate, _: rate,
        AdamW=partial(optim.AdamW, weight_decay=job.weight_decay, bias_correction=True),
    )
    trainer = rl_trainers.DPOTrainer(
        model=model,
        train_dataset=common.rows_of_numbers(len(job.pairs)),
        tokenizer=tokenizer,
        args=rl_trainers.DPOConfig(
            output_dir=str(Path(job.out) / "run"),
            beta=job.beta,
            learning_rate=job.learning_rate,
            per_device_train_batch_size=job.batch_size,
            max_steps=job.updates,
            logging_steps=1,
            save_steps=sys.maxsize,
            max_seq_length=common.MAX_LENGTH,
        ),
    )
    clock = common.StepClock()
    reference_began = 0.0

    def listen(*values: Any, **options: Any) -> None:
        # It has no callbacks: what it prints is the only sign of a step.
        nonlocal reference_began
        text = str(values[0]) if values else ""
        if text.startswith("Pre-computing reference"):
            reference_began = time.perf_counter()
        elif "Reference log-probs cached" in text:
            result.reference_seconds = time.perf_counter() - reference_began
            result.reference_pairs = len(job.pairs)
        elif text.lstrip().startswith("Starting training for"):
            clock.start()
        elif text.startswith("  Step "):
            clock.tick()
            result.losses.append(float(text.split("Loss: ")[1].split()[0]))
            return
        builtins.print(*values, **options)

    rl_trainers.print = listen
    result.model_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    trainer.train()
    result.steps, result.cpu = clock.seconds, clock.cpu
    result.pairs = [job.batch_size] * job.updates
    result.peak_bytes = mx.get_peak_memory()
    result.tokens, result.shapes = sum(widths), len(set(widths))
    mlx_lora.save(model.model, job)
    if job.grad_checkpoint and job.batch_size == 1:
        result.note = "gradients through the shared prompt are lost when it checkpoints"
    result.print()


if __name__ == "__main__":
    main()
