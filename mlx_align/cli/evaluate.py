"""`mlx-align eval`: what a run changed, measured against its reference."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given, json_option
from mlx_align.config import EvalConfig, make_config
from mlx_align.config.schema import require
from mlx_align.errors import ConfigError
from mlx_align.system.starter import resolve_starter

EVALUATION, ANSWERS = "evaluation.json", "answers.jsonl"


@click.command("eval", cls=Command, short_help="Measure a run against its reference.")
@config_options(EvalConfig)
@json_option("Print the numbers as JSON; all else goes to stderr.")
def evaluate(json: bool, **options: Any) -> None:
    """Measure a run against its reference: the model or adapter that it started from.

    Reports held-out preference accuracy and margins, and the KL from the reference on the run's
    own completions. With --reward-model: the win rate over the reference, also at equal length,
    and the gain of best-of-n. With --perplexity-data: what the run cost on other text. Both models
    complete the same prompts at temperature 1.
    """
    from mlx_align.cli.console import Console
    from mlx_align.evaluation.policy import evaluate_policy
    from mlx_align.evaluation.render import render_evaluation

    console = Console(json)
    config = make_config(EvalConfig, given(options), None, "command line")
    require(config, "model", "adapter_path")
    assert config.model is not None
    config = replace(
        config,
        model=resolve_starter(config.model, "model"),
        data=None if config.data is None else resolve_starter(config.data, "data"),
    )
    folder = None if config.output is None else _new_folder(config.output)
    evaluation, rows = evaluate_policy(config, console)
    content = evaluation.as_json()
    if folder is not None:
        _write(folder, content, rows)
    if json:
        click.echo(json_module.dumps(content, indent=2))
        return
    console.note(render_evaluation(evaluation))
    if folder is not None:
        console.note(f"\nWrote {folder / EVALUATION} and {folder / ANSWERS}")


def _new_folder(output: str) -> Path:
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a folder")
    for name in (EVALUATION, ANSWERS):
        if (folder / name).exists():
            raise ConfigError(f"--output {output}: has {name} already; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: can't be created ({error.strerror})") from error
    return folder


def _write(folder: Path, content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    text = json_module.dumps(content, indent=2)
    (folder / EVALUATION).write_text(text + "\n", encoding="utf-8")
    lines = "".join(json_module.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / ANSWERS).write_text(lines, encoding="utf-8")
