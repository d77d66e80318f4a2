"""Options of the commands in which people make preferences: label, data agreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlx_align.config.evaluation import SampleConfig
from mlx_align.config.judges import JudgeConfig
from mlx_align.config.offline import TrainConfig
from mlx_align.config.schema import LABELS, MODEL, REQUIRED, SAMPLING, Options, option, override


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Options):
    """Options of `mlx-align label`."""

    input: tuple[str, ...] = option(
        REQUIRED,
        "Answers, pairs or prompts: a file, folder or hub name.",
        MODEL,
        metavar="PROMPTS_OR_ANSWERS",
        multiple=True,
        positional=True,
    )
    output: str = override(
        TrainConfig,
        "output",
        REQUIRED,
        help="JSONL file of judgements; those in it are kept, and labelling continues there.",
        metavar="FILE",
        default_text=None,
    )
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    rater: str | None = option(
        None, "Your name.", LABELS, metavar="NAME", default_text="your login's"
    )
    web: bool = option(False, "Label in the browser, on a page of this machine.", LABELS)
    port: int | None = option(
        None, "Port of --web.", LABELS, default_text="a free one", at_least=1, at_most=65535
    )
    open: bool = option(False, "Open the page of --web in the browser.", LABELS)
    rubric: str | None = override(
        JudgeConfig, "rubric", help="YAML file with the criteria to compare by.", group=LABELS
    )
    by_criterion: bool = option(
        False, "Ask for a verdict on each criterion before the verdict.", LABELS
    )
    # Pairs of other prompts say more than further pairs of the same one.
    pairs_per_prompt: int | None = option(
        1, "Pairs drawn from a row with more than two answers.", LABELS, at_least=1
    )
    max_pairs: int | None = option(
        None,
        "Label at most N pairs, the first of the order.",
        LABELS,
        default_text="all",
        at_least=1,
    )
    spot_check: float | None = option(
        None,
        "Share of a judge's labels, drawn at random, to label again without seeing them.",
        LABELS,
        metavar="SHARE",
        above=0,
        at_most=1,
    )
    ask_by: Literal["random", "disagreement"] = option(
        "random",
        "Order of the pairs: at random, or first those on which reward heads disagree most.",
        LABELS,
    )
    reward_model: str | None = override(
        JudgeConfig,
        "reward_model",
        help="Ensemble for --ask-by disagreement: a run of mlx-align reward --members 5.",
        group=LABELS,
    )
    seed: int = option(
        0, "Random seed for the order of pairs and answers, and sampling.", LABELS, at_least=0
    )
    model: str | None = override(
        TrainConfig, "model", help="Model that answers prompts without answers."
    )
    # None here and below, to detect options that have no effect on given answers.
    adapter_path: str | None = override(SampleConfig, "adapter_path", group=SAMPLING)
    arms: str | None = override(SampleConfig, "arms")
    temperatures: tuple[str, ...] | None = override(SampleConfig, "temperatures")
    n: int | None = option(
        None, "Answers per prompt, and arm.", SAMPLING, default_text="2, or 1 per arm", at_least=1
    )
    max_completion_length: int | None = override(
        SampleConfig, "max_completion_length", None, default_text="256"
    )
    thinking: Literal["auto", "on", "off"] | None = override(
        TrainConfig, "thinking", None, group=SAMPLING, default_text="auto"
    )


@dataclass(frozen=True, kw_only=True)
class AgreementConfig(Options):
    """Options of `mlx-align data agreement`."""

    input: tuple[str, ...] = option(
        REQUIRED,
        "Files of judgements, which are joined.",
        MODEL,
        metavar="FILE [FILE ...]",
        multiple=True,
        positional=True,
    )
    output: str | None = override(
        TrainConfig,
        "output",
        help="JSONL file for the pairs with soft labels.",
        metavar="FILE",
        default_text="none",
    )
    ties: Literal["skip", "half"] = option(
        "skip", "Ties: skip the pair, or count half a win for each.", MODEL
    )
    min_agreement: float | None = option(
        None,
        "Least share of a pair's raters for one answer; others are left out.",
        MODEL,
        above=0.5,
        at_most=1,
    )
    seed: int = option(0, "Random seed for intervals.", MODEL, at_least=0)
