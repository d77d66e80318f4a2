"""Options of `mlx-align eval`."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_align.settings import option


@dataclass(frozen=True)
class EvalConfig:
    """Options of `mlx-align eval`."""

    model: str | None = option(None, "The run's base model: a folder, or a hub name.")
    adapter_path: str | None = option(None, "The run to measure.", metavar="RUN")
    data: str | None = option(
        None, "Held-out pairs or prompts. Default: what the run itself held out."
    )
    format: str | None = option(None, "Force a data format instead of recognising it.")
    reward_model: str | None = option(
        None,
        "Who judges the answers: a run of mlx-align reward, or a classifier's folder or hub name.",
        metavar="RUN_OR_NAME",
    )
    perplexity_data: str | None = option(
        None,
        "A text from elsewhere, whose perplexity is measured: a text file, or rows of text.",
        metavar="FILE",
    )
    # 64 prompts tell a win rate of 50% from one of about 65%; 4 answers to each steady the KL.
    samples: int = option(64, "Prompts that both roles answer.", at_least=1)
    n: int = option(4, "Answers to each prompt; the best-of-n curve ends there.", at_least=1)
    sample_tokens: int = option(256, "Longest answer, tokens.", at_least=1)
    max_seq_length: int | None = option(
        None, "Tokens of prompt and completion. Default: the run's.", at_least=2
    )
    seed: int = option(0, "Seed of prompts, answers and intervals.", at_least=0)
    output: str | None = option(
        None, "Folder to write: evaluation.json, and every answer in answers.jsonl.", metavar="PATH"
    )
