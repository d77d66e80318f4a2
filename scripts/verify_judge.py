"""A judge with planted faults, measured and corrected: how far off the numbers are.

    python scripts/verify_judge.py [--simulations 200]

The judge's log-odds for the first of two answers are logit .7 (position) plus or minus logit .8
(quality: 20% wrong verdicts between answers of equal position). Each verdict is drawn at random.
People's labels are the truth. No model is involved; takes about a minute.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_align.preferences.judge_statistics import (
    BothOrders,
    Sample,
    average_orders,
    measure_judge,
)

POSITION, NOISE = 0.7, 0.2


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def planted(n: int, seed: int) -> Sample:
    draw = np.random.default_rng(seed)
    a_better = draw.random(n) < 0.5
    quality = np.where(a_better, logit(1 - NOISE), -logit(1 - NOISE))
    forward, backward = (
        (draw.random(n) < 1 / (1 + np.exp(-(logit(POSITION) + sign * quality)))).astype(float)
        for sign in (1, -1)
    )
    labels = a_better.astype(float)
    return Sample(BothOrders(forward, backward), labels, np.zeros(n), np.arange(n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=200)
    simulations = parser.parse_args().simulations
    print(
        "pairs  position bias      noise              one order  labels right  probability  covered"
    )
    for n in (50, 100, 300, 1000):
        rows, covered = [], []
        for seed in range(simulations):
            sample = planted(n, seed)
            report = measure_judge(sample, seed=seed)
            # The labels are for new pairs, with the calibration of the sample.
            fresh = planted(1000, 10_000 + seed)
            odds = average_orders(fresh.verdicts)
            decided = odds != 0
            right = (np.sign(odds) == np.sign(fresh.human - 0.5))[decided].mean()
            p = report.calibration.probability(odds, fresh.own)[decided]
            rows.append(
                (report.position_bias.value, report.noise.value, report.one_order.value, right,
                 np.maximum(p, 1 - p).mean())
            )  # fmt: skip
            covered.append(
                (report.position_bias.low <= POSITION <= report.position_bias.high,
                 report.noise.low <= NOISE <= report.noise.high)
            )  # fmt: skip
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
        shares = " ".join(f"{share:.0%}" for share in np.mean(covered, axis=0))
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True)]
        line = f"{n:5}  {cells[0]:17}  {cells[1]:17}  {mean[2]:.3f}      "
        print(f"{line}{cells[3]:13} {cells[4]:13} {shares}")


if __name__ == "__main__":
    main()
