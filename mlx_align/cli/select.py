"""`mlx-align data select`: the pairs that people should label."""

from __future__ import annotations

from typing import Any

import click

from mlx_align.cli.options import Command, config_options, given_options, json_option
from mlx_align.config import SelectConfig, make_config
from mlx_align.errors import ConfigError
from mlx_align.system.json_text import to_json
from mlx_align.system.row_file import new_file
from mlx_align.system.starter import resolve_starter


@click.command(cls=Command, short_help="Select the pairs of answers that people should label.")
@config_options(SelectConfig)
@json_option("Print a summary as JSON; all else goes to stderr.")
def select(json: bool, **options: Any) -> None:
    """Write pairs of answers for people to label, without labels and in random order.

    --by random draws pairs: a sample to measure a judge on, or a spot check of its labels. --by
    disagreement takes the pairs on which the heads of a reward model disagree most, which teach it
    most (Christiano et al. 2017). Rows have prompt, completions with the two answers, and models.
    """
    from mlx_align.data.columns import configure_data
    from mlx_align.data.messages import text_as_json
    from mlx_align.preferences.ai_feedback import read_answer_pairs
    from mlx_align.preferences.disagreement import select_pairs
    from mlx_align.system.atomic_io import open_atomic
    from mlx_align.system.console import Console

    config = make_config(SelectConfig, given_options(options), None, "command line")
    if (config.count is None) == (config.share is None):
        raise ConfigError("give --count or --share, and not both")
    if config.share is not None and config.share > 1:
        raise ConfigError(f"--share {config.share:g}: expected at most 1")
    if (config.by == "disagreement") != (config.reward_model is not None):
        raise ConfigError(
            "--by disagreement needs --reward-model, and only it does: a run of mlx-align reward "
            "--members 5"
        )
    output = new_file(config.output)
    console = Console(json)
    data = configure_data(resolve_starter(config.data, "data"), config)
    pairs, title = read_answer_pairs(data, config.split, config.format, seed=config.seed)
    console.note(title)
    count = config.count or max(1, round((config.share or 0) * len(pairs)))
    chosen, scores = select_pairs(pairs, count, config.reward_model, config.seed)
    with open_atomic(output) as stream:
        for index in chosen:
            pair = pairs[index]
            row: dict[str, Any] = {
                "prompt": text_as_json(pair.prompt),
                "completions": [text_as_json(pair.a), text_as_json(pair.b)],
                "models": list(pair.authors),
            }
            if scores is not None:
                row["disagreement"] = round(scores[index], 6)
            stream.write(to_json(row, ascii=False) + "\n")
    if json:
        click.echo(to_json({"output": str(output), "pairs": len(pairs), "written": len(chosen)}))
        return
    console.note(f"Wrote {len(chosen):,} of {len(pairs):,} pairs to {output}")
