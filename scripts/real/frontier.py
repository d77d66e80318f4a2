"""Reward against KL for DPO, PPO and best-of-n: the frontier of the DPO paper, on a small model.

The gold reward of `stories.py` labels the pairs that DPO learns from at five β, is the reward of
PPO at four KL coefficients, and picks the best of up to 256 samples. All are measured by the gold
reward and the KL from the start, on held-out prompts. The drawing is that of Rafailov et al. 2023,
"Direct Preference Optimization", figure 2.

    python scripts/real/frontier.py            # 3 seeds: 15 minutes of one core
    python scripts/real/frontier.py --seeds 1

A finished run is not repeated, and an interrupted one continues. Writes docs/verified/frontier.md
and its drawing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import stories
from frontier_page import write_frontier
from stories_pages import half_width
from studies import write_rows

import mlx_align as ma

Floats = stories.Floats
BETAS = (0.03, 0.1, 0.3, 1.0, 3.0)
KL_COEFS = (0.05, 0.2, 0.5, 1.5)
PAIRS = 400
BATCHES = 30


def dpo_run(folder: Path, beta: float, seed: int) -> ma.Run:
    """DPO on pairs of the model's own completions with gold labels."""
    asked, texts, scores = stories.labelled(folder)
    order = np.random.default_rng(seed).permutation(len(asked))[: PAIRS + 50]
    chosen = [asked[i] for i in order], [texts[i] for i in order], scores[order]
    rows = stories.make_pairs(*chosen, 0, seed)
    data = folder / f"dpo-data-{seed}"
    write_rows(data / "train.jsonl", rows[:PAIRS])
    write_rows(data / "valid.jsonl", rows[PAIRS:])
    settings = {"batch_size": 8, "grad_accumulation_steps": 2, "learning_rate": 3e-4}
    settings |= {"keep": "last", "steps_per_eval": 0, "epochs": 2, "beta": beta}
    return stories.trained("dpo", folder / f"dpo-{beta:g}-{seed}", data, seed=seed, **settings)


def ppo_run(folder: Path, kl_coef: float, seed: int) -> ma.Run:
    """PPO with the gold reward itself and a KL penalty."""
    return stories.ppo(
        folder / f"ppo-gold-{kl_coef:g}-{seed}",
        stories.ppo_data(folder),
        None,
        seed=seed,
        kl_coef=kl_coef,
        iters=BATCHES,
        learning_rate=3e-4,
        steps_per_eval=10,
        save_every=20,
        reward_rollouts=96,
    )


def optimum(gold: Floats, betas: Floats) -> list[dict[str, float]]:
    """KL and reward of the best possible policies, π ∝ π_start·e^(r/β), from samples (P, N).

    Samples of the start are weighted by e^(r/β). A policy far from the start rests on few of them:
    only those with an effective sample size of at least 30 are returned.
    """
    found = []
    for beta in betas:
        weights = np.exp((gold - gold.max(axis=1, keepdims=True)) / beta)
        weights /= weights.sum(axis=1, keepdims=True)
        if (1 / (weights**2).sum(axis=1)).mean() < 30:
            continue
        logs = np.log(np.maximum(weights, 1e-300) * gold.shape[1])
        gain = (weights * gold).sum(axis=1) - gold.mean(axis=1)
        kl = float((weights * logs).sum(axis=1).mean())
        found.append({"beta": float(beta), "kl": kl, "gold": float(gain.mean())})
    return found


def policies(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Gold reward and KL of all settings of DPO and PPO, for one seed."""
    mean, std = stories.reference(folder)
    found = []
    for beta in BETAS:
        run = dpo_run(folder, beta, seed)
        file = folder / f"measured-{run.path.name}.json"
        row = stories.kept(file, lambda run=run: stories.measured(run, seed))
        found.append({"method": "DPO", "setting": f"β = {beta:g}", **row})
    for kl_coef in KL_COEFS:
        row = stories.evaluations(ppo_run(folder, kl_coef, seed))[-1]
        found.append({"method": "PPO", "setting": f"KL coefficient {kl_coef:g}", **row})
    return [
        {
            "method": row["method"],
            "setting": row["setting"],
            "seed": seed,
            "kl": row["kl"],
            "gold": (row["gold"] - mean) / std,
            "half": half_width(row["gold_std"] / std, stories.HELD_OUT),
        }
        for row in found
    ]


def study(folder: Path, seeds: int) -> dict[str, Any]:
    """All measurements."""
    _, std = stories.reference(folder)
    gold = stories.rule_scores(*stories.many_samples(folder)) / std
    return {
        "pairs": PAIRS,
        "batches": BATCHES,
        "tokens": stories.TOKENS,
        "held_out": stories.HELD_OUT,
        "best_of": stories.best_of(gold, gold),
        "optimum": optimum(gold, np.geomspace(10, 0.1, 30)),
        "policies": [row for seed in range(seeds) for row in policies(folder, seed)],
    }


if __name__ == "__main__":
    stories.run_study(__doc__, "frontier", study, write_frontier)
