"""`mlx-align plan`: memory and time of a run before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import Command, echo_json, given_options, json_option, schema_options
from mlx_align.config import (
    TRAINING_CONFIGS,
    PlanConfig,
)
from mlx_align.config.schema import declared_options

if TYPE_CHECKING:
    from mlx_align.data.buckets import AnyShape
    from mlx_align.planning.duration import Duration, RolloutDuration
    from mlx_align.planning.plan import Plan


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
    from mlx_align import commands

    file = None if config_file is None else Path(config_file)
    found = commands.plan(given_options(options), file=file, source="command line")
    if json:
        echo_json(found.as_json(), indent=2)
    else:
        click.echo(render(found.plan, found.duration))


def _describe_shape(shape: AnyShape) -> str:
    prompt, completion, count, *packed = shape
    if packed:
        return f"rows of {prompt} prompt tokens and {completion} completion tokens"
    prompts = f"{count} prompts of {prompt}" if count > 1 else f"a prompt of {prompt}"
    return f"{prompts}, completions of {completion}"


def render(plan: Plan, duration: Duration | RolloutDuration | None) -> str:
    """The plan as text."""
    from mlx_align.commands import PLAN_BASIS
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
            f"Time: unknown before the first run like this; {measuring}--run RUN takes the speed "
            "of another run."
        )
    lines += [f"- {remark}" for remark in platform_warnings(machine, plan.model.activation_dtype)]
    lines.append(f"- {', '.join(f'{name} {what}' for name, what in software_versions().items())}")
    lines.append(f"- {PLAN_BASIS}")
    return "\n".join(lines)
