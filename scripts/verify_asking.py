"""Asking people about the pairs on which reward heads disagree, against asking at random.

    python scripts/verify_asking.py [--seeds 5]

A simulated rater labels pairs of answers: the better one by a hidden reward, except that 10% of the
labels are wrong. Answers are vectors of features, as the last hidden state of a frozen backbone is;
an ensemble of 5 linear heads is fitted to the labels so far by the Bradley-Terry loss, each head
without another fifth of the prompts, as mlx-align reward --members 5 does. Then the next 10 pairs
are asked: at random, or those with the largest disagreement (mlx_align.preferences.disagreement).

As in real data, most pairs are easy: the features differ mainly in a few directions, and the reward
depends on others too. Takes about a minute; no model is involved.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_align.preferences.disagreement import most_disagreement_first, preference_disagreement

FEATURES, POOL, HELD_OUT = 24, 3000, 2000
MEMBERS, FIRST, STEP, LAST = 5, 20, 10, 600
WRONG = 0.1
TARGETS = (0.8, 0.85, 0.9)


def make_world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Feature differences and true labels of the pool and of held-out pairs."""
    draw = np.random.default_rng(seed)
    # Directions differ in how much answers vary in them, by a factor of up to 20.
    scale = np.geomspace(2.0, 0.1, FEATURES)
    reward = draw.normal(size=FEATURES) / scale**0.5
    pairs = draw.normal(size=(POOL + HELD_OUT, 2, FEATURES)) * scale
    difference = pairs[:, 0] - pairs[:, 1]
    better = difference @ reward > 0
    return pairs[:POOL], better[:POOL], pairs[POOL:], better[POOL:]


def fit_heads(pairs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(members, features) heads, each fitted without another fifth of the labelled pairs."""
    difference = pairs[:, 0] - pairs[:, 1]
    heads = []
    for member in range(MEMBERS):
        rows = np.arange(len(labels)) % MEMBERS != member
        x, y = difference[rows], labels[rows].astype(float)
        weight = np.zeros(x.shape[1])
        for _ in range(30):
            p = 1 / (1 + np.exp(-(x @ weight)))
            curvature = (x * (p * (1 - p))[:, None]).T @ x + 0.1 * np.eye(len(weight))
            step = np.linalg.solve(curvature, x.T @ (y - p) - 0.1 * weight)
            weight = weight + step
            if np.abs(step).max() < 1e-6:
                break
        heads.append(weight)
    return np.array(heads)


def accuracies(by_disagreement: bool, seed: int) -> list[tuple[int, float]]:
    """(labels, held-out accuracy) after every 10 labels."""
    pairs, truth, held_out, answers = make_world(seed)
    draw = np.random.default_rng((seed, 1))
    labels = truth ^ (draw.random(POOL) < WRONG)
    waiting = draw.permutation(POOL).tolist()
    labelled, waiting = waiting[:FIRST], waiting[FIRST:]
    found = []
    while True:
        heads = fit_heads(pairs[labelled], labels[labelled])
        mean = ((held_out[:, 0] - held_out[:, 1]) @ heads.T).mean(axis=1)
        found.append((len(labelled), float(((mean > 0) == answers).mean())))
        if len(labelled) >= LAST:
            return found
        if by_disagreement:
            scores = pairs[waiting] @ heads.T  # (waiting, 2, members)
            order = most_disagreement_first(preference_disagreement(scores[:, 0], scores[:, 1]))
            waiting = [waiting[k] for k in order]
        labelled, waiting = labelled + waiting[:STEP], waiting[STEP:]


def labels_needed(curve: list[tuple[int, float]], target: float) -> float:
    """Labels until the accuracy reaches the target and stays there in the next measurement."""
    for (count, accuracy), (_, following) in itertools.pairwise(curve):
        if accuracy >= target and following >= target:
            return float(count)
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    curves = {
        way: [accuracies(way == "disagreement", seed) for seed in seeds]
        for way in ("random", "disagreement")
    }
    print("accuracy  labels, random  labels, disagreement  share (95% interval over seeds)")
    for target in TARGETS:
        needed = {
            way: np.array([labels_needed(curve, target) for curve in found])
            for way, found in curves.items()
        }
        ratio = needed["disagreement"] / needed["random"]
        known = ratio[~np.isnan(ratio)]
        if len(known) < len(ratio):
            print(
                f"{target:.0%}: not reached within {LAST} labels in {len(ratio) - len(known)} runs"
            )
        if not len(known):
            continue
        # Student's t interval of the log of the ratio.
        logs = np.log(known)
        spread = logs.std(ddof=1) / np.sqrt(len(logs))
        t = T_QUANTILES.get(len(logs), 1.96)
        low, high = np.exp(logs.mean() - t * spread), np.exp(logs.mean() + t * spread)
        means = {way: np.nanmean(values) for way, values in needed.items()}
        print(
            f"{target:8.0%}  {means['random']:14.0f}  {means['disagreement']:20.0f}  "
            f"{np.exp(logs.mean()):.2f} ({low:.2f} to {high:.2f})"
        )


# Two-sided 95% quantiles of Student's t with n − 1 degrees of freedom, by n.
T_QUANTILES = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262, 20: 2.093}


if __name__ == "__main__":
    main()
