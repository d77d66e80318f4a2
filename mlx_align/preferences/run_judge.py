"""`mlx-align judge`: from its options to labelled pairs and a report on the judge."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_align.config import JudgeConfig
from mlx_align.config.schema import flag_of
from mlx_align.data.columns import configure_data
from mlx_align.data.judgements import AnswerPair
from mlx_align.data.provenance import Lineage
from mlx_align.data.readers import DataSource
from mlx_align.errors import ConfigError, DataError
from mlx_align.models.adapters import fingerprint_folder
from mlx_align.models.loading import resolve_model_path
from mlx_align.preferences.ai_feedback import (
    VERDICT_FIELDS,
    Feedback,
    LabelledPairs,
    label_pairs,
    measure_on_sample,
    provenance_of,
    read_answer_pairs,
    read_human_sample,
)
from mlx_align.preferences.endpoint import Endpoint, EndpointJudge
from mlx_align.preferences.judge_statistics import Calibration, JudgeReport
from mlx_align.preferences.judges import (
    MIN_MASS,
    LanguageModelJudge,
    RewardModelJudge,
    open_reward_judge,
)
from mlx_align.preferences.lineage import model_lineage
from mlx_align.preferences.rubric import read_rubric
from mlx_align.preferences.verdicts import Judge
from mlx_align.rollout.reward_functions import RewardSource
from mlx_align.system.atomic_io import open_atomic, write_text
from mlx_align.system.intervals import Estimate
from mlx_align.system.json_text import to_json
from mlx_align.system.keyed_log import KeyedLog
from mlx_align.system.progress import Console
from mlx_align.system.starter import resolve_starter

# With fewer, the interval of the agreement is wider than .28.
MIN_SAMPLE = 50


@dataclass(frozen=True)
class JudgeSpec:
    """Which judge to use: exactly one of the four kinds.

    Attributes:
        model: A language model, or its name at `url`.
        adapter_path: A run whose adapter the model has.
        reward_model: A run of `mlx-align reward`, or a classifier.
        reward: Reward functions: specs, or Python functions.
        url: An OpenAI-compatible endpoint.
        api_key_variable: Environment variable with its key.
        concurrency: Requests at a time; None for the default, as below.
        min_mass: Least probability of all verdicts together.
        max_seq_length: Longest prompt of the judge, tokens.
        batch_size: Comparisons per forward pass.
        prefix: What the options' names start with, for messages.
        reward_prefix: The same for reward models and functions, if it is another.
    """

    model: str | None = None
    adapter_path: str | None = None
    reward_model: str | None = None
    reward: tuple[RewardSource, ...] | None = None
    url: str | None = None
    api_key_variable: str | None = None
    concurrency: int | None = None
    min_mass: float | None = None
    max_seq_length: int | None = None
    batch_size: int | None = None
    prefix: str = field(default="--", compare=False)
    reward_prefix: str | None = field(default=None, compare=False)

    def check(self) -> None:
        """Check that the options name one judge.

        Raises:
            ConfigError: They name none or several, or one has no effect.
        """
        p, r = self.prefix, self.reward_prefix or self.prefix
        kinds = [
            flag
            for flag, given in (
                (f"{p}model", self.model if self.url is None else None),
                (f"{r}reward-model", self.reward_model),
                (f"{r}reward", self.reward),
                (f"{p}url", self.url),
            )
            if given
        ]
        if not kinds:
            raise ConfigError(
                f"no judge; give {p}model (a language model), {r}reward-model, {r}reward or {p}url"
            )
        if len(kinds) > 1:
            raise ConfigError(f"{' and '.join(kinds)} name several judges; give one")
        if self.url is not None and self.model is None:
            raise ConfigError(f"{p}url {self.url}: needs {p}model, the model's name there")
        if self.adapter_path is not None and kinds != [f"{p}model"]:
            raise ConfigError(f"{p}adapter-path needs {p}model, the adapter's base model")
        kind = kinds[0].removeprefix(p).removeprefix(r)
        for name, given, used_by in (
            ("api-key-variable", self.api_key_variable, ("url",)),
            ("concurrency", self.concurrency, ("url",)),
            ("min-verdict-mass", self.min_mass, ("url", "model")),
            ("max-seq-length", self.max_seq_length, ("model", "reward-model")),
            ("batch-size", self.batch_size, ("model", "reward-model")),
        ):
            if given is not None and kind not in used_by:
                raise ConfigError(f"{p}{name}: has no effect on {kinds[0]}; leave it out")


@dataclass(frozen=True)
class OpenJudge:
    """A judge that is ready.

    Attributes:
        judge: The judge.
        identity: What determines its verdicts.
        lineage: Its lineage; () for reward models, functions and endpoints.
        own_names: Names of its model, as the data may have them for the authors of answers.
    """

    judge: Judge
    identity: str
    lineage: Lineage
    own_names: tuple[str, ...]


@contextmanager
def open_judge(spec: JudgeSpec) -> Iterator[OpenJudge]:
    """Load the judge within the block.

    Raises:
        MlxAlignError: The options don't name one judge, or it can't be loaded.
    """
    spec.check()
    min_mass = MIN_MASS if spec.min_mass is None else spec.min_mass
    lengths: dict[str, int] = {
        "max_seq_length": spec.max_seq_length or 4096,
        "batch_size": spec.batch_size or 4,
    }
    if spec.reward:
        with open_reward_judge(spec.reward) as functions:
            yield OpenJudge(functions, _function_identity(spec.reward), (), ())
        return
    if spec.reward_model is not None:
        model = RewardModelJudge.load(spec.reward_model, **lengths)
        folder = Path(spec.reward_model).expanduser()
        run = folder if folder.is_dir() else model.model.model.folder.path
        identity = f"reward model {fingerprint_folder(run)}"
        yield OpenJudge(model, identity, (), (spec.reward_model,))
        return
    assert spec.model is not None
    if spec.url is not None:
        endpoint = Endpoint(
            spec.url,
            spec.model,
            spec.api_key_variable,
            concurrency=spec.concurrency or 4,
        )
        judge = EndpointJudge(endpoint, min_mass)
        yield OpenJudge(judge, f"{judge.name}, {min_mass}", (), (spec.model, judge.name))
        return
    name = resolve_starter(spec.model, "model")
    lm = LanguageModelJudge.load(name, spec.adapter_path, min_mass=min_mass, **lengths)
    adapter = None if spec.adapter_path is None else Path(spec.adapter_path).expanduser()
    lineage = model_lineage(resolve_model_path(name), adapter)
    identity = f"{' '.join(lineage)}, {min_mass}, {lm.max_seq_length}"
    own = (lm.name,) if adapter is not None else (lm.name, str(lm.model.folder.path))
    yield OpenJudge(lm, identity, lineage, own)


def _function_identity(specs: Sequence[RewardSource]) -> str:
    """Names of reward functions, with a hash of the code that defines them."""
    parts = []
    for spec in specs:
        if not isinstance(spec, str):
            function, weight = spec if isinstance(spec, tuple) else (spec, 1.0)
            name = getattr(function, "__qualname__", type(function).__name__)
            try:
                code = inspect.getsource(function)
            except (OSError, TypeError):  # an object, or typed into a plain interpreter
                code = repr(function)  # has its address: another one is not taken for it
            digest = hashlib.blake2b(code.encode(), digest_size=16).hexdigest()
            parts.append(f"{name}={weight} {digest}")
            continue
        file = Path(spec.rpartition(":")[0]).expanduser()
        known = file.suffix == ".py" and file.is_file()
        digest = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if known else ""
        parts.append(f"{spec} {digest}".strip())
    return ", ".join(parts)


def spec_of(config: JudgeConfig, rewards: Sequence[RewardSource] = ()) -> JudgeSpec:
    """The judge that the options of `mlx-align judge` name, with Python functions besides."""
    return JudgeSpec(
        config.model,
        config.adapter_path,
        config.reward_model,
        (*(config.reward or ()), *rewards) or None,
        config.url,
        config.api_key_variable,
        config.concurrency,
        config.min_verdict_mass,
        config.max_seq_length,
        config.batch_size,
    )


@dataclass(frozen=True)
class JudgeOutcome:
    """The result of `mlx-align judge`.

    Attributes:
        report: The judge measured on people's labels; None without them.
        labelled: The pairs.
        pairs: Pairs that were compared.
        output: The file of the pairs.
        log: The file of all verdicts.
    """

    report: JudgeReport | None
    labelled: LabelledPairs
    pairs: int
    output: Path
    log: Path

    def as_json(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {
            "output": str(self.output),
            "verdicts": str(self.log),
            "pairs": self.pairs,
            "written": len(self.labelled.rows),
            "ties": self.labelled.ties,
            "unsure": self.labelled.unsure,
            "invalid": dict(self.labelled.invalid),
            "judge": None if self.report is None else asdict(self.report),
        }


def judge_data(
    config: JudgeConfig,
    output: Path,
    console: Console,
    *,
    log_file: Path | None = None,
    data: DataSource | None = None,
    human: DataSource | None = None,
    rewards: Sequence[RewardSource] = (),
) -> JudgeOutcome:
    """Measure a judge on people's labels, label the data, and write the pairs.

    Args:
        config: The options.
        output: The file to write. The verdicts go into a file next to it, and an interrupted
            command that is given again continues from there.
        console: Shows notes and progress.
        log_file: The file of the verdicts, if it is another.
        data: Opened data, instead of what the options name.
        human: Opened pairs that people labelled, instead of those that the options name.
        rewards: Python functions in addition to the option `reward`.

    Raises:
        ConfigError: The options are wrong, or the judge doesn't beat a coin.
        DataError: The data can't be read, or no pair got a label.
    """
    spec = spec_of(config, rewards)
    spec.check()
    _check_options(config)
    if config.human is None:
        refuse_unproven(None, None, allow=config.allow_unproven)
    criteria = read_rubric(config.rubric)
    source = configure_data(resolve_starter(config.data, "data") if data is None else data, config)
    pairs, title = read_answer_pairs(
        source,
        config.split,
        config.format,
        pairs_per_prompt=config.pairs_per_prompt,
        seed=config.seed,
    )
    console.note(title)
    sample = None
    if config.human is not None:
        sample, human_title = read_human_sample(
            resolve_starter(config.human, "data") if human is None else human
        )
        console.note(human_title)
    log = KeyedLog(log_file or verdict_file(output), VERDICT_FIELDS)
    if len(log):
        console.note(f"continuing: {len(log):,} verdicts in {log.file}")
    with open_judge(spec) as opened:
        own_names = config.own_name or opened.own_names
        feedback = Feedback(opened.judge, opened.identity, criteria, config.by_criterion, log)
        report = None
        if sample is not None:
            report = measure_judge_on(
                feedback, sample, own_names, str(config.human), console, seed=config.seed
            )
        refuse_unproven(report, config.human, allow=config.allow_unproven)
        judged = feedback.judge_pairs(pairs, console)
        calibration = Calibration() if report is None else report.calibration
        labelled = label_pairs(
            judged,
            calibration,
            own_names,
            provenance_of(opened.judge.name, opened.lineage, report),
            keep_ties=config.ties == "half",
            min_confidence=config.min_confidence,
            soft=config.labels == "soft",
        )
    if not labelled.rows:
        counts = describe_counts(labelled)
        raise DataError(f"nothing to write: none of the {len(pairs):,} pairs has a label{counts}")
    with open_atomic(output) as stream:
        for row in labelled.rows:
            stream.write(to_json(row, ascii=False) + "\n")
    outcome = JudgeOutcome(report, labelled, len(pairs), output, log.file)
    write_text(report_file(output), to_json(outcome.as_json(), indent=2) + "\n")
    return outcome


def measure_judge_on(
    feedback: Feedback,
    sample: Sequence[AnswerPair],
    own_names: Sequence[str],
    human: str,
    console: Console,
    *,
    seed: int,
) -> JudgeReport:
    """Judge the pairs that people labelled, and show how far the judge agrees with them.

    Args:
        feedback: The judge at work.
        sample: The pairs.
        own_names: Names in the data of answers by the judge's own model.
        human: The name of the sample, for messages.
        console: Shows the report.
        seed: Random seed of the intervals.

    Raises:
        DataError: The judge gave no valid verdict on a pair that people decided.
    """
    measured = feedback.judge_pairs(sample, console, "Measuring the judge")
    report = measure_on_sample(measured, own_names, seed=seed)
    if report is None:
        reasons = ", ".join(sorted({one.invalid for one in measured if one.invalid})[:3])
        raise DataError(
            f"--human {human}: no valid verdict on a pair that people decided ({reasons}); use "
            "another judge, or a lower --min-verdict-mass"
        )
    console.note(render_judge_report(report, feedback.judge.ignores_order))
    return report


def _check_options(config: JudgeConfig) -> None:
    """Check options that have no effect on the judge.

    Raises:
        ConfigError: One has none.
    """
    is_model = config.model is not None
    unused: list[tuple[str, bool, str]] = [
        ("rubric", config.rubric is not None and not is_model, "scores answers without criteria"),
        ("by_criterion", config.by_criterion and not is_model, "scores answers without criteria"),
    ]
    for name, given, reason in unused:
        if given:
            raise ConfigError(f"{flag_of(name)}: has no effect, the judge {reason}; leave it out")
    if config.own_name and config.human is None:
        raise ConfigError("--own-name: self-preference is measured on --human; give both")


def verdict_file(output: Path) -> Path:
    """The file of the verdicts that belongs to an output file."""
    return output.with_name(f"{output.stem}.verdicts.jsonl")


def report_file(output: Path) -> Path:
    """The file of the report that belongs to an output file."""
    return output.with_name(f"{output.stem}.report.json")


def refuse_unproven(report: JudgeReport | None, human: str | None, *, allow: bool) -> None:
    """Refuse to label with a judge that is not known to be better than a coin.

    Raises:
        ConfigError: It isn't, and that is not allowed.
    """
    if allow or (report is not None and report.beats_coin):
        return
    if report is None:
        raise ConfigError(
            "--human is missing: give pairs that people labelled (mlx-align label), to find out "
            "whether the judge agrees with them; or label all the same with --allow-unproven"
        )
    raise ConfigError(
        f"--human {human}: the judge agrees with people on {_percent(report.agreement)} of "
        f"{report.pairs:,} pairs, which can't be told apart from a coin; use a better judge or "
        "more pairs, or label all the same with --allow-unproven"
    )


def render_judge_report(report: JudgeReport, ignores_order: bool) -> str:
    """The report as lines for a terminal."""
    pairs = f"{report.pairs:,} pairs that people labelled"
    lines = [f"Agreement with people: {_percent(report.agreement)} of {pairs}"]
    if report.decided is not None and report.decided.value != report.agreement.value:
        lines.append(f"  without its ties, which count ½: {_percent(report.decided)}")
    if report.invalid:
        lines.append(f"  without a valid verdict: {report.invalid:,} more, not counted")
    if not ignores_order:
        lines += [
            f"  from one order alone: {_percent(report.one_order)}; both orders agree on "
            f"{report.consistency:.0%} of the pairs",
            f"  position bias: chooses the first of two equal answers with "
            f"{_number(report.position_bias)} (.5: no bias); averaging both orders removes it",
        ]
    lines.append(f"  noise: {_number(report.noise)} of the verdicts are against people's choice")
    if report.self_preference is not None:
        lines.append(
            f"  self-preference: chooses its own of two equal answers with "
            f"{_number(report.self_preference)} (.5: no bias); the labels are corrected for it"
        )
    before, after = report.log_loss
    lines.append(
        f"  calibration: temperature {report.calibration.temperature:.2f}; log-loss "
        f"{before:.3f} → {after:.3f} nats, held out (a coin has .693)"
    )
    if report.pairs < MIN_SAMPLE:
        lines.append(f"! Only {report.pairs} pairs: label {MIN_SAMPLE} or more for a firm number.")
    return "\n".join(lines)


def describe_outcome(outcome: JudgeOutcome) -> str:
    """What was written, and how to train on it."""
    return (
        f"Wrote {len(outcome.labelled.rows):,} pairs of {outcome.pairs:,} to {outcome.output}"
        f"{describe_counts(outcome.labelled)}; verdicts: {outcome.log}. Train on them:\n"
        f"  mlx-align dpo --model MODEL --data {outcome.output}"
    )


def describe_counts(labelled: LabelledPairs) -> str:
    """What was left out, in brackets; empty if nothing was."""
    parts: list[str] = []
    if labelled.ties:
        parts.append(f"{labelled.ties:,} ties")
    if labelled.unsure:
        parts.append(f"{labelled.unsure:,} below --min-confidence")
    parts += [f"{count:,} invalid: {reason}" for reason, count in labelled.invalid.items()]
    return f" ({', '.join(parts)})" if parts else ""


def _percent(rate: Estimate) -> str:
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"


def _number(rate: Estimate) -> str:
    return f"{rate.value:.2f} ({rate.low:.2f} to {rate.high:.2f})"
