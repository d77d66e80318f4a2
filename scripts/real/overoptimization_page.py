"""The page of overoptimization.py and its drawings, from stored results."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curves import Fit, Floats, Series, draw, fit_best_of, fit_rl
from stories_pages import (
    LEAST_KL,
    SHOWN,
    Point,
    best_of_points,
    filled,
    listed,
    quoted,
    repeated_by,
    seeds,
    table,
    value,
    what_is_measured,
    write,
)

from mlx_align.system.intervals import wilson_interval

GUIDE = "../guides/reward-model-and-ppo.md#dont-optimise-the-reward-model-too-far"
OVEROPTIMIZATION = """
# Overoptimising a reward model

A policy that is optimised against a reward model gets better at first; later it only gets better at
fooling it. Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", measured when that
happens. `scripts/real/overoptimization.py` repeats their experiment on a small scale: it trains
proxy reward models on few pairs, and optimises each by best-of-n and by PPO.

{measured}

## The proxies

Each proxy is a run of `mlx-align reward` on pairs of the model's own completions. The rule labels
the pairs, and a quarter of the labels are flipped, as in Coste et al. 2023. Accuracy on
{pairs} held-out pairs, judged by the rule, one number per seed:

{accuracies}

## Best of n

The best by the proxy of n samples, from 512 samples of each of {prompts} prompts. The unbiased
estimator averages over all subsets of n samples; the KL is ln n − (n − 1)/n. Gains over one sample.
{seeds}; 95% intervals over prompts.

{best_of}

![Gold and proxy reward of best-of-n against the square root of KL](../images/best-of-n.svg)

## PPO

`mlx-align ppo` with `--kl-coef 0`, `--no-guard` and the rule as `--eval-reward`: {batches} rollout
batches of 32 completions at a learning rate of 3e-4. The KL is measured with samples, in nats per
completion. {seeds}; the intervals are those of a single run, over prompts.

{ppo}

![Gold and proxy reward along PPO against the square root of KL](../images/overoptimization.svg)

Greedy completions of a held-out prompt after PPO (seed 0): "{prompt}"

{texts}

## The fitted curves

Least squares on the gold reward, with d = √KL: best-of-n on its means, PPO on all evaluations of
all seeds.

{fits}

## What it shows

{conclusions}

What to do about it is in the guide: [don't optimise the reward model too far]({guide}). {guarded}

The gold reward is a rule and not a large reward model as in the paper, because a reward model of
this size shares the faults of its proxies. It was tried first: one trained on 2,000 pairs that the
rule had labelled. PPO against a proxy of it raised it by 2.5 standard deviations, while the rule
fell by 0.6.

{how}
"""


def write_overoptimization(results: dict[str, Any], docs: Path) -> list[Path]:
    """Write the page of overoptimization.py, and its drawings; returns the files."""
    sizes = by_size(results)
    drawings = {"best-of-n.svg": best_of_drawing(sizes), "overoptimization.svg": ppo_drawing(sizes)}
    return write(docs, "overoptimization.md", overoptimization_page(results), drawings)


def by_size(results: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The proxies of each size."""
    found: dict[int, list[dict[str, Any]]] = {}
    for proxy in results["proxies"]:
        found.setdefault(proxy["size"], []).append(proxy)
    return found


def ppo_points(proxies: Sequence[dict[str, Any]]) -> dict[int, Point]:
    """PPO against proxies of one size, by rollout batch: means over their seeds.

    Intervals are over the prompts of one run, so they are too wide for means of several.
    """
    found = {}
    for rows in zip(*(one["ppo"] for one in proxies), strict=True):
        means = (
            float(np.mean([row[name] for row in rows]))
            for name in ("kl", "gold", "gold_half", "proxy")
        )
        found[int(rows[0]["step"])] = Point(*means)
    return found


def peak_of(points: dict[int, Point]) -> int:
    """Where the gold reward is highest."""
    return max(points, key=lambda key: points[key].gold)


def falls(peak: Point, last: Point) -> bool:
    """Whether the gold reward ends below its highest, beyond both intervals."""
    return peak.gold - last.gold > math.hypot(peak.half, last.half)


def fits(proxies: Sequence[dict[str, Any]]) -> tuple[Fit, Fit]:
    """The curves of best-of-n and of PPO, fitted to the gold rewards of all seeds."""
    best = [point for n, point in best_of_points(proxies).items() if n > 1]
    rows = [row for one in proxies for row in one["ppo"] if row["kl"] > LEAST_KL]
    return (
        fit_best_of(_root(point.kl for point in best), np.array([point.gold for point in best])),
        fit_rl(_root(row["kl"] for row in rows), np.array([row["gold"] for row in rows])),
    )


def _root(values: Iterable[float]) -> Floats:
    return np.sqrt(np.array(list(values)))


def best_of_drawing(sizes: dict[int, list[dict[str, Any]]]) -> str:
    """Gold and proxy reward of best-of-n."""
    series = []
    for colour, (size, proxies) in enumerate(sizes.items()):
        points = best_of_points(proxies)
        at = [math.sqrt(point.kl) for point in points.values()]
        series += _three(
            f"{size} pairs",
            (at, [p.gold for p in points.values()], [p.half for p in points.values()]),
            (at, [p.proxy for p in points.values()]),
            fits(proxies)[0],
            colour,
        )
    return _gao("Best of n by a proxy", "under best-of-n, for n = 1 to 256", series)


def ppo_drawing(sizes: dict[int, list[dict[str, Any]]]) -> str:
    """Gold and proxy reward of PPO, all seeds."""
    series = []
    for colour, (size, proxies) in enumerate(sizes.items()):
        rows = [row for one in proxies for row in one["ppo"] if row["kl"] > LEAST_KL]
        rows.sort(key=lambda row: row["kl"])
        means = sorted(ppo_points(proxies).values())
        series += _three(
            f"{size} pairs",
            (_root(row["kl"] for row in rows), [r["gold"] for r in rows], None),
            (_root(max(p.kl, 0) for p in means), [p.proxy for p in means]),
            fits(proxies)[1],
            colour,
        )
    return _gao("PPO against a proxy", "under PPO, along the runs of all seeds", series)


def _three(name: str, gold: Any, proxy: Any, fit: Fit, colour: int) -> list[Series]:
    x, y, half = gold
    line = np.linspace(1e-3, max(x), 120)
    return [
        Series(f"proxy of {name}: gold reward", x, y, half, colour),
        Series(
            f"proxy of {name}: fitted curve",
            line,
            fit.curve(line),
            None,
            colour,
            False,
            False,
            "solid",
        ),
        Series(f"proxy of {name}: its own reward", *proxy, None, colour, True, True, "dashed"),
    ]


def _gao(title: str, how: str, series: list[Series]) -> str:
    text = f"Gold and proxy reward {how}, against the square root of the KL from the start."
    return draw(title, text, "d = √KL, √nat", "reward, standard deviations", series)


def overoptimization_page(results: dict[str, Any]) -> str:
    """The page of overoptimization.py."""
    sizes, first = by_size(results), results["proxies"][0]
    accuracies = [
        f"| {size} | {', '.join(accuracy(one) for one in proxies)} |"
        for size, proxies in sizes.items()
    ]
    best = {size: best_of_points(proxies) for size, proxies in sizes.items()}
    ppo = {size: ppo_points(proxies) for size, proxies in sizes.items()}
    columns = "".join(f" proxy of {size} | its gold |" for size in sizes)
    ruler = "|---:|---:|" + "---:|---|" * len(sizes)
    best_rows = [
        f"| {n} | {next(iter(best.values()))[n].kl:.2f} |"
        + "".join(f" {value(b[n].proxy)} | {value(b[n].gold, b[n].half)} |" for b in best.values())
        for n in SHOWN
    ]
    ppo_rows, fit_rows = [], []
    for size, points in ppo.items():
        for name, step in (("start", 0), ("gold highest", peak_of(points)), ("end", max(points))):
            at = points[step]
            ppo_rows.append(
                f"| {size} | {name} | {step} | {at.kl:.1f} | {value(at.proxy)} | "
                f"{value(at.gold, at.half)} |"
            )
        for name, fit, unit in zip(
            ("best-of-n", "PPO"), fits(sizes[size]), ("β·d", "β·ln d"), strict=True
        ):
            far = fit.peak > 1.5 * fit.farthest
            top = f"{value(fit.best)} at {fit.peak**2:.1f} nats"
            peak = "none" if math.isinf(fit.peak) else "beyond what was measured" if far else top
            beta = f"{fit.beta:.3f}".replace("-", "−")
            fit_rows.append(
                f"| {size} | {name} | d(α − {unit}) | {fit.alpha:.3f} | {beta} | "
                f"{fit.error:.3f} | {peak} |"
            )
    texts = [f"- proxy of {size}: {quoted(p[0]['text'])}" for size, p in sizes.items()]
    return filled(
        OVEROPTIMIZATION,
        measured=what_is_measured(results),
        pairs=first["pairs"],
        prompts=len(first["best_of"][0]["gold"]),
        seeds=seeds(len(next(iter(sizes.values())))),
        batches=max(next(iter(ppo.values()))),
        prompt=results["prompt"],
        accuracies=table("| pairs | accuracy |", "|---:|---|", accuracies),
        best_of=table(f"| n | KL, nats |{columns}", ruler, best_rows),
        ppo=table(
            "| pairs | | rollout batch | KL, nats | proxy | gold |",
            "|---:|---|---:|---:|---:|---|",
            ppo_rows,
        ),
        guide=GUIDE,
        guarded=guard_conclusion(results),
        texts="\n".join(texts),
        fits=table(
            "| pairs | by | form | α | β | error (RMS) | its maximum |",
            "|---:|---|---|---:|---:|---:|---|",
            fit_rows,
        ),
        conclusions=listed([*conclusions(best, ppo), *fit_conclusions(sizes)]),
        how=repeated_by("overoptimization", results),
    )


def accuracy(proxy: dict[str, Any]) -> str:
    """The accuracy of a proxy, with a 95% interval."""
    found = wilson_interval(proxy["accuracy"], proxy["pairs"])
    return f"{found.value:.1%} ({found.low:.0%} to {found.high:.0%})"


def conclusions(best: dict[int, dict[int, Point]], ppo: dict[int, dict[int, Point]]) -> list[str]:
    """What the numbers say, by method and size of the proxies."""
    found = []
    for size, points in ppo.items():
        peak, last = points[peak_of(points)], points[max(points)]
        if falls(peak, last):
            end = f"and then falls to {value(last.gold)} at {last.kl:.0f} nats"
        elif peak == last:
            end = "where the run ends: it has not fallen yet"
        else:
            end = f"and ends at {value(last.gold)}, no fall beyond the intervals"
        found.append(
            f"PPO against proxies of {size} pairs raises the gold reward to {value(peak.gold)} at "
            f"{peak.kl:.1f} nats, {end}. The proxy itself rises to {value(last.proxy)}."
        )
    for size, points in best.items():
        n, largest = peak_of(points), max(points)
        peak, last = points[n], points[largest]
        if falls(peak, last):
            end = f", and falls to {value(last.gold)} at n = {largest}"
        elif peak == last:
            end = ", the largest n: it has not fallen yet"
        else:
            end = f"; {value(last.gold)} at n = {largest} is no fall beyond the intervals"
        found.append(
            f"Best-of-n by proxies of {size} pairs gains at most {value(peak.gold)} "
            f"at n = {n}{end}."
        )
    small, large = min(ppo), max(ppo)
    if small != large:
        low, high = (ppo[size][peak_of(ppo[size])] for size in (small, large))
        sure = high.gold - low.gold > math.hypot(high.half, low.half)
        found.append(
            f"With {large} pairs instead of {small}, the highest gold reward of PPO is "
            f"{value(high.gold)} instead of {value(low.gold)}"
            + ("." if sure else ", a difference within the intervals.")
        )
    return found


def guard_conclusion(results: dict[str, Any]) -> str:
    """What the guard and the choice of a checkpoint make of the first run."""
    found, proxy = results["guarded"], results["proxies"][0]
    gold = {int(row["step"]): row["gold"] for row in proxy["ppo"]}
    best = found["best_step"]
    stopped = "stopped it" if found["stopped_early"] else "did not stop it, so it ended"
    return (
        f"The study turns `--guard` and `--keep best` off. With them, and the rule as "
        f"`--eval-reward`, the first run against a proxy of {proxy['size']} pairs was repeated: "
        f"the guard {stopped} after {found['steps']} rollout batches, and the adapter that was "
        f"kept is that of batch {best}, at {value(gold[best])}."
    )


def fit_conclusions(sizes: dict[int, list[dict[str, Any]]]) -> list[str]:
    """Whether the published forms describe what was measured, within its intervals."""
    found = []
    for size, proxies in sizes.items():
        points = best_of_points(proxies), ppo_points(proxies)
        for name, fit, own in zip(("best-of-n", "PPO"), fits(proxies), points, strict=True):
            half = float(np.mean([point.half for point in own.values()]))
            found.append(
                f"The published form {'describes' if fit.error <= half else 'does not describe'} "
                f"{name} by proxies of {size} pairs: its error is {fit.error:.2f}, and the "
                f"intervals are ± {half:.2f} on average."
            )
    return found
