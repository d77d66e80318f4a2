"""Options of judge, constitution, improve and data select, in which models make preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlx_align.config.evaluation import EvalConfig, SampleConfig
from mlx_align.config.offline import DPOConfig, TrainConfig
from mlx_align.config.on_policy import OnPolicyConfig
from mlx_align.config.schema import (
    EVALUATION,
    JUDGE,
    LABELS,
    MODEL,
    OPTIMISATION,
    REQUIRED,
    SAMPLING,
    Options,
    option,
    override,
)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(Options):
    """Options of `mlx-align judge`."""

    data: str = override(
        TrainConfig, "data", REQUIRED, help="Pairs or lists of answers; their labels are ignored."
    )
    split: str = option("train", "Split of --data.", MODEL, metavar="NAME")
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    output: str = override(SampleConfig, "output")
    human: str | None = option(
        None,
        "Pairs that people labelled. The judge is measured and calibrated on them first.",
        MODEL,
        metavar="FILE",
        python_type="str | Path",
    )
    model: str | None = override(
        TrainConfig, "model", help="Judge: a language model, or its name at --url."
    )
    adapter_path: str | None = override(
        EvalConfig, "adapter_path", help="Run whose adapter the judge has.", group=JUDGE
    )
    reward_model: str | None = override(
        OnPolicyConfig,
        "reward_model",
        help="Judge: a run of mlx-align reward, or a classifier.",
        group=JUDGE,
    )
    reward: tuple[str, ...] | None = override(
        OnPolicyConfig,
        "reward",
        help="Judge: reward functions; the answer with the higher total wins.",
        group=JUDGE,
    )
    url: str | None = option(
        None,
        "Judge: an OpenAI-compatible endpoint, such as http://127.0.0.1:8080/v1.",
        JUDGE,
        metavar="URL",
    )
    api_key_variable: str | None = option(
        None, "Environment variable with the API key of --url.", JUDGE, metavar="NAME"
    )
    # None here and below, to detect options that have no effect on the judge.
    concurrency: int | None = option(
        None, "Requests to --url at a time.", JUDGE, default_text="4", at_least=1
    )
    rubric: str | None = option(
        None,
        "YAML file with the criteria to compare by.",
        JUDGE,
        default_text="helpful, honest, harmless",
        metavar="FILE",
        python_type="str | Path",
    )
    by_criterion: bool = option(
        False, "Ask for each criterion alone, and average the verdicts.", JUDGE
    )
    # A model that gives less would mostly answer with something else than a verdict.
    min_verdict_mass: float | None = option(
        None,
        "Least probability of all verdicts together; with less, the output is invalid.",
        JUDGE,
        default_text="0.5",
        at_least=0,
        below=1,
    )
    own_name: tuple[str, ...] | None = option(
        None,
        "Name in the data of answers by the judge's model, for its self-preference.",
        JUDGE,
        default_text="the judge's model",
        metavar="NAME",
        multiple=True,
    )
    max_seq_length: int | None = option(
        None,
        "Longest prompt of the judge in tokens; longer ones are invalid.",
        JUDGE,
        default_text="4096",
        at_least=2,
    )
    batch_size: int | None = option(
        None, "Comparisons per forward pass.", JUDGE, default_text="4", at_least=1
    )
    allow_unproven: bool = option(
        False,
        "Label although the judge's agreement with people is unknown, or no better than a coin.",
        LABELS,
    )
    pairs_per_prompt: int | None = option(
        None,
        "Pairs drawn from a row with more than two answers.",
        LABELS,
        default_text="all",
        at_least=1,
    )
    ties: Literal["skip", "half"] = option(
        "skip", "Pairs that the judge calls equal: leave them out, or label them .5.", LABELS
    )
    min_confidence: float = option(
        0.5,
        "Least calibrated probability of the chosen answer; pairs below are left out.",
        LABELS,
        at_least=0.5,
        below=1,
    )
    labels: Literal["soft", "hard"] = option(
        "soft", "Write the calibrated probability as soft_label, or only the order.", LABELS
    )
    seed: int = option(0, "Random seed for pairs and intervals.", LABELS, at_least=0)


@dataclass(frozen=True, kw_only=True)
class ConstitutionConfig(Options):
    """Options of `mlx-align constitution`."""

    model: str = override(
        TrainConfig, "model", REQUIRED, help="Model that answers and revises, or its name at --url."
    )
    adapter_path: str | None = override(
        EvalConfig, "adapter_path", help="Run whose adapter the model has."
    )
    url: str | None = override(
        JudgeConfig,
        "url",
        help="OpenAI-compatible endpoint of --model, such as http://127.0.0.1:8080/v1.",
        group=MODEL,
    )
    api_key_variable: str | None = override(
        JudgeConfig,
        "api_key_variable",
        help="Environment variable with the API key of --url or --judge-url.",
        group=MODEL,
    )
    data: str = override(TrainConfig, "data", REQUIRED, help="Prompts.")
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    output: str = override(
        TrainConfig, "output", REQUIRED, help="Folder to write into.", default_text=None
    )
    constitution: str | None = option(
        None,
        "YAML file with the principles.",
        MODEL,
        default_text="five that come with the package",
        metavar="FILE",
        python_type="str | Path",
    )
    rounds: int = option(
        1, "Critiques and revisions of an answer, one after another.", SAMPLING, at_least=0
    )
    answers: int = option(
        2, "Answers per prompt; the first is revised, all are compared.", SAMPLING, at_least=1
    )
    max_completion_length: int = override(
        SampleConfig, "max_completion_length", help="Longest text in tokens."
    )
    temperature: float = override(
        SampleConfig,
        "temperature",
        help="Sampling temperature; 1 samples from the model itself.",
    )
    seed: int = option(0, "Random seed for texts, principles and intervals.", SAMPLING, at_least=0)
    samples: int = option(
        12, "Prompts in samples.md, with every step in full.", SAMPLING, at_least=0
    )
    pairs: bool = option(True, "Compare the answers by principles, as pairs.", LABELS)
    judge_model: str | None = override(
        TrainConfig,
        "model",
        help="Judge that compares, or its name at --judge-url.",
        group=JUDGE,
        aliases=(),
        default_text="--model itself",
    )
    judge_adapter_path: str | None = override(
        EvalConfig, "adapter_path", help="Run whose adapter --judge-model has.", group=JUDGE
    )
    judge_url: str | None = override(
        JudgeConfig, "url", help="OpenAI-compatible endpoint of --judge-model."
    )
    min_verdict_mass: float | None = override(JudgeConfig, "min_verdict_mass")
    human: str | None = override(JudgeConfig, "human", group=JUDGE)
    allow_unproven: bool = override(JudgeConfig, "allow_unproven")
    ties: Literal["skip", "half"] = override(JudgeConfig, "ties")
    min_confidence: float = override(JudgeConfig, "min_confidence")
    labels: Literal["soft", "hard"] = override(JudgeConfig, "labels")


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Options):
    """Options of `mlx-align data select`."""

    data: str = override(
        TrainConfig, "data", REQUIRED, help="Pairs or lists of answers; their labels are ignored."
    )
    split: str = override(JudgeConfig, "split")
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    output: str = override(SampleConfig, "output")
    by: Literal["random", "disagreement"] = option(
        "random", "Draw pairs, or take those on which reward heads disagree most.", LABELS
    )
    count: int | None = option(None, "Number of pairs to write.", LABELS, at_least=1)
    share: float | None = option(
        None, "Share of the pairs to write, such as 0.05.", LABELS, above=0
    )
    reward_model: str | None = override(
        JudgeConfig,
        "reward_model",
        help="Ensemble for --by disagreement: a run of mlx-align reward --members 5.",
        group=LABELS,
    )
    seed: int = override(JudgeConfig, "seed")


@dataclass(frozen=True, kw_only=True)
class ImproveConfig(Options):
    """Options of `mlx-align improve`."""

    model: str = override(TrainConfig, "model", REQUIRED, help="Base model of the policy.")
    init_adapter: str | None = override(
        TrainConfig, "init_adapter", help="Run that the first round starts from."
    )
    data: str = override(
        TrainConfig, "data", REQUIRED, help="Prompts; its valid split, or a part, is held out."
    )
    format: str | None = override(TrainConfig, "format")
    columns: dict[str, Any] = override(TrainConfig, "columns")
    output: str = override(
        TrainConfig, "output", REQUIRED, help="Folder with one folder per round.", default_text=None
    )
    rounds: int = option(3, "Rounds at most.", OPTIMISATION, at_least=1)
    train_config: str | None = option(
        None,
        "YAML file with options of mlx-align dpo for every round.",
        OPTIMISATION,
        metavar="FILE",
        python_type="str | Path",
    )
    iters: int | None = override(TrainConfig, "iters", help="Optimizer updates per round.")
    learning_rate: float | None = override(
        TrainConfig, "learning_rate", None, default_text="as in dpo"
    )
    beta: float | None = override(DPOConfig, "beta")
    prompts_per_round: int | None = option(
        None,
        "Prompts of a round, others in each; all are used again once none is left.",
        SAMPLING,
        default_text="all",
        at_least=1,
    )
    answers: int = option(2, "Answers per prompt.", SAMPLING, at_least=2)
    max_completion_length: int = override(SampleConfig, "max_completion_length")
    temperature: float = override(
        SampleConfig,
        "temperature",
        help="Sampling temperature; 1 samples from the policy itself.",
        above=0,
        at_least=None,
    )
    seed: int = override(SampleConfig, "seed")
    labels_by: Literal["judge", "people"] = option(
        "judge",
        "Who labels; with people, a round waits for its file labels.jsonl.",
        LABELS,
    )
    judge_model: str | None = override(
        ConstitutionConfig, "judge_model", help="Judge, or its name at --judge-url.",
        default_text=None,
    )  # fmt: skip
    judge_adapter_path: str | None = override(ConstitutionConfig, "judge_adapter_path")
    judge_url: str | None = override(ConstitutionConfig, "judge_url")
    api_key_variable: str | None = override(
        JudgeConfig,
        "api_key_variable",
        help="Environment variable with the API key of --judge-url and --eval-judge-url.",
    )
    reward_model: str | None = override(JudgeConfig, "reward_model")
    reward: tuple[str, ...] | None = override(JudgeConfig, "reward")
    rubric: str | None = override(JudgeConfig, "rubric")
    human: str | None = override(JudgeConfig, "human", group=JUDGE)
    allow_unproven: bool = override(JudgeConfig, "allow_unproven")
    allow_circular: bool = override(TrainConfig, "allow_circular", group=LABELS)
    min_confidence: float = override(JudgeConfig, "min_confidence")
    eval_judge_model: str | None = override(
        JudgeConfig,
        "model",
        help="Held-out judge, or its name at --eval-judge-url.",
        group=EVALUATION,
        aliases=(),
    )
    eval_judge_url: str | None = override(
        JudgeConfig,
        "url",
        help="OpenAI-compatible endpoint of --eval-judge-model.",
        group=EVALUATION,
    )
    eval_reward_model: str | None = override(
        JudgeConfig,
        "reward_model",
        help="Held-out judge: a run of mlx-align reward, or a classifier.",
        group=EVALUATION,
    )
    eval_reward: tuple[str, ...] | None = override(
        JudgeConfig, "reward", help="Held-out judge: reward functions.", group=EVALUATION
    )
    eval_prompts: int = option(
        64, "Held-out prompts that the policies answer.", EVALUATION, at_least=1
    )
    valid_fraction: float = override(TrainConfig, "valid_fraction", 0.2, above=0, at_least=None)
    guard: bool = option(
        True, "Stop when the held-out judge no longer prefers the new policy.", EVALUATION
    )
