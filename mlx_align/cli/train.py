"""The training commands, all made by one factory: dpo, kto, sft, reward, ppo, grpo."""

from __future__ import annotations

import json as json_module
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import (
    Command,
    Group,
    config_options,
    given,
    json_option,
    schema_options,
)
from mlx_align.config import (
    TRAINING_CONFIGS,
    ExportConfig,
    TrainConfig,
    make_config,
)
from mlx_align.config.schema import declared_options, flag_of, require, to_yaml
from mlx_align.errors import ConfigError, WriteError
from mlx_align.system.starter import resolve_starter, shipped_file

if TYPE_CHECKING:
    from mlx_align.cli.console import Console

_UPDATES = "--iters, --steps-per-* and --save-every count optimizer updates."
_ROLLOUTS = (
    "--iters, --steps-per-* and --save-every count rollout batches: --batch-size x "
    "--grad-accumulation-steps x --minibatches prompts with --group-size completions each."
)


@dataclass(frozen=True)
class TrainingCommand:
    """What one training command has of its own.

    Attributes:
        name: The command.
        summary: One line for the list of commands.
        help: The text of its --help.
        next_step: Printed above the command that uses the result.
        starter: A shipped configuration, used if neither model nor data is given.
    """

    name: str
    summary: str
    help: str
    next_step: str = "Chat with the result in stock mlx-lm"
    starter: str | None = None

    @property
    def config_class(self) -> type[TrainConfig]:
        """The config class with its options."""
        return TRAINING_CONFIGS[self.name]


DPO = TrainingCommand(
    "dpo",
    "Train on preference pairs (DPO and its variants).",
    "Train a model on preference pairs. The run folder loads in mlx-lm.\n\nWithout --model, --data "
    f"and -c, trains the small starter model that comes with the package. {_UPDATES}",
    starter="starter.yaml",
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
    next_step="Score completions with it",
)
PPO = TrainingCommand(
    "ppo",
    "Train on the policy's own completions, with a critic (PPO).",
    "Train a policy by PPO on prompts and rewards. The run folder loads in mlx-lm.\n\nPolicy, "
    "reference, reward model and critic are adapters of one base model. Rewards come from a reward "
    "model (--reward-model), from functions (--reward), or both. Reward functions run with your "
    f"user's permissions, in a process of their own.\n\n{_ROLLOUTS}",
)
GRPO = TrainingCommand(
    "grpo",
    "Train on the policy's own completions, compared in groups (GRPO, RLOO, ...).",
    "Train a policy by GRPO or a related method on prompts and rewards. The run folder loads in "
    "mlx-lm.\n\n--loss selects the method; online_dpo trains on the best and the worst completion "
    "of each prompt as a pair. Rewards come from functions (--reward), from a reward model "
    "(--reward-model), or both. Reward functions run with your user's permissions, in a process of "
    f"their own.\n\n{_ROLLOUTS}",
)


def training_command(entry: TrainingCommand) -> Command:
    """The click command of a training command."""
    return Command(
        entry.name,
        params=_parameters(entry),
        callback=partial(_train, entry),
        short_help=entry.summary,
        help=entry.help,
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
            help="Resume an interrupted run: RUN, or the one at --output.",
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
    json: bool,
    **options: Any,
) -> None:
    """Resolve the options, train, and print the outcome."""
    # Imported late, because mlx-lm takes seconds and --help should not.
    from mlx_align.cli.console import Console
    from mlx_align.tracking.run_dir import PAGE_FILE, new_run_dir
    from mlx_align.training.run import make_algorithm, train

    console = Console(json)
    keywords = given(options)
    if resume is not None:
        config, run = _resumed(entry, resume, keywords, config_file)
        algorithm = make_algorithm(config)
    else:
        config = _configured(entry, keywords, config_file, console)
        algorithm = make_algorithm(config)
        run = new_run_dir(config.output, entry.name)
    config = replace(config, output=str(run))
    with _explaining_resume(run, entry.name, console):
        summary = train(algorithm, config, run, console, resume=resume is not None)
    if json:
        click.echo(json_module.dumps(summary, indent=2))
        return
    console.outcome(summary)
    console.note(
        f"\nRun folder: {run}\nRun page: {run / PAGE_FILE}\n{entry.next_step}:\n  {summary['talk']}"
    )
    if entry is SFT:
        console.note(f"Train on preferences from here: mlx-align dpo … --init-adapter {run}")


def _configured(
    entry: TrainingCommand,
    keywords: Mapping[str, Any],
    config_file: str | None,
    console: Console,
) -> TrainConfig:
    file = None if config_file is None else Path(config_file)
    use_starter = file is None and "model" not in keywords and "data" not in keywords
    if entry.starter is not None and use_starter:
        file = shipped_file(entry.starter)
    config = make_config(entry.config_class, keywords, file, "command line")
    if entry.starter is not None and use_starter:
        console.note(f"No --model and no --data: training the starter.\n\n{to_yaml(config)}")
    require(config, "model", "data")
    assert config.model is not None
    assert config.data is not None
    return replace(
        config,
        model=resolve_starter(config.model, "model"),
        data=resolve_starter(config.data, "data"),
    )


def _resumed(
    entry: TrainingCommand,
    resume: str,
    keywords: dict[str, Any],
    config_file: str | None,
) -> tuple[TrainConfig, Path]:
    """The config of an earlier run, with the changes that a resumed run may make."""
    from mlx_align.tracking.run_dir import CONFIG_FILE
    from mlx_align.training.resume import check_command, read_fingerprints

    if config_file is not None:
        raise ConfigError("-c and --resume: a resumed run uses its own config.yaml; drop -c")
    output = keywords.pop("output", None)
    if resume and output is not None and Path(resume) != Path(output):
        raise ConfigError(
            f"--resume {resume} --output {output}: a run can only be resumed in its own folder; "
            "drop --output"
        )
    folder = resume or output
    if not folder:
        raise ConfigError("--resume: say which run, --resume RUN or --output RUN --resume")
    run = Path(folder).expanduser()
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"--resume {folder}: no {CONFIG_FILE} in it; is it a run folder?")
    check_command(run, entry.name, read_fingerprints(run))
    config = make_config(entry.config_class, {}, run / CONFIG_FILE)
    if config.model is None or config.data is None:
        raise ConfigError(f"--resume {folder}: its {CONFIG_FILE} has no model or no data")
    wanted = make_config(entry.config_class, keywords, source="command line")
    changed = {}
    for name, declared in declared_options(entry.config_class).items():
        if name not in keywords:
            continue
        value = getattr(wanted, name)
        if declared.change_on_resume:
            changed[name] = value
        elif value != getattr(config, name):
            raise ConfigError(
                f"{declared.flag} {value}: the run has {getattr(config, name)}, and a resumed run "
                "can't change it; leave it out, or start a new run"
            )
    return replace(config, **changed), run


@contextmanager
def _explaining_resume(run: Path, command: str, console: Console) -> Iterator[None]:
    """If the run is interrupted, say how to resume it."""
    from mlx_align.system.interrupts import Interrupted
    from mlx_align.tracking.run_dir import CONFIG_FILE
    from mlx_align.training.checkpoint import has_checkpoint

    resume = f"mlx-align {command} --resume {shlex.quote(str(run))}"
    try:
        yield
    except Interrupted:
        if has_checkpoint(run):
            console.note(f"stopped; resume with: {resume}")
        elif (run / CONFIG_FILE).is_file():
            console.note(f"stopped before the first checkpoint; start again with: {resume}")
        else:
            console.note("stopped before anything was written; nothing is lost")
        raise
    except WriteError:
        if (run / CONFIG_FILE).is_file():
            console.note(f"the run folder is intact; free some space and resume with: {resume}")
        raise


dpo, kto, sft, ppo, grpo = (training_command(entry) for entry in (DPO, KTO, SFT, PPO, GRPO))


def _train_reward(context: click.Context, /, **options: Any) -> None:
    """Train, unless a subcommand follows."""
    if context.invoked_subcommand is None:
        _train(REWARD, **options)
        return
    options["json"] = options["json"] or None
    for name in given(options):
        flag = "--config" if name == "config_file" else flag_of(name)
        raise ConfigError(
            f"{flag} before {context.invoked_subcommand}: an option of training; put the options "
            f"of {context.invoked_subcommand} after it"
        )


reward = Group(
    "reward",
    params=_parameters(REWARD),
    callback=click.pass_context(_train_reward),
    invoke_without_command=True,
    short_help=REWARD.summary,
    help=REWARD.help,
    subcommand_metavar="| export ...",
)


@reward.command(short_help="Write a reward model that transformers loads.")
@config_options(ExportConfig)
@json_option("Print the report as JSON.")
def export(json: bool, **options: Any) -> None:
    """Write base, adapter and head as one *ForSequenceClassification folder.

    transformers and vLLM load it. Quantised layers are written dequantised. An ensemble is
    exported as its mean.
    """
    from mlx_align.cli.console import Console
    from mlx_align.inference.export import export_reward_model
    from mlx_align.models.loading import open_model

    console = Console(json)
    config = make_config(ExportConfig, given(options), None, "command line")
    folder = open_model(resolve_starter(config.model, "model"))
    report = export_reward_model(folder, Path(config.adapter_path), Path(config.output))
    if json:
        click.echo(json_module.dumps(asdict(report), indent=2))
        return
    console.note(
        f"Wrote {report.architecture} to {config.output}; its scores on random tokens differ from "
        f"the run's by at most {report.score_gap:.2g}.\n"
        f"{report.reads_at}\n"
        f"Load it: AutoModelForSequenceClassification.from_pretrained({config.output!r})"
    )
