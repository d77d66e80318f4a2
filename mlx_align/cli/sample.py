"""`mlx-align data sample`: training rows from the best of a model's own completions."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import (
    Command,
    config_options,
    echo_json,
    given_options,
    json_option,
)
from mlx_align.config import SampleConfig, make_config


@click.command(
    cls=Command, short_help="Keep the best of sampled completions, as data for sft or dpo."
)
@config_options(SampleConfig)
@json_option("Print a summary as JSON; all else goes to stderr.")
def sample(json: bool, **options: Any) -> None:
    """Sample N completions per prompt, score them, and write the best as rows for sft.

    Without --reward and --reward-model, all of them are written, a line per prompt, for `mlx-align
    label` and `mlx-align judge`: at several --temperatures, or by --arms, which name models,
    adapters and system prompts.

    Rows have prompt, completion, score and n, and the other fields of the prompt's row, in the
    order of the prompts. A prompt without a completion that scores (at least --threshold) gets no
    row; with --pairs, neither does one whose completions all score the same. Without --threshold,
    a completion that scored 0, the least of its prompt, is not kept.

    After an interruption, --resume continues, with the same rows as if there had been none. With a
    reward, the file has the finished rows until then; answers without one are written at the end.
    """
    from mlx_align.preferences.run_sample import sample_data
    from mlx_align.system.console import Console

    config = make_config(SampleConfig, given_options(options), None, "command line")
    console = Console(json)
    outcome = sample_data(config, console)
    if json:
        echo_json(outcome.content)
    else:
        console.note(outcome.text)
