"""Train briefly with every loss, check the result, and print a table.

Each loss of `dpo`, `kto` and `sft` trains for a few steps on the starter data that comes with the
package, through the command line. The checks:

    held-out   the held-out loss is lower after training than before
    adapter    the adapter file differs from the one that the run started from (SHA-256)
    stock      stock mlx-lm loads the run folder and gives the held-out completions the log-prob
               (for sft, the perplexity) that the run's last evaluation reports

    python scripts/verify_losses.py                                # every loss, some minutes
    python scripts/verify_losses.py --losses simpo,kto --iters 20
    python scripts/verify_losses.py --model starter --data starter

Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

from mlx_align.cli.main import run as mlx_align
from mlx_align.config import DPOConfig
from mlx_align.losses.registry import PAIRWISE_LOSSES, TOKEN_LOSSES, UNPAIRED_LOSSES
from mlx_align.models.adapters import ADAPTER_FILE, AdapterLayout, save_adapter
from mlx_align.models.loading import open_model
from mlx_align.models.policy import make_policy
from mlx_align.system.starter import resolve_starter

# By name in the table: the command and its options.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: ("dpo", ("--loss", name)) for name in PAIRWISE_LOSSES},
    "sigmoid=1,sft=0.2": ("dpo", ("--loss", "sigmoid=1,sft=0.2")),
    "sigmoid --wpo": ("dpo", ("--wpo",)),
    "sigmoid --ld-alpha 0.5": ("dpo", ("--ld-alpha", "0.5")),
    **{name: ("kto", ("--loss", name)) for name in UNPAIRED_LOSSES},
    **{name: ("sft", ("--loss", name)) for name in TOKEN_LOSSES},
}


@dataclass(frozen=True)
class Result:
    """Result of one run.

    Attributes:
        command: dpo, kto or sft.
        before: Held-out metrics before training.
        after: Held-out metrics after training.
        changed: Whether the adapter file differs from the one at the start.
        stock: Stock mlx-lm's mean log-prob of the chosen held-out completions in nats, or for sft
            the perplexity.
        told: The same as reported by the run; None where it is defined differently.
        seconds: Duration of the run.
    """

    command: str
    before: dict[str, float]
    after: dict[str, float]
    changed: bool
    stock: float
    told: float | None
    seconds: float

    @property
    def failures(self) -> list[str]:
        """The checks that failed, as text."""
        checks = (
            (self.after["loss"] < self.before["loss"], "held-out loss did not fall"),
            (self.changed, "adapter did not change"),
            (
                self.told is None or abs(self.stock - self.told) < 1e-3 * max(1, abs(self.stock)),
                "stock mlx-lm gives other log-probs",
            ),
        )
        return [words for holds, words in checks if not holds]


def verify(name: str, model: str, data: str, folder: Path, options: Sequence[str]) -> Result:
    """Run one loss and check it.

    Args:
        name: A key of `RUNS`.
        model: As `--model` takes it.
        data: As `--data` takes it; preference pairs in a folder with a valid split.
        folder: Where to write.
        options: More options for the command.
    """
    command, own = RUNS[name]
    run, began = folder / name.replace(" ", "_"), time.perf_counter()
    arguments = [command, "--model", model, "--data", data, "--output", str(run), *own, *options]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = mlx_align([*arguments, "--val-batches", "-1", "--samples", "0"])
    if code:
        raise SystemExit(f"{' '.join(arguments)}: exit {code}\n{said.getvalue()}")
    seconds = time.perf_counter() - began
    summary = json.loads((run / "summary.json").read_text())
    nats, tokens = stock_logps(model, data, run)
    if command == "sft":
        stock, told = float(np.exp(-nats.sum() / tokens.sum())), summary["eval"]["perplexity"]
    else:
        stock, told = float(nats.mean()), summary["eval"]["logps/chosen"]
    if "--ld-alpha" in own:
        told = None  # its sums weigh tokens
    return Result(
        command,
        summary["eval_before"],
        summary["eval"],
        digest(run / ADAPTER_FILE) != digest(start_of(model, folder)),
        stock,
        told,
        seconds,
    )


def stock_logps(model: str, data: str, run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-prob and tokens of every held-out chosen answer, by stock mlx-lm with the adapter."""
    module, tokenizer = mlx_lm.load(resolve_starter(model, "model"), adapter_path=str(run))
    lines = (Path(resolve_starter(data, "data")) / "valid.jsonl").read_text().splitlines()
    nats, tokens = [], []
    for row in map(json.loads, lines):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"])
        logits = module(mx.array([whole[:-1]]))[0, len(prompt) - 1 :].astype(mx.float32)
        logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        answer = mx.array(whole[len(prompt) :])
        nats.append(mx.take_along_axis(logps, answer[:, None], axis=-1).sum().item())
        tokens.append(len(answer))
    return np.array(nats), np.array(tokens)


def start_of(model: str, folder: Path) -> Path:
    """The file of the adapter that all runs start from, which the seed decides."""
    file = folder / "start" / ADAPTER_FILE
    if not file.exists():
        file.parent.mkdir()
        layout = AdapterLayout()
        policy = make_policy(DPOConfig(), open_model(resolve_starter(model, "model")), layout)
        save_adapter(file.parent, policy.start, layout, model)
    return file


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def row(name: str, result: Result) -> str:
    """A line of the table."""

    def change(key: str, pattern: str) -> str:
        if key not in result.after:
            return ""
        return f"{pattern} → {pattern}".format(result.before[key], result.after[key])

    told = "loads" if result.told is None else f"loads, {abs(result.stock - result.told):.0e} off"
    cells: list[Any] = [
        f"{result.command} `{name}`",
        change("loss", "{:.4f}"),
        f"{result.after['rewards/accuracies']:.0%}" if "rewards/accuracies" in result.after else "",
        f"{result.after['rewards/margins']:+.2f}" if "rewards/margins" in result.after else "",
        change("logps/accuracies", "{:.0%}") or change("perplexity", "{:.3f}"),
        "changed" if result.changed else "NOT CHANGED",
        told,
        f"{result.seconds:.0f} s",
        "; ".join(result.failures) or "ok",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| Loss | Held-out loss | Reward accuracy | Reward margin | Prefers the chosen, or perplexity "
    "| Adapter | Stock mlx-lm | Time | |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train with every loss for a moment.")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--data", default="starter")
    parser.add_argument("--losses", help="names of the table, separated by commas")
    parser.add_argument("--iters", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    wanted = [name for name in RUNS if not arguments.losses or name in arguments.losses.split(",")]
    options = ["--iters", str(arguments.iters), "--learning-rate", str(arguments.learning_rate)]
    options += ["--batch-size", "8", "--grad-accumulation-steps", "1", "--max-seq-length", "128"]
    options += ["--no-grad-checkpoint", "--steps-per-eval", "0"]
    failed = 0
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            result = verify(name, arguments.model, arguments.data, Path(folder), options)
            failed += bool(result.failures)
            print(row(name, result), flush=True)
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
