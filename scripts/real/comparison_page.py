"""The page of the comparison with other packages, from stored results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

OURS = "mlx-align"


@dataclass(frozen=True)
class Measured:
    """All rounds of one run of one package.

    Attributes:
        name: Name of the run, as in `compare.py --list`.
        package: Name of the package.
        batches: How pairs are batched, in words.
        grad_checkpoint: Whether activations are computed again.
        same_order: Whether it trains on the pairs in the common order.
        defaults: Whether it is ours with its own batches and checkpointing.
        rounds: What was stored of each round: `result` (a runner's), `seconds`, `evaluation`,
            `date`, `machine`.
    """

    name: str
    package: str
    batches: str
    grad_checkpoint: bool
    same_order: bool
    defaults: bool
    rounds: Sequence[Mapping[str, Any]]

    @property
    def version(self) -> str:
        """Name and version of the package."""
        return str(self.rounds[0]["result"]["package"])

    @property
    def label(self) -> str:
        """The run in a table."""
        return f"{self.version}, {self.batches}"

    @property
    def losses(self) -> list[float]:
        """Training loss of each update; the same in all rounds."""
        return list(self.rounds[0]["result"]["losses"])

    @property
    def training(self) -> float:
        """Seconds per pair in the updates after the first."""
        return median(after_first(one["result"], "steps") for one in self.rounds)

    @property
    def cpu(self) -> float:
        """CPU seconds per pair in the updates after the first."""
        return median(after_first(one["result"], "cpu") for one in self.rounds)

    @property
    def reference(self) -> float:
        """Seconds per pair of the reference pass before training; 0 if there is none."""
        return median(
            one["result"]["reference_seconds"] / max(1, one["result"]["reference_pairs"])
            for one in self.rounds
        )

    @property
    def together(self) -> float:
        """Seconds per pair: training and reference."""
        return median(
            after_first(one["result"], "steps")
            + one["result"]["reference_seconds"] / max(1, one["result"]["reference_pairs"])
            for one in self.rounds
        )

    @property
    def seconds(self) -> float:
        """Seconds of the whole process."""
        return median(one["seconds"] for one in self.rounds)

    @property
    def mlx_peak(self) -> float | None:
        """The peak of mlx's memory in GB; None for torch."""
        if self.package == "trl":
            return None
        return median(one["result"]["peak_bytes"] for one in self.rounds) / 1e9

    @property
    def process_peak(self) -> float:
        """Peak memory of the process in GB."""
        return median(one["result"]["resident_peak_bytes"] for one in self.rounds) / 1e9

    @property
    def tokens(self) -> float:
        """Tokens per pair that the model runs, padding included."""
        result = self.rounds[0]["result"]
        return float(result["tokens"] / sum(result["pairs"]))


def after_first(result: Mapping[str, Any], name: str) -> float:
    """Seconds per pair of a runner's updates after the first, which compiles."""
    values, pairs = result[name], result["pairs"]
    if len(values) > 1:
        values, pairs = values[1:], pairs[1:]
    return float(sum(values) / sum(pairs))


def largest_difference(one: Measured, other: Measured) -> float | None:
    """Largest difference of two runs' losses in an update; None without a common order."""
    if not (one.same_order and other.same_order) or len(one.losses) != len(other.losses):
        return None
    pairs = zip(one.losses, other.losses, strict=True)
    return max(abs(a - b) for a, b in pairs)


def render(
    settings: Mapping[str, Any], runs: Sequence[Measured], failures: Mapping[str, str]
) -> str:
    """The page in Markdown.

    Args:
        settings: What all runs have in common, as `compare.py` stores it.
        runs: The finished runs, ours first.
        failures: Why other runs failed, by name.
    """
    return "\n".join(
        [
            *_introduction(settings, runs),
            "",
            "## Time and memory",
            "",
            *_measurements(runs),
            "",
            *_summary(runs),
            "",
            "## Ours against the others",
            "",
            *_ratios(runs),
            "",
            "## Losses",
            "",
            *_losses(runs),
            "",
            "## Packed and padded rows",
            "",
            *_batches(settings, runs),
            "",
            "## How it was measured",
            "",
            *_method(settings, runs, failures),
            "",
        ]
    )


def _introduction(settings: Mapping[str, Any], runs: Sequence[Measured]) -> list[str]:
    dates = sorted({str(one["date"]) for run in runs for one in run.rounds})
    machines = sorted({str(one["machine"]) for run in runs for one in run.rounds})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    options = settings["options"]
    return [
        "# A real run against other packages",
        "",
        f"{settings['model_name']} in float32 is trained with DPO on the same "
        f"{settings['pairs']} preference pairs of `{settings['data_name']}` by every package: one "
        f"pass, {settings['updates']} updates of {settings['pairs_per_update']} pairs. The rows "
        f"are ragged, as users have them: {settings['tokens']['prompt']:.0f} tokens of prompt, "
        f"{settings['tokens']['chosen']:.0f} of chosen and {settings['tokens']['rejected']:.0f} "
        f"of rejected completion on average, {settings['tokens']['longest']} in the longest row. "
        f"LoRA of rank {options['lora_rank']} on all linear layers of all blocks, alpha "
        f"{options['lora_alpha']:g}, AdamW at a constant {options['learning_rate']:g}, beta "
        f"{options['beta']:g}.",
        "",
        f"{when}, {'; '.join(machines)}. `python scripts/real/compare.py` makes the environments, "
        "trains, and writes this page.",
    ]


def _measurements(runs: Sequence[Measured]) -> list[str]:
    lines = [
        "| package and batches | checkpointing | training, s/pair | reference, s/pair | together "
        "| CPU in training, s/pair | whole process, s | mlx's peak, GB | process's peak, GB "
        "| tokens run per pair |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        cells = [
            f"**{run.label} (defaults)**" if run.defaults else run.label,
            "on" if run.grad_checkpoint else "off",
            f"{run.training:.2f}",
            f"{run.reference:.2f}" if run.reference else "in training",
            f"{run.together:.2f}",
            f"{run.cpu:.2f}",
            f"{run.seconds:.0f}",
            "–" if run.mlx_peak is None else f"{run.mlx_peak:.2f}",
            f"{run.process_peak:.2f}",
            f"{run.tokens:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _summary(runs: Sequence[Measured]) -> list[str]:
    ours = next((run for run in runs if run.defaults), None)
    if ours is None:
        return []
    lines = []
    for kind, is_torch in (("other run on mlx", False), ("run on torch", True)):
        others = [run for run in runs if run.package != OURS and (run.mlx_peak is None) == is_torch]
        if not others:
            continue
        fastest = min(others, key=lambda run: run.together)
        smallest = min(others, key=lambda run: run.process_peak)
        peak = ""
        if ours.mlx_peak and fastest.mlx_peak:
            peak = f"{ours.mlx_peak / fastest.mlx_peak:.2f} of its peak in mlx and "
        lines.append(
            f"- The fastest {kind} is {_words(fastest)}: {fastest.together:.2f} s per pair. Ours "
            f"with its defaults takes {ours.together:.2f} s: "
            f"{fastest.together / ours.together:.2f} times as fast, at {peak}"
            f"{ours.process_peak / fastest.process_peak:.2f} of its process's peak. The smallest "
            f"process is that of {_words(smallest)}: {smallest.process_peak:.2f} GB; ours takes "
            f"{ours.process_peak:.2f} GB."
        )
    return lines


def _words(run: Measured) -> str:
    return f"{run.label}, {'with' if run.grad_checkpoint else 'without'} checkpointing"


def counterpart(run: Measured, runs: Sequence[Measured]) -> Measured | None:
    """Our run with default batches that has the same checkpointing as another package's."""
    ours = [one for one in runs if one.package == OURS and one.batches == "default batches"]
    return next((one for one in ours if one.grad_checkpoint == run.grad_checkpoint), None)


def _ratios(runs: Sequence[Measured]) -> list[str]:
    lines = [
        "Each run of another package against ours with default batches and the same checkpointing. "
        "Times are of training and reference together.",
        "",
        "| package and batches | checkpointing | its time / ours | its CPU in training / ours "
        "| mlx's peak: ours / its | process's peak: ours / its |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for run in runs:
        ours = counterpart(run, runs)
        if run.package == OURS or ours is None:
            continue
        mlx = "–"
        if ours.mlx_peak and run.mlx_peak:
            mlx = f"{ours.mlx_peak / run.mlx_peak:.2f}"
        lines.append(
            f"| {run.label} | {'on' if run.grad_checkpoint else 'off'} | "
            f"{run.together / ours.together:.2f} | {run.cpu / ours.cpu:.2f} | {mlx} | "
            f"{ours.process_peak / run.process_peak:.2f} |"
        )
    return lines


def _losses(runs: Sequence[Measured]) -> list[str]:
    ours = next((run for run in runs if run.package == OURS and run.same_order), None)
    lines = [
        "Every package starts from the same adapters. Held-out loss and accuracy of all adapters "
        "are computed by this package, with 95% intervals. Differences are those of the training "
        "loss of an update from ours with one pair at a time, where both train on the pairs in the "
        "same order.",
        "",
        "| package and batches | checkpointing | updates | loss of the first and last update "
        "| largest difference in an update | held-out loss | held-out accuracy |",
        "|---|---|---:|---|---:|---|---|",
    ]
    for run in runs:
        found = run.rounds[0].get("evaluation") or {}
        difference = None if ours is None or run is ours else largest_difference(run, ours)
        losses = run.losses
        lines.append(
            f"| {run.label} | {'on' if run.grad_checkpoint else 'off'} | {len(losses)} | "
            f"{losses[0]:.4f} → {losses[-1]:.4f} | "
            f"{'–' if difference is None else _power(difference)} | "
            f"{_interval(found.get('loss'), '.4f')} | "
            f"{_interval(found.get('rewards/accuracies'), '.0%')} |"
        )
    return lines


def _power(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _interval(found: Sequence[float] | None, form: str) -> str:
    if not found:
        return "–"
    value, low, high = (format(number, form) for number in found)
    return value if math.isclose(found[1], found[2]) else f"{value} ({low} to {high})"


def _batches(settings: Mapping[str, Any], runs: Sequence[Measured]) -> list[str]:
    needed = settings["tokens"]["pair"]
    lines = [
        "Ours only. A pair has its prompt once and its two completions, "
        f"{needed:.0f} tokens on average; what is run beyond them is padding.",
        "",
        "| batches | checkpointing | tokens/s without padding | padding | shapes compiled "
        "| mlx's peak, GB | updates |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        if run.package != OURS:
            continue
        result = run.rounds[0]["result"]
        lines.append(
            f"| {run.batches}{_chosen(result)} | {'on' if run.grad_checkpoint else 'off'} | "
            f"{needed / run.training:.0f} | {1 - needed / run.tokens:.0%} | {result['shapes']} | "
            f"{run.mlx_peak:.2f} | {len(run.losses)} |"
        )
    return lines


def _chosen(result: Mapping[str, Any]) -> str:
    """The options of batching that a run of ours resolved."""
    config = result.get("config") or {}
    names = ("batch_size", "batch_tokens", "grad_accumulation_steps")
    given = [f"--{n.replace('_', '-')} {config[n]}" for n in names if config.get(n) is not None]
    return f" (`{' '.join(given)}`)" if given else ""


def _method(
    settings: Mapping[str, Any], runs: Sequence[Measured], failures: Mapping[str, str]
) -> list[str]:
    rounds = max(len(run.rounds) for run in runs)
    how = "once" if rounds == 1 else f"in {rounds} turns; numbers are medians"
    notes = dict.fromkeys(
        f"{run.version}: {run.rounds[0]['result']['note']}"
        for run in runs
        if run.rounds[0]["result"]["note"]
    )
    lines = [
        f"- Each run is a process of its own, made {how}. {settings['environment']}",
        "- Seconds per pair are means over the updates after the first, whose time is mostly "
        "compilation; later compilations, of further batch sizes, count. The reference pass is "
        "counted with its compilation.",
        "- mlx's peak is from the loaded model on, reference pass included. The process's peak is "
        "everything: interpreter, libraries, model. torch has no count of its own on the CPU.",
        "- All packages get the same token ids, from this package's tokenization of the rows with "
        "the model's chat template; padding is each package's own.",
        "- The order of the pairs is that of `mlx-align dpo --batch-size 1`, and the others are "
        "made to follow it: mlx-lm-lora would sort rows by length and draw batches with "
        "replacement, unsloth_zoo would sort by length. Batches of several pairs would be padded "
        "less if they were sorted.",
        "- Ours orders and groups the pairs itself in all other runs, so their updates hold other "
        "pairs than the others'. Packed updates hold more or fewer pairs than "
        f"{settings['pairs_per_update']}.",
        "- The same for all, where packages differ: AdamW with bias correction and without weight "
        "decay (mlx-tune and mlx-lm-lora have no bias correction by default), a constant learning "
        "rate (mlx-tune has a fixed cosine schedule), no clipping (two packages have none), and "
        "the initial LoRA matrices.",
        "- mlx-tune ignores the number of batches of an update, so it runs only with all pairs of "
        "an update at once.",
        "- Ours evaluates nothing and samples nothing in these runs "
        "(`--valid-fraction 0 --samples 0`), as the others do. It runs with mlx's own exponential, "
        "as on a Mac; the run that says so has the faster one that it takes on x86.",
    ]
    lines += [f"- {note}." for note in notes]
    lines += [f"- Failed: {name} ({why})." for name, why in failures.items()]
    return lines
