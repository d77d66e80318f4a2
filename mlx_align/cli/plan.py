"""`mlx-align plan`: memory and time of a run before it starts."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import Command, given, json_option, schema_options
from mlx_align.config import (
    TRAINING_CONFIGS,
    LossConfig,
    OnPolicyConfig,
    PlanConfig,
    TrainConfig,
    make_config,
)
from mlx_align.config.schema import declared_options, flag_of, require
from mlx_align.errors import ConfigError
from mlx_align.system.starter import resolve_starter

if TYPE_CHECKING:
    from mlx_align.data.buckets import AnyShape
    from mlx_align.models.loading import ModelFolder
    from mlx_align.planning.duration import Duration, RolloutDuration
    from mlx_align.planning.machine import Machine
    from mlx_align.planning.plan import Plan

_BASIS = (
    "Computed, from measurements of mlx's CPU backend: within 10% there, not yet compared with "
    "Metal. On a Mac, python scripts/verify_plan.py (in a checkout) does that."
)


def _training_options() -> list[click.Parameter]:
    """Every option of every training command, once."""
    options: dict[str | None, click.Parameter] = {}
    for config_class in TRAINING_CONFIGS.values():
        for option in schema_options(config_class):
            options.setdefault(option.name, option)
    return list(options.values())


@click.command(
    cls=Command,
    params=[*schema_options(PlanConfig), *_training_options()],
    shown=[*declared_options(PlanConfig), "model", "data"],
    short_help="Estimate memory and time of a run before it starts.",
)
@click.option(
    "-c", "--config", "config_file", type=click.Path(), metavar="FILE", help="YAML file of options."
)
@json_option("Print as JSON.")
def plan(config_file: str | None, json: bool, **options: Any) -> None:
    """Estimate what a training run needs, whether it fits, and what would make it fit.

    Takes all options of the training command; see mlx-align dpo --help, for example. Reads the
    model's configuration and the headers of its weights, not the weights (except with --measure).
    Without --data, assumes rows of --max-seq-length tokens.
    """
    from mlx_align.models.loading import open_model
    from mlx_align.planning.machine import parse_machine, this_machine

    keywords = given(options)
    own = {name: keywords.pop(name) for name in declared_options(PlanConfig) if name in keywords}
    planned = make_config(PlanConfig, own, None, "command line")
    if planned.machine is not None and (planned.measure or planned.run):
        flag = "--measure" if planned.measure else f"--run {planned.run}"
        raise ConfigError(f"{flag} measures this machine, not that of --machine; drop one")
    where = this_machine() if planned.machine is None else parse_machine(planned.machine)
    file = None if config_file is None else Path(config_file)
    config_class = TRAINING_CONFIGS[planned.command]
    for name in keywords:
        if name not in declared_options(config_class):
            raise ConfigError(f"{flag_of(name)} is not an option of {planned.command}; drop it")
    config = make_config(config_class, keywords, file, "command line")
    require(config, "model")
    if config.data is None and (planned.measure or planned.run):
        raise ConfigError("--data is missing; the time of a run depends on its data")
    assert config.model is not None
    config = replace(
        config,
        model=resolve_starter(config.model, "model"),
        data=None if config.data is None else resolve_starter(config.data, "data"),
    )
    assert config.model is not None
    planning = _plan_on_policy if isinstance(config, OnPolicyConfig) else _plan_offline
    made, duration = planning(
        planned.command,
        config,
        open_model(config.model),
        where,
        measure=planned.measure,
        run_folder=planned.run,
    )
    if json:
        click.echo(json_module.dumps(as_json(made, duration), indent=2))
    else:
        click.echo(render(made, duration))


def _plan_offline(
    command: str,
    config: TrainConfig,
    folder: ModelFolder,
    where: Machine,
    *,
    measure: bool,
    run_folder: str | None,
) -> tuple[Plan, Duration | None]:
    from mlx_align.algorithms.base import Algorithm
    from mlx_align.planning.duration import expected_duration
    from mlx_align.planning.plan import make_plan
    from mlx_align.training.run import make_algorithm
    from mlx_align.training.setup import prepare_data, resolve_layout

    layout = resolve_layout(config)
    task = make_algorithm(config)
    assert isinstance(task, Algorithm)
    groups = None
    if config.data is not None:
        groups = task.arrange(prepare_data(config, folder, task.read).train)
    made = make_plan(config, layout, folder, groups, where)
    if not groups or not where.here:
        return made, None
    found = _rate(command, config, measure, run_folder, task, groups)
    if found is None:
        return made, None
    has_reference = isinstance(config, LossConfig) and task.needs_reference
    return made, expected_duration(
        config, groups, *found, has_reference=has_reference, limit=made.workload.limit
    )


def _plan_on_policy(
    command: str,
    config: Any,
    folder: ModelFolder,
    where: Machine,
    *,
    measure: bool,
    run_folder: str | None,
) -> tuple[Plan, RolloutDuration | None]:
    from mlx_align.planning.duration import (
        expected_rollout_duration,
        load_rate,
        rate_key,
        read_rollout_rate,
    )
    from mlx_align.planning.plan import make_on_policy_plan
    from mlx_align.training.run import make_algorithm
    from mlx_align.training.setup import find_reward_models, read_prompt_splits, resolve_layout

    if measure:
        raise ConfigError(
            f"--measure can't time {command}, which samples and scores before it trains; run it "
            "with --iters 3, and give that run as --run"
        )
    make_algorithm(config)
    layout = resolve_layout(config)
    prompts = None
    if config.data is not None:
        train, held_out, *_ = read_prompt_splits(config, folder)
        prompts = [prompt.tokens for prompt in train], [prompt.tokens for prompt in held_out]
    rewards = find_reward_models(config, folder, layout)
    made = make_on_policy_plan(config, layout, folder, prompts, rewards, where)
    if prompts is None or not where.here:
        return made, None
    if run_folder is not None:
        rate: float | None = read_rollout_rate(Path(run_folder).expanduser(), command)
        source = f"run {run_folder}"
    else:
        rate = load_rate(rate_key(command, folder.path, config, layout, where.name))
        source = "measured earlier, by a run"
    if rate is None:
        return made, None
    return made, expected_rollout_duration(config, len(prompts[0]), rate, source)


def _rate(
    command: str,
    config: TrainConfig,
    measure: bool,
    run_folder: str | None,
    task: Any,
    groups: list[Any],
) -> tuple[float, str] | None:
    """Tokens per second, and their source: a run, a measurement now, or an earlier one."""
    from mlx_align.models.loading import resolve_model_path
    from mlx_align.planning.duration import load_rate, rate_key, read_run_rate, save_rate
    from mlx_align.planning.machine import this_machine
    from mlx_align.training.benchmark import measured_rate
    from mlx_align.training.setup import resolve_layout

    if run_folder is not None:
        return read_run_rate(Path(run_folder).expanduser()), f"run {run_folder}"
    assert config.model is not None
    path = resolve_model_path(config.model)
    key = rate_key(command, path, config, resolve_layout(config), this_machine().name)
    if measure:
        rate = measured_rate(config, task, groups)
        save_rate(key, rate)
        return rate, "measured now"
    earlier = load_rate(key)
    return None if earlier is None else (earlier, "measured earlier, by a run or --measure")


def as_json(plan: Plan, duration: Duration | RolloutDuration | None) -> dict[str, Any]:
    """The plan as JSON; sizes in bytes, times in seconds."""
    from mlx_align.planning.machine import platform_warnings, software_versions

    return {
        "peak_bytes": plan.memory.peak_bytes,
        "parts": dict(plan.memory.parts),
        "moment": plan.memory.moment,
        "shape": list(plan.memory.shape),
        "trained_parameters": plan.memory.trained_parameters,
        "machine": asdict(plan.machine),
        "fits": plan.fits,
        "advice": [asdict(step) for step in plan.steps],
        "time": None if duration is None else asdict(duration),
        "remarks": platform_warnings(plan.machine, plan.model.activation_dtype),
        "software": software_versions(),
        "basis": _BASIS,
    }


def _describe_shape(shape: AnyShape) -> str:
    prompt, completion, count, *packed = shape
    if packed:
        return f"rows of {prompt} prompt tokens and {completion} completion tokens"
    prompts = f"{count} prompts of {prompt}" if count > 1 else f"a prompt of {prompt}"
    return f"{prompts}, completions of {completion}"


def render(plan: Plan, duration: Duration | RolloutDuration | None) -> str:
    """The plan as text."""
    from mlx_align.planning.duration import RolloutDuration
    from mlx_align.planning.machine import platform_warnings, software_versions
    from mlx_align.planning.memory import SAMPLING
    from mlx_align.planning.plan import format_bytes
    from mlx_align.system.formatting import format_duration

    memory, machine = plan.memory, plan.machine
    where = _describe_shape(memory.shape)
    if memory.moment == SAMPLING and plan.workload.sampling is not None:
        sampling = plan.workload.sampling
        where = f"{sampling.rows} completions of {sampling.completion} tokens at once"
    lines = [f"Peak memory, in {memory.moment} ({where}):"]
    lines += [
        f"  {name:<24}{format_bytes(n):>10}"
        for name, n in memory.parts.items()
        if n or name != "reward models"
    ]
    lines.append(f"  {'total':<24}{format_bytes(memory.peak_bytes):>10}")
    verdict = "It fits" if plan.fits else "It does not fit"
    room = "recommended working set" if machine.metal else "memory"
    lines += [f"{verdict}: {machine.name}, {room} {format_bytes(machine.working_set_bytes)}.", ""]
    if plan.steps:
        end = "" if plan.steps[-1].fits else " (all of them together are not enough)"
        lines.append(f"What makes it fit, cheapest first, each added to the previous ones{end}:")
        lines += [
            f"  {format_bytes(s.peak_bytes):>9}  {s.options}  ({s.cost})" for s in plan.steps
        ] + [""]
    elif not plan.fits:
        lines += ["No option makes it fit; use a smaller model.", ""]
    if isinstance(duration, RolloutDuration):
        lines.append(
            f"Time: {format_duration(duration.training_seconds)} for {duration.batches:,} rollout "
            f"batches of {format_duration(duration.seconds_per_batch)} ({duration.source})."
        )
    elif duration is not None:
        lines.append(
            f"Time: {format_duration(duration.training_seconds)} of training, at most "
            f"{format_duration(duration.reference_seconds)} for the reference, at "
            f"{duration.tokens_per_second:,.0f} tokens/s ({duration.source})."
        )
    elif machine.here:
        measuring = "" if plan.workload.sampling is not None else "--measure times a few steps, "
        lines.append(
            f"Time: unknown until such a run was made; {measuring}--run RUN takes the speed of "
            "another run."
        )
    lines += [f"- {remark}" for remark in platform_warnings(machine, plan.model.activation_dtype)]
    lines.append(f"- {', '.join(f'{name} {what}' for name, what in software_versions().items())}")
    lines.append(f"- {_BASIS}")
    return "\n".join(lines)
