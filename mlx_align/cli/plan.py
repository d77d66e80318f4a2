"""`mlx-align plan`: memory and time of a run before it starts."""

from __future__ import annotations

import json as json_module
import typing
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import config_options, given, option_of
from mlx_align.config import (
    DpoConfig,
    GrpoConfig,
    KtoConfig,
    LossConfig,
    OnPolicyConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)
from mlx_align.errors import ConfigError
from mlx_align.settings import resolve
from mlx_align.shipped import shipped_or_given

if TYPE_CHECKING:
    from mlx_align.data.shapes import AnyShape
    from mlx_align.models.loading import ModelFolder
    from mlx_align.plan.check import Plan
    from mlx_align.plan.machine import Machine
    from mlx_align.plan.timing import Duration, RolloutDuration
    from mlx_align.train.task import Task

_KINDS: dict[str, type[TrainConfig]] = {
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "grpo": GrpoConfig,
}
_BASIS = (
    "Computed, from measurements of mlx's CPU backend: within 10% there, not yet compared with "
    "Metal. On a Mac, python scripts/verify_plan.py (in a checkout) does that."
)


def _all_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of dpo, and those that the other commands have besides."""
    names = {entry.name for entry in fields(DpoConfig)}
    for command, kind in _KINDS.items():
        for entry in fields(kind):
            if entry.name not in names:
                names.add(entry.name)
                hint = typing.get_type_hints(kind)[entry.name]
                function = option_of(entry, hint, f"As in {command}.")(function)
    return config_options(DpoConfig)(function)


@click.command(short_help="Memory and time of a run before it starts.")
@_all_options
@click.option("-c", "--config", "config_file", metavar="FILE", help="YAML file with options.")
@click.option(
    "--command",
    type=click.Choice(sorted(_KINDS)),
    default="dpo",
    show_default=True,
    help="The command whose run to plan.",
)
@click.option("--machine", metavar="TEXT", help='Plan for another Mac, like "16 GB M2".')
@click.option("--measure", is_flag=True, help="Load the model and time a few real steps here.")
@click.option("--run", "run_folder", metavar="RUN", help="Take the speed of this finished run.")
@click.option("--json", is_flag=True, help="Print as JSON.")
def plan(
    config_file: str | None,
    command: str,
    machine: str | None,
    measure: bool,
    run_folder: str | None,
    json: bool,
    **options: Any,
) -> None:
    """Say what a training run would need, whether it fits, and what makes it fit.

    Takes the options of the training command. Reads the model's configuration and the headers of
    its weights, never the weights (but with --measure). Without --data, rows of --max-seq-length.
    """
    from mlx_align.models.loading import open_model
    from mlx_align.plan.machine import parse_machine, this_machine

    if machine is not None and (measure or run_folder):
        flag = "--measure" if measure else "--run"
        raise ConfigError(f"{flag}: measures this machine, not that of --machine; leave one out")
    where = this_machine() if machine is None else parse_machine(machine)
    kind = _KINDS[command]
    config = resolve(kind, given(options), None if config_file is None else Path(config_file))
    if config.model is None:
        raise ConfigError("--model is missing; name a folder or a hub name")
    if config.data is None and (measure or run_folder):
        raise ConfigError("--data is missing; a run's time follows from its data")
    config = replace(config, model=shipped_or_given(config.model, "model"))
    if config.data is not None:
        config = replace(config, data=shipped_or_given(config.data, "data"))
    assert config.model is not None
    planning = _plan_on_policy if isinstance(config, OnPolicyConfig) else _plan_offline
    made, duration = planning(
        command, config, open_model(config.model), where, measure=measure, run_folder=run_folder
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
    from mlx_align.plan.check import make_plan
    from mlx_align.plan.timing import expected
    from mlx_align.train.setup import prepare_data, resolve_layout

    layout = resolve_layout(config)
    task = _task(command, config)
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
    return made, expected(
        config, groups, *found, has_reference=has_reference, limit=made.work.limit
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
    from mlx_align.plan.on_policy import make_on_policy_plan
    from mlx_align.plan.timing import expected_rollouts, rate_key, rate_of_rollouts, stored_rate
    from mlx_align.train.grpo import check_group_options
    from mlx_align.train.on_policy_setup import check_shared_options, read_run_prompts
    from mlx_align.train.online_dpo import ONLINE_DPO, check_pair_options
    from mlx_align.train.planned import reward_models
    from mlx_align.train.ppo import check_ppo_options
    from mlx_align.train.setup import resolve_layout

    if measure:
        raise ConfigError(
            f"--measure: {command} samples and asks for rewards before it learns; run it with "
            "--iters 3, and name that run with --run"
        )
    check_shared_options(config)
    if command == "ppo":
        check_ppo_options(config)
    elif config.loss == ONLINE_DPO:
        check_pair_options(config)
    else:
        check_group_options(config)
    layout = resolve_layout(config)
    prompts = None
    if config.data is not None:
        train, held_out, *_ = read_run_prompts(config, folder)
        prompts = [prompt.tokens for prompt in train], [prompt.tokens for prompt in held_out]
    rewards = reward_models(config, folder, layout)
    made = make_on_policy_plan(config, layout, folder, prompts, rewards, where)
    if prompts is None or not where.here:
        return made, None
    if run_folder is not None:
        rate: float | None = rate_of_rollouts(Path(run_folder).expanduser(), command)
        source = f"run {run_folder}"
    else:
        rate = stored_rate(rate_key(command, folder.path, config, layout, where.name))
        source = "measured before, by a run"
    if rate is None:
        return made, None
    return made, expected_rollouts(config, len(prompts[0]), rate, source)


def _task(command: str, config: Any) -> Task:
    from mlx_align.train.preference import dpo_task
    from mlx_align.train.reward import reward_task
    from mlx_align.train.supervised import sft_task
    from mlx_align.train.unpaired import kto_task

    tasks: dict[str, Callable[[Any], Task]] = {
        "dpo": dpo_task,
        "kto": kto_task,
        "sft": sft_task,
        "reward": reward_task,
    }
    return tasks[command](config)


def _rate(
    command: str,
    config: TrainConfig,
    measure: bool,
    run_folder: str | None,
    task: Task,
    groups: list[Any],
) -> tuple[float, str] | None:
    """Tokens per second and where they come from: a run, a measurement now, or an earlier one."""
    from mlx_align.models.compat import resolve_model_path
    from mlx_align.plan.machine import this_machine
    from mlx_align.plan.timing import rate_key, rate_of_run, store_rate, stored_rate
    from mlx_align.train.measured import measured_rate
    from mlx_align.train.setup import resolve_layout

    if run_folder is not None:
        return rate_of_run(Path(run_folder).expanduser()), f"run {run_folder}"
    assert config.model is not None
    path = resolve_model_path(config.model)
    key = rate_key(command, path, config, resolve_layout(config), this_machine().name)
    if measure:
        rate = measured_rate(config, task, groups)
        store_rate(key, rate)
        return rate, "measured now"
    earlier = stored_rate(key)
    return None if earlier is None else (earlier, "measured before, by a run or --measure")


def as_json(plan: Plan, duration: Duration | RolloutDuration | None) -> dict[str, Any]:
    """The plan for programs; sizes in bytes, times in seconds."""
    from mlx_align.plan.machine import remarks, software

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
        "remarks": remarks(plan.machine, plan.model.activation_dtype),
        "software": software(),
        "basis": _BASIS,
    }


def _say_shape(shape: AnyShape) -> str:
    prompt, completion, count, *packed = shape
    if packed:
        return f"rows of {prompt} tokens of prompts and {completion} of answers"
    prompts = f"{count} prompts of {prompt}" if count > 1 else f"a prompt of {prompt}"
    return f"{prompts}, answers of {completion}"


def render(plan: Plan, duration: Duration | RolloutDuration | None) -> str:
    """The plan for people."""
    from mlx_align.plan.check import say_bytes
    from mlx_align.plan.machine import remarks, software
    from mlx_align.plan.memory import SAMPLING
    from mlx_align.plan.timing import RolloutDuration
    from mlx_align.train.runlog import say_seconds

    memory, machine = plan.memory, plan.machine
    where = _say_shape(memory.shape)
    if memory.moment == SAMPLING and plan.work.sampling is not None:
        said = plan.work.sampling
        where = f"{said.rows} completions of {said.completion} tokens at once"
    lines = [f"Peak memory, in {memory.moment} ({where}):"]
    lines += [
        f"  {name:<24}{say_bytes(n):>10}"
        for name, n in memory.parts.items()
        if n or name != "reward models"
    ]
    lines.append(f"  {'in all':<24}{say_bytes(memory.peak_bytes):>10}")
    verdict = "It fits" if plan.fits else "It does not fit"
    room = "recommended working set" if machine.metal else "memory"
    lines += [f"{verdict}: {machine.name}, {room} {say_bytes(machine.working_set_bytes)}.", ""]
    if plan.steps:
        end = "" if plan.steps[-1].fits else " (even all of it is not enough)"
        lines.append(f"What makes it fit, cheapest first, each on top of those before{end}:")
        lines += [
            f"  {say_bytes(s.peak_bytes):>9}  {s.options}  ({s.cost})" for s in plan.steps
        ] + [""]
    elif not plan.fits:
        lines += ["No option makes it fit: take a smaller model.", ""]
    if isinstance(duration, RolloutDuration):
        lines.append(
            f"Time: {say_seconds(duration.training_seconds)} for {duration.batches:,} rollout "
            f"batches of {say_seconds(duration.seconds_per_batch)} ({duration.source})."
        )
    elif duration is not None:
        lines.append(
            f"Time: {say_seconds(duration.training_seconds)} of training, at most "
            f"{say_seconds(duration.reference_seconds)} for the reference, at "
            f"{duration.tokens_per_second:,.0f} tokens/s ({duration.source})."
        )
    elif machine.here:
        measuring = "" if plan.work.sampling is not None else "--measure times a few steps, "
        lines.append(
            f"Time: not known before such a run was made; {measuring}--run RUN takes another "
            "run's speed."
        )
    lines += [f"- {remark}" for remark in remarks(machine, plan.model.activation_dtype)]
    lines.append(f"- {', '.join(f'{name} {what}' for name, what in software().items())}")
    lines.append(f"- {_BASIS}")
    return "\n".join(lines)
