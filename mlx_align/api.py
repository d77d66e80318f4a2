"""The Python functions: `mlx_align.dpo(...)` and the others.

Their keyword arguments are the options of the commands, from one schema: `config/` has their types,
defaults and reasons. Signatures and docstrings are made from it below.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from mlx_align import commands
from mlx_align.config import (
    TRAINING_CONFIGS,
    AgreementConfig,
    ConstitutionConfig,
    EvalConfig,
    FuseConfig,
    ImproveConfig,
    JudgeConfig,
    Options,
    PlanConfig,
    SampleConfig,
)
from mlx_align.config.keywords import (
    ConstitutionOptions,
    DPOOptions,
    EvalOptions,
    FuseOptions,
    GRPOOptions,
    ImproveOptions,
    JudgeOptions,
    KTOOptions,
    PPOOptions,
    RewardOptions,
    SampleOptions,
    SFTOptions,
)
from mlx_align.config.schema import declared_options
from mlx_align.config.signatures import document, signature_of
from mlx_align.run import (
    Run,
    as_json,
    evaluate_run,
    fuse_run,
    make_preferences,
    python_messages,
    start_run,
    take_objects,
)
from mlx_align.training.callbacks import Callback

RunPath = str | os.PathLike[str]


def sft(
    *,
    resume: RunPath | bool | None = None,
    accept_changed: str | Sequence[str] = (),
    config: RunPath | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **options: Unpack[SFTOptions],
) -> Run:
    """Train on demonstrations."""
    return _train("sft", options, resume, accept_changed, config, callbacks, progress)


def dpo(
    *,
    resume: RunPath | bool | None = None,
    accept_changed: str | Sequence[str] = (),
    config: RunPath | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **options: Unpack[DPOOptions],
) -> Run:
    """Train on preference pairs."""
    return _train("dpo", options, resume, accept_changed, config, callbacks, progress)


def kto(
    *,
    resume: RunPath | bool | None = None,
    accept_changed: str | Sequence[str] = (),
    config: RunPath | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **options: Unpack[KTOOptions],
) -> Run:
    """Train on unpaired good and bad completions."""
    return _train("kto", options, resume, accept_changed, config, callbacks, progress)


def reward(
    *,
    resume: RunPath | bool | None = None,
    accept_changed: str | Sequence[str] = (),
    config: RunPath | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **options: Unpack[RewardOptions],
) -> Run:
    """Train a reward model."""
    return _train("reward", options, resume, accept_changed, config, callbacks, progress)


def ppo(
    *,
    resume: RunPath | bool | None = None,
    accept_changed: str | Sequence[str] = (),
    config: RunPath | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **options: Unpack[PPOOptions],
) -> Run:
    """Train on the policy's own completions, with a critic."""
    return _train("ppo", options, resume, accept_changed, config, callbacks, progress)


def grpo(
    *,
    resume: RunPath | bool | None = None,
    accept_changed: str | Sequence[str] = (),
    config: RunPath | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **options: Unpack[GRPOOptions],
) -> Run:
    """Train on the policy's own completions, compared in groups."""
    return _train("grpo", options, resume, accept_changed, config, callbacks, progress)


def _train(
    command: str,
    options: Mapping[str, Any],
    resume: RunPath | bool | None,
    accept_changed: str | Sequence[str],
    config: RunPath | None,
    callbacks: Sequence[Callback],
    progress: bool,
) -> Run:
    extra = {
        "accept_changed": accept_changed,
        "config": config,
        "callbacks": callbacks,
        "progress": progress,
    }
    return start_run(command, {**options, **extra}, resume=resume)


def evaluate(*, progress: bool = True, **options: Unpack[EvalOptions]) -> dict[str, Any]:
    """Measure a run against its reference."""
    return evaluate_run({**options, "progress": progress})


def fuse(**options: Unpack[FuseOptions]) -> dict[str, Any]:
    """Merge an adapter into its base model."""
    return fuse_run(dict(options))


def plan(command: str = "dpo", *, config: RunPath | None = None, **options: Any) -> dict[str, Any]:
    """Estimate memory and time of a run before it starts."""
    keywords = dict(options)
    with python_messages():
        objects = take_objects(keywords)
        found = commands.plan(
            {**keywords, "command": command},
            file=None if config is None else Path(config),
            objects=objects,
        )
    return as_json(found.as_json())


# --- preference data ---


def sample(*, progress: bool = True, **options: Unpack[SampleOptions]) -> dict[str, Any]:
    """Sample completions of prompts, and write all of them, or the best."""
    return make_preferences("sample", {**options, "progress": progress})


def judge(*, progress: bool = True, **options: Unpack[JudgeOptions]) -> dict[str, Any]:
    """Label pairs of answers by a judge, which is measured on people's labels first."""
    return make_preferences("judge", {**options, "progress": progress})


def agreement(
    input: RunPath | Sequence[RunPath], *, progress: bool = True, **options: Any
) -> dict[str, Any]:
    """Report how far raters agree, and join their judgements."""
    files = [input] if isinstance(input, str | os.PathLike) else list(input)
    named = {**options, "input": [os.fspath(file) for file in files], "progress": progress}
    return make_preferences("agreement", named)


def constitution(
    *, progress: bool = True, **options: Unpack[ConstitutionOptions]
) -> dict[str, Any]:
    """Revise and compare answers by written principles."""
    return make_preferences("constitution", {**options, "progress": progress})


def improve(*, progress: bool = True, **options: Unpack[ImproveOptions]) -> dict[str, Any]:
    """Sample, judge, train and evaluate in rounds."""
    return make_preferences("improve", {**options, "progress": progress})


# --- signatures and docstrings ---

_SUMMARIES = {
    "sft": """Train a model on demonstrations (supervised fine-tuning).

        The result is a run folder with a LoRA adapter, which stock mlx-lm loads, and a start for
        preference training: `mlx_align.dpo(init_adapter=run, ...)`. Rows are prompts with
        completions, conversations, instructions, text, or pairs (the chosen completions).

            run = mlx_align.sft(model="Qwen/Qwen2.5-0.5B", data="demonstrations.jsonl")
            run.generate("Capital of Australia?")
        """,
    "dpo": """Train a model on preference pairs (DPO and its variants).

        The result is a run folder with a LoRA adapter, which stock mlx-lm loads. `loss` takes a
        name, a weighted sum such as "sigmoid=1,sft=0.2", or a function of `PairLogps` that returns
        a loss per pair. Without model and data, trains the small starter model.

            pairs = [{"prompt": "Capital of Australia?", "chosen": "Canberra.",
                      "rejected": "Sydney."}, ...]
            run = mlx_align.dpo(model="mlx-community/Qwen2.5-7B-Instruct-4bit", data=pairs,
                                output="runs/first", beta=0.1, iters=200)
            run.metrics["eval/rewards/accuracies"]
        """,
    "kto": """Train a model on completions labelled good or bad (KTO).

        Rows have a prompt, a completion and a label. Pairs are accepted too, and split into a
        desirable and an undesirable completion.

            run = mlx_align.kto(model="Qwen/Qwen2.5-0.5B-Instruct", data="labelled.jsonl")
        """,
    "reward": """Train a reward model on preference pairs or ranked lists.

        A linear head on the last token of a completion replaces the vocabulary head.

            rm = mlx_align.reward(model="Qwen/Qwen2.5-0.5B-Instruct", data="pairs.jsonl")
            rm.score("Capital of Australia?", ["Canberra.", "Sydney."])
            mlx_align.ppo(model="Qwen/Qwen2.5-0.5B-Instruct", data="prompts.jsonl", reward_model=rm)
        """,
    "ppo": """Train a policy by PPO, on prompts and rewards.

        Policy, reference, reward model and critic are adapters of one base model. Rewards come from
        a reward model (`reward_model`, also a `Run`), from functions (`reward`), or both.

            run = mlx_align.ppo(model="Qwen/Qwen2.5-0.5B-Instruct", data="prompts.jsonl",
                                reward_model="runs/rm", iters=50)
        """,
    "grpo": """Train a policy by GRPO or a related method, on prompts and rewards.

        `reward` takes specs as on the command line, Python functions, (function, weight), or a list
        of these. A function is called as `f(prompts=..., completions=..., **columns)`, with one
        entry per completion, and returns a number or None for each.

            def short(completions, **columns):
                return [-len(text) for text in completions]

            run = mlx_align.grpo(model="Qwen/Qwen2.5-0.5B-Instruct", data=prompts,
                                 reward=[short, "exact_answer=2"], iters=50)
        """,
    "evaluate": """Measure a run against its reference: the model or adapter that it started from.

        Held-out preference accuracy and margins, and the KL from the reference on the run's own
        completions; with a reward model the win rate; with other text the change of perplexity.

            mlx_align.evaluate(adapter_path=run, samples=32)["preferences"]
        """,
    "fuse": """Merge an adapter into its base model, as one model folder.

        A layer that would lose more than a twentieth of what training changed is stored in 8 bits,
        16 bits or float32.

            mlx_align.fuse(model=run.model, adapter_path=run, output="models/aligned")
        """,
    "plan": """Estimate memory and time of a training run before it starts.

        Reads the model's configuration and the headers of its weights, not the weights (except with
        `measure`). Takes all options of the planned command.

            mlx_align.plan("grpo", model="Qwen/Qwen2.5-7B-Instruct", data="prompts.jsonl")["fits"]
        """,
    "sample": """Sample completions of prompts: all of them to be compared, or the best by a reward.

            mlx_align.sample(model="Qwen/Qwen2.5-0.5B-Instruct", data="prompts.jsonl", n=2,
                             output="answers.jsonl")["answers"]
        """,
    "judge": """Label pairs of answers by a judge, which is measured on people's labels first.

        The judge is a language model, an endpoint, a reward model, or reward functions: specs or
        Python functions, as for `mlx_align.grpo`. It refuses to label if it agrees with people no
        more than a coin. `human` may be rows too. Called again, it continues after an interruption.

            report = mlx_align.judge(model="Qwen/Qwen2.5-7B-Instruct", data="answers.jsonl",
                                     human="labels.jsonl", output="judged.jsonl")
            report["judge"]["agreement"], report["judge"]["position_bias"]
        """,
    "agreement": """Report how far raters agree, and join their judgements into pairs.

        Krippendorff's alpha and kappa with intervals; each rater's reliability, biases and speed;
        and how far people agree with a judge whose labels they checked.

            mlx_align.agreement(["ana.jsonl", "ben.jsonl"], output="pairs.jsonl")["alpha_nominal"]
        """,
    "constitution": """Let a model revise its answers by principles, and compare them by principles.

        Writes demonstrations for `sft` and pairs for `dpo` into a folder (Bai et al. 2022). Called
        again, it continues after an interruption.

            mlx_align.constitution(model="Qwen/Qwen2.5-7B-Instruct", data="prompts.jsonl",
                                   human="labels.jsonl", output="constitution")["revisions"]
        """,
    "improve": """Improve a policy in rounds: sample, judge, train by DPO, evaluate.

        `reward` and `eval_reward` may be Python functions, as in `mlx_align.grpo`. Called again, it
        continues. With `labels_by="people"` it returns what it waits for.

            def brief(completions, **columns):
                return [-len(text) for text in completions]

            mlx_align.improve(model="Qwen/Qwen2.5-0.5B-Instruct", data="prompts.jsonl",
                              reward=brief, allow_unproven=True, eval_reward_model="runs/rm",
                              output="runs/improved")["best_adapter"]
        """,
}
_DATA = (
    "A path or hub name; a list of dicts or a datasets.Dataset; or a dict of these by split name "
    "(train, valid). Errors name a row as data[17]."
)
_TRAINING_EXTRA = (
    ("data", _DATA),
    (
        "resume",
        "Run folder to continue from its last checkpoint; True for the one that output names. "
        "Other options may be left out; a larger iters or epochs trains it for longer.",
    ),
    (
        "accept_changed",
        'With resume: "rewards", "data" or both, which may differ from what the run began with.',
    ),
    ("config", "YAML file of options; keyword arguments take precedence."),
    ("callbacks", "Objects with the methods of mlx_align.Callback."),
    ("progress", "Whether to show progress and notes, in the terminal or the notebook."),
)
_RAISES = (
    (
        "MlxAlignError",
        "An option, the data or a model can't be used, or training failed; one line that says what "
        "to change.",
    ),
    (
        "KeyboardInterrupt",
        "Ctrl-C. If the run had begun, a checkpoint was written, and resume= continues the run.",
    ),
)


def _describe(
    function: Callable[..., Any],
    options: type[Options],
    *,
    extra: Sequence[tuple[str, str]] = (),
    returns: str,
    raises: Sequence[tuple[str, str]] = _RAISES[:1],
) -> None:
    """Give a function the signature and the docstring of its options."""
    own = inspect.signature(function).parameters.values()
    parameters = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
    annotation = "Run" if function.__name__ in TRAINING_CONFIGS else "dict[str, Any]"
    names = {one.name for one in parameters} | {name for name, _ in extra}
    documented = [name for name in declared_options(options) if name in names]
    signature = signature_of(
        options,
        extra=parameters,
        leave_out=[one.name for one in parameters],
        returns=annotation,
    )
    if options is PlanConfig:
        any_option = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
        signature = signature.replace(parameters=[*signature.parameters.values(), any_option])
    function.__dict__["__signature__"] = signature
    function.__doc__ = document(
        options,
        inspect.cleandoc(_SUMMARIES[function.__name__]),
        extra=extra,
        leave_out=documented,
        returns=returns,
        raises=raises,
    )


for _function in (sft, dpo, kto, reward, ppo, grpo):
    _describe(
        _function,
        TRAINING_CONFIGS[_function.__name__],
        extra=_TRAINING_EXTRA,
        returns="The run: its folder, metrics, and the trained model to use.",
        raises=_RAISES,
    )
_describe(
    evaluate,
    EvalConfig,
    extra=(
        ("adapter_path", "The run: its folder, or a Run. Required."),
        ("model", "Its base model. Default: the one that the run names."),
        ("data", f"Held-out pairs or prompts. {_DATA} Default: what the run held out."),
        ("progress", "Whether to show progress."),
    ),
    returns="What `mlx-align eval --json` prints.",
)
_PROGRESS = ("progress", "Whether to show progress and notes.")
_MAKERS: tuple[tuple[Callable[..., Any], type[Options], tuple[str, str]], ...] = (
    (sample, SampleConfig, ("data", f"Prompts. {_DATA} Required.")),
    (judge, JudgeConfig, ("data", f"Answers to compare. {_DATA} Required.")),
    (agreement, AgreementConfig, ("input", "Files of judgements. Required.")),
    (constitution, ConstitutionConfig, ("data", f"Prompts. {_DATA} Required.")),
    (improve, ImproveConfig, ("data", f"Prompts. {_DATA} Required.")),
)
for _maker, _options, _input in _MAKERS:
    _describe(
        _maker,
        _options,
        extra=(_input, ("progress", "Whether to show progress and notes.")),
        returns="What the command prints with --json.",
        raises=_RAISES,
    )
_describe(fuse, FuseConfig, returns="What `mlx-align fuse --json` prints.")
_describe(
    plan,
    PlanConfig,
    extra=(
        ("command", "Command to plan: dpo, kto, sft, reward, ppo or grpo."),
        ("config", "YAML file of options of that command."),
        ("options", "Options of that command, such as model and data."),
    ),
    returns="What `mlx-align plan --json` prints: sizes in bytes, times in seconds.",
)
