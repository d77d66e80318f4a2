"""Benchmark of scoring K completions of one prompt, which runs once per role.

Times `ImplicitReward` on a random Llama (34M parameters, vocabulary of 32,000) with a LoRA policy
against scoring the same rows whole, K times per role: plainly, with logits at every position, and
with this package's forward pass, which computes logits at completion positions only. The three take
turns, because machines are shared.

    python scripts/bench_rerank.py
    python scripts/bench_rerank.py --completions 16 --prompt 512 --tokens 32

On Linux float32 is some 60 times faster with LD_PRELOAD naming libopenblas; on a busy machine
OPENBLAS_NUM_THREADS=1 keeps its threads from waiting for each other.
Exits with 1 if the ratio is above --most.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_align.inference.implicit_reward import ImplicitReward, load_implicit_reward
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.loading import load_module
from mlx_align.types import TokenizedGroup


def main() -> None:
    """Make the model, time all ways and print; exit with 1 if sharing saves too little."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--most", type=float, default=0.45, help="highest ratio allowed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shared = scorer(Path(folder))
    whole = replace(shared, model=replace(shared.model, shared=False))
    group = random_group(arguments.completions, arguments.prompt, arguments.tokens)
    ways: list[Callable[[], Any]] = [
        lambda: shared.score_tokens([group])[0].scores,
        lambda: plain(shared, group),
        lambda: whole.score_tokens([group])[0].scores,
    ]
    scores = [way() for way in ways]
    seconds = np.array([[timed(way) for way in ways] for _ in range(arguments.rounds)])
    ratios = seconds[:, 0] / seconds[:, 1]
    ratio = float(np.median(ratios[:, 0]))
    print(
        f"K = {arguments.completions}, prompt {arguments.prompt}, completions {arguments.tokens}, "
        f"two roles, {mx.default_device()}"
    )
    names = ("shared prompt", "whole rows, plainly", "whole rows, this package")
    for name, column in zip(names, seconds.swapaxes(0, 1), strict=True):
        wall, cpu = np.median(column, axis=0)
        print(f"{name}: {wall:.3f} s, {cpu:.3f} s of processor (medians of {arguments.rounds})")
    print(
        f"ratio {ratio:.3f} (from {ratios[:, 0].min():.3f} to {ratios[:, 0].max():.3f}), of "
        f"processor time {np.median(ratios[:, 1]):.3f}; against whole rows in this package "
        f"{np.median(seconds[:, 0, 0] / seconds[:, 2, 0]):.3f}; scores of "
        f"{scores[1].min():+.3f} to {scores[1].max():+.3f}, "
        f"differences of at most {np.abs(scores[0] - scores[1]).max():.1e}"
    )
    if ratio > arguments.most:
        sys.exit(f"above {arguments.most}")


def scorer(folder: Path) -> ImplicitReward:
    """A random model and a random policy on it, as from a run of dpo."""
    base, run = folder / "model", folder / "run"
    maker = Path(__file__).parent / "bench" / "model.py"
    subprocess.run([sys.executable, str(maker), str(base)], check=True, stdout=subprocess.DEVNULL)
    model = load_module(base)
    layout = AdapterLayout(rank=16)
    install_adapters(model, layout)
    mx.random.seed(1)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.02 * mx.random.normal(module.lora_b.shape)
    run.mkdir()
    save_adapter(run, model.trainable_parameters(), layout, str(base))
    return load_implicit_reward(str(base), run, beta=0.1)


def plain(rewards: ImplicitReward, group: TokenizedGroup) -> np.ndarray:
    """The same scores from whole rows, with logits at all positions."""
    rows = [np.concatenate([group.prompt, ids]) for ids in group.completions]
    tokens, start = mx.array(np.stack(rows)), len(group.prompt)
    assert rewards.reference is not None
    logps = []
    for tree in (rewards.policy, rewards.reference):
        with rewards.model.use_adapter(tree):
            logits = rewards.model.module(tokens).astype(mx.float32)
            normalised = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            own = mx.take_along_axis(normalised[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
            logps.append(np.array(own[:, start - 1 :], np.float64))
    return rewards.beta * (logps[0] - logps[1]).sum(axis=1)


def random_group(completions: int, prompt: int, tokens: int) -> TokenizedGroup:
    """Random tokens."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(4, 32_000, n).astype(np.int32) for n in [prompt] + [tokens] * completions]
    return TokenizedGroup(rows[0], tuple(rows[1:]), "random")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
