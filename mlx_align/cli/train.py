"""The training commands, all made by one factory: dpo, kto, sft, reward, ppo, grpo."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from mlx_align.cli.options import (
    Command,
    Group,
    config_options,
    echo_json,
    given_options,
    json_option,
    options_of_run,
    run_argument,
    schema_options,
)
from mlx_align.config import TRAINING_CONFIGS, ExportConfig, TrainConfig, make_config
from mlx_align.config.schema import flag_of
from mlx_align.errors import ConfigError, TrainingError, WriteError
from mlx_align.system.starter import resolve_starter

_EPILOG = (
    "Names of mlx-lm, TRL and axolotl are accepted too, such as --output-dir, with hyphens or "
    "underscores. The reference of options lists them."
)
_UPDATES = "--iters, --steps-per-* and --save-every count optimizer updates."
_ROLLOUTS = (
    "--iters, --steps-per-* and --save-every count rollout batches: --batch-size x "
    "--grad-accumulation-steps x --minibatches prompts with --group-size completions each."
)


@dataclass(frozen=True)
class TrainingCommand:
    """The name and the texts of a training command.

    Attributes:
        name: The command.
        summary: One line for the list of commands.
        help: The text of its --help.
    """

    name: str
    summary: str
    help: str

    @property
    def config_class(self) -> type[TrainConfig]:
        """The config class with its options."""
        return TRAINING_CONFIGS[self.name]


DPO = TrainingCommand(
    "dpo",
    "Train on preference pairs (DPO and its variants).",
    "Train a model on preference pairs. The run folder loads in mlx-lm.\n\nWithout --model, --data "
    f"and -c, trains the small starter model that comes with the package. {_UPDATES}",
)
KTO = TrainingCommand(
    "kto",
    "Train on unpaired good and bad completions (KTO).",
    "Train a model on labelled completions (prompt, completion, label). The run folder loads in "
    "mlx-lm.\n\nPairs are accepted too, and split into a desirable and an undesirable completion. "
    f"{_UPDATES}",
)
SFT = TrainingCommand(
    "sft",
    "Train on demonstrations, before preference training.",
    "Train a model on demonstrations. The run folder loads in mlx-lm and is what dpo "
    "--init-adapter takes.\n\nAccepts prompts with completions, conversations, instructions, text, "
    f"and pairs (uses the chosen completions). {_UPDATES}",
)
REWARD = TrainingCommand(
    "reward",
    "Train a reward model on preferences, or export one.",
    "Train a reward model on pairs or ranked lists.\n\nA linear head on the last token of a "
    "completion replaces the vocabulary head. The final report gives accuracy on held-out data, "
    f"and how much of it length explains. {_UPDATES}",
)
PPO = TrainingCommand(
    "ppo",
    "Train on the policy's own completions, with a critic (PPO).",
    "Train a policy by PPO on prompts and rewards. The run folder loads in mlx-lm.\n\nPolicy, "
    "reference, reward model and critic are adapters of one base model. Rewards come from a reward "
    "model (--reward-model), from functions (--reward), or both. Reward functions run with your "
    f"user's permissions, in a separate process.\n\n{_ROLLOUTS}",
)
GRPO = TrainingCommand(
    "grpo",
    "Train on the policy's own completions, compared in groups (GRPO, RLOO, ...).",
    "Train a policy by GRPO or a related method on prompts and rewards. The run folder loads in "
    "mlx-lm.\n\n--loss selects the method; online_dpo trains on the best and the worst completion "
    "of each prompt as a pair. Rewards come from functions (--reward), from a reward model "
    "(--reward-model), or both. Reward functions run with your user's permissions, in a separate "
    f"process.\n\n{_ROLLOUTS}",
)


def training_command(entry: TrainingCommand) -> Command:
    """The click command of a training command."""
    return Command(
        entry.name,
        params=_parameters(entry),
        callback=partial(_train, entry),
        short_help=entry.summary,
        help=entry.help,
        epilog=_EPILOG,
    )


def _parameters(entry: TrainingCommand) -> list[click.Parameter]:
    return [
        *schema_options(entry.config_class),
        click.Option(
            ["-c", "--config", "config_file"],
            type=click.Path(),
            metavar="FILE",
            help="YAML file with options; the command line takes precedence.",
        ),
        click.Option(
            ["--resume"],
            is_flag=False,
            flag_value="",
            type=click.Path(),
            metavar="[RUN]",
            help="Resume an interrupted run, or train a finished one for longer: RUN, or the one "
            "at --output.",
        ),
        click.Option(
            ["--accept-changed"],
            type=click.Choice(["rewards", "data"]),
            multiple=True,
            help="With --resume: continue although this changed.",
        ),
        click.Option(
            ["--json"], is_flag=True, help="Print the summary as JSON; all else goes to stderr."
        ),
    ]


def _train(
    entry: TrainingCommand,
    *,
    config_file: str | None,
    resume: str | None,
    accept_changed: tuple[str, ...],
    json: bool,
    **options: Any,
) -> None:
    """Train, and print the outcome."""
    # Imported late: rich and mlx-lm take seconds, and --help should be fast.
    from mlx_align import commands
    from mlx_align.system.console import Console

    console = Console(json)
    from mlx_align.system.activation import activation_command
    from mlx_align.system.interrupts import Interrupted

    try:
        run, summary = commands.train(
            entry.name,
            given_options(options),
            console,
            file=None if config_file is None else Path(config_file),
            resume=resume,
            accept_changed=accept_changed,
            source="command line",
        )
    except (Interrupted, TrainingError, WriteError):
        if activate := activation_command():
            console.note(f"Your shell finds mlx-align after: {activate}")
        raise
    if json:
        echo_json(summary, indent=2)
        return

    from mlx_align.tracking.run_dir import PAGE_FILE

    console.outcome(summary)
    console.note(f"\nRun folder: {run}\nRun page: {run / PAGE_FILE}\n")
    if activate := activation_command():
        console.note(f"Your shell finds these commands after: {activate}")
    for what, command in _next_commands(entry, run, summary):
        console.note(f"{what}:\n  {command}")


def _next_commands(
    entry: TrainingCommand, run: Path, summary: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """What to do with a run, and the commands that do it."""
    folder = shlex.quote(str(run))
    if entry is REWARD:
        yield "Score completions with it", summary["talk"]
        return
    if summary["verdict"]["kind"] == "broken":
        from mlx_align.tracking.run_dir import CONFIG_FILE, read_run_record

        rate = read_run_record(run).config.get("learning_rate")
        yield "Read what it answers now", f"mlx-align chat {folder} --compare"
        if isinstance(rate, float):
            file, output = (shlex.quote(str(path)) for path in (run / CONFIG_FILE, f"{run}-again"))
            options = f"--config {file} --learning-rate {rate / 10:g} --output {output}"
            yield "Train again at a tenth of the rate", f"mlx-align {entry.name} {options}"
        return
    yield "Ask it, and the model it started from", f"mlx-align chat {folder} --compare"
    yield "Measure the change", f"mlx-align eval {folder}"
    yield "Use it in stock mlx-lm", summary["talk"]
    if entry is SFT:
        yield "Train on preferences from here", f"mlx-align dpo … --init-adapter {folder}"


dpo, kto, sft, ppo, grpo = (training_command(entry) for entry in (DPO, KTO, SFT, PPO, GRPO))


def _train_reward(context: click.Context, /, **options: Any) -> None:
    """Train, unless a subcommand follows."""
    if context.invoked_subcommand is None:
        _train(REWARD, **options)
        return
    options["json"] = options["json"] or None
    for name in given_options(options):
        flag = "--config" if name == "config_file" else flag_of(name)
        raise ConfigError(
            f"{flag} before {context.invoked_subcommand}: is an option of training; put the "
            f"options of {context.invoked_subcommand} after it"
        )


reward = Group(
    "reward",
    params=_parameters(REWARD),
    callback=click.pass_context(_train_reward),
    invoke_without_command=True,
    short_help=REWARD.summary,
    help=REWARD.help,
    epilog=_EPILOG,
    subcommand_metavar="| export ...",
)


@reward.command(short_help="Write a reward model that transformers loads.")
@run_argument
@config_options(ExportConfig)
@json_option("Print the report as JSON.")
def export(json: bool, **options: Any) -> None:
    """Write base, adapter and head as one *ForSequenceClassification folder.

    transformers and vLLM load it. Quantised layers are written dequantised. An ensemble is
    exported as its mean.
    """
    from mlx_align.inference.export import export_reward_model
    from mlx_align.inference.trained_run import default_output
    from mlx_align.models.loading import open_model
    from mlx_align.system.console import Console

    console = Console(json)
    config = make_config(
        ExportConfig, options_of_run(options, needs_run=True), None, "command line"
    )
    folder = open_model(resolve_starter(config.model, "model"))
    output = config.output or str(default_output(config.adapter_path, "transformers"))
    report = export_reward_model(folder, Path(config.adapter_path), Path(output))
    if json:
        echo_json({"output": output, **asdict(report)}, indent=2)
        return
    console.note(
        f"Wrote {report.architecture} to {output}; its scores on random tokens differ from "
        f"the run's by at most {report.score_gap:.2g}.\n"
        f"{report.reads_at}\n"
        f"Load it: AutoModelForSequenceClassification.from_pretrained({output!r})"
    )
