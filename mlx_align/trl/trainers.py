"""TRL's trainer classes, on the functions behind `mlx_align.dpo` and the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mlx_align.errors import ConfigError
from mlx_align.run import Run, python_console, python_messages, start_run
from mlx_align.training.callbacks import Callback
from mlx_align.trl.arguments import refuse
from mlx_align.trl.callbacks import TrainerCallbacks, TrainerState
from mlx_align.trl.configs import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
    TrainingArguments,
)
from mlx_align.trl.inputs import (
    as_text,
    check_dataset,
    check_reference,
    model_and_adapter,
    model_name,
    with_messages,
)
from mlx_align.trl.options import (
    NAMES,
    grpo_options,
    lora_options,
    pairs_options,
    reward_options,
    rloo_options,
    rollout_options,
    rollout_sizes,
    supervised_options,
    training_options,
    unpaired_options,
)

# Files of a run folder that its adapter needs.
_SAVED = ("*.safetensors", "adapter_config.json", "config.yaml", "summary.json")
_NO_COLLATOR = "batches are made from the data's columns; leave it out"
_NO_METRICS = "metrics are those of docs/reference/metrics.md; compute others in a callback"
_NO_OPTIMIZER = "AdamW with the arguments of the config is the only optimizer; leave it out"
_NO_QUANTIZATION = "pass a quantised model, such as mlx-community/Qwen2.5-7B-Instruct-4bit"


class TrainOutput(NamedTuple):
    """The return value of `train()`, as in transformers."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer:
    """Base class of the trainers.

    Attributes:
        args: The config.
        model: The model as it was given.
        train_dataset: The training data.
        eval_dataset: The held-out data, or None.
        processing_class: The tokenizer as it was given.
        state: Steps, epochs and `log_history`.
        run: The finished `mlx_align.Run`; None before `train()`.
    """

    command: ClassVar[str]
    config_class: ClassVar[type[TrainingArguments]]

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        callbacks: Sequence[Any] | None,
        peft_config: Any,
        refused: Mapping[str, tuple[Any, str]],
    ) -> None:
        name = type(self).__name__
        for argument, (value, instead) in refused.items():
            refuse(name, argument, value, instead)
        self.model, self.processing_class = model, processing_class
        self._model, self._init_adapter = model_and_adapter(name, model)
        if args is None:
            args = self.config_class(f"{Path(self._model).name}-{name.removesuffix('Trainer')}")
        elif not isinstance(args, self.config_class):
            raise ConfigError(
                f"{name}(args=…): {type(args).__name__}; expected mlx_align.trl."
                f"{self.config_class.__name__}"
            )
        self.args: Any = args
        if args.output_dir is None:
            args.output_dir = "trainer_output"
        if train_dataset is None:
            raise ConfigError(f"{name}: train_dataset is missing")
        check_dataset(name, "train_dataset", train_dataset)
        if eval_dataset is not None:
            check_dataset(name, "eval_dataset", eval_dataset)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._peft_config = peft_config
        self._callbacks = list(callbacks or [])
        self.state = TrainerState(
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            num_train_epochs=args.num_train_epochs,
            train_batch_size=args.per_device_train_batch_size,
        )
        self.run: Run | None = None
        # Arguments that can't be used are refused before the data is read.
        self._options()

    # --- specific to this trainer

    def _own_options(self) -> dict[str, Any]:
        """The options of its loss or method."""
        raise NotImplementedError

    def _updates_per_step(self) -> int:
        """Updates in a step of the run."""
        return 1

    def _notes(self) -> list[str]:
        """Differences to TRL in this run, one line each."""
        return []

    # --- TRL's methods

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None) -> Any:
        """Train, and write the run folder `output_dir`.

        Args:
            resume_from_checkpoint: True, or the run folder (or a checkpoint in it), to continue
                from the last checkpoint.

        Returns:
            A `TrainOutput`: global_step, training_loss, metrics.

        Raises:
            MlxAlignError: An argument, the data or the model can't be used, or training failed.
            KeyboardInterrupt: Ctrl-C; a checkpoint was written.
        """
        progress = not self.args.disable_tqdm
        console = python_console(progress=progress)
        with python_messages(NAMES):
            self._check_tokenizer()
            options = {
                **self._options(),
                **lora_options(self._peft_config, self._layers()),
                "data": self._data(),
                "callbacks": self._all_callbacks(),
                "progress": progress,
            }
        if self._peft_config is None:
            console.note("LoRA of rank 16 on all linear layers; peft_config changes that.")
        for line in self._notes():
            console.note(line)
        self.run = start_run(
            self.command, options, resume=self._resume(resume_from_checkpoint), names=NAMES
        )
        return self._output(self.run)

    def evaluate(self, eval_dataset: Any = None, **_: Any) -> dict[str, float]:
        """The metrics of the trained model on `eval_dataset`, as `eval_…`.

        Raises:
            ConfigError: It was not trained yet, or there is no eval_dataset.
        """
        name = type(self).__name__
        refuse(f"{name}.evaluate", "eval_dataset", eval_dataset, "pass it to the trainer")
        if self.eval_dataset is None:
            raise ConfigError(f"{name}.evaluate(): there is no eval_dataset; give the trainer one")
        if self.run is None:
            raise ConfigError(f"{name}.evaluate(): call train() first; it evaluates at its end")
        held_out = self.run.record.held_out[-1]
        found = {key.replace("eval/", "eval_", 1): value for key, value in held_out.items()}
        found.pop("step", None)
        return {**found, "epoch": self.state.epoch}

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Copy the trained adapter to a folder; `output_dir` of the config has it already.

        Raises:
            ConfigError: It was not trained yet.
        """
        if self.run is None:
            raise ConfigError(f"{type(self).__name__}.save_model(): call train() first")
        target = Path(self.args.output_dir if output_dir is None else output_dir).expanduser()
        if target.exists() and target.resolve() == self.run.path.resolve():
            return
        target.mkdir(parents=True, exist_ok=True)
        for pattern in _SAVED:
            for file in self.run.path.glob(pattern):
                shutil.copy2(file, target / file.name)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Not available: it raises a `ConfigError` that says how to upload the run folder."""
        raise ConfigError(
            f"{type(self).__name__}.push_to_hub(): upload the run folder instead: "
            f"huggingface-cli upload NAME {self.args.output_dir}"
        )

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or its class."""
        self._callbacks.append(callback)

    def is_world_process_zero(self) -> bool:
        """True: there is one process."""
        return True

    # --- inside

    def _options(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "model": self._model,
            "output": os.fspath(self.args.output_dir),
            "valid_fraction": 0.0,
            **training_options(
                self.args,
                self._rows_per_epoch(),
                has_eval=self.eval_dataset is not None,
                updates_per_step=self._updates_per_step(),
            ),
            **self._own_options(),
        }
        if self._init_adapter is not None:
            found["init_adapter"] = self._init_adapter
        return found

    def _data(self) -> Any:
        train = self.train_dataset
        if self.eval_dataset is None:
            return train
        return {"train": train, "valid": self.eval_dataset}

    def _rows(self) -> int | None:
        return len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None

    def _rows_per_epoch(self) -> int | None:
        """Rows that fill the microbatches of an epoch."""
        return self._rows()

    def _columns(self) -> list[str]:
        """Names of the columns of the training data."""
        first: Mapping[str, Any] = next(iter(self.train_dataset), {})
        return list(first)

    def _all_callbacks(self) -> list[Callback]:
        own = [one for one in self._callbacks if isinstance(one, Callback)]
        others = [one for one in self._callbacks if not isinstance(one, Callback)]
        context = {
            "model": self.model,
            "processing_class": self.processing_class,
            "optimizer": None,
            "lr_scheduler": None,
            "train_dataloader": None,
            "eval_dataloader": None,
        }
        adapter = TrainerCallbacks(
            others, self.args, self.state, self._rows(), self._updates_per_step(), context
        )
        return [*own, adapter]

    def _layers(self) -> list[str]:
        """Names of the linear layers in a block of the model."""
        if self._peft_config is None:
            return []
        from mlx_align.models.loading import open_model
        from mlx_align.planning.model_shape import read_model_shape

        folder = open_model(self._model)
        linears = read_model_shape(folder.path, folder.config).linears
        return list(dict.fromkeys(linear.name for linear in linears))

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer that is not the model's own, which is what will be used.

        Raises:
            ConfigError: It differs.
        """
        given = getattr(self.processing_class, "tokenizer", self.processing_class)
        if given is None:
            return
        from mlx_align.models.loading import open_model

        own = open_model(self._model).tokenizer
        for what, name in (("chat template", "chat_template"), ("end token", "eos_token")):
            if getattr(given, name, None) != getattr(own, name, None):
                raise ConfigError(
                    f"processing_class: its {what} is not that of {self._model}, whose own "
                    "tokenizer is used; save the tokenizer into the model folder, or leave it out"
                )
        if given.get_vocab() != own.get_vocab():
            raise ConfigError(
                f"processing_class: not the tokenizer of {self._model}, which is used; leave it out"
            )

    def _resume(self, given: str | os.PathLike[str] | bool | None) -> str | None:
        if given is None or given is False:
            return None
        output = Path(self.args.output_dir).expanduser()
        if given is not True:
            folder = Path(given).expanduser()
            if output.resolve() not in (folder.resolve(), *folder.resolve().parents):
                raise ConfigError(
                    f"resume_from_checkpoint={str(given)!r}: not in output_dir; a run is resumed "
                    "in its own folder"
                )
        return str(output)

    def _output(self, run: Run) -> TrainOutput:
        summary = run.summary
        loss = _mean_loss(run.record.training)
        seconds = float(summary.get("seconds", 0.0))
        metrics = {
            "train_runtime": seconds,
            "train_steps_per_second": self.state.global_step / max(seconds, 1e-9),
            "train_tokens_per_second": float(summary.get("tokens_per_second", 0.0)),
            "train_loss": loss,
            "epoch": self.state.epoch,
        }
        return TrainOutput(self.state.global_step, loss, metrics)


def _mean_loss(rows: Sequence[Mapping[str, float]]) -> float:
    """The mean loss over all steps; each row has the mean since the row before it."""
    total = step = 0.0
    for row in rows:
        total += row["loss"] * (row["step"] - step)
        step = row["step"]
    return total / step if step else float("nan")


class DPOTrainer(Trainer):
    """Trains on preference pairs; takes the arguments of TRL's class of this name."""

    command = "dpo"
    config_class = DPOConfig

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        check_reference(type(self).__name__, model, ref_model)
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks,
            peft_config,
            _refused(data_collator, compute_metrics, optimizers, quantization_config),
        )

    def _own_options(self) -> dict[str, Any]:
        return pairs_options(self.args)


class KTOTrainer(Trainer):
    """Trains on labelled completions; takes the arguments of TRL's class of this name."""

    command = "kto"
    config_class = KTOConfig

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: KTOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        check_reference(type(self).__name__, model, ref_model)
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks,
            peft_config,
            _refused(data_collator, compute_metrics, optimizers, quantization_config),
        )

    def _own_options(self) -> dict[str, Any]:
        return unpaired_options(self.args)


class SFTTrainer(Trainer):
    """Trains on demonstrations; takes the arguments of TRL's class of this name."""

    command = "sft"
    config_class = SFTConfig

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], str] | None = None,
    ) -> None:
        self._formatting_func = formatting_func
        field = "text" if args is None else args.dataset_text_field
        super().__init__(
            model,
            args,
            as_text(train_dataset, field, formatting_func),
            as_text(eval_dataset, field, formatting_func),
            processing_class,
            callbacks,
            peft_config,
            {
                **_refused(data_collator, compute_metrics, optimizers, quantization_config),
                "compute_loss_func": (compute_loss_func, "use loss_type"),
                "optimizer_cls_and_kwargs": (optimizer_cls_and_kwargs, _NO_OPTIMIZER),
                "preprocess_logits_for_metrics": (preprocess_logits_for_metrics, _NO_METRICS),
            },
        )

    def _own_options(self) -> dict[str, Any]:
        return supervised_options(self.args, self._columns())

    def _notes(self) -> list[str]:
        if self._own_options()["loss_on"] != "assistant" or self.args.assistant_only_loss:
            return []
        return ["The loss is on the assistant's turns; in TRL it is on the user's too."]


class RewardTrainer(Trainer):
    """Trains a reward model; takes the arguments of TRL's class of this name."""

    command = "reward"
    config_class = RewardConfig

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks,
            peft_config,
            {
                **_refused(data_collator, compute_metrics, optimizers, quantization_config),
                "optimizer_cls_and_kwargs": (optimizer_cls_and_kwargs, _NO_OPTIMIZER),
                "preprocess_logits_for_metrics": (preprocess_logits_for_metrics, _NO_METRICS),
            },
        )

    def _own_options(self) -> dict[str, Any]:
        return reward_options(self.args)


class _RolloutTrainer(Trainer):
    """Base class of GRPO and RLOO."""

    command = "grpo"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        reward_processing_classes: Any,
        callbacks: Sequence[Any] | None,
        optimizers: Any,
        quantization_config: Any,
        peft_config: Any,
        refused: Mapping[str, tuple[Any, str]],
    ) -> None:
        name = type(self).__name__
        if reward_funcs is None:
            raise ConfigError(f"{name}: reward_funcs is missing")
        single = isinstance(reward_funcs, str | os.PathLike) or not isinstance(
            reward_funcs, list | tuple
        )
        self.reward_funcs = [reward_funcs] if single else list(reward_funcs)
        refused_here = {
            "reward_processing_classes": (
                reward_processing_classes,
                "reward models use their own tokenizers; leave it out",
            ),
            **_refused(None, None, optimizers, quantization_config),
            **refused,
        }
        if isinstance(reward_processing_classes, list) and not any(reward_processing_classes):
            del refused_here["reward_processing_classes"]
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks,
            peft_config,
            refused_here,
        )

    def _updates_per_step(self) -> int:
        return rollout_sizes(self.args).updates

    def _rows_per_epoch(self) -> int | None:
        """Completions of an epoch: TRL's microbatches count them."""
        rows = self._rows()
        return None if rows is None else rows * self.args.num_generations

    def _own_options(self) -> dict[str, Any]:
        return {**rollout_options(self.args, rollout_sizes(self.args)), **self._rewards()}

    def _rewards(self) -> dict[str, Any]:
        """The options of the rewards, in TRL's order and with its weights."""
        weights = self.args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ConfigError(
                f"{self.config_class.__name__}(reward_weights={weights!r}): expected "
                f"{len(self.reward_funcs)}, one per reward function"
            )
        functions: list[Any] = []
        models: list[tuple[str, float]] = []
        for function, weight in zip(self.reward_funcs, weights, strict=True):
            if isinstance(function, str | os.PathLike):
                models.append((os.fspath(function), float(weight)))
            elif hasattr(function, "config"):
                models.append((model_name(type(self).__name__, function), float(weight)))
            elif callable(function):
                functions.append((with_messages(function, self.state), float(weight)))
            else:
                raise ConfigError(
                    f"reward_funcs: {type(function).__name__}; expected a function, or the name "
                    "of a reward model"
                )
        if len(models) > 1:
            raise ConfigError("reward_funcs: give one reward model, and others as functions")
        found: dict[str, Any] = {"reward": functions or None}
        if models:
            found["reward_model"], found["reward_model_weight"] = models[0]
        return found


class GRPOTrainer(_RolloutTrainer):
    """Trains on the policy's completions; takes the arguments of TRL's class of this name."""

    config_class = GRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            {
                "tools": (tools or None, "completions are single turns"),
                "rollout_func": (rollout_func, "completions are sampled from the policy"),
                "environment_factory": (environment_factory, "there are no environments"),
            },
        )

    def _own_options(self) -> dict[str, Any]:
        return {**super()._own_options(), **grpo_options(self.args, len(self.reward_funcs))}


class RLOOTrainer(_RolloutTrainer):
    """Trains on the policy's completions; takes the arguments of TRL's class of this name."""

    config_class = RLOOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RLOOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            {},
        )

    def _own_options(self) -> dict[str, Any]:
        return {**super()._own_options(), **rloo_options()}


def _refused(
    data_collator: Any, compute_metrics: Any, optimizers: Any, quantization_config: Any
) -> dict[str, tuple[Any, str]]:
    return {
        "data_collator": (data_collator, _NO_COLLATOR),
        "compute_metrics": (compute_metrics, _NO_METRICS),
        "optimizers": (None if optimizers in (None, (None, None)) else optimizers, _NO_OPTIMIZER),
        "quantization_config": (quantization_config, _NO_QUANTIZATION),
    }
