"""Reading a run folder for inference and evaluation: its adapter, options and implicit reward.

Adapter folders written by mlx-lm work too. They have no options, and their reference is the base
model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlx.utils import tree_flatten

from mlx_align.config import DPOConfig, KTOConfig, SFTConfig, TrainConfig
from mlx_align.config.schema import make_config
from mlx_align.data.chat_template import Thinking
from mlx_align.data.columns import LabelRules
from mlx_align.data.statistics import trained_thinking
from mlx_align.errors import ConfigError, ModelError
from mlx_align.losses.registry import PAIRWISE_LOSSES, combine, parse_losses, resolve_options
from mlx_align.models.adapters import (
    ADAPTER_CONFIG_FILE,
    AdapterLayout,
    fingerprint_folder,
    read_layout,
    resolve_adapter_dtype,
)
from mlx_align.models.heads import has_reward_head
from mlx_align.models.loading import LanguageModel
from mlx_align.system.regular_files import MAX_JSON_BYTES, read_json, read_regular_file
from mlx_align.tracking.run_dir import (
    CHECKPOINTS,
    CONFIG_FILE,
    FINGERPRINTS_FILE,
    INIT_ADAPTER,
    SUMMARY_FILE,
    read_data_statistics,
)

# Commands whose runs have a KL penalty against the reference, but no β of an implicit reward.
ON_POLICY = ("ppo", "grpo")
# Losses on log-ratios averaged over tokens: the reward they fit is an average too.
_PER_TOKEN_LOSSES = frozenset({"ipo", "sigmoid_norm"})


@dataclass(frozen=True)
class TrainedRun:
    """A run folder, one of its checkpoints, or an adapter folder of mlx-lm; no weights are loaded.

    Attributes:
        folder: Folder of the adapter.
        layout: Layout of the adapter.
        base: Base model named in adapter_config.json, or None.
        command: Command that trained it (dpo, kto, sft, ppo …); None without config.yaml.
        config: Options shared by all training commands; None without config.yaml.
        beta: The loss's β; None if it has none.
        loss_on: For sft, the part of a conversation that was trained on.
        loss: Name of the loss; None without config.yaml.
        labels: How it read the labels of its data.
        sampling_thinking: Whether to sample from it with the chat template's thinking on: as most
            of its completions were rendered; "auto" (as mlx-lm does) if that isn't known.
    """

    folder: Path
    layout: AdapterLayout
    base: str | None = None
    command: str | None = None
    config: TrainConfig | None = None
    beta: float | None = None
    loss_on: str | None = None
    loss: str | None = None
    labels: LabelRules = dataclasses.field(default_factory=LabelRules)
    sampling_thinking: Thinking = "auto"

    @property
    def thinking(self) -> Thinking:
        """Its option `--thinking`: how given completions are rendered to be scored."""
        return "auto" if self.config is None else self.config.thinking

    def find_reference(self, remedy: str) -> Path | None:
        """The folder of the adapter the run started from; None for the base model.

        Args:
            remedy: The advice in the error message if the folder no longer exists.

        Raises:
            ModelError: The folder no longer exists, or holds another adapter than when the run
                began.
        """
        if self.config is None or self.config.init_adapter is None:
            return None
        init = Path(self.config.init_adapter).expanduser()
        if not init.is_dir():
            raise ModelError(
                f"{self.folder}: started from --init-adapter {init}, which does not exist "
                f"(relative to {Path.cwd()}); it is the run's reference: {remedy}"
            )
        recorded = self._recorded_hash(INIT_ADAPTER)
        if recorded not in (None, fingerprint_folder(init, "*adapter*")):
            raise ModelError(
                f"{self.folder}: started from --init-adapter {init}, which has changed since the "
                f"run began; it is the run's reference: {remedy}"
            )
        return init

    def _recorded_hash(self, part: str) -> str | None:
        """The hash of a part of the run, from its fingerprints; None if not recorded."""
        file = _config_file(self.folder).with_name(FINGERPRINTS_FILE)
        try:
            found = read_json(file)["hashes"][part]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return str(found)


def default_output(adapter_path: str | Path, name: str) -> Path:
    """Where a command writes that was given a run and no --output: NAME in the run folder.

    What is made of a checkpoint has the checkpoint's number in its name.
    """
    folder = Path(adapter_path).expanduser()
    if folder.parent.name != CHECKPOINTS:
        return folder / name
    file = folder.parent.parent / name
    return file.with_name(f"{file.stem}-{folder.name}{file.suffix}")


def read_trained_run(adapter_path: str | Path, *, reward_model: bool = False) -> TrainedRun:
    """Read a run folder, one of its checkpoints, or an adapter folder of mlx-lm.

    Args:
        adapter_path: The folder.
        reward_model: Whether the run of a reward model is accepted too.

    Raises:
        ModelError: There is no adapter, or it is a reward model's.
        ConfigError: The folder's config.yaml can't be read.
    """
    folder = Path(adapter_path).expanduser()
    if not folder.is_dir():
        raise ModelError(f"--adapter-path {adapter_path}: no such folder")
    if not reward_model and has_reward_head(folder):
        raise ModelError(
            f"--adapter-path {adapter_path}: this is a reward model, which generates no text; "
            "mlx-align score measures its accuracy on labelled pairs"
        )
    layout = read_layout(folder)
    written = read_json(folder / ADAPTER_CONFIG_FILE)
    base = written.get("model", written.get("base_model_name_or_path"))
    base = base if isinstance(base, str) else None
    file = _config_file(folder)
    if not file.is_file():
        return TrainedRun(folder, layout, base)
    values = _read_yaml(file)
    command = _command(file.parent, values)
    shared = {entry.name for entry in dataclasses.fields(TrainConfig)}
    if command in ON_POLICY:
        # In these commands it limits samples; completions in the data are not truncated.
        shared.remove("max_completion_length")
    config = make_config(TrainConfig, {k: v for k, v in values.items() if k in shared})
    return TrainedRun(
        folder,
        layout,
        base,
        command,
        config=config,
        beta=_loss_beta(command, file),
        loss_on=str(values.get("loss_on", "completion")) if command == "sft" else None,
        loss=str(values["loss"]) if "loss" in values else None,
        labels=LabelRules(**{k: values[k] for k in ("ties", "strength", "votes") if k in values}),
        sampling_thinking=trained_thinking(config.thinking, read_data_statistics(file.parent)),
    )


def read_thinking(folder: Path) -> Thinking:
    """The option `--thinking` of a run, a reward model's too; "auto" without config.yaml.

    Raises:
        ConfigError: The folder's config.yaml can't be read.
    """
    file = _config_file(folder)
    if not file.is_file():
        return "auto"
    values = _read_yaml(file)
    given = {"thinking": values["thinking"]} if "thinking" in values else {}
    return make_config(TrainConfig, given).thinking


def match_adapter_dtype(model: LanguageModel, run: TrainedRun) -> LanguageModel:
    """The model, with adapters that compute in the dtype that `run` was trained in.

    Raises:
        ConfigError: The model does not compute in that dtype.
    """
    if run.config is None or run.layout.fine_tune_type != "lora":
        return model
    dtypes = {array.dtype for _, array in tree_flatten(model.module.parameters())}
    return dataclasses.replace(
        model, adapter_dtype=resolve_adapter_dtype(run.config.adapter_dtype, dtypes)
    )


@dataclass(frozen=True)
class ImplicitRewardSettings:
    """The parameters of a run's implicit reward.

    Attributes:
        beta: Temperature β.
        reference: Folder of the reference's adapter; None for the base model.
        per_token: Whether the reward is divided by the completion's length.
    """

    beta: float
    reference: Path | None
    per_token: bool

    @classmethod
    def from_run(
        cls,
        run: TrainedRun,
        *,
        beta: float | None = None,
        reference_adapter: str | Path | None = None,
        per_token: bool | None = None,
    ) -> ImplicitRewardSettings:
        """The settings a run was trained with; arguments other than None override them.

        Raises:
            ConfigError: The run has no β and none is given, or the given one is not positive.
            ModelError: The adapter that the run started from no longer exists.
        """
        losses = _reference_losses(run)
        if beta is None:
            beta = _implicit_beta(run, losses)
        elif not 0 < beta < float("inf"):
            raise ConfigError(f"--beta {beta:g}: must be above 0")
        if reference_adapter is None:
            reference = run.find_reference(
                "pass the adapter it started from with --reference-adapter"
            )
        else:
            reference = Path(reference_adapter).expanduser()
            if not reference.is_dir():
                raise ModelError(f"--reference-adapter {reference_adapter}: no such folder")
        if per_token is None:
            per_token = bool(losses) and losses[0] in _PER_TOKEN_LOSSES
        return cls(beta, reference, per_token)

    @property
    def description(self) -> str:
        """The formula and the reference, one line."""
        average = ", per token" if self.per_token else ""
        reference = "the base model" if self.reference is None else str(self.reference)
        return (
            f"implicit reward: {self.beta:g} x log(policy / reference){average}; "
            f"reference: {reference}"
        )


def _config_file(folder: Path) -> Path:
    """The config.yaml of a run or of the run that a checkpoint belongs to."""
    return (folder.parent.parent if folder.parent.name == CHECKPOINTS else folder) / CONFIG_FILE


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_regular_file(file, MAX_JSON_BYTES).decode("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: can't be read ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected lines of `option: value`; is this a run folder?")
    return {str(key): value for key, value in values.items()}


def _command(run: Path, values: dict[str, Any]) -> str:
    """The command in summary.json, or a guess from the options of an unfinished run."""
    try:
        return str(read_json(run / SUMMARY_FILE)["command"])
    except (OSError, ValueError, KeyError, TypeError):
        if "loss_on" in values:
            return "sft"
        if "members" in values:
            return "reward"
        if "group_size" in values:
            return "ppo" if "critic" in values else "grpo"
        return "dpo" if "wpo" in values else "kto" if "loss" in values else "run"


def _loss_beta(command: str, file: Path) -> float | None:
    if command == "dpo":
        dpo = make_config(DPOConfig, {}, file)
        losses = _registered_losses(dpo)
        return combine(losses, dpo.loss_options()).beta if losses else None
    if command == "kto":
        kto = make_config(KTOConfig, {}, file)
        return float(resolve_options(kto.loss, kto.loss_options())["beta"])
    if command == "sft":
        make_config(SFTConfig, {}, file)
    return None


def _registered_losses(config: DPOConfig) -> tuple[tuple[str, float], ...]:
    """The (name, weight) of a run's losses; () for a loss function that was passed from Python."""
    try:
        return parse_losses(config.loss)
    except ConfigError:
        return ()


def _dpo_config(run: TrainedRun) -> DPOConfig:
    return make_config(DPOConfig, {}, _config_file(run.folder))


def _reference_losses(run: TrainedRun) -> list[str]:
    """Names of the losses with a reference that the run was trained with."""
    if run.command == "dpo":
        names = [name for name, _ in _registered_losses(_dpo_config(run))]
        return [name for name in names if PAIRWISE_LOSSES[name].needs_reference]
    return ["kto"] if run.command == "kto" else []


def _implicit_beta(run: TrainedRun, losses: Sequence[str]) -> float:
    """The β of the run's implicit reward.

    Raises:
        ConfigError: It has none.
    """
    if run.command is None:
        raise ConfigError(
            f"{run.folder}: no {CONFIG_FILE} in it, so β and the reference are unknown; give "
            "--beta (and --reference-adapter, unless training started from the base model)"
        )
    if run.command == "dpo" and losses:
        config = _dpo_config(run)
        options = combine(_registered_losses(config), config.loss_options()).options
        found = next((options[name] for name in losses if "beta" in options[name]), None)
        if found is not None:
            return float(found["beta"])
    if run.command == "kto" and run.beta is not None:
        return run.beta
    what = _dpo_config(run).loss if run.command == "dpo" else run.command
    raise ConfigError(
        f"{run.folder}: a run of {what} has no β, because it was not trained against a reference; "
        "give --beta to score by β x log(policy / start) anyway, or use --reward-model"
    )
