"""Runs in Python: starting one, opening its folder, and using the model it trained."""

from __future__ import annotations

import gc
import html
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from mlx_align import commands
from mlx_align.config import (
    AgreementConfig,
    ConstitutionConfig,
    EvalConfig,
    FuseConfig,
    ImproveConfig,
    JudgeConfig,
    SampleConfig,
    TrainConfig,
    make_config,
)
from mlx_align.config.spelling import python_spelling
from mlx_align.errors import ConfigError, MlxAlignError, ModelError
from mlx_align.system.interrupts import Interrupted
from mlx_align.system.json_text import to_json
from mlx_align.system.progress import Console, ProgressBar, SilentConsole
from mlx_align.tracking.run_dir import PAGE_FILE, RunRecord, read_metrics, read_run_record
from mlx_align.tracking.verdict import Verdict, verdict

if TYPE_CHECKING:
    from typing import Unpack

    from mlx_align.config.keywords import Data, EvalOptions
    from mlx_align.data.readers import DataSource
    from mlx_align.inference.generate import TextGenerator
    from mlx_align.inference.rerank import RankedCompletion, Reranker
    from mlx_align.inference.reward_model import RewardModel
    from mlx_align.inference.scoring import TextOrMessages
    from mlx_align.rollout.reward_functions import RewardSource

# Metrics that `Run` shows, if the run has them, in this order.
_SHOWN = (
    "loss",
    "perplexity",
    "reward",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/auc",
    "kl",
    "completions/ended",
)


class ScoringOptions(TypedDict, total=False):
    """Options of scoring, as those of `mlx-align rerank`."""

    reward_model: str | os.PathLike[str] | None
    beta: float | None
    reference_adapter: str | os.PathLike[str] | None
    per_token: bool | None
    max_seq_length: int
    batch_size: int


class Run:
    """A run folder: what was trained, how it went, and the trained model to use.

    Made by the training functions and by `load_run`. It is a path: pass it where a run folder is
    expected, such as `init_adapter=run` or `reward_model=run`. Models are loaded when first used
    and kept until `release()`.

    Attributes:
        path: The run folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, data: Data | None = None) -> None:
        """Open a run folder; nothing is loaded yet.

        Args:
            path: The run folder.
            data: The data it was trained on, if that was passed from Python.

        Raises:
            ConfigError: It is not a run folder.
        """
        self.path = Path(path).expanduser()
        self._data = data
        self._policy: TextGenerator | Reranker | None = None
        self._scored_by: Mapping[str, Any] = {}
        self._reward_model: RewardModel | None = None
        with python_messages():
            read_run_record(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    # --- the content of the folder ---

    @property
    def record(self) -> RunRecord:
        """The content of the folder's files, read now."""
        return read_run_record(self.path)

    @property
    def command(self) -> str:
        """The training command: dpo, kto, sft, reward, ppo or grpo."""
        return self.record.command

    @property
    def adapter_path(self) -> Path:
        """The adapter's folder; `mlx_lm.load(model, adapter_path=str(run.adapter_path))`."""
        return self.path

    @cached_property
    def config(self) -> TrainConfig:
        """All options of the run, as `run.config.beta`.

        Raises:
            ConfigError: config.yaml can't be read, or is of an unknown command.
        """
        from mlx_align.tracking.run_dir import CONFIG_FILE

        config_class = _config_class(self.command)
        with python_messages():
            return make_config(config_class, {}, self.path / CONFIG_FILE)

    @cached_property
    def model(self) -> str:
        """The base model, as it was named when the run was made.

        Raises:
            ModelError: The folder doesn't name it.
        """
        from mlx_align.models.adapters import ADAPTER_CONFIG_FILE

        named = self.record.config.get("model")
        if named is None:
            try:
                content = json.loads((self.path / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
                named = content.get("model")
            except (OSError, ValueError, AttributeError):
                named = None
        if not isinstance(named, str):
            raise ModelError(f"{self.path}: its files don't name the base model")
        return named

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json; {} if the run is not finished."""
        return dict(self.record.summary)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every row of metrics.jsonl: training rows, and held-out rows with keys `eval/…`."""
        return read_metrics(self.path)

    @property
    def metrics(self) -> dict[str, float]:
        """The last training metrics, and the last held-out metrics under `eval/…`."""
        record = self.record
        found = dict(record.training[-1]) if record.training else {}
        held_out = dict(record.held_out[-1]) if record.held_out else {}
        held_out.pop("step", None)
        return {**found, **held_out}

    @property
    def verdict(self) -> Verdict:
        """The result on held-out data: a sentence with an interval."""
        return verdict(self.record)

    def report(self) -> Path:
        """Write the run page from the folder's current state; its path."""
        from mlx_align.report.page import render_run
        from mlx_align.system.atomic_io import write_text

        file = self.path / PAGE_FILE
        write_text(file, render_run(self.record))
        return file

    # --- continuing ---

    def resume(self, **options: Any) -> Run:
        """Continue a run from its last checkpoint.

        Args:
            **options: What a resumed run may change, such as `save_every`, or `iters` to train it
                for longer; `callbacks`, `progress` and `accept_changed`; and data, reward or loss
                again, if they were passed from Python.

        Raises:
            MlxAlignError: An option can't be changed, or the run can't be continued.
        """
        if self._data is not None:
            options.setdefault("data", self._data)
        return start_run(self.command, options, resume=self.path)

    # --- using the model ---

    def generate(
        self,
        prompt: TextOrMessages,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        apply_chat_template: bool = True,
    ) -> str:
        """Generate one completion with the trained model.

        Args:
            prompt: Text, or messages ({"role": …, "content": …}).
            max_tokens: Longest completion, tokens.
            temperature: 0 for greedy decoding; 1 samples from the policy itself.
            seed: Random seed for sampling.
            apply_chat_template: Whether text becomes a user message if the model has a chat
                template; if not, it is used verbatim.

        Raises:
            MlxAlignError: The run is a reward model, or the prompt is too long.
        """
        with python_messages():
            return self._generator().generate(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                apply_chat_template=apply_chat_template,
            )

    def rerank(
        self,
        prompt: TextOrMessages,
        n: int = 8,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
        apply_chat_template: bool = True,
        **scoring: Unpack[ScoringOptions],
    ) -> list[RankedCompletion]:
        """Sample `n` completions and rank them, best first; equal ones once, with their count.

        Args:
            prompt: Text, or messages ({"role": …, "content": …}).
            n: Completions to sample.
            max_tokens: Longest completion, tokens.
            temperature: 1 samples from the policy itself.
            seed: Random seed for sampling.
            apply_chat_template: As in `generate`.
            **scoring: `reward_model` (a run of `reward`, or a classifier) to rank by, instead of
                the run's implicit reward; or `beta`, `reference_adapter`, `per_token` of that.

        Raises:
            MlxAlignError: The run has no scorer, or the prompt is too long.
        """
        with python_messages():
            return self._reranker(scoring).sample(
                prompt,
                n,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                apply_chat_template=apply_chat_template,
            )

    def score(
        self,
        prompt: TextOrMessages,
        completions: Sequence[TextOrMessages],
        *,
        apply_chat_template: bool = True,
        **scoring: Unpack[ScoringOptions],
    ) -> list[float]:
        """Score completions of one prompt, in their order; higher is better.

        The scores of a run of `reward` are its own, those of other runs their implicit reward
        β·log(policy / reference).

        Args:
            prompt: Text, or messages ({"role": …, "content": …}).
            completions: Text or messages.
            apply_chat_template: As in `generate`.
            **scoring: As in `rerank`.

        Raises:
            MlxAlignError: The run has no reward, or a completion is too long.
        """
        with python_messages():
            scorer: Any
            if self.command == "reward":
                if scoring:
                    raise ConfigError(
                        f"{next(iter(scoring))}: has no effect on a reward model's own scores"
                    )
                scorer = self.reward_model
            else:
                scorer = self._reranker(scoring).scorer
            if isinstance(prompt, str) and apply_chat_template and scorer.style.has_template:
                prompt = [{"role": "user", "content": prompt}]
            scores: list[float] = scorer.score(prompt, completions)
            return scores

    @property
    def reward_model(self) -> RewardModel:
        """The reward model of a run of `reward`; `run.reward_model.score(prompt, completions)`.

        Raises:
            ModelError: It is a run of another command.
        """
        from mlx_align.inference.reward_model import RewardModel

        if self.command != "reward":
            raise ModelError(
                f"{self.path}: is a run of {self.command}, not a reward model; use run.score, or "
                "train one with mlx_align.reward"
            )
        if self._reward_model is None:
            with python_messages():
                self._reward_model = RewardModel.load(self.model, self.path)
        return self._reward_model

    def evaluate(self, **options: Unpack[EvalOptions]) -> dict[str, Any]:
        """Measure the run against its reference: the model or adapter that it started from.

        Args:
            **options: As `mlx_align.evaluate`; by default on what the run held out.

        Returns:
            What `mlx-align eval --json` prints.

        Raises:
            MlxAlignError: An option is wrong, or the run or the data can't be used.
        """
        self.release()
        keywords: dict[str, Any] = dict(options)
        return evaluate_run({**keywords, "adapter_path": self}, own_data=self._data)

    def fuse(self, output: str | os.PathLike[str], *, dequantize: bool = False) -> dict[str, Any]:
        """Merge the adapter into its base model, as one model folder.

        Args:
            output: Folder to create.
            dequantize: Dequantise the whole model.

        Returns:
            What `mlx-align fuse --json` prints.

        Raises:
            MlxAlignError: The folder is not empty, or the run is a reward model.
        """
        self.release()
        options = {"model": self.model, "output": output, "dequantize": dequantize}
        return fuse_run({**options, "adapter_path": self.path})

    def release(self) -> None:
        """Free the memory of the models that were loaded to use the run."""
        self._policy = self._reward_model = None
        free_memory()

    def _generator(self) -> TextGenerator:
        from mlx_align.inference.generate import TextGenerator
        from mlx_align.inference.rerank import Reranker

        if isinstance(self._policy, Reranker):
            return self._policy.generator
        if self._policy is None:
            self._policy = TextGenerator.load(self.model, self.path)
        return self._policy

    def _reranker(self, scoring: ScoringOptions) -> Reranker:
        from mlx_align.inference.rerank import Reranker

        wanted = dict(scoring)
        if not isinstance(self._policy, Reranker) or wanted != self._scored_by:
            self.release()
            keywords: Any = {
                name: os.fspath(value) if isinstance(value, os.PathLike) else value
                for name, value in wanted.items()
            }
            self._policy = Reranker.load(self.model, self.path, **keywords)
            self._scored_by = wanted
        return self._policy

    # --- showing ---

    def __repr__(self) -> str:
        record = self.record
        lines = [f"Run({str(self.path)!r}): {record.command}, {_state(record)}"]
        lines += [f"  {name}: {', '.join(cells)}" for name, *cells in self._table()]
        return "\n".join([*lines, f"  {verdict(record).sentence}"])

    def _repr_html_(self) -> str:
        record = self.record
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for name, *cells in self._table()
        )
        page = html.escape(os.path.relpath(self.path / PAGE_FILE), quote=True)
        return (
            f"<p><b>{html.escape(str(self.path))}</b>: {html.escape(record.command)}, "
            f"{_state(record)}. {html.escape(verdict(record).sentence)} "
            f'<a href="{page}" target="_blank">Run page</a></p><table>{rows}</table>'
        )

    def _table(self) -> list[tuple[str, ...]]:
        """Rows of (metric, training value, held-out value)."""
        found: list[tuple[str, ...]] = []
        metrics = self.metrics
        for name in _SHOWN:
            values = metrics.get(name), metrics.get(f"eval/{name}")
            cells = [
                f"{value:.4g} {where}"
                for value, where in zip(values, ("(training)", "(held out)"), strict=True)
                if value is not None
            ]
            if cells:
                found.append((name, *cells))
        return found


def load_run(path: str | os.PathLike[str], *, data: Data | None = None) -> Run:
    """Open a run folder, finished or interrupted.

    Args:
        path: The run folder.
        data: The data it was trained on, if that was passed from Python.

    Raises:
        ConfigError: It is not a run folder.
    """
    return Run(path, data=data)


# --- starting ---


def start_run(
    command: str,
    options: Mapping[str, Any],
    *,
    resume: str | os.PathLike[str] | bool | None = None,
    names: Mapping[str, str] | None = None,
) -> Run:
    """Train, as the functions in `api` do.

    Args:
        command: dpo, kto, sft, reward, ppo or grpo.
        options: The command's options by name; besides them `accept_changed`, `config`,
            `callbacks` and `progress`. `data`, `loss`, `reward` and `eval_reward` may be Python
            objects.
        resume: The run folder to continue; True for the one that `output` names.
        names: Other names for options in messages.

    Raises:
        MlxAlignError: An option, the data or a model can't be used, or training failed.
        KeyboardInterrupt: Ctrl-C; if the run had begun, a checkpoint was written.
    """
    keywords = dict(options)
    file = keywords.pop("config", None)
    callbacks = keywords.pop("callbacks", None)
    accept_changed = keywords.pop("accept_changed", None) or ()
    console = python_console(progress=keywords.pop("progress", True), names=names)
    data = keywords.get("data")
    with python_messages(names), _keyboard_interrupt(command):
        objects = take_objects(keywords, callbacks)
        path, summary = commands.train(
            command,
            keywords,
            console,
            file=None if file is None else Path(file),
            resume=_resumed_folder(resume),
            accept_changed=accept_changed,
            source="python" if names is None else "command line",
            objects=objects,
        )
        run = Run(path, data=data if objects.data is not None else None)
    console.outcome(summary, run)
    free_memory()
    return run


def take_objects(
    keywords: dict[str, Any], callbacks: Sequence[Any] | None = None
) -> commands.PythonObjects:
    """Remove from `keywords`, and return, the objects that a configuration can't hold.

    Raises:
        MlxAlignError: The data can't be opened, or a callback has the wrong type.
    """
    from mlx_align.data.readers import open_data
    from mlx_align.training.callbacks import Callback

    data: DataSource | None = None
    if not isinstance(keywords.get("data"), str | os.PathLike | None):
        data = open_data(keywords.pop("data"))
    loss = keywords.get("loss")
    if loss is None or isinstance(loss, str):
        loss = None
    else:
        # The parentheses distinguish it from a loss of that name in the registry.
        keywords["loss"] = f"{getattr(loss, '__name__', type(loss).__name__)}()"
    for callback in callbacks or ():
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks: {type(callback).__name__} is not a mlx_align.Callback; callbacks of "
                "transformers work with the trainers of mlx_align.trl"
            )
    return commands.PythonObjects(
        data=data,
        loss=loss,
        rewards=_take_functions(keywords, "reward"),
        eval_rewards=_take_functions(keywords, "eval_reward"),
        callbacks=tuple(callbacks or ()),
    )


def _take_functions(keywords: dict[str, Any], name: str) -> tuple[RewardSource, ...]:
    """Remove the reward functions from the option `name`, which keeps its specs."""
    given = keywords.get(name)
    if given is None:
        return ()
    single = isinstance(given, str) or callable(given) or _is_weighted(given)
    sources = [given] if single else list(given)
    specs = [source for source in sources if isinstance(source, str)]
    if specs:
        keywords[name] = specs
    else:
        del keywords[name]
    return tuple(source for source in sources if not isinstance(source, str))


def _is_weighted(source: Any) -> bool:
    """Whether it is (function, weight)."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], int | float)


def _resumed_folder(resume: str | os.PathLike[str] | bool | None) -> str | None:
    if resume is None or resume is False:
        return None
    return "" if resume is True else os.fspath(resume)


def evaluate_run(options: Mapping[str, Any], *, own_data: Any = None) -> dict[str, Any]:
    """Evaluate a run, for `mlx_align.evaluate` and `Run.evaluate`; errors are theirs."""
    from mlx_align.data.readers import open_data

    keywords = dict(options)
    console = python_console(progress=keywords.pop("progress", True))
    run = keywords.get("adapter_path")
    with python_messages():
        if run is None:
            raise ConfigError("adapter_path is missing; give a run folder or a Run")
        if isinstance(run, Run):
            own_data = run._data if own_data is None else own_data
        if keywords.get("model") is None:
            keywords["model"] = Run(run).model
        given = keywords.get("data")
        data = None
        if not isinstance(given, str | os.PathLike | None):
            data = open_data(keywords.pop("data"))
        config = make_config(EvalConfig, keywords)
        own = None if own_data is None else open_data(own_data)
        found = commands.evaluate(config, console, data=data, own_data=own)
    free_memory()
    return as_json(found.content)


def fuse_run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fuse a run, for `mlx_align.fuse` and `Run.fuse`; errors are theirs."""
    from dataclasses import asdict

    with python_messages():
        report = commands.fuse(make_config(FuseConfig, options))
    free_memory()
    return as_json(asdict(report))


# What the options name as data if it was passed from Python.
_IN_MEMORY = "data in memory"


def make_preferences(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Sample, label or improve, for the functions in `api`; errors are theirs.

    Args:
        command: sample, judge, agreement, constitution or improve.
        options: The command's options by name, and `progress`. `data` and `human` may be rows, and
            `reward` and `eval_reward` functions.

    Returns:
        What the command prints with `--json`.
    """
    keywords = dict(options)
    console = python_console(progress=keywords.pop("progress", True))
    with python_messages(), _keyboard_interrupt(command):
        opened = {name: _take_data(keywords, name) for name in ("data", "human")}
        given = {name: source for name, source in opened.items() if source is not None}
        rewards = _take_functions(keywords, "reward")
        content = _PREFERENCES[command](keywords, console, given, rewards)
    free_memory()
    return as_json(content)


def _take_data(keywords: dict[str, Any], name: str) -> DataSource | None:
    """Open the data that a Python caller passed, if it isn't a path."""
    from mlx_align.data.readers import open_data

    if isinstance(keywords.get(name), str | os.PathLike | None):
        return None
    found = open_data(keywords[name])
    keywords[name] = _IN_MEMORY
    return found


def _sample(keywords: Any, console: Any, data: Any, rewards: Any) -> Mapping[str, Any]:
    from mlx_align.preferences.run_sample import sample_data

    outcome = sample_data(make_config(SampleConfig, keywords), console, rewards=rewards, **data)
    console.note(outcome.text)
    return outcome.content


def _judge(keywords: Any, console: Any, data: Any, rewards: Any) -> Mapping[str, Any]:
    from mlx_align.preferences.run_judge import describe_outcome, judge_data
    from mlx_align.system.row_file import new_file

    config = make_config(JudgeConfig, keywords)
    outcome = judge_data(config, new_file(config.output), console, rewards=rewards, **data)
    console.note(describe_outcome(outcome))
    return outcome.as_json()


def _agreement(keywords: Any, console: Any, data: Any, rewards: Any) -> Mapping[str, Any]:
    from mlx_align.preferences.raters import render_agreement
    from mlx_align.preferences.run_agreement import measure_agreement

    outcome = measure_agreement(make_config(AgreementConfig, keywords))
    console.note(render_agreement(outcome.report))
    return outcome.as_json()


def _constitution(keywords: Any, console: Any, data: Any, rewards: Any) -> Mapping[str, Any]:
    from mlx_align.preferences.run_constitution import apply_constitution, describe_outcome

    config = make_config(ConstitutionConfig, keywords)
    outcome = apply_constitution(config, console, **data)
    for line in describe_outcome(outcome, config):
        console.note(line)
    return outcome.as_json()


def _improve(keywords: Any, console: Any, data: Any, rewards: Any) -> Mapping[str, Any]:
    from mlx_align.improver import Improver, WaitingForLabels

    eval_rewards = _take_functions(keywords, "eval_reward")
    config = make_config(ImproveConfig, keywords)
    try:
        outcome = Improver(
            config, console, rewards=rewards, eval_rewards=eval_rewards, **data
        ).run()
    except WaitingForLabels as waiting:
        console.note(str(waiting))
        return {"waiting": str(waiting)}
    console.note(f"Stopped: {outcome.stopped}.")
    return outcome.as_json()


_PREFERENCES: Mapping[str, Callable[..., Mapping[str, Any]]] = {
    "sample": _sample,
    "judge": _judge,
    "agreement": _agreement,
    "constitution": _constitution,
    "improve": _improve,
}


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as a command's --json prints it: dicts, lists, text and numbers."""
    found: dict[str, Any] = json.loads(to_json(content))
    return found


def free_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def _config_class(command: str) -> type[TrainConfig]:
    from mlx_align.config import TRAINING_CONFIGS

    if command not in TRAINING_CONFIGS:
        raise ConfigError(f"a run of {command}: its options are unknown; see run.record.config")
    return TRAINING_CONFIGS[command]


def _state(record: RunRecord) -> str:
    unit = "rollout batches" if record.command in ("ppo", "grpo") else "updates"
    if record.finished:
        return f"finished after {record.step:,} {unit}"
    return f"{record.status.get('state', 'not finished')} after {record.step:,} {unit}"


# --- messages ---


@contextmanager
def python_messages(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Within the block, errors name options as Python keywords.

    Args:
        names: Other names for options.
    """
    try:
        yield
    except MlxAlignError as error:
        error.args = (python_spelling(str(error), names), *error.args[1:])
        raise


@contextmanager
def _keyboard_interrupt(command: str) -> Iterator[None]:
    """Turn an interrupted run into the exception that Ctrl-C raises in Python."""
    try:
        yield
    except Interrupted as error:
        if error.signum != signal.SIGINT:
            raise
        raise KeyboardInterrupt(f"{command} stopped; resume= continues it") from None


class _PythonConsole:
    """A console whose notes name options as Python keywords."""

    def __init__(self, console: Console, names: Mapping[str, str] | None) -> None:
        self._console, self._names = console, names

    def note(self, text: str) -> None:
        self._console.note(python_spelling(text, self._names))

    def bar(self, label: str, total: int, done: int = 0) -> AbstractContextManager[ProgressBar]:
        return self._console.bar(label, total, done)

    def outcome(self, summary: Mapping[str, Any], run: Run) -> None:
        if isinstance(self._console, SilentConsole):
            return
        cast(Any, self._console).outcome(summary)
        self.note(f"\nRun folder: {run.path}\nRun page: {run.path / PAGE_FILE}")


def python_console(
    *, progress: bool = True, names: Mapping[str, str] | None = None
) -> _PythonConsole:
    """A console for Python callers; silent without `progress`."""
    from mlx_align.system.console import Console as TerminalConsole

    return _PythonConsole(TerminalConsole() if progress else SilentConsole(), names)
