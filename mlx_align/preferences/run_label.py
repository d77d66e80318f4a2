"""`mlx-align label`: from its options to a session in the terminal or the browser."""

from __future__ import annotations

import getpass
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_align.config import LabelConfig, SampleConfig
from mlx_align.config.schema import flag_of
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import read_prompts
from mlx_align.data.judgements import AnswerPair, pair_answers
from mlx_align.data.provenance import PROVENANCE
from mlx_align.errors import ConfigError, DataError
from mlx_align.preferences.ai_feedback import read_answer_pairs
from mlx_align.preferences.arms import Arm, read_arms, temperature_arms
from mlx_align.preferences.label_terminal import label_in_terminal, open_keys
from mlx_align.preferences.label_web import LabelServer
from mlx_align.preferences.labelling import LabelSession, check_rater
from mlx_align.preferences.records import JudgementLog
from mlx_align.preferences.rubric import read_rubric
from mlx_align.preferences.spot_check import read_judged_pairs
from mlx_align.system.console import Console
from mlx_align.system.progress import Console as Notes
from mlx_align.system.starter import resolve_starter
from mlx_align.types import PromptGroup

if TYPE_CHECKING:
    from mlx_align.preferences.sample_answers import SampledAnswers

# Options of sampling, which need prompts without answers.
_SAMPLING = (
    "model",
    "adapter_path",
    "arms",
    "temperatures",
    "n",
    "max_completion_length",
    "thinking",
)


def label_data(config: LabelConfig, console: Console) -> Path:
    """Label pairs as the options say; returns the file of judgements.

    Raises:
        ConfigError: An option is wrong or without effect.
        DataError: The data has nothing to compare.
        WriteError: A judgement can't be written.
    """
    output = output_file(config.output)
    rater = check_rater(config.rater or _login())
    criteria = read_rubric(config.rubric)
    if not config.web and (config.port is not None or config.open):
        raise ConfigError(f"--{'open' if config.open else 'port'}: has no effect without --web")
    log = JudgementLog(output)
    pairs = read_pairs(config, output, console)
    session = LabelSession(pairs, log, criteria, by_criterion=config.by_criterion, seed=config.seed)
    if config.web:
        _label_in_browser(session, config, rater, console)
    else:
        label_in_terminal(session, rater, console.console, open_keys())
    return output


def output_file(name: str) -> Path:
    """The file of judgements, which may exist.

    Raises:
        ConfigError: Its folder doesn't exist.
    """
    file = Path(name).expanduser()
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"--output {name}: expected a file in a folder that exists")
    return file


def read_pairs(config: LabelConfig, output: Path, console: Console) -> list[AnswerPair]:
    """The pairs to label, in the order in which they are shown.

    Prompts without answers are answered first, into a file next to the output.

    Raises:
        ConfigError: There are prompts only, and no model; or a model, and answers already.
        DataError: The data can't be read.
    """
    (name,) = config.input if len(config.input) == 1 else (None,)
    if name is None:
        raise ConfigError(f"label takes one input, found {len(config.input)}; label each alone")
    _check_order(config)
    data = configure_data(resolve_starter(name, "data"), config)
    if config.spot_check is not None:
        pairs, title = read_judged_pairs(data, config.format)
        count = max(1, round(config.spot_check * len(pairs)))
        pairs = _in_order(pairs, config, console)[:count]
        console.note(f"{title}; {len(pairs):,} of them to check")
        return pairs[: config.max_pairs]
    pairs_per_prompt, seed = config.pairs_per_prompt, config.seed
    try:
        found, title = read_answer_pairs(
            data, "train", config.format, pairs_per_prompt=pairs_per_prompt, seed=seed
        )
    except DataError as error:
        prompts = _prompts_alone(data, config)
        if prompts is None:
            raise
        if config.model is None:
            raise ConfigError(
                f"{name}: has prompts without answers to compare; give --model to sample answers, "
                f"or a file of mlx-align data sample ({error})"
            ) from error
        answers = output.with_name(f"{output.stem}.answers.jsonl")
        if not answers.is_file():
            sample_to_file(prompts[: config.max_pairs], _sampling_config(config), answers, console)
        console.note(f"Answers: {answers}")
        found, title = read_answer_pairs(str(answers), pairs_per_prompt=pairs_per_prompt, seed=seed)
    else:
        given = [key for key in _SAMPLING if getattr(config, key) is not None]
        if given:
            raise ConfigError(
                f"{flag_of(given[0])}: has no effect, {name} has answers already; leave it out"
            )
    console.note(title)
    # The judge of earlier labels has no part in those of people.
    pairs = [
        pair_answers(
            one.prompt,
            (one.a, one.b),
            one.source,
            one.authors,
            {key: value for key, value in one.columns.items() if key != PROVENANCE},
        )
        for one in found
    ]
    return _in_order(pairs, config, console)[: config.max_pairs]


def _check_order(config: LabelConfig) -> None:
    """Check the options that say which pairs are shown first.

    Raises:
        ConfigError: One is missing or has no effect.
    """
    by_disagreement = config.ask_by == "disagreement"
    if by_disagreement != (config.reward_model is not None):
        raise ConfigError(
            "--ask-by disagreement needs --reward-model, and only it does: a run of mlx-align "
            "reward --members 5"
        )
    if config.spot_check is None:
        return
    if by_disagreement:
        raise ConfigError(
            "--spot-check draws at random, so that the result holds for all labels; drop --ask-by"
        )
    given = [key for key in _SAMPLING if getattr(config, key) is not None]
    if given:
        raise ConfigError(
            f"{flag_of(given[0])}: has no effect with --spot-check, whose pairs have answers; "
            "leave it out"
        )


def _in_order(
    pairs: Sequence[AnswerPair], config: LabelConfig, console: Console
) -> list[AnswerPair]:
    """Different pairs in the order in which they are shown."""
    unique = list({pair.id: pair for pair in pairs}.values())
    if config.ask_by == "random":
        return [unique[i] for i in np.random.default_rng(config.seed).permutation(len(unique))]
    # Imports the model code, which labelling does without.
    from mlx_align.preferences.disagreement import select_pairs

    order, _ = select_pairs(unique, len(unique), config.reward_model, config.seed)
    if len(order) < len(unique):
        console.note(f"! {len(unique) - len(order):,} pairs can't be scored and are left out")
    return [unique[i] for i in order]


def _prompts_alone(data: object, config: LabelConfig) -> list[PromptGroup] | None:
    """The prompts of data without answers; None if it isn't such data."""
    try:
        return read_prompts(data, "train", config.format)[0]  # type: ignore[arg-type]
    except (DataError, ConfigError):
        return None


def _sampling_config(config: LabelConfig) -> SampleConfig:
    """The options of `data sample` that the options of `label` stand for."""
    assert config.model is not None
    several = config.arms is not None or config.temperatures is not None
    given: dict[str, Any] = {}
    if config.max_completion_length is not None:
        given["max_completion_length"] = config.max_completion_length
    return SampleConfig(
        model=config.model,
        adapter_path=config.adapter_path,
        data=config.input[0],
        output=config.output,
        arms=config.arms,
        temperatures=config.temperatures,
        n=config.n or (1 if several else 2),
        thinking=config.thinking or "auto",
        seed=config.seed,
        **given,
    )


def sample_to_file(
    prompts: Sequence[PromptGroup], config: SampleConfig, output: Path, console: Notes
) -> SampledAnswers:
    """Sample answers by the arms that the options say, and write them.

    Raises:
        ConfigError: The arms are wrong.
        ModelError: A model can't be used.
        DataError: There are no answers.
    """
    # Imports the model code, which labelling does without.
    from mlx_align.preferences.sample_answers import SamplingOptions, sample_answers

    default = Arm("answers", config.model, config.adapter_path, None, config.temperature, config.n)
    if config.arms is not None and config.temperatures is not None:
        raise ConfigError("--arms and --temperatures exclude each other; an arm has a temperature")
    if config.arms is not None:
        arms = read_arms(config.arms, default)
    elif config.temperatures is not None:
        arms = temperature_arms(config.temperatures, default)
    else:
        arms = [default]
    options = SamplingOptions(
        config.max_prompt_length, config.max_completion_length, config.thinking, config.seed
    )
    found = sample_answers(prompts, arms, options, output, console)
    if found.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items())
        console.note(f"! prompts without an answer of an arm: {reasons}")
    return found


def _label_in_browser(
    session: LabelSession, config: LabelConfig, rater: str, console: Console
) -> None:
    proposed = rater if config.rater is not None else ""
    with LabelServer(session, proposed, config.port or 0) as server:
        console.note(
            f"Label {len(session.pairs):,} pairs in the browser (only on this machine):\n"
            f"  {server.url}\nStop with q on the page, or Ctrl-C here; every verdict is saved."
        )
        if config.open:
            webbrowser.open(server.url)
        server.wait()


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name
        return "me"
