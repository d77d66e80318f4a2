"""Steps of mlx-tune's `DPOTrainer`; its reference log-probs are computed before step 1."""

import builtins
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
from mlx_tune import FastLanguageModel, rl_trainers


def main() -> None:
    args = common.runner_arguments()
    result = common.Result(f"mlx-tune {version('mlx-tune')}")
    pairs = common.synthetic_pairs(args)
    mx.random.seed(0)
    length = args.prompt + args.completion
    model, tokenizer = FastLanguageModel.from_pretrained(
        args.model, max_seq_length=common.MAX_LENGTH
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=common.RANK,
        lora_alpha=common.RANK * common.SCALE,
        use_gradient_checkpointing=args.grad_checkpoint,
    )
    mx.eval(model.model.parameters())

    def tokenised(_self: Any, row: dict[str, str]) -> dict[str, Any]:
        pair = pairs[int(row["prompt"])]
        return {
            "chosen_ids": pair.prompt + pair.chosen,
            "rejected_ids": pair.prompt + pair.rejected,
            "chosen_length": length,
            "rejected_length": length,
            "prompt_length": len(pair.prompt),
        }

    rl_trainers.DPOTrainer._tokenize_preference_pair = tokenised
    trainer = rl_trainers.DPOTrainer(
        model=model,
        train_dataset=common.rows_of_numbers(len(pairs)),
        tokenizer=tokenizer,
        args=rl_trainers.DPOConfig(
            output_dir=str(Path(args.out) / "run"),
            beta=common.BETA,
            learning_rate=common.LEARNING_RATE,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps,
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
            result.reference_pairs = len(pairs)
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
    result.peak_bytes = mx.get_peak_memory()
    if args.grad_checkpoint and args.batch_size == 1:
        result.note = "gradients through the shared prompt are lost when it checkpoints"
    result.print()


if __name__ == "__main__":
    main()
