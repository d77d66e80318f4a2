"""`mlx-align eval`: what a run changed, measured against where it started."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_align.cli.options import config_options, given
from mlx_align.config import EvalConfig
from mlx_align.errors import ConfigError
from mlx_align.settings import resolve

EVALUATION, ANSWERS = "evaluation.json", "answers.jsonl"


@click.command("eval", short_help="Measure a run against where it started.")
@config_options(EvalConfig)
@click.option("--json", is_flag=True, help="Print the numbers as JSON; all else goes to stderr.")
def evaluate(json: bool, **options: Any) -> None:
    """Measure a run against its reference: the model, or the adapter, that it started from.

    Held-out preference accuracy and margins; KL from the reference on own answers; with
    --reward-model, how often its answers beat the reference's, also at equal length; what keeping
    the best of n answers gives; with --perplexity-data, what the run cost on other text. Both
    answer the same prompts at temperature 1, untruncated.
    """
    from mlx_align.cli.display import Terminal
    from mlx_align.inference.evaluation import evaluate_run
    from mlx_align.inference.scorecard import render_evaluation
    from mlx_align.shipped import shipped_or_given

    terminal = Terminal(json)
    config = resolve(EvalConfig, given(options))
    if config.model is None or config.adapter_path is None:
        missing = "--model" if config.model is None else "--adapter-path"
        raise ConfigError(f"{missing} is missing; name the run with --adapter-path, and its base")
    config = replace(
        config,
        model=shipped_or_given(config.model, "model"),
        data=None if config.data is None else shipped_or_given(config.data, "data"),
    )
    folder = None if config.output is None else _free_folder(config.output)
    found, rows = evaluate_run(config, terminal.bar)
    content = found.as_json()
    if folder is not None:
        _write(folder, content, rows)
    if json:
        click.echo(json_module.dumps(content, indent=2))
        return
    terminal.note(render_evaluation(found))
    if folder is not None:
        terminal.note(f"\nWritten: {folder / EVALUATION}, {folder / ANSWERS}")


def _free_folder(output: str) -> Path:
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {output}: is a file; name a folder")
    for name in (EVALUATION, ANSWERS):
        if (folder / name).exists():
            raise ConfigError(f"--output {output}: holds {name} already; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: can't be made ({error.strerror})") from error
    return folder


def _write(folder: Path, content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    text = json_module.dumps(content, indent=2)
    (folder / EVALUATION).write_text(text + "\n", encoding="utf-8")
    lines = "".join(json_module.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / ANSWERS).write_text(lines, encoding="utf-8")
