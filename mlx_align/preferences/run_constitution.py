"""`mlx-align constitution`: from its options to demonstrations, pairs and samples to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_align.config import ConstitutionConfig
from mlx_align.config.schema import flag_of
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import read_prompts
from mlx_align.data.provenance import Lineage
from mlx_align.data.readers import DataSource
from mlx_align.errors import ConfigError, DataError
from mlx_align.models.loading import resolve_model_path
from mlx_align.preferences.ai_feedback import (
    VERDICT_FIELDS,
    Feedback,
    LabelledPairs,
    label_pairs,
    provenance_of,
    read_human_sample,
)
from mlx_align.preferences.constitution import (
    STEP_FIELDS,
    RevisedPrompt,
    Reviser,
    RevisionReport,
    RevisionSettings,
    candidate_pairs,
    render_samples,
    report_revisions,
    revision_rows,
)
from mlx_align.preferences.endpoint import Endpoint
from mlx_align.preferences.judge_statistics import Calibration, JudgeReport
from mlx_align.preferences.judges import MIN_MASS, LanguageModelJudge
from mlx_align.preferences.lineage import model_lineage
from mlx_align.preferences.principles import Principle, read_constitution
from mlx_align.preferences.rubric import read_rubric
from mlx_align.preferences.run_judge import (
    JudgeSpec,
    OpenJudge,
    describe_counts,
    measure_judge_on,
    open_judge,
    refuse_unproven,
)
from mlx_align.preferences.writers import EndpointWriter, ModelWriter, Writer
from mlx_align.system.atomic_io import open_atomic, wrap_write_errors, write_text
from mlx_align.system.json_text import to_json
from mlx_align.system.keyed_log import KeyedLog
from mlx_align.system.progress import Console
from mlx_align.system.starter import resolve_starter

STEPS, VERDICTS = "steps.jsonl", "verdicts.jsonl"
REVISIONS, PAIRS = "revisions.jsonl", "pairs.jsonl"
REPORT, SAMPLES = "report.json", "samples.md"


@dataclass(frozen=True)
class ConstitutionOutcome:
    """The result of `mlx-align constitution`.

    Attributes:
        folder: The folder that was written.
        revisions: What changed.
        demonstrations: Rows for `sft`.
        judge: The judge measured on people's labels; None without them, or without pairs.
        pairs: The labelled pairs; None without.
    """

    folder: Path
    revisions: RevisionReport
    demonstrations: int
    judge: JudgeReport | None
    pairs: LabelledPairs | None

    def as_json(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        labelled = self.pairs
        return {
            "output": str(self.folder),
            "revisions": {
                **asdict(self.revisions),
                "share_changed": self.revisions.share_changed,
                "written": self.demonstrations,
            },
            "judge": None if self.judge is None else asdict(self.judge),
            "pairs": None
            if labelled is None
            else {
                "written": len(labelled.rows),
                "ties": labelled.ties,
                "unsure": labelled.unsure,
                "invalid": dict(labelled.invalid),
            },
        }


@dataclass(frozen=True)
class _OpenWriter:
    """A writer with what determines its texts, and its model if it is in memory."""

    writer: Writer
    identity: str
    lineage: Lineage
    model: ModelWriter | None = None


def apply_constitution(
    config: ConstitutionConfig, console: Console, *, data: DataSource | None = None
) -> ConstitutionOutcome:
    """Revise answers and compare them by principles; write demonstrations and pairs.

    The folder keeps every step. If it has steps of the same settings, they are not repeated.

    Args:
        config: The options.
        console: Shows notes and progress.
        data: Opened prompts, instead of those that the options name.

    Raises:
        ConfigError: The options are wrong, or the judge doesn't beat a coin.
        DataError: The prompts can't be read.
    """
    _check_options(config)
    principles = read_constitution(config.constitution)
    source = configure_data(resolve_starter(config.data, "data") if data is None else data, config)
    groups, reading = read_prompts(source, "train", config.format)
    console.note(f"{reading}; {len(groups):,} prompts, {len(principles)} principles")
    folder = _open_folder(config.output)
    steps = KeyedLog(folder / STEPS, STEP_FIELDS)
    verdicts = KeyedLog(folder / VERDICTS, VERDICT_FIELDS)
    if len(steps) or len(verdicts):
        console.note(f"continuing: {len(steps):,} texts and {len(verdicts):,} verdicts in {folder}")
    opened = _open_writer(config)
    report: JudgeReport | None = None
    labelled: LabelledPairs | None = None
    with _open_constitution_judge(config, opened) as judge:
        feedback = None
        if judge is not None:
            criteria = read_rubric(None)
            feedback = Feedback(judge.judge, judge.identity, criteria, False, verdicts)
            if config.human is not None:
                sample, title = read_human_sample(resolve_starter(config.human, "data"))
                console.note(title)
                report = measure_judge_on(
                    feedback, sample, (), config.human, console, seed=config.seed
                )
            refuse_unproven(report, config.human, allow=config.allow_unproven)
        settings = RevisionSettings(
            config.answers,
            config.rounds,
            config.max_completion_length,
            config.temperature,
            config.seed,
        )
        reviser = Reviser(opened.writer, opened.identity, principles, settings, steps)
        revised = reviser.revise(groups, console)
        revisions = report_revisions(revised)
        about = provenance_of(opened.writer.name, opened.lineage, None)
        demonstrations = revision_rows(revised, about) if config.rounds else []
        if feedback is not None and judge is not None:
            labelled = _compare(config, feedback, judge, revised, principles, report, console)
    if not demonstrations and not (labelled and labelled.rows):
        reasons = ", ".join(f"{count} {why}" for why, count in revisions.problems.items())
        raise DataError(f"nothing to write: no prompt has a usable revision or pair ({reasons})")
    outcome = ConstitutionOutcome(folder, revisions, len(demonstrations), report, labelled)
    _write(outcome, demonstrations, render_samples(revised, config.samples, config.seed))
    return outcome


def describe_outcome(outcome: ConstitutionOutcome, config: ConstitutionConfig) -> list[str]:
    """Lines on what changed and what was written."""
    report, folder, lines = outcome.revisions, outcome.folder, []
    if config.rounds:
        before, after = report.words
        lines.append(
            f"{report.changed:,} of {report.revised:,} revised answers changed "
            f"({report.share_changed:.0%}); words per answer: {before:.0f}, then {after:.0f}"
        )
        for name, (count, share) in report.by_principle.items():
            lines.append(f"  {name}: {count:,} revised, {share:.0%} changed")
        problems = ", ".join(f"{count:,} {why}" for why, count in report.problems.items())
        if problems:
            lines.append(f"! Without a usable revision: {problems}")
        lines.append(f"Wrote {outcome.demonstrations:,} demonstrations to {folder / REVISIONS}")
    if outcome.pairs is not None:
        counts = describe_counts(outcome.pairs)
        if outcome.pairs.rows:
            lines.append(f"Wrote {len(outcome.pairs.rows):,} pairs to {folder / PAIRS}{counts}")
        else:
            lines.append(f"! No pair got a label{counts}")
    if config.samples and (folder / SAMPLES).exists():
        lines.append(f"Read some before you train: {folder / SAMPLES}")
    return lines


def _compare(
    config: ConstitutionConfig,
    feedback: Feedback,
    judge: OpenJudge,
    revised: Sequence[RevisedPrompt],
    principles: Sequence[Principle],
    report: JudgeReport | None,
    console: Console,
) -> LabelledPairs:
    """Compare the answers of each prompt by principles."""
    pairs = candidate_pairs(revised, principles, config.model, config.seed)
    judged = feedback.judge_pairs(pairs, console)
    return label_pairs(
        judged,
        Calibration() if report is None else report.calibration,
        (),  # every answer is by the same model
        provenance_of(judge.judge.name, judge.lineage, report),
        keep_ties=config.ties == "half",
        min_confidence=config.min_confidence,
        soft=config.labels == "soft",
    )


def _check_options(config: ConstitutionConfig) -> None:
    judge_options = ("judge_model", "judge_adapter_path", "judge_url", "min_verdict_mass", "human")
    if not config.pairs:
        given = next((name for name in judge_options if getattr(config, name) is not None), None)
        if given is not None:
            raise ConfigError(f"{flag_of(given)}: has no effect with --no-pairs; leave it out")
        if not config.rounds:
            raise ConfigError("--rounds 0 with --no-pairs leaves nothing to do; drop one")
    elif config.answers == 1 and not config.rounds:
        raise ConfigError("--answers 1 --rounds 0: no two answers to compare; raise one")
    if config.adapter_path is not None and config.url is not None:
        raise ConfigError("--adapter-path: has no effect with --url; leave it out")
    for name in ("judge_adapter_path", "judge_url"):
        if getattr(config, name) is not None and config.judge_model is None:
            raise ConfigError(f"{flag_of(name)} needs --judge-model")
    if config.api_key_variable is not None and config.url is None and config.judge_url is None:
        raise ConfigError("--api-key-variable needs --url or --judge-url")
    if config.temperature == 0 and config.answers > 1:
        raise ConfigError(
            "--temperature 0 makes all answers the same; add --answers 1, or give a temperature "
            "above 0"
        )


def _open_folder(output: str) -> Path:
    """The output folder: new, empty, or one of an earlier call of the command."""
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a folder")
    if (folder / REPORT).exists():
        raise ConfigError(f"--output {output}: is finished; name a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STEPS).exists():
        raise ConfigError(f"--output {output}: has other files; name a new folder")
    with wrap_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open_writer(config: ConstitutionConfig) -> _OpenWriter:
    if config.url is not None:
        endpoint = Endpoint(config.url, config.model, config.api_key_variable)
        writer = EndpointWriter(endpoint)
        return _OpenWriter(writer, writer.name, ())
    name = resolve_starter(config.model, "model")
    adapter = None if config.adapter_path is None else Path(config.adapter_path).expanduser()
    model = ModelWriter.load(name, config.adapter_path)
    lineage = model_lineage(resolve_model_path(name), adapter)
    return _OpenWriter(model, " ".join(lineage), lineage, model)


@contextmanager
def _open_constitution_judge(
    config: ConstitutionConfig, opened: _OpenWriter
) -> Iterator[OpenJudge | None]:
    """The judge: the writer itself, or the one that the options name; None without pairs."""
    if not config.pairs:
        yield None
        return
    if config.judge_model is None and opened.model is not None:
        mass = MIN_MASS if config.min_verdict_mass is None else config.min_verdict_mass
        generator = opened.model.generator
        judge = LanguageModelJudge.of_loaded(
            opened.writer.name, generator.model, generator.weights, min_mass=mass
        )
        yield OpenJudge(judge, f"{opened.identity}, {mass}", opened.lineage, ())
        return
    own = config.judge_model is None
    spec = JudgeSpec(
        model=config.model if own else config.judge_model,
        adapter_path=config.judge_adapter_path,
        url=config.url if own else config.judge_url,
        api_key_variable=config.api_key_variable if own or config.judge_url else None,
        min_mass=config.min_verdict_mass,
        prefix="--judge-",
    )
    with open_judge(spec) as found:
        yield found


def _write(
    outcome: ConstitutionOutcome, demonstrations: Sequence[Mapping[str, Any]], samples: str
) -> None:
    folder = outcome.folder
    pairs = [] if outcome.pairs is None else outcome.pairs.rows
    for name, rows in ((REVISIONS, demonstrations), (PAIRS, pairs)):
        if rows:
            with open_atomic(folder / name) as stream:
                stream.writelines(to_json(row, ascii=False) + "\n" for row in rows)
    if samples:
        write_text(folder / SAMPLES, samples)
    write_text(folder / REPORT, to_json(outcome.as_json(), indent=2) + "\n")
