"""`mlx-align rerank`: several answers to a prompt, best first."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.files import free_file
from mlx_align.errors import ConfigError

if TYPE_CHECKING:
    from mlx_align.cli.display import Terminal
    from mlx_align.inference.asked import Asked, Sampling
    from mlx_align.inference.ranking import Ranking
    from mlx_align.inference.rerank import Reranker

# max_tokens is mlx-lm's.
N, MAX_TOKENS = 8, 256


@click.command(short_help="Sample several answers and rank them, or rank given ones.")
@click.option("--model", required=True, metavar="PATH_OR_NAME", help="The base model.")
@click.option("--adapter-path", metavar="RUN", help="The run whose policy answers.")
@click.option(
    "--reward-model",
    metavar="RUN_OR_MODEL",
    help="Rank by a run of mlx-align reward, or by a classifier, not by the implicit reward.",
)
@click.option("--prompt", metavar="TEXT", help="A question; without it, asks on the terminal.")
@click.option(
    "--input",
    "file",
    metavar="FILE",
    help="Rows with a prompt, to be answered; or with completions too, which are ranked.",
)
@click.option("--output", metavar="FILE", help="JSONL file to write: rankings, best first.")
@click.option("-n", type=click.IntRange(1), metavar="N", help="Answers per prompt. [default: 8]")
@click.option(
    "--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer. [default: 256]"
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    metavar="X",
    help="1 samples from the policy itself. [default: 1.0]",
)
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Of the answers. [default: 0]")
@click.option("--beta", type=float, metavar="X", help="Of the implicit reward; default: the run's.")
@click.option(
    "--reference-adapter",
    metavar="PATH",
    help="Where the adapter is now that the run started from.",
)
@click.option(
    "--per-token/--sum",
    default=None,
    help="Divide the implicit reward by the answer's length. [default: as the run's loss did]",
)
@click.option(
    "--ignore-chat-template", is_flag=True, help="Take --prompt as it stands, not as a message."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    metavar="N",
    help="Prompts scored at once.",
)
@click.option(
    "--max-seq-length",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    metavar="N",
    help="Longer prompts, or given rows, are not ranked.",
)
@click.option("--json", is_flag=True, help="A JSON object per prompt; all else goes to stderr.")
def rerank(
    model: str,
    adapter_path: str | None,
    reward_model: str | None,
    prompt: str | None,
    file: str | None,
    output: str | None,
    n: int | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    beta: float | None,
    reference_adapter: str | None,
    per_token: bool | None,
    ignore_chat_template: bool,
    batch_size: int,
    max_seq_length: int,
    json: bool,
) -> None:
    """Sample N answers to a prompt and print them with their scores, best first.

    The score is the run's implicit reward, β·log(policy / reference), or a reward model's. A
    prompt is a user's message where the model has a chat template. Without --prompt and --input,
    reads prompts from the terminal, a line each, until Ctrl-D.

    In files, prompts that are text are taken as they stand; write messages for the chat template.
    Equal samples are shown once, with their number; given completions are all kept.
    """
    from mlx_align.cli.display import Terminal
    from mlx_align.inference.asked import Sampling, read_asked
    from mlx_align.inference.ranking import NOTE, as_row
    from mlx_align.inference.rerank import Reranker
    from mlx_align.shipped import shipped_or_given

    asked = {"-n": n, "--max-tokens": max_tokens, "--temperature": temperature, "--seed": seed}
    _check(prompt, file, asked, ignore_chat_template)
    terminal = Terminal(json)
    target = None if output is None else free_file(output)
    asking = None if file is None else read_asked(file)
    if asking is not None:
        terminal.note(asking.read_as)
        _check_effect(asked, asking)
    reranker = Reranker.load(
        shipped_or_given(model, "model"),
        adapter_path,
        reward_model,
        beta=beta,
        reference_adapter=reference_adapter,
        per_token=per_token,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
    )
    terminal.note(reranker.said)
    how = Sampling(
        n=N if n is None else n,
        max_tokens=MAX_TOKENS if max_tokens is None else max_tokens,
        temperature=1.0 if temperature is None else temperature,
        seed=seed or 0,
    )
    if asking is not None:
        rankings = _of_file(reranker, asking, how, terminal)
    else:
        chat = reranker.style.has_template and not ignore_chat_template
        texts = _lines(terminal) if prompt is None else [prompt]
        rankings = _of_texts(reranker, texts, chat, how, terminal)
    count = unranked = 0
    with nullcontext() if target is None else target.open("w", encoding="utf-8") as stream:
        for ranking in rankings:
            count, unranked = count + 1, unranked + bool(ranking.reason)
            line = json_module.dumps(as_row(ranking), ensure_ascii=False)
            if stream is not None:
                stream.write(line + "\n")
                stream.flush()
            if json and (stream is None or asking is None):
                click.echo(line)
            elif not json and (stream is None or asking is None):
                terminal.note(_shown(ranking))
    if target is not None:
        left = f"; {unranked} prompts have none ({NOTE} says why)" if unranked else ""
        terminal.note(f"{count:,} rankings in {target}{left}")
        if json and asking is not None:
            summary = {"output": str(target), "prompts": count, "unranked": unranked}
            click.echo(json_module.dumps(summary))


def _check(
    prompt: str | None, file: str | None, asked: dict[str, Any], ignore_chat_template: bool
) -> None:
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --input exclude each other; give one")
    if prompt is None and file is None and not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on; give --prompt or --input")
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt: is empty")
    if asked["--temperature"] == 0 and asked["-n"] != 1:
        raise ConfigError(
            "--temperature 0: all answers would be the same; give -n 1 too, or a temperature "
            "above 0"
        )
    if file is not None and ignore_chat_template:
        raise ConfigError("--ignore-chat-template: has no effect on --input; text stands as it is")


def _check_effect(asked: dict[str, Any], asking: Asked) -> None:
    for name, value in asked.items():
        if value is not None and not asking.to_answer:
            raise ConfigError(f"{name}: has no effect; the rows have completions, which are ranked")


def _of_file(
    reranker: Reranker, asking: Asked, how: Sampling, terminal: Terminal
) -> Iterator[Ranking]:
    if reranker.style.has_template and any(isinstance(g.prompt, str) for g in asking.readable):
        terminal.note(
            "! prompts are text, taken as they stand; write messages to use the chat template"
        )
    with terminal.bar("Ranking", len(asking.rows)) as bar:
        for ranking in asking.rankings(reranker, how):
            yield ranking
            bar.advance()


def _of_texts(
    reranker: Reranker, texts: Iterable[str], chat: bool, how: Sampling, terminal: Terminal
) -> Iterator[Ranking]:
    """Rankings of prompts that come one by one, each with draws of its own."""
    from mlx_align.types import Message, PromptGroup

    for turn, text in enumerate(texts):
        group = PromptGroup((Message("user", text),) if chat else text, (), "--prompt")
        with terminal.bar("Sampling", how.n * how.max_tokens) as bar:
            (ranking,) = reranker.sample_groups(
                [group],
                how.n,
                max_tokens=how.max_tokens,
                temperature=how.temperature,
                seed=how.seed + turn,
                on_token=bar.advance,
            )
        yield ranking


def _lines(terminal: Terminal) -> Iterator[str]:
    """What is typed on the terminal, until Ctrl-D."""
    terminal.note("A prompt a line; Ctrl-D ends.")
    while True:
        try:
            line = input("> ") if terminal.console.file is sys.stdout else input()
        except EOFError:
            return
        if line.strip():
            yield line


def _shown(ranking: Ranking) -> str:
    """A ranking for people: a line per answer, and the best one in full if a line is too short."""
    if ranking.reason:
        return f"not ranked: {ranking.reason}"
    width = max(len(f"{one.score:+.4f}") for one in ranking.ranked)
    lines = []
    for one in ranking.ranked:
        marks = (f" (x{one.count})" if one.count > 1 else "") + (" (cut)" if one.cut else "")
        lines.append(f"  {one.score:>+{width}.4f}  {_one_line(one.text) or '(empty)'}{marks}")
    best = ranking.ranked[0].text
    if _one_line(best) != best.strip():
        lines += ["", best]
    return "\n".join(lines)


def _one_line(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
