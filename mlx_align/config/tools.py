"""Options of data check, data convert, fuse, export, plan, report, cache and selftest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlx_align.config.evaluation import EvalConfig, SampleConfig
from mlx_align.config.offline import LabelOptions, LossConfig, TrainConfig
from mlx_align.config.schema import MODEL, OTHER, REQUIRED, RESUME_HELP, Options, option, override


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig(Options):
    """Options of `mlx-align data check`."""

    model: str | None = override(
        TrainConfig,
        "model",
        help="Model whose tokenizer and chat template to use.",
        default_text="none: no lengths in tokens",
    )
    data: str | None = override(TrainConfig, "data")
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    thinking: Literal["auto", "on", "off"] = override(TrainConfig, "thinking")
    ties: Literal["skip", "half"] = override(LabelOptions, "ties")
    strength: Literal["ignore", "margin", "soft-label"] = override(LabelOptions, "strength")
    votes: Literal["soft-label", "ignore"] = override(LabelOptions, "votes")
    min_agreement: float | None = override(LabelOptions, "min_agreement")
    max_seq_length: int = override(TrainConfig, "max_seq_length")
    max_completion_length: int | None = override(TrainConfig, "max_completion_length")


@dataclass(frozen=True, kw_only=True)
class ConvertDataConfig(Options):
    """Options of `mlx-align data convert`."""

    input: tuple[str, ...] = option(
        REQUIRED,
        "Data to convert: a file, folder or hub name.",
        MODEL,
        metavar="IN",
        multiple=True,
        positional=True,
    )
    output: str = override(SampleConfig, "output")
    resume: bool = option(False, RESUME_HELP, MODEL)
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    ties: Literal["skip", "half"] = override(LabelOptions, "ties")
    strength: Literal["ignore", "margin", "soft-label"] = override(LabelOptions, "strength")
    votes: Literal["soft-label", "ignore"] = override(LabelOptions, "votes")
    min_agreement: float | None = override(LabelOptions, "min_agreement")
    split: str = option("train", "Split to convert: train, valid or test.", MODEL, metavar="NAME")
    as_messages: bool = option(
        False, "Write text as messages of user and assistant, for the chat template.", MODEL
    )
    dedup: bool = option(False, "Leave out rows equal to an earlier one.", MODEL)
    max_rows: int | None = option(
        None, "Write at most N rows, the first ones.", MODEL, default_text="all", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """Options of `mlx-align reward export`."""

    model: str = override(TrainConfig, "model", REQUIRED, help="Base model.")
    adapter_path: str = override(
        EvalConfig, "adapter_path", REQUIRED, help="Run of mlx-align reward."
    )
    output: str | None = override(
        TrainConfig,
        "output",
        help="Folder to create.",
        default_text="transformers in the run folder",
    )


@dataclass(frozen=True, kw_only=True)
class AdapterExportConfig(ExportConfig):
    """Options of `mlx-align export`."""

    adapter_path: str = override(
        EvalConfig, "adapter_path", REQUIRED, help="Run or adapter folder."
    )
    output: str | None = override(ExportConfig, "output", default_text="peft in the run folder")
    format: Literal["peft"] = option("peft", "Format to write.", MODEL)


@dataclass(frozen=True, kw_only=True)
class FuseConfig(ExportConfig):
    """Options of `mlx-align fuse`."""

    adapter_path: str = override(
        EvalConfig, "adapter_path", REQUIRED, help="Run or adapter folder."
    )
    output: str | None = override(ExportConfig, "output", default_text="fused in the run folder")
    dequantize: bool = option(False, "Dequantise the whole model.", MODEL)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Options):
    """Options of `mlx-align plan`, besides those of the command that is planned."""

    command: Literal["dpo", "kto", "sft", "reward", "ppo", "grpo"] = option(
        "dpo", "Command to plan.", MODEL
    )
    machine: str | None = option(
        None, 'Plan for another Mac, such as "16 GB M2".', MODEL, metavar="TEXT"
    )
    measure: bool = option(False, "Load the model and time a few real steps here.", MODEL)
    run: str | None = option(
        None,
        "Take the speed from this finished run.",
        MODEL,
        metavar="RUN",
        python_type="str | Path",
    )


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Options of `mlx-align report`."""

    runs: tuple[str, ...] = option(
        REQUIRED,
        "Run folders.",
        OTHER,
        metavar="RUN [RUN ...]",
        multiple=True,
        positional=True,
    )
    output: str | None = option(
        None,
        "File to write.",
        OTHER,
        default_text="report.html in the run folder; for several runs ./comparison.html",
        metavar="FILE",
        python_type="str | Path",
    )
    open: bool = option(False, "Open it in the browser.", OTHER)


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Options):
    """Options of `mlx-align cache`."""

    reference_cache: str | None = override(LossConfig, "reference_cache", group=OTHER)
    purge: bool = option(False, "Delete all stored log-probs.", OTHER)


@dataclass(frozen=True, kw_only=True)
class SelftestConfig(Options):
    """Options of `mlx-align selftest`."""

    size: Literal["small", "full"] | None = option(
        None, "Size of the checks.", OTHER, default_text="full on a GPU, small on a CPU"
    )
    minutes: float = option(8.0, "Stop after this time.", OTHER, above=0)
    output: str = option(
        "selftest.json", "File to write.", OTHER, metavar="FILE", python_type="str | Path"
    )
