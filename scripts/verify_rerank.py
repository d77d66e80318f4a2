"""Best-of-n on the starter: is the answer with the best implicit reward more often correct?

Trains the starter briefly with `mlx-align dpo`, samples answers to its held-out questions from the
policy at temperature 1, and measures for growing n how often the best of n by implicit reward names
the right capital: with the unbiased estimator from all samples, the reward summed over tokens and
per token, with 95% intervals over questions. For comparison: ranking by the policy's own log-prob,
and the upper bound, how often at least one of the n is correct.

    python scripts/verify_rerank.py                 # some minutes
    python scripts/verify_rerank.py --iters 20 --samples 16

Exits with 1 unless best-of-8 beats one sample, with separate intervals, and the curve rises.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_align.cli.main import run as mlx_align
from mlx_align.data.formats import read_prompts
from mlx_align.evaluation.metrics import expected_best
from mlx_align.evaluation.statistics import mean_estimate
from mlx_align.inference.rerank import Ranking, Reranker
from mlx_align.system.starter import shipped_file
from mlx_align.types import PromptGroup

ACROSS = (1, 2, 4, 8, 16, 32)
WAYS = ("sum", "per token", "policy's log-prob", "one is right")
Values = npt.NDArray[np.float64]


def main() -> None:
    """Train, sample, rank and print; exit with 1 if best-of-n does not help."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--iters", type=int, default=40, help="updates of DPO before")
    parser.add_argument("--samples", type=int, default=32, help="answers per question")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(run, arguments.iters)
        rankings = sampled(run, arguments.samples, arguments.seed)
    curves = {way: curve(rankings, way) for way in WAYS}
    print(f"{len(rankings)} held-out questions, {arguments.samples} answers each")
    print(table(curves, [n for n in ACROSS if n <= arguments.samples]))
    print(gain(rankings, min(8, arguments.samples)))
    first, best = curves["sum"][1], curves["sum"][min(8, arguments.samples)]
    means = [mean for _, (mean, _, _) in sorted(curves["sum"].items())]
    if not (best[1] > first[2] and all(later > earlier for earlier, later in pairwise(means))):
        sys.exit("best-of-n does not help as claimed")


def train(run: Path, iters: int) -> None:
    """A short run of DPO on the starter."""
    options = ["-c", str(shipped_file("starter.yaml")), "--iters", str(iters), "--samples", "0"]
    cache = ["--reference-cache", str(run.parent / "cache")]
    with contextlib.redirect_stdout(io.StringIO()):
        if mlx_align(["dpo", *options, *cache, "--val-batches", "1", "--output", str(run)]):
            sys.exit("training failed")


def sampled(run: Path, samples: int, seed: int) -> list[Ranking]:
    """The ranked answers to every held-out question."""
    groups, _ = read_prompts(str(shipped_file("starter")), "valid")
    questions = list({group.prompt: group for group in groups}.values())
    reranker = Reranker.load(str(shipped_file("starter/model")), run)
    return reranker.sample_groups(questions, samples, max_tokens=40, seed=seed)


def is_right(group: PromptGroup, text: str) -> bool:
    """Whether an answer names the capital of the country in question, and not its biggest city."""
    question = group.prompt[-1].content.lower()  # type: ignore[union-attr]
    (country,) = [c for c in countries() if c["name"].lower() in question]
    return country["capital"] in text and country["biggest"] not in text


def countries() -> list[dict[str, Any]]:
    """The countries of the starter's data."""
    world = json.loads((shipped_file("starter") / "world.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = world["countries"]
    return found


def spread(ranking: Ranking, way: str) -> tuple[Values, Values]:
    """Score and correctness of every sample of a question, repeated samples included."""
    scores, right = [], []
    for one in ranking.ranked:
        by = {
            "sum": one.score,
            "per token": one.score / one.tokens,
            "policy's log-prob": one.policy_logp,
            "one is right": float(is_right(ranking.prompt, one.text)),
        }
        scores += [by[way]] * one.count
        right += [float(is_right(ranking.prompt, one.text))] * one.count
    return np.array(scores, np.float64), np.array(right)


def curve(rankings: Sequence[Ranking], way: str) -> dict[int, tuple[float, float, float]]:
    """For each n: how often the best of n is correct, with its 95% interval over questions."""
    size = sum(one.count for one in rankings[0].ranked)
    found = {}
    for n in [n for n in ACROSS if n <= size]:
        shares = shares_right(rankings, way, n)
        mean = mean_estimate(shares, np.arange(len(shares)))
        found[n] = mean.value, mean.low, mean.high
    return found


def shares_right(rankings: Sequence[Ranking], way: str, n: int) -> Values:
    """Per question, how often the best of n is correct."""
    every = [spread(ranking, way) for ranking in rankings]
    return np.array([expected_best(scores, n, right) for scores, right in every])


def gain(rankings: Sequence[Ranking], n: int) -> str:
    """Difference between ranking by sum and per token, paired on the same samples."""
    by_sum, by_mean = (shares_right(rankings, way, n) for way in ("sum", "per token"))
    differences = by_sum - by_mean
    found = mean_estimate(differences, np.arange(len(differences)))
    return (
        f"best of {n}, sum minus per token, paired: {found.value:+.1%} "
        f"(95%: {found.low:+.1%} to {found.high:+.1%})"
    )


def table(curves: dict[str, dict[int, tuple[float, float, float]]], across: Sequence[int]) -> str:
    """The curves as Markdown."""
    lines = [
        "| right answers, best of | " + " | ".join(str(n) for n in across) + " |",
        "|---" * (len(across) + 1) + "|",
    ]
    for way, found in curves.items():
        cells = (f"{m:.1%} ({low:.1%} to {high:.1%})" for m, low, high in map(found.get, across))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
