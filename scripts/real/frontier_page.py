"""The page of frontier.py and its drawing, from stored results."""

from pathlib import Path
from typing import Any

import numpy as np
from curves import Series, draw
from stories_pages import (
    LEAST_KL,
    SHOWN,
    Point,
    best_of_points,
    filled,
    listed,
    repeated_by,
    seeds,
    table,
    value,
    what_is_measured,
    write,
)

FRONTIER = """
# Reward against KL

How much reward does a method gain for how much drift? Rafailov et al. 2023, "Direct Preference
Optimization", compare DPO with PPO by this frontier (figure 2). `scripts/real/frontier.py` draws it
for `mlx-align dpo`, `mlx-align ppo` and best-of-n on a small model, with a reward that is known.

{measured}

DPO learns from {pairs} pairs of the model's own completions, which the rule labels without errors,
for two epochs at a learning rate of 3e-4. PPO is trained on the rule itself, for {batches} rollout
batches of 32 completions at the same rate. Best-of-n chooses by the rule.

![Gold reward against KL for DPO, PPO and best-of-n](../images/frontier.svg)

{seeds}; ± is half of a 95% interval over prompts for one run. The KL is measured with samples, per
completion. Best-of-n and the optimum are measured on {prompts} of the prompts, with 512 samples
each. The last column is interpolated, and ends at best of 256.

{policies}

{best_of}

## What it shows

{conclusions}

{how}
"""


def write_frontier(results: dict[str, Any], docs: Path) -> list[Path]:
    """Write the page of frontier.py, and its drawing; returns the files."""
    drawings = {"frontier.svg": frontier_drawing(results)}
    return write(docs, "frontier.md", frontier_page(results), drawings)


def settings_of(results: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The policies of each method and setting, one per seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in results["policies"]:
        found.setdefault((one["method"], one["setting"]), []).append(one)
    return found


def gold_best_of(results: dict[str, Any]) -> dict[int, Point]:
    """Best-of-n by the gold reward itself."""
    return best_of_points([results])


def frontier_drawing(results: dict[str, Any]) -> str:
    """Gold reward against KL."""
    best = gold_best_of(results)
    optimum = results["optimum"]
    series = [
        Series(
            "the optimum, start × exp(reward/β), estimated from 512 samples",
            [row["kl"] for row in optimum],
            [row["gold"] for row in optimum],
            None,
            3,
            False,
            False,
            "dashed",
        ),
        Series(
            "best of 1 to 256 by the gold reward",
            [point.kl for point in best.values()],
            [point.gold for point in best.values()],
            [point.half for point in best.values()],
            2,
            line="solid",
        ),
    ]
    for colour, (method, name) in enumerate(
        (
            ("DPO", "DPO on gold-labelled pairs, by β"),
            ("PPO", "PPO with the gold reward, by KL coefficient"),
        )
    ):
        rows = [row for row in results["policies"] if row["method"] == method]
        columns = ([row[key] for row in rows] for key in ("kl", "gold", "half"))
        series.append(Series(name, *columns, colour))
    return draw(
        "Reward against KL",
        "Gold reward of DPO, PPO and best-of-n against the KL from the start, on held-out prompts.",
        "KL from the start, nats per completion",
        "gold reward, standard deviations",
        series,
    )


def best_of_at(results: dict[str, Any], kl: float) -> float | None:
    """The gold gain of best-of-n at a KL, interpolated; None beyond the largest n."""
    points = sorted(gold_best_of(results).values())
    if not points[0].kl <= kl <= points[-1].kl:
        return None
    return float(np.interp(kl, [p.kl for p in points], [p.gold for p in points]))


def frontier_page(results: dict[str, Any]) -> str:
    """The page of frontier.py."""
    settings = settings_of(results)
    best = gold_best_of(results)
    rows = []
    for (method, setting), policies in settings.items():
        kl, gold, half = (float(np.mean([p[k] for p in policies])) for k in ("kl", "gold", "half"))
        golds = [p["gold"] for p in policies]
        other = best_of_at(results, kl)
        beside = "–" if other is None else value(other)
        spread = f"{value(min(golds))} to {value(max(golds))}" if len(golds) > 1 else "–"
        rows.append(
            f"| {method} | {setting} | {kl:.2f} | {value(gold, half)} | {spread} | {beside} |"
        )
    best_rows = [f"| {n} | {best[n].kl:.2f} | {value(best[n].gold, best[n].half)} |" for n in SHOWN]
    return filled(
        FRONTIER,
        measured=what_is_measured(results),
        pairs=results["pairs"],
        batches=results["batches"],
        prompts=len(results["best_of"][0]["gold"]),
        seeds=seeds(max(len(rows) for rows in settings.values())),
        policies=table(
            "| | setting | KL, nats | gold | over seeds | best-of-n at this KL |",
            "|---|---|---:|---|---|---:|",
            rows,
        ),
        best_of=table("| best of | KL, nats | gold |", "|---:|---:|---|", best_rows),
        conclusions=listed(frontier_conclusions(results)),
        how=repeated_by("frontier", results),
    )


def frontier_conclusions(results: dict[str, Any]) -> list[str]:
    """What the numbers say."""
    best, found = gold_best_of(results), []
    if (top := _optimum_at(results, best[4].kl)) is not None:
        found.append(
            f"Best-of-n is close to the optimum: best of 4 gains {value(best[4].gold)} for "
            f"{best[4].kl:.2f} nats, and the most that can be had for them is {value(top)}."
        )
    for method in ("DPO", "PPO"):
        own = {
            key[1]: Point(
                *(float(np.mean([p[k] for p in rows])) for k in ("kl", "gold", "half")), 0
            )
            for key, rows in settings_of(results).items()
            if key[0] == method
        }
        top = max(own, key=lambda setting: own[setting].gold)
        found.append(
            f"{method} reaches at most {value(own[top].gold)}, at {own[top].kl:.1f} nats ({top}). "
            f"Best of 256 reaches {value(best[256].gold)} at {best[256].kl:.1f} nats."
        )
        gaps = [
            (point.gold - at, point.half)
            for point in own.values()
            if (at := best_of_at(results, point.kl)) is not None and point.kl > LEAST_KL
        ]
        if gaps:
            below = sum(gap < -half for gap, half in gaps)
            found.append(
                f"{method} can be compared with best-of-n at the same KL in {len(gaps)} settings. "
                f"It is below by more than the interval in {below} of them, and "
                f"{value(np.mean([gap for gap, _ in gaps]))} on average."
            )
    found.append("Best-of-n needs n completions for each answer; DPO and PPO need one.")
    return found


def _optimum_at(results: dict[str, Any], kl: float) -> float | None:
    rows = sorted(results["optimum"], key=lambda row: row["kl"])
    if not rows or not rows[0]["kl"] <= kl <= rows[-1]["kl"]:
        return None
    return float(np.interp(kl, [row["kl"] for row in rows], [row["gold"] for row in rows]))
