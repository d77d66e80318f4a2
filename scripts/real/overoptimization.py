"""Optimise proxy reward models until the gold one falls, by best-of-n and by PPO, and fit curves.

Proxies are trained on 60 and on 600 pairs labelled by the gold reward model, a quarter of the
labels wrong. Then best of 1 to 256 samples by the proxy, and PPO against it without a KL penalty,
are measured by the gold reward on held-out prompts, as functions of the KL from the start. Curves
are those of Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization".

    python scripts/real/overoptimization.py            # 3 seeds: 15 minutes of one core
    python scripts/real/overoptimization.py --seeds 1

A finished run is not repeated, and an interrupted one continues. Writes
docs/verified/overoptimization.md and its drawings.
"""

from pathlib import Path
from typing import Any

import numpy as np
import stories
from overoptimization_page import write_overoptimization
from stories_pages import half_width
from studies import write_rows

import mlx_align as ma

SIZES = (60, 600)
FLIPS = 0.25
BATCHES = 40
EVALUATE_EVERY = 2
SHOWN = 1  # the held-out prompt whose completions the page shows


def proxy_run(folder: Path, size: int, seed: int) -> ma.Run:
    """A proxy: a reward model trained on a few pairs with gold labels, some of them wrong."""
    asked, texts, scores = stories.labelled(folder)
    order = np.random.default_rng(seed).permutation(len(asked))
    test, train = order[:100], order[100 : 100 + size]

    def pairs(rows: Any, flips: float) -> list[dict[str, str]]:
        chosen = [asked[i] for i in rows], [texts[i] for i in rows], scores[rows]
        return stories.make_pairs(*chosen, flips, seed)

    data = folder / f"proxy-data-{size}-{seed}"
    write_rows(data / "train.jsonl", pairs(train, FLIPS))
    write_rows(data / "valid.jsonl", pairs(test, 0))
    settings = {"batch_size": 8, "grad_accumulation_steps": 1, "learning_rate": 5e-4}
    settings |= {"keep": "last", "steps_per_eval": 0, "epochs": 8 if size < 200 else 3}
    return stories.trained("reward", folder / f"proxy-{size}-{seed}", data, seed=seed, **settings)


def optimise(folder: Path, proxy: ma.Run, seed: int, **options: Any) -> ma.Run:
    """PPO against a proxy, without a KL penalty; with its guard, if the options say so."""
    kind = "guarded" if options else "ppo"
    return stories.ppo(
        folder / f"{kind}-{proxy.path.name}",
        stories.ppo_data(folder),
        proxy.path,
        seed=seed,
        kl_coef=0.0,
        iters=BATCHES,
        learning_rate=3e-4,
        steps_per_eval=EVALUATE_EVERY,
        save_every=20,
        reward_rollouts=96,
        **options,
    )


def guarded(folder: Path) -> dict[str, Any]:
    """What the guard makes of the first run against a proxy of few pairs."""
    run = optimise(folder, proxy_run(folder, SIZES[0], 0), 0, guard=True, keep="best")
    names = ("stopped_early", "steps", "best_step")
    return {name: run.summary[name] for name in names}


def measure(folder: Path, size: int, seed: int) -> dict[str, Any]:
    """What a proxy is worth: its accuracy, best-of-n by it, and PPO against it.

    Rewards are in standard deviations of the model's own samples on the held-out prompts, above
    their mean.
    """
    proxy = proxy_run(folder, size, seed)
    asked = stories.held_out()
    gold_mean, gold_std = stories.reference(folder)
    texts = stories.sampled(folder / "reference-samples.json", asked, 8, seed=3)
    some, many = stories.many_samples(folder)

    def scores() -> dict[str, Any]:
        print(f"Scoring by {proxy.path.name} …", flush=True)
        found = {"reference": (asked, texts), "many": (some, many)}
        return {name: stories.score(proxy.path, *what).tolist() for name, what in found.items()}

    scored = stories.kept(folder / f"scores-{proxy.path.name}.json", scores)
    by_proxy = np.array(scored["reference"])
    mean, std = float(by_proxy.mean()), float(by_proxy.std())
    run = optimise(folder, proxy, seed)
    evaluated = [
        {
            "step": row["step"],
            "kl": row["kl"],
            "gold": (row["gold"] - gold_mean) / gold_std,
            "gold_half": half_width(row["gold_std"] / gold_std, len(asked)),
            "proxy": (row["proxy"] - mean) / std,
        }
        for row in stories.evaluations(run)
    ]
    right, pairs = stories.accuracy(by_proxy, stories.rule_scores(asked, texts))
    gold = stories.rule_scores(some, many) / gold_std
    return {
        "size": size,
        "seed": seed,
        "accuracy": right,
        "pairs": pairs,
        "best_of": stories.best_of(np.array(scored["many"]) / std, gold),
        "ppo": evaluated,
        "text": run.generate(asked[SHOWN], max_tokens=stories.TOKENS),
    }


def study(folder: Path, seeds: int) -> dict[str, Any]:
    """All measurements, by seed first, so that an interrupted study has whole seeds."""
    made = [measure(folder, size, seed) for seed in range(seeds) for size in SIZES]
    return {
        "tokens": stories.TOKENS,
        "held_out": stories.HELD_OUT,
        "prompt": stories.held_out()[SHOWN],
        "proxies": made,
        "guarded": guarded(folder),
    }


if __name__ == "__main__":
    stories.run_study(__doc__, "overoptimization", study, write_overoptimization)
