"""The commands as functions, from options to results.

The command line (`cli`) and the Python functions (`api`) both call these, so that both check,
compute and write the same. Printing is up to them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_align.config import (
    TRAINING_CONFIGS,
    EvalConfig,
    FuseConfig,
    LossConfig,
    OnPolicyConfig,
    PlanConfig,
    TrainConfig,
    make_config,
)
from mlx_align.config.schema import Source, declared_options, flag_of, require
from mlx_align.errors import ConfigError, RewardError, TrainingError, WriteError
from mlx_align.system.json_text import to_json
from mlx_align.system.starter import resolve_starter, shipped_file

# mlx-lm takes seconds to import, and errors in options are found without it. So these imports are
# made in the functions.
if TYPE_CHECKING:
    from mlx_align.algorithms.base import Algorithm
    from mlx_align.data.readers import DataSource
    from mlx_align.evaluation.parts import FinishedParts
    from mlx_align.models.fuse import FuseReport
    from mlx_align.models.loading import ModelFolder
    from mlx_align.planning.duration import Duration, RolloutDuration
    from mlx_align.planning.machine import Machine
    from mlx_align.planning.plan import Plan
    from mlx_align.rollout.reward_functions import RewardSource
    from mlx_align.system.progress import Console
    from mlx_align.training.callbacks import Callback

# The shipped configuration of a command, used if neither model nor data is given.
STARTERS = {"dpo": "starter.yaml"}
EVALUATION_FILE, ANSWERS_FILE = "evaluation.json", "answers.jsonl"
PLAN_BASIS = (
    "Computed, from measurements of mlx's CPU backend: within 10% there, not yet compared with "
    "Metal. On a Mac, python scripts/verify_plan.py (in a checkout) does that."
)


@dataclass(frozen=True)
class PythonObjects:
    """Arguments of a Python caller that a configuration file can't hold.

    Attributes:
        data: Opened data; None if the options name it.
        loss: A loss of preference pairs; its name is the option `loss`.
        rewards: Reward functions in addition to the option `reward`.
        eval_rewards: Reward functions in addition to the option `eval_reward`.
        callbacks: Called during training.
    """

    data: DataSource | None = None
    loss: Callable[..., Any] | None = None
    rewards: Sequence[RewardSource] = ()
    eval_rewards: Sequence[RewardSource] = ()
    callbacks: Sequence[Callback] = ()


# --- training ---


def train(
    command: str,
    options: Mapping[str, Any],
    console: Console,
    *,
    file: Path | None = None,
    resume: str | None = None,
    accept_changed: Sequence[str] = (),
    source: Source = "python",
    objects: PythonObjects | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Train, and write the run folder.

    Args:
        command: dpo, kto, sft, reward, ppo or grpo.
        options: The options that were given, by name.
        console: Shows messages and progress.
        file: A YAML file of further options.
        resume: The run folder to continue; "" for the one that the option `output` names; None to
            start a new run.
        accept_changed: "rewards", "data" or both: what may differ from the earlier part of the run.
        source: The source of the options, for messages.
        objects: Arguments that only a Python caller can pass.

    Returns:
        The run folder, and the content of summary.json with the `samples`.

    Raises:
        MlxAlignError: An option, the data or a model can't be used, or training failed.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    objects = objects or PythonObjects()
    accept = _check_accepted(command, accept_changed, resume)
    if resume is None:
        config = configure(command, options, console, file=file, source=source, objects=objects)
    elif file is not None:
        raise ConfigError(
            f"{'-c' if source == 'command line' else 'config'} and --resume: a resumed run uses "
            "its own config.yaml; leave one out"
        )
    else:
        config = configure_resumed(
            command, resume, options, accept=accept, source=source, objects=objects
        )

    from mlx_align.tracking.run_dir import new_run_dir
    from mlx_align.training import run as training

    algorithm = training.make_algorithm(config, loss=objects.loss, rewards=objects.rewards)
    if resume is None:
        run = new_run_dir(config.output, command)
        _check_not_input(str(run), "data", config.data)
    else:
        assert config.output is not None
        run = Path(config.output)
    again = _resume_command(command, run, source, objects)
    with _explain_resume(run, console, again):
        summary = training.train(
            algorithm,
            replace(config, output=str(run)),
            run,
            console,
            resume=resume is not None,
            accept=accept,
            data=objects.data,
            rewards=objects.rewards,
            eval_rewards=objects.eval_rewards,
            callbacks=objects.callbacks,
        )
    return run, summary


def configure(
    command: str,
    options: Mapping[str, Any],
    console: Console,
    *,
    file: Path | None = None,
    source: Source = "python",
    objects: PythonObjects | None = None,
) -> TrainConfig:
    """The checked options of a new run. Arguments and errors as in `train`."""
    data = None if objects is None else objects.data
    starter = STARTERS.get(command)
    use_starter = file is None and data is None and not {"model", "data"} & options.keys()
    if starter is not None and use_starter:
        file = shipped_file(starter)
    config = make_config(TRAINING_CONFIGS[command], options, file, source)
    if starter is not None and use_starter:
        from mlx_align.training.run import make_algorithm

        # A wrong option is an error before all else is printed.
        make_algorithm(config, loss=None if objects is None else objects.loss)
        console.note(f"No --model and no --data: training the starter.\n\n{_given_options(config)}")
    if data is not None:
        config = replace(config, data=None)
        require(config, "model", source=source)
    else:
        require(config, "model", "data", source=source)
    return _with_starter(config)


def _given_options(config: TrainConfig) -> str:
    """The options that are not at their defaults, a line each."""
    defaults = asdict(type(config)())
    return "".join(
        f"  {name}: {value}\n" for name, value in asdict(config).items() if value != defaults[name]
    )


def configure_resumed(
    command: str,
    resume: str,
    options: Mapping[str, Any],
    *,
    accept: Sequence[str] = (),
    source: Source = "python",
    objects: PythonObjects | None = None,
) -> TrainConfig:
    """The options of an earlier run, with the changes that a resumed run may make.

    Its option `output` is the run folder. Arguments and errors as in `train`.
    """
    from mlx_align.tracking.run_dir import CONFIG_FILE
    from mlx_align.training.checkpoint import last_step
    from mlx_align.training.resume import (
        check_command,
        effective_value,
        may_change,
        read_fingerprints,
        run_config,
    )

    objects = objects or PythonObjects()
    given = dict(options)
    output = given.pop("output", None)
    if resume and output is not None and Path(resume) != Path(output):
        raise ConfigError(
            f"--resume {resume} --output {output}: a run can only be resumed in its own folder; "
            "drop --output"
        )
    folder = resume or output
    if not folder:
        raise ConfigError("--resume needs a run: --resume RUN, or --output RUN --resume")
    run = Path(folder).expanduser()
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"--resume {folder}: has no {CONFIG_FILE}; expected a run folder")
    began = read_fingerprints(run)
    check_command(run, command, began)
    config_class = TRAINING_CONFIGS[command]
    config = run_config(run, config_class, began)
    if config.model is None:
        raise ConfigError(f"--resume {folder}: its {CONFIG_FILE} has no model")
    if objects.data is not None:
        config = replace(config, data=None)
    elif config.data is None and given.get("data") is None:
        raise _missing_object(folder, command, "data was", "data")
    _check_functions(folder, command, config, began, objects)
    wanted = make_config(config_class, given, source=source)
    changed = {}
    for name, declared in declared_options(config_class).items():
        if name not in given:
            continue
        value = getattr(wanted, name)
        before, shown = effective_value(config, name, run)
        if declared.change_on_resume or may_change(name, accept):
            changed[name] = value
        elif value not in (before, getattr(config, name)):
            raise ConfigError(
                f"{declared.flag} {value}: the run has {shown}, and a resumed run can't change it; "
                "leave it out, or start a new run"
            )
    for one, other in (("iters", "epochs"), ("epochs", "iters")):
        if one in given:
            changed[other] = None
            # A run that is made longer trains on, although it has reached its target.
            if "target_margin" not in given and getattr(config, "target_margin", None):
                changed["target_margin"] = 0.0
    done = last_step(run)
    if changed.get("iters") is not None and done >= changed["iters"] != config.iters:
        raise ConfigError(
            f"--iters {changed['iters']}: the run has made {done} steps already; give a larger "
            "number"
        )
    return replace(config, **changed, output=str(run))


def _check_accepted(command: str, accept: Sequence[str], resume: str | None) -> tuple[str, ...]:
    """The kinds of changes that `--accept-changed` names; a ConfigError if it is wrong."""
    if not accept:
        return ()

    from mlx_align.training.resume import ACCEPTABLE

    given = (accept,) if isinstance(accept, str) else accept
    kinds = tuple(dict.fromkeys(kind.strip() for one in given for kind in one.split(",")))
    for kind in kinds:
        if kind not in ACCEPTABLE:
            raise ConfigError(
                f"--accept-changed {kind}: unknown; choose from {', '.join(ACCEPTABLE)}"
            )
        if resume is None:
            raise ConfigError(f"--accept-changed {kind} needs --resume; add it, or leave it out")
        if kind == "rewards" and not issubclass(TRAINING_CONFIGS[command], OnPolicyConfig):
            raise ConfigError(f"--accept-changed rewards: {command} has no rewards; leave it out")
    return kinds


def _check_functions(
    folder: str,
    command: str,
    config: TrainConfig,
    began: Mapping[str, Any],
    objects: PythonObjects,
) -> None:
    """Raise a ConfigError if functions that the run was started with are missing."""
    loss = getattr(config, "loss", "")
    if loss.endswith("()") and objects.loss is None:
        raise _missing_object(folder, command, f"loss {loss} was", "loss")
    functions = [
        name.removeprefix("reward function ")
        for name in began.get("hashes", {})
        if name.startswith("reward function ")
    ]
    if functions and not (objects.rewards or objects.eval_rewards):
        what = f"reward {', '.join(functions)} {'was' if len(functions) == 1 else 'were'}"
        raise _missing_object(folder, command, what, "reward")


def _missing_object(folder: str, command: str, what: str, keyword: str) -> ConfigError:
    """The error for a Python object that a resumed run needs again."""
    return ConfigError(
        f"--resume {folder}: the run's {what} passed from Python; resume it with "
        f"mlx_align.{command}(resume={folder!r}, {keyword}=…)"
    )


def _with_starter(config: TrainConfig) -> TrainConfig:
    """The config with the name "starter" replaced by the paths of the shipped model and data."""
    assert config.model is not None
    return replace(
        config,
        model=resolve_starter(config.model, "model"),
        data=None if config.data is None else resolve_starter(config.data, "data"),
    )


def _resume_command(command: str, run: Path, source: Source, objects: PythonObjects) -> str:
    """The command or the Python call that resumes a run, with what has to be passed again."""
    if source == "command line":
        return f"mlx-align {command} --resume {shlex.quote(str(run))}"
    again = (("data", objects.data), ("loss", objects.loss), ("reward", objects.rewards))
    passed = "".join(f", {name}=…" for name, value in again if value)
    return f"mlx_align.{command}(resume={str(run)!r}{passed})"


@contextmanager
def _explain_resume(run: Path, console: Console, resume: str) -> Iterator[None]:
    """Within the block, what ends the run early prints what is kept and how to resume.

    Args:
        run: The run folder.
        console: Shows the line.
        resume: The command that resumes the run.
    """
    from mlx_align.system.interrupts import Interrupted
    from mlx_align.tracking.run_dir import CONFIG_FILE
    from mlx_align.training.checkpoint import checkpoint_folder, has_checkpoint, last_step

    try:
        yield
    except Interrupted as interruption:
        interruption.explained = True
        if has_checkpoint(run):
            console.note(f"stopped; resume with: {resume}")
        elif (run / CONFIG_FILE).is_file():
            console.note(f"stopped before the first checkpoint; start again with: {resume}")
        else:
            console.note("stopped before anything was written")
        raise
    except WriteError:
        if (run / CONFIG_FILE).is_file():
            kept = "the last checkpoint is intact"
            if not has_checkpoint(run):
                kept = "no checkpoint was written yet"
            console.note(f"{kept}; free some space and resume with: {resume}")
        raise
    except TrainingError as error:
        first = ""
        if isinstance(error, RewardError):
            first, resume = "after correcting the reward, ", _accepting_rewards(resume)
        if has_checkpoint(run):
            last = checkpoint_folder(run, last_step(run))
            console.note(f"the last checkpoint is {last}; {first}resume from it with: {resume}")
        elif (run / CONFIG_FILE).is_file():
            console.note(f"no checkpoint was written yet; {first}start again with: {resume}")
        raise


def _accepting_rewards(resume: str) -> str:
    """The command or call that resumes a run, with what accepts changed rewards."""
    if resume.startswith("mlx-align "):
        return f"{resume} --accept-changed rewards"
    return f"{resume.removesuffix(')')}, accept_changed='rewards')"


# --- evaluation and fusing ---


@dataclass(frozen=True)
class EvaluationOutcome:
    """The result of `evaluate`.

    Attributes:
        evaluation: An `evaluation.policy.Evaluation`.
        content: The same as JSON-serialisable values: the content of evaluation.json.
        folder: Folder of evaluation.json and answers.jsonl; None if they were not written.
        answers: The content of answers.jsonl.
    """

    evaluation: Any
    content: dict[str, Any]
    folder: Path | None
    answers: list[dict[str, Any]]


def evaluate(
    config: EvalConfig,
    console: Console,
    *,
    data: DataSource | None = None,
    own_data: DataSource | None = None,
) -> EvaluationOutcome:
    """Measure a run against its reference, and write the result if `output` is given.

    Args:
        config: The options; `model` and `adapter_path` are set.
        console: Shows progress.
        data: Held-out data in place of `config.data`.
        own_data: The data that the run was trained on, if it was passed from Python.

    Raises:
        MlxAlignError: An option is wrong, or a model, run or data can't be used.
    """
    from mlx_align.evaluation.policy import evaluate_policy
    from mlx_align.system.atomic_io import open_atomic, write_text

    assert config.model is not None
    config = replace(
        config,
        model=resolve_starter(config.model, "model"),
        data=None if config.data is None else resolve_starter(config.data, "data"),
    )
    if config.resume and config.output is None:
        raise ConfigError("--resume needs --output, the folder of the evaluation; add it")
    with _evaluation_output(config, console) as (folder, parts):
        evaluation, rows = evaluate_policy(
            config, console, data=data, own_data=own_data, parts=parts
        )
        content = evaluation.as_json()
        if folder is not None:
            with open_atomic(folder / ANSWERS_FILE) as stream:
                stream.writelines(to_json(row, ascii=False) + "\n" for row in rows)
            write_text(folder / EVALUATION_FILE, to_json(content, indent=2) + "\n")
            parts.remove()
    return EvaluationOutcome(evaluation, content, folder, rows)


@contextmanager
def _evaluation_output(
    config: EvalConfig, console: Console
) -> Iterator[tuple[Path | None, FinishedParts]]:
    """The folder of an evaluation, and its finished parts, which stay if the block is ended early.

    Raises:
        ConfigError: The folder has an evaluation already, or can't be created.
    """
    from mlx_align.evaluation.parts import FinishedParts
    from mlx_align.system.interrupts import Interrupted

    if config.output is None:
        if config.resume:
            raise ConfigError("--resume needs --output, the folder of the evaluation; add it")
        yield None, FinishedParts()
        return
    existed = Path(config.output).expanduser().exists()
    folder = _new_evaluation_folder(config.output, resume=config.resume)
    _check_not_input(config.output, "model", config.model)
    parts = FinishedParts(folder, resume=config.resume)
    try:
        yield folder, parts
    except BaseException as error:
        if not parts.close():
            if not existed:
                with suppress(OSError):  # it isn't empty
                    folder.rmdir()
        elif not isinstance(error, ConfigError):
            if isinstance(error, Interrupted):
                error.explained = True
            console.note(
                f"stopped; {folder} keeps what is finished: continue with the same command and "
                "--resume"
            )
        raise


def _check_not_input(output: str, name: str, path: str | None) -> None:
    """Raise a ConfigError if `--output` is the folder that the option `name` names."""
    if path is None or not Path(path).expanduser().is_dir():
        return
    if Path(output).expanduser().resolve() == Path(path).expanduser().resolve():
        raise ConfigError(f"--output {output}: is the folder of --{name}; name a new folder")


def _new_evaluation_folder(output: str, *, resume: bool) -> Path:
    from mlx_align.system.atomic_io import check_can_create

    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a folder")
    check_can_create(output)
    if (folder / EVALUATION_FILE).exists():
        raise ConfigError(f"--output {output}: has {EVALUATION_FILE} already; name a new folder")
    if (folder / ANSWERS_FILE).exists() and not resume:
        raise ConfigError(f"--output {output}: has {ANSWERS_FILE} already; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: can't be created ({error.strerror})") from error
    return folder


def fuse(config: FuseConfig) -> FuseReport:
    """Merge an adapter into its base model, as one model folder.

    Raises:
        MlxAlignError: The output folder is not empty, or the adapter does not fit the model.
    """
    from mlx_align.inference.trained_run import default_output
    from mlx_align.models.fuse import fuse_adapter
    from mlx_align.models.loading import open_model

    folder = open_model(resolve_starter(config.model, "model"))
    adapter = Path(config.adapter_path)
    output = default_output(adapter, "fused") if config.output is None else Path(config.output)
    return fuse_adapter(folder, adapter, output, dequantize=config.dequantize)


# --- planning ---


@dataclass(frozen=True)
class PlanOutcome:
    """The memory and time that a run needs.

    Attributes:
        plan: The memory.
        duration: The time; None if the speed is unknown.
    """

    plan: Plan
    duration: Duration | RolloutDuration | None

    def as_json(self) -> dict[str, Any]:
        """As JSON-serialisable values: sizes in bytes, times in seconds."""
        from mlx_align.planning.machine import platform_warnings, software_versions

        plan = self.plan
        return {
            "peak_bytes": plan.memory.peak_bytes,
            "parts": dict(plan.memory.parts),
            "moment": plan.memory.moment,
            "shape": list(plan.memory.shape),
            "trained_parameters": plan.memory.trained_parameters,
            "machine": asdict(plan.machine),
            "fits": plan.fits,
            "advice": [asdict(step) for step in plan.steps],
            "time": None if self.duration is None else asdict(self.duration),
            "remarks": platform_warnings(plan.machine, plan.model.activation_dtype),
            "software": software_versions(),
            "basis": PLAN_BASIS,
        }


def plan(
    options: Mapping[str, Any],
    *,
    file: Path | None = None,
    source: Source = "python",
    objects: PythonObjects | None = None,
) -> PlanOutcome:
    """Estimate memory and time of a training run.

    Args:
        options: Those of `PlanConfig` and of the planned command, by name.
        file: A YAML file of further options of the planned command.
        source: The source of the options, for messages.
        objects: Arguments that only a Python caller can pass.

    Raises:
        MlxAlignError: An option is wrong, or the model or data can't be read.
    """
    from mlx_align.models.loading import open_model
    from mlx_align.planning.machine import parse_machine, this_machine

    keywords = dict(options)
    own = {name: keywords.pop(name) for name in declared_options(PlanConfig) if name in keywords}
    planned = make_config(PlanConfig, own, None, source)
    if planned.machine is not None and (planned.measure or planned.run):
        flag = "--measure" if planned.measure else f"--run {planned.run}"
        raise ConfigError(f"{flag} measures this machine, not that of --machine; drop one")
    machine = this_machine() if planned.machine is None else parse_machine(planned.machine)
    config_class = TRAINING_CONFIGS[planned.command]
    for name in keywords:
        if name not in declared_options(config_class):
            raise ConfigError(f"{flag_of(name)} is not an option of {planned.command}; drop it")
    config = make_config(config_class, keywords, file, source)
    require(config, "model", source=source)
    objects = objects or PythonObjects()
    if config.data is None and objects.data is None and (planned.measure or planned.run):
        raise ConfigError("--data is missing; the time of a run depends on its data")
    config = _with_starter(config)
    assert config.model is not None
    planner = _Planner(planned, config, open_model(config.model), machine, objects)
    return (
        planner.plan_on_policy() if isinstance(config, OnPolicyConfig) else planner.plan_offline()
    )


@dataclass(frozen=True)
class _Planner:
    """Plans one run; the methods do so for offline and for on-policy commands."""

    planned: PlanConfig
    config: Any
    folder: ModelFolder
    machine: Machine
    objects: PythonObjects

    def plan_offline(self) -> PlanOutcome:
        from mlx_align.algorithms.base import Algorithm
        from mlx_align.planning.duration import expected_duration
        from mlx_align.planning.plan import can_pack, make_plan
        from mlx_align.training.defaults import resolve_offline
        from mlx_align.training.run import make_algorithm
        from mlx_align.training.setup import prepare_data, resolve_layout

        config, data = self.config, self.objects.data
        layout = resolve_layout(config)
        algorithm = make_algorithm(config, loss=self.objects.loss)
        assert isinstance(algorithm, Algorithm)
        groups = None
        if config.data is not None or data is not None:
            dataset = prepare_data(config, self.folder, algorithm.read, data)
            groups = algorithm.arrange(dataset.train)
            valid = len(dataset.valid)
            packs = algorithm.packs and can_pack(self.folder)
            config, _ = resolve_offline(
                config,
                layout,
                groups,
                valid,
                dataset.valid_fraction,
                packs=packs,
                width=self.folder.hidden_size,
            )
        made = make_plan(config, layout, self.folder, groups, self.machine)
        config = replace(config, grad_checkpoint=made.workload.grad_checkpoint)
        if not groups or not self.machine.here:
            return PlanOutcome(made, None)
        rate = self._rate(config, algorithm.with_options(config), groups)
        if rate is None:
            return PlanOutcome(made, None)
        has_reference = isinstance(config, LossConfig) and algorithm.needs_reference
        limit = made.workload.limit
        return PlanOutcome(
            made,
            expected_duration(config, groups, *rate, has_reference=has_reference, limit=limit),
        )

    def plan_on_policy(self) -> PlanOutcome:
        from mlx_align.planning.duration import (
            expected_rollout_duration,
            load_rate,
            rate_key,
            read_rollout_rate,
        )
        from mlx_align.planning.plan import make_on_policy_plan
        from mlx_align.training.defaults import resolve_on_policy
        from mlx_align.training.on_policy import (
            find_reward_models,
            limit_held_out,
            read_prompt_splits,
            reward_model_memory,
        )
        from mlx_align.training.run import make_algorithm
        from mlx_align.training.setup import resolve_layout

        config, folder, command = self.config, self.folder, self.planned.command
        if self.planned.measure:
            raise ConfigError(
                f"--measure can't time {command}, which samples and scores before it trains; run "
                "it with --iters 3, and give that run as --run"
            )
        make_algorithm(config, rewards=self.objects.rewards)
        layout = resolve_layout(config)
        prompts = None
        if config.data is not None or self.objects.data is not None:
            train, held_out, *_, fraction = read_prompt_splits(config, folder, self.objects.data)
            config, _ = resolve_on_policy(
                config, layout, len(train), len(held_out), fraction, width=folder.hidden_size
            )
            held_out = limit_held_out(held_out, config)
            prompts = [one.tokens for one in train], [one.tokens for one in held_out]
        models = find_reward_models(config, folder)
        rewards = reward_model_memory(models.values(), folder, layout)
        made = make_on_policy_plan(config, layout, folder, prompts, rewards, self.machine)
        config = replace(config, grad_checkpoint=made.workload.grad_checkpoint)
        if prompts is None or not self.machine.here:
            return PlanOutcome(made, None)
        run = self.planned.run
        if run is not None:
            rate: float | None = read_rollout_rate(Path(run).expanduser(), command)
            source = f"run {run}"
        else:
            rate = load_rate(rate_key(command, folder.path, config, layout, self.machine.name))
            source = "measured earlier, by a run"
        if rate is None:
            return PlanOutcome(made, None)
        return PlanOutcome(made, expected_rollout_duration(config, len(prompts[0]), rate, source))

    def _rate(
        self, config: TrainConfig, algorithm: Algorithm, groups: list[Any]
    ) -> tuple[float, str] | None:
        """Tokens per second, and their source: a run, a measurement now, or an earlier one."""
        from mlx_align.planning.duration import load_rate, rate_key, read_run_rate, save_rate
        from mlx_align.training.benchmark import measure_rate
        from mlx_align.training.setup import resolve_layout

        if self.planned.run is not None:
            return read_run_rate(Path(self.planned.run).expanduser()), f"run {self.planned.run}"
        layout = resolve_layout(config)
        command, path = self.planned.command, self.folder.path
        key = rate_key(command, path, config, layout, self.machine.name)
        if self.planned.measure:
            rate = measure_rate(config, algorithm, groups)
            save_rate(key, rate)
            return rate, "measured now"
        earlier = load_rate(key)
        return None if earlier is None else (earlier, "measured earlier, by a run or --measure")
