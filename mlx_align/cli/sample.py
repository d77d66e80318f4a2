"""`mlx-align data sample`: rows to train on, the best of a model's own answers."""

from __future__ import annotations

import json as json_module
import math

import click

from mlx_align.cli.files import free_file
from mlx_align.errors import ConfigError, DataError
from mlx_align.shipped import shipped_or_given


@click.command(short_help="Keep the best of several sampled answers, as data for sft or dpo.")
@click.option("--model", required=True, metavar="PATH_OR_NAME", help="The base model.")
@click.option("--adapter-path", metavar="RUN", help="The run whose policy answers.")
@click.option("--data", "data_name", required=True, metavar="PATH_OR_NAME", help="The prompts.")
@click.option("--format", metavar="TEXT", help="Force a data format.")
@click.option("--output", required=True, metavar="FILE", help="JSONL file to write.")
@click.option("--reward", multiple=True, metavar="REWARD", help="As in ppo; several times, too.")
@click.option("--reward-model", metavar="RUN_OR_MODEL", help="As in ppo.")
@click.option("--reward-model-weight", type=float, metavar="X", help="As in ppo. [default: 1.0]")
@click.option(
    "--reward-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="X",
    help="As in ppo.",
)
@click.option(
    "-n",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="Answers sampled for a prompt.",
)
@click.option("--keep", type=click.IntRange(1), metavar="N", help="The best so many. [default: 1]")
@click.option("--threshold", type=float, metavar="X", help="The least score of what is kept.")
@click.option("--pairs", is_flag=True, help="Write the best and the worst as pairs for dpo.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="N",
    help="Longest answer.",
)
@click.option(
    "--max-prompt-length",
    type=click.IntRange(1),
    default=768,
    show_default=True,
    metavar="N",
    help="Longer prompts are dropped and counted, tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="X",
    help="1 samples from the policy itself.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the answers.",
)
@click.option("--json", is_flag=True, help="Print a summary as JSON; all else goes to stderr.")
def sample(
    model: str,
    adapter_path: str | None,
    data_name: str,
    format: str | None,
    output: str,
    reward: tuple[str, ...],
    reward_model: str | None,
    reward_model_weight: float | None,
    reward_timeout: float,
    n: int,
    keep: int | None,
    threshold: float | None,
    pairs: bool,
    max_tokens: int,
    max_prompt_length: int,
    temperature: float,
    seed: int,
    json: bool,
) -> None:
    """Sample N answers to each prompt, score them, and write the best ones as rows for sft.

    Rows have prompt, completion, score and n, and the other fields of the prompt's row; they come
    in the order of the prompts. A prompt none of whose answers has a score (above --threshold) has
    no row; with --pairs, neither has one whose answers all score the same.

    What is written is whole lines, whenever it stops; to go on, start again with a new --output:
    the same options write the same rows.
    """
    from mlx_align.cli.display import Terminal
    from mlx_align.data.formats import read_prompts
    from mlx_align.data.prompts import tokenize_prompts
    from mlx_align.files import writing
    from mlx_align.models.loading import open_model
    from mlx_align.rollout.experience import Prompt
    from mlx_align.train.best_sampled import Wish, load_sampler, sampled_rows
    from mlx_align.train.judging import Judge, require_rewards, wanted_rewards

    _check(n, keep, threshold, pairs, reward_model, reward_model_weight)
    weight = 1.0 if reward_model_weight is None else reward_model_weight
    wanted = require_rewards(wanted_rewards(reward, reward_model, weight, reward_timeout))
    terminal = Terminal(json)
    target = free_file(output)
    groups, reading = read_prompts(shipped_or_given(data_name, "data"), "train", format)
    terminal.note(str(reading))
    folder = open_model(shipped_or_given(model, "model"))
    tokens, report = tokenize_prompts(groups, folder.tokenizer, max_prompt_length)
    prompts = [Prompt(groups[i], one) for i, one in zip(report.places, tokens, strict=True)]
    dropped = sum(report.dropped.values())
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        terminal.note(f"! {dropped:,} prompts dropped: {reasons}")
    for note in report.notes:
        terminal.note(f"! {note}")
    loaded, policy, score = load_sampler(folder, adapter_path, reward_model)
    wish = Wish(n, keep or 1, threshold, pairs, max_tokens, temperature, seed)
    scores: list[float] = []
    with Judge(wanted, score) as judge:
        judge.check([prompt.text for prompt in prompts])
        with (
            terminal.bar("Sampling", len(prompts)) as bar,
            writing(target, (OSError,)),
            target.open("w", encoding="utf-8") as stream,
        ):
            for row in sampled_rows(loaded, policy, judge, prompts, wish, bar.advance):
                stream.write(json_module.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
                scores.append(row["score_chosen" if pairs else "score"])
    if not scores:
        target.unlink()
        raise DataError(
            "nothing to write: no answer has a score"
            + ("" if threshold is None else f" of --threshold {threshold:g} or more")
            + (", or all of a prompt score the same" if pairs else "")
        )
    mean = sum(scores) / len(scores)
    command = "dpo" if pairs else "sft"
    if json:
        summary = {
            "output": str(target),
            "prompts": len(prompts),
            "dropped": dict(report.dropped),
            "rows": len(scores),
            "n": n,
            "score": mean,
            "seed": seed,
        }
        click.echo(json_module.dumps(summary))
        return
    terminal.note(
        f"{len(scores):,} rows of {len(prompts):,} prompts in {target}, mean score {mean:+.4f}. "
        f"Train on them:\n  mlx-align {command} --model {model} --data {target}"
    )


def _check(
    n: int,
    keep: int | None,
    threshold: float | None,
    pairs: bool,
    reward_model: str | None,
    reward_model_weight: float | None,
) -> None:
    if pairs and keep is not None:
        raise ConfigError(f"--keep {keep}: has no effect on --pairs; leave one out")
    if pairs and n < 2:
        raise ConfigError(f"-n {n}: a pair takes two answers; give 2 or more")
    if keep is not None and keep > n:
        raise ConfigError(f"--keep {keep}: more than the -n {n} that are sampled")
    if threshold is not None and not math.isfinite(threshold):
        raise ConfigError(f"--threshold {threshold}: expected a finite number")
    if reward_model_weight is None:
        return
    if reward_model is None:
        raise ConfigError(
            f"--reward-model-weight {reward_model_weight:g}: there is no --reward-model"
        )
    if not 0 < reward_model_weight < math.inf:
        raise ConfigError(f"--reward-model-weight {reward_model_weight:g}: must be above 0")
