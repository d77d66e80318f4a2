"""`mlx-align rerank`: several completions of a prompt, best first."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import (
    Command,
    config_options,
    echo_json,
    json_option,
    options_of_run,
    run_argument,
)
from mlx_align.config import RerankConfig, make_config
from mlx_align.config.schema import fingerprint_options, flag_of
from mlx_align.errors import ConfigError
from mlx_align.system.row_file import hash_rows, new_file, open_rows
from mlx_align.system.starter import resolve_starter

if TYPE_CHECKING:
    from mlx_align.inference.rerank import Ranking, Reranker, RerankInput, SamplingOptions
    from mlx_align.system.console import Console

N, MAX_TOKENS = 8, 256


@click.command(cls=Command, short_help="Sample completions and rank them, or rank given ones.")
@run_argument
@config_options(RerankConfig)
@json_option("Print a JSON object per prompt; all else goes to stderr.")
def rerank(json: bool, **options: Any) -> None:
    """Sample N completions of a prompt and print them with their scores, best first.

    Scores are the run's implicit reward, beta * log(policy / reference), or a reward model's.
    --prompt is a user message if the model has a chat template. Without --prompt and --input,
    reads one prompt per line from the terminal, until Ctrl-D.

    Prompts in files are used verbatim if they are text; use messages for the chat template.
    Identical samples are listed once, with their count; given completions are all kept. With
    --input and --output, an interrupted command keeps its rankings, and --resume continues.
    """
    from mlx_align.inference.rerank import (
        NOTE,
        PROMPTS_AT_ONCE,
        Reranker,
        SamplingOptions,
        ranking_row,
        read_rerank_input,
    )
    from mlx_align.system.console import Console

    config = make_config(RerankConfig, options_of_run(options), None, "command line")
    _check_config(config)
    console = Console(json)
    target = None if config.output is None else new_file(config.output, resume=config.resume)
    source = None if config.input is None else read_rerank_input(config.input)
    if source is not None:
        console.note(source.read_as)
        _check_sampling_options(config, source)
    reranker = Reranker.load(
        resolve_starter(config.model, "model"),
        config.adapter_path,
        config.reward_model,
        beta=config.beta,
        reference_adapter=config.reference_adapter,
        per_token=config.per_token,
        thinking=config.thinking,
        max_seq_length=config.max_seq_length,
        batch_size=config.batch_size,
    )
    console.note(reranker.description)
    sampling = SamplingOptions(
        n=N if config.n is None else config.n,
        max_tokens=config.max_completion_length or MAX_TOKENS,
        temperature=1.0 if config.temperature is None else config.temperature,
        seed=config.seed or 0,
    )
    total = None if source is None else len(source.rows)
    output: Any = nullcontext()
    if target is not None:
        hashes = {} if source is None else _hashes(config, reranker, source)
        inputs = fingerprint_options(config, hashes)
        output = open_rows(target, inputs, resume=config.resume, total=total, note=console.note)
    count = unranked = 0
    with output as written:
        if source is not None:
            done = 0 if written is None else written.done
            if written is not None:
                count, unranked = done, sum(NOTE in row for row in written.read())
            rankings = _rank_file(reranker, source, sampling, console, done)
        else:
            rankings = _rank_texts(
                reranker, _texts(config, console), _uses_chat(config, reranker), sampling, console
            )
        for ranking in rankings:
            count, unranked = count + 1, unranked + bool(ranking.reason)
            row = ranking_row(ranking)
            if written is not None:
                written.write(row)
                if total is not None and (count % PROMPTS_AT_ONCE == 0 or count == total):
                    written.commit(count)
            if json and (written is None or source is None):
                echo_json(row, ascii=False)
            elif not json and (written is None or source is None):
                console.note(_format_ranking(ranking))
    if target is not None:
        missing = f"; {unranked} prompts without one (see {NOTE})" if unranked else ""
        console.note(f"Wrote {count:,} rankings to {target}{missing}")
        if json and source is not None:
            summary = {"output": str(target), "prompts": count, "unranked": unranked}
            echo_json(summary)


def _texts(config: RerankConfig, console: Console) -> Iterable[str]:
    return _read_lines(console) if config.prompt is None else [config.prompt]


def _uses_chat(config: RerankConfig, reranker: Reranker) -> bool:
    return reranker.style.has_template and not config.ignore_chat_template


def _hashes(config: RerankConfig, reranker: Reranker, source: RerankInput) -> dict[str, str]:
    """Hashes of what rankings depend on, by the option that names it."""
    from mlx_align.models.adapters import fingerprint_adapters, fingerprint_folder

    hashes = {
        **fingerprint_adapters(config),
        "model": fingerprint_folder(reranker.generator.model.folder.path),
        "input": hash_rows(row.row.fields for row in source.rows),
    }
    if config.reward_model is not None:
        folder = reranker.scorer.model.folder.path
        hashes["reward_model"] = fingerprint_folder(folder)
        if (run := Path(config.reward_model).expanduser()).is_dir():
            hashes["reward_model"] += fingerprint_folder(run, "*.safetensors")
    return hashes


def _check_config(config: RerankConfig) -> None:
    if config.resume and (config.input is None or config.output is None):
        raise ConfigError("--resume needs --input and --output; add them, or leave it out")
    if config.prompt is not None and config.input is not None:
        raise ConfigError("--prompt and --input exclude each other; give one")
    if config.prompt is None and config.input is None and not sys.stdin.isatty():
        raise ConfigError("no terminal to read prompts from; give --prompt or --input")
    if config.prompt is not None and not config.prompt.strip():
        raise ConfigError("--prompt is empty")
    if config.temperature == 0 and config.n != 1:
        raise ConfigError(
            "--temperature 0 makes all completions the same; add -n 1, or give a temperature above "
            "0"
        )
    if config.input is not None and config.ignore_chat_template:
        raise ConfigError(
            "--ignore-chat-template has no effect with --input; text in files is used verbatim"
        )


def _check_sampling_options(config: RerankConfig, source: RerankInput) -> None:
    for name in ("n", "max_completion_length", "temperature", "seed"):
        if getattr(config, name) is not None and not source.needs_sampling:
            raise ConfigError(
                f"{flag_of(name)} has no effect: the rows have completions, which are ranked as "
                "given; leave it out"
            )


def _rank_file(
    reranker: Reranker,
    source: RerankInput,
    sampling: SamplingOptions,
    console: Console,
    done: int = 0,
) -> Iterator[Ranking]:
    if reranker.style.has_template and any(isinstance(g.prompt, str) for g in source.readable):
        console.note("! text prompts are used verbatim; write messages to use the chat template")
    with console.bar("Ranking", len(source.rows), done) as bar:
        for ranking in source.rankings(reranker, sampling, done):
            yield ranking
            bar.advance()


def _rank_texts(
    reranker: Reranker,
    texts: Iterable[str],
    chat: bool,
    sampling: SamplingOptions,
    console: Console,
) -> Iterator[Ranking]:
    """Rank prompts one by one, each sampled with its own seed."""
    from mlx_align.types import Message, PromptGroup

    for turn, text in enumerate(texts):
        group = PromptGroup((Message("user", text),) if chat else text, (), "--prompt")
        with console.bar("Sampling", sampling.n * sampling.max_tokens) as bar:
            (ranking,) = reranker.sample_groups(
                [group],
                sampling.n,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed + turn,
                on_token=bar.advance,
            )
        yield ranking


def _read_lines(console: Console) -> Iterator[str]:
    """Lines typed on the terminal, until Ctrl-D."""
    console.note("One prompt per line; Ctrl-D ends.")
    while True:
        try:
            line = input("> ") if console.console.file is sys.stdout else input()
        except EOFError:
            return
        if line.strip():
            yield line


def _format_ranking(ranking: Ranking) -> str:
    """A ranking as text: a line per completion, and the best in full if its line is shortened."""
    if ranking.reason:
        return f"not ranked: {ranking.reason}"
    width = max(len(f"{one.score:+.4f}") for one in ranking.ranked)
    lines = []
    for one in ranking.ranked:
        marks = (f" (x{one.count})" if one.count > 1 else "") + (
            " (truncated)" if one.truncated else ""
        )
        lines.append(f"  {one.score:>+{width}.4f}  {_one_line(one.text) or '(empty)'}{marks}")
    best = ranking.ranked[0].text
    if _one_line(best) != best.strip():
        lines += ["", best]
    return "\n".join(lines)


def _one_line(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
