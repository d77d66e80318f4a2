"""Steps of TRL's `DPOTrainer` with peft, on torch's CPU backend, reference precomputed."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


def set_start(model: Any, job: common.Job) -> None:
    """Give the LoRA layers the matrices that the job starts from, if it names them."""
    if not job.start:
        return
    start = load_file(job.start)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            module, _, kind = name.removesuffix(".default.weight").rpartition(".")
            leaf = {"lora_A": "lora_a", "lora_B": "lora_b"}[kind]
            weight.copy_(start.pop(f"{module.removeprefix('base_model.model.')}.{leaf}").T)
    if start:
        raise SystemExit(f"it trains other layers than {job.start}: {next(iter(start))}")


def main() -> None:
    job = common.read_job()
    result = common.Result(f"trl {version('trl')}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    rows = [
        {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected}
        for p in job.pairs
    ]
    sizes: list[torch.Size] = []
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

        def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            sizes.append(inputs["input_ids"].shape)
            return super().compute_loss(model, inputs, *given, **named)

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
            output_dir=str(Path(job.out) / "run"),
            beta=job.beta,
            learning_rate=job.learning_rate,
            weight_decay=job.weight_decay,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=job.batch_size,
            gradient_accumulation_steps=job.accumulation,
            max_steps=job.updates,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            max_length=common.MAX_LENGTH,
            gradient_checkpointing=job.grad_checkpoint,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(
            r=job.rank,
            lora_alpha=job.rank * job.scale,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Listener()],
    )
    set_start(trainer.model, job)
    trainer.train()
    result.steps, result.cpu = clock.seconds, clock.cpu
    result.pairs = [job.batch_size * job.accumulation] * job.updates
    result.peak_bytes = common.resident_peak_bytes()
    result.tokens, result.shapes = sum(map(torch.Size.numel, sizes)), len(set(sizes))
    trainer.model.save_pretrained(str(Path(job.out) / "adapter"))
    result.note = "peak of the whole process"
    result.print()


if __name__ == "__main__":
    main()
