"""Options of the commands that use a trained run: eval, score, rerank and data sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlx_align.config.offline import TrainConfig
from mlx_align.config.on_policy import OnPolicyConfig
from mlx_align.config.schema import (
    EVALUATION,
    MODEL,
    REQUIRED,
    RESUME_HELP,
    REWARD,
    SAMPLING,
    SCORING,
    Options,
    option,
    override,
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Options):
    """Options of `mlx-align eval`."""

    model: str | None = override(TrainConfig, "model", help="Base model of the run.")
    adapter_path: str | None = option(
        None, "Run to evaluate.", MODEL, metavar="RUN", python_type="str | PathLike[str]"
    )
    data: str | None = override(
        TrainConfig,
        "data",
        help="Held-out pairs or prompts.",
        default_text="what the run held out",
    )
    split: Literal["train", "valid", "test"] | None = option(
        None,
        "Split of --data, or of the run's data.",
        MODEL,
        default_text="valid, or what the run held out",
    )
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    reward_model: str | None = override(
        OnPolicyConfig,
        "reward_model",
        help="Judge of the completions: a run of mlx-align reward, or a classifier.",
        group=EVALUATION,
    )
    perplexity_data: str | None = option(
        None,
        "Unrelated text on which to measure perplexity: a text file, or rows of text.",
        EVALUATION,
        metavar="FILE",
        python_type="str | Path",
    )
    # 64 prompts distinguish a win rate of 50% from one of about 65%; 4 completions of each reduce
    # the noise of the KL.
    samples: int = option(64, "Prompts to complete by both models.", SAMPLING, at_least=1)
    n: int = option(
        4, "Completions per prompt; the best-of-n curve ends there.", SAMPLING, at_least=1
    )
    max_completion_length: int = option(
        256,
        "Longest completion in tokens.",
        SAMPLING,
        at_least=1,
        aliases=("sample_tokens", "max_tokens", "max_new_tokens"),
    )
    max_seq_length: int | None = option(
        None,
        "Longest prompt plus completion in tokens.",
        MODEL,
        default_text="the run's",
        at_least=2,
    )
    seed: int = option(0, "Random seed for prompts, sampling and intervals.", SAMPLING, at_least=0)
    output: str | None = option(
        None,
        "Folder for evaluation.json and answers.jsonl.",
        MODEL,
        metavar="PATH",
        python_type="str | Path",
    )
    resume: bool = option(False, "Continue an evaluation in --output that was interrupted.", MODEL)


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(Options):
    """Options common to score and rerank: how completions are scored."""

    beta: float | None = option(
        None, "Beta of the implicit reward.", SCORING, default_text="the run's"
    )
    reference_adapter: str | None = option(
        None,
        "Current location of the adapter the run was initialised from, if it was moved.",
        SCORING,
        metavar="PATH",
        python_type="str | PathLike[str]",
    )
    per_token: bool | None = option(
        None,
        "Divide implicit rewards and log-probs by the completion's length, or don't.",
        SCORING,
        default_text="as the run's loss does",
        off="--sum",
    )
    thinking: Literal["auto", "on", "off"] | None = option(
        None,
        "Thinking of the chat template.",
        SCORING,
        default_text="as the run was trained",
    )
    batch_size: int = option(4, "Prompts per forward pass.", SCORING, at_least=1)
    max_seq_length: int = option(
        4096, "Longest prompt plus completion in tokens; skips longer ones.", SCORING, at_least=2
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScorerConfig):
    """Options of `mlx-align score`."""

    model: str = override(
        TrainConfig, "model", REQUIRED, help="Base model of a run, or a classifier."
    )
    adapter_path: str | None = override(
        EvalConfig,
        "adapter_path",
        help="Run of reward, or of dpo or kto (scores by its implicit reward).",
    )
    logps: bool = option(False, "Score by log-prob in nats under the model or run.", SCORING)
    data: str | None = override(
        TrainConfig, "data", help="Rows to score.", default_text="what the run held out"
    )
    split: str | None = option(
        None,
        "Split of --data, or of the run's data.",
        MODEL,
        metavar="NAME",
        default_text="train, or what the run held out",
    )
    output: str | None = override(
        TrainConfig,
        "output",
        help="JSONL file to write.",
        metavar="FILE",
        default_text="scores.jsonl in the run folder",
    )
    resume: bool = option(False, RESUME_HELP, MODEL)
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    combine: Literal["mean", "min", "mean-variance"] = option(
        "mean", "How to combine the scores of an ensemble.", SCORING
    )
    variance_penalty: float | None = option(
        None, "With --combine mean-variance: mean - X * variance.", SCORING
    )


@dataclass(frozen=True, kw_only=True)
class RerankConfig(ScorerConfig):
    """Options of `mlx-align rerank`."""

    model: str = override(TrainConfig, "model", REQUIRED, help="Base model.")
    adapter_path: str | None = override(
        EvalConfig, "adapter_path", help="Run whose policy is sampled."
    )
    reward_model: str | None = override(
        OnPolicyConfig,
        "reward_model",
        help="Rank by this run of mlx-align reward or classifier, not the implicit reward.",
        group=MODEL,
    )
    prompt: str | None = option(
        None,
        "One prompt.",
        MODEL,
        default_text="read prompts from the terminal",
        metavar="TEXT",
    )
    input: str | None = option(
        None,
        "File of prompts to complete and rank; completions in it are ranked as given.",
        MODEL,
        metavar="FILE",
        python_type="str | Path",
    )
    output: str | None = option(
        None,
        "JSONL file for the rankings, best first.",
        MODEL,
        metavar="FILE",
        python_type="str | Path",
    )
    resume: bool = option(False, RESUME_HELP, MODEL)
    ignore_chat_template: bool = option(False, "Use --prompt verbatim, not as a message.", MODEL)
    # None, to detect an option that has no effect on given completions.
    n: int | None = option(None, "Completions per prompt.", SAMPLING, default_text="8", at_least=1)
    max_completion_length: int | None = override(
        EvalConfig,
        "max_completion_length",
        None,
        default_text="256",
        aliases=("max_tokens", "max_new_tokens"),
    )
    temperature: float | None = option(
        None,
        "Sampling temperature; 1 samples from the policy itself.",
        SAMPLING,
        default_text="1.0",
        at_least=0,
        aliases=("temp",),
    )
    seed: int | None = option(
        None, "Random seed for sampling.", SAMPLING, default_text="0", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Options):
    """Options of `mlx-align chat`."""

    model: str | None = override(
        TrainConfig, "model", help="Base model of the run, or a model to talk to."
    )
    adapter_path: str | None = override(EvalConfig, "adapter_path", help="Run to talk to.")
    compare: bool = option(
        False, "Also show the answers of the model that the run started from.", MODEL
    )
    system: str | None = option(
        None, "System prompt of the conversation.", MODEL, metavar="TEXT", default_text="none"
    )
    thinking: Literal["auto", "on", "off"] | None = override(ScorerConfig, "thinking", group=MODEL)
    max_completion_length: int = override(
        EvalConfig, "max_completion_length", aliases=("max_tokens", "max_new_tokens")
    )
    max_seq_length: int | None = option(
        None,
        "Longest conversation in tokens.",
        SAMPLING,
        default_text="what the model was made for",
        at_least=2,
    )
    temperature: float = option(
        0.0,
        "Sampling temperature; 0 takes the likeliest token.",
        SAMPLING,
        at_least=0,
        aliases=("temp",),
    )
    seed: int = option(0, "Random seed for sampling.", SAMPLING, at_least=0)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Options):
    """Options of `mlx-align data sample`."""

    model: str = override(TrainConfig, "model", REQUIRED, help="Base model.")
    adapter_path: str | None = override(
        EvalConfig, "adapter_path", help="Run whose policy is sampled."
    )
    data: str = override(TrainConfig, "data", REQUIRED, help="Prompts.")
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    thinking: Literal["auto", "on", "off"] = override(TrainConfig, "thinking")
    output: str = override(
        TrainConfig,
        "output",
        REQUIRED,
        help="JSONL file to write.",
        metavar="FILE",
        default_text=None,
    )
    resume: bool = option(False, RESUME_HELP, MODEL)
    max_prompt_length: int = option(
        768, "Longest prompt in tokens; drops longer ones.", MODEL, at_least=1
    )
    reward: tuple[str, ...] | None = override(OnPolicyConfig, "reward")
    reward_model: str | None = override(OnPolicyConfig, "reward_model")
    # None, to detect a weight that is given without a reward model.
    reward_model_weight: float | None = override(
        OnPolicyConfig, "reward_model_weight", None, default_text="1.0"
    )
    reward_timeout: float = override(OnPolicyConfig, "reward_timeout", group=REWARD)
    threshold: float | None = option(
        None, "Keep only completions that score at least this.", REWARD
    )
    n: int = option(8, "Completions per prompt.", SAMPLING, at_least=1)
    keep: int | None = option(
        None, "Number of best completions to keep.", SAMPLING, default_text="1", at_least=1
    )
    pairs: bool = option(
        False, "Write the best and the worst completion as a pair, for dpo.", SAMPLING
    )
    max_completion_length: int = override(
        EvalConfig, "max_completion_length", aliases=("max_tokens", "max_new_tokens")
    )
    temperature: float = option(
        1.0,
        "Sampling temperature; 1 samples from the policy itself, 0 (with -n 1) takes the likeliest "
        "token.",
        SAMPLING,
        at_least=0,
        aliases=("temp",),
    )
    temperatures: tuple[str, ...] | None = option(
        None,
        "Without a reward: -n answers at each of these temperatures (comma-separated).",
        SAMPLING,
        metavar="X,X",
    )
    arms: str | None = option(
        None,
        "Without a reward: YAML list of arms, each with name, model, adapter_path, system, "
        "temperature or n.",
        SAMPLING,
        metavar="FILE",
        python_type="str | Path",
    )
    seed: int = option(0, "Random seed for sampling.", SAMPLING, at_least=0)
