"""Steps of TRL's `DPOTrainer` with peft, on torch's CPU backend, reference precomputed."""

import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


def main() -> None:
    args = common.runner_arguments()
    result = common.Result(f"trl {version('trl')}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    pairs = common.synthetic_pairs(args)
    rows = [
        {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs
    ]
    clock = common.StepClock()

    class Listener(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_log(
            self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any
        ) -> None:
            if logs and "loss" in logs:
                clock.tick()
                result.losses.append(float(logs["loss"]))

    class Trainer(DPOTrainer):
        """The pairs are token ids already."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, *given: Any, **named: Any) -> Dataset:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*given, **named)
            result.reference_seconds = time.perf_counter() - began
            result.reference_pairs = len(dataset)
            return dataset

    trainer = Trainer(
        model,
        args=DPOConfig(
            output_dir=str(Path(args.out) / "run"),
            beta=common.BETA,
            learning_rate=common.LEARNING_RATE,
            weight_decay=common.WEIGHT_DECAY,
            lr_scheduler_type="constant",
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=1,
            max_steps=args.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            max_length=common.MAX_LENGTH,
            gradient_checkpointing=args.grad_checkpoint,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(
            r=common.RANK,
            lora_alpha=common.RANK * common.SCALE,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Listener()],
    )
    trainer.train()
    result.steps, result.cpu = clock.seconds, clock.cpu
    # Kilobytes on Linux, bytes on a Mac.
    unit = 1 if sys.platform == "darwin" else 1024
    result.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    result.note = "peak of the whole process"
    result.print()


if __name__ == "__main__":
    main()
