"""What the studies on the stories model share: prompts, samples, labels, runs, measurements.

The model is stories260K (data/real/stories260K): 260,000 parameters, small enough for curves with
many points on a CPU. The gold reward is the rule in story_rule.py, the truth of the studies: all
labels are its. A reward model in its place would share its faults with the proxies: PPO against a
proxy raised one trained on 2,000 pairs by 2.5 standard deviations, while the rule that labelled
these pairs fell by 0.6.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stories_pages import DOCS, SEEDS, when_and_where
from story_rule import rule
from studies import write_rows

import mlx_align as ma
from mlx_align.evaluation.metrics import best_of_kl, expected_best
from mlx_align.inference.generate import TextGenerator
from mlx_align.inference.scoring import tokenize_for_scoring
from mlx_align.system.atomic_io import write_text
from mlx_align.system.user_folders import cache_folder
from mlx_align.types import PromptGroup

Floats = npt.NDArray[np.float64]

MODEL = Path(__file__).resolve().parent.parent.parent / "data" / "real" / "stories260K"
TOKENS = 24  # of a completion, about 10 words; no story ends within them
OPENINGS = (
    "Once upon a time, there was a {hero} named {name}.",
    "One day, a {hero} named {name} went to the park.",
    "{name} was a {hero} who loved to play.",
    "There was a {hero} called {name} in a big house.",
    "{name} the {hero} woke up early.",
    "A {hero} named {name} found a box in the garden.",
)
HEROES = (
    *("little girl", "little boy", "big dog", "small cat", "brown bear", "red bird"),
    *("kind king", "old man", "happy fish", "white rabbit", "green frog", "brave mouse"),
)
TRAIN_NAMES = (
    *("Lily", "Tom", "Anna", "Ben", "Sara", "Sam", "Mia", "Jack", "Lucy", "Tim", "Amy", "Bob"),
    *("Jane", "Leo", "Emma", "Spot"),
)
HELD_OUT_NAMES = ("Max", "Sue", "Mary", "John")
HELD_OUT = 96  # prompts
BEST_OF = tuple(2**k for k in range(9))
SAMPLES = 512  # per prompt, from which the best of up to 256 is estimated
BEST_OF_PROMPTS = 24
LABELLED = 720  # prompts with two completions each


def prompts(names: Sequence[str]) -> list[str]:
    """Openings of stories about heroes with these names, in a fixed random order."""
    found = [
        opening.format(hero=hero, name=name)
        for opening in OPENINGS
        for hero in HEROES
        for name in names
    ]
    random.Random(0).shuffle(found)
    return found


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON content of a file, made if it is not there."""
    if not file.is_file():
        content = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content))
    return json.loads(file.read_text(encoding="utf-8"))


def sampled(file: Path, asked: Sequence[str], n: int, seed: int) -> list[list[str]]:
    """`n` completions of each prompt by the model as it is."""

    def make() -> list[list[str]]:
        print(f"Sampling {n} completions of {len(asked)} prompts …", flush=True)
        return sample(TextGenerator.load(str(MODEL)), asked, n, seed)

    return kept(file, make)


def sample(policy: TextGenerator, asked: Sequence[str], n: int, seed: int) -> list[list[str]]:
    """`n` completions of each prompt by a policy at temperature 1, duplicates included."""
    found = []
    for start in range(0, len(asked), 16):  # by parts, to bound memory
        groups = [PromptGroup(text, (), "prompt") for text in asked[start : start + 16]]
        tokens: Any = tokenize_for_scoring(groups, policy.style, 512)
        answers = policy.sample(tokens, n, max_tokens=TOKENS, seed=seed * 1000 + start)
        found += [[policy.decode(one) for one in group] for group in answers]
    return found


def score(run: Path, asked: Sequence[str], texts: Sequence[Sequence[str]]) -> Floats:
    """The scores (P, K) that a reward model gives to K completions of each of P prompts."""
    model = ma.RewardModel.load(str(MODEL), run)
    rows = []
    for prompt, answers in zip(asked, texts, strict=True):
        parts = (answers[start : start + 128] for start in range(0, len(answers), 128))
        rows.append([value for part in parts for value in model.score(prompt, part)])
    return np.array(rows)


def make_pairs(
    asked: Sequence[str], texts: Sequence[Sequence[str]], scores: Floats, flips: float, seed: int
) -> list[dict[str, str]]:
    """Pairs of the 1st and 2nd, 3rd and 4th … completion; the one that scores higher is chosen.

    Args:
        asked: P prompts.
        texts: K completions of each.
        scores: (P, K), by which the pairs are labelled. Equal scores make no pair.
        flips: Probability that a label is wrong.
        seed: Of the wrong labels.
    """
    draw, rows = random.Random(seed), []
    for prompt, answers, values in zip(asked, texts, scores, strict=True):
        for k in range(0, len(answers) - 1, 2):
            if values[k] == values[k + 1]:
                continue
            first = bool(values[k] > values[k + 1]) != (draw.random() < flips)
            chosen, rejected = (k, k + 1) if first else (k + 1, k)
            sides = {"chosen": answers[chosen], "rejected": answers[rejected]}
            rows.append({"prompt": prompt, **sides})
    return rows


def trained(command: str, output: Path, data: Path, **options: Any) -> ma.Run:
    """A run of a command, trained if it is not finished; an interrupted one continues."""
    if (output / "summary.json").is_file():
        return ma.load_run(output)
    train: Callable[..., ma.Run] = getattr(ma, command)
    print(f"Training {output.name} …", flush=True)
    if (output / "config.yaml").is_file():
        return train(resume=output, progress=False)
    common = {"fine_tune_type": "full", "grad_checkpoint": False, "samples": 0, "val_batches": -1}
    common |= {"max_seq_length": 96, "model": str(MODEL), "progress": False}
    return train(data=data, output=output, **common, **options)


def accuracy(judged: Floats, truth: Floats) -> tuple[float, int]:
    """Agreement with the truth on the 1st and 2nd, 3rd and 4th … completion; number of pairs.

    Pairs whose true scores are equal don't count.
    """
    right = (judged[:, ::2] > judged[:, 1::2]) == (truth[:, ::2] > truth[:, 1::2])
    right = right[truth[:, ::2] != truth[:, 1::2]]
    return float(right.mean()), right.size


def rule_scores(asked: Sequence[str], texts: Sequence[Sequence[str]]) -> Floats:
    """The gold rewards (P, K) of K completions of each of P prompts."""
    return np.array([[rule(p, text) for text in row] for p, row in zip(asked, texts, strict=True)])


def reference(folder: Path) -> tuple[float, float]:
    """Mean and standard deviation of the gold reward of the model as it is, on held-out prompts."""
    asked = held_out()
    scores = rule_scores(asked, sampled(folder / "reference-samples.json", asked, 8, seed=3))
    return float(scores.mean()), float(scores.std())


def ppo_data(folder: Path) -> Path:
    """Prompts for PPO: all that have training names, and `HELD_OUT` others."""
    data = folder / "prompts"
    write_rows(data / "train.jsonl", [{"prompt": text} for text in prompts(TRAIN_NAMES)])
    write_rows(data / "valid.jsonl", [{"prompt": text} for text in held_out()])
    return data


def held_out() -> list[str]:
    """The prompts on which everything is measured."""
    return prompts(HELD_OUT_NAMES)[:HELD_OUT]


def ppo(output: Path, data: Path, proxy: Path | None, **options: Any) -> ma.Run:
    """PPO against a proxy, or the gold reward itself; measured by the gold one along the way.

    Nothing stops it early and no checkpoint is chosen: the study wants to see it fail.
    """
    settings = {"guard": False, "keep": "last", "missing_eos_penalty": 0.0, "reward_clip": 20.0}
    settings |= {"max_completion_length": TOKENS, "batch_size": 8, "grad_accumulation_steps": 1}
    settings |= {"critic_warmup": 2, "critic_learning_rate": 1e-3, "lr_schedule": "constant"}
    gold = f"{Path(__file__).parent / 'story_rule.py'}:gold"
    if proxy is None:
        settings["reward"] = gold
    else:
        settings |= {"reward_model": str(proxy), "eval_reward": gold}
    return trained("ppo", output, data, **settings | options)


def evaluations(run: ma.Run) -> list[dict[str, float]]:
    """The held-out evaluations of a run of PPO.

    Of each the step, `kl` (nats per completion), `proxy` and `gold`, the means of the reward that
    it was trained on and of the gold one, and `gold_std`, the standard deviation over the prompts.
    """
    rows = []
    for row in run.history:
        if "eval/reward" not in row:
            continue
        gold = "eval/held_out" if "eval/held_out" in row else "eval/reward"
        rows.append(
            {
                "step": row["step"],
                "kl": row["eval/objective/kl"],
                "proxy": row["eval/reward"],
                "gold": row[gold],
                "gold_std": row[f"{gold}_std"],
            }
        )
    return rows


def labelled(folder: Path) -> tuple[list[str], list[list[str]], Floats]:
    """Prompts, two completions of each, and their gold rewards: what proxies and DPO learn from."""
    asked = prompts(TRAIN_NAMES)[:LABELLED]
    texts = sampled(folder / "pair-samples.json", asked, 2, seed=2)
    return asked, texts, rule_scores(asked, texts)


def measured(run: ma.Run, seed: int) -> dict[str, float]:
    """Gold reward and KL of a run on the held-out prompts, two completions each."""
    asked = held_out()
    reranker = ma.Reranker.load(str(MODEL), run.path, beta=1.0)
    groups = [PromptGroup(text, (), "prompt") for text in asked]
    rankings = reranker.sample_groups(groups, 2, max_tokens=TOKENS, seed=seed)
    # Equal samples come once, with their count.
    both = [[one for one in found.ranked for _ in range(one.count)] for found in rankings]
    ratios = np.array([[one.score for one in answers] for answers in both])
    scores = rule_scores(asked, [[one.text for one in answers] for answers in both])
    means = scores.mean(axis=1)
    spread = float(means.std(ddof=1))
    return {"kl": float(ratios.mean()), "gold": float(means.mean()), "gold_std": spread}


def many_samples(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Some held-out prompts, and the samples of each from which best-of-n is estimated."""
    some = held_out()[:BEST_OF_PROMPTS]
    return some, sampled(folder / "best-of-samples.json", some, SAMPLES, seed=4)


def best_of(proxy: Floats, gold: Floats) -> list[dict[str, Any]]:
    """Gains of best-of-n by a proxy over one sample, from scores (P, N), by the unbiased estimator.

    Returns:
        For each n of `BEST_OF` its bound on the KL, and for each of the P prompts the gold gain and
        the proxy's.
    """
    rows = []
    for n in BEST_OF:
        gains = {
            name: [
                expected_best(by, n, values) - float(values.mean())
                for by, values in zip(proxy, scores, strict=True)
            ]
            for name, scores in (("gold", gold), ("proxy", proxy))
        }
        rows.append({"n": n, "kl": best_of_kl(n), **gains})
    return rows


def run_study(
    description: str,
    name: str,
    study: Callable[[Path, int], dict[str, Any]],
    write_page: Callable[[dict[str, Any], Path], list[Path]],
) -> None:
    """The command of a study: runs it, keeps its results, and writes its page."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "real" / "stories")
    parser.add_argument("--docs", type=Path, default=DOCS, help="Folder of the pages to write.")
    given = parser.parse_args()
    results = study(given.folder, given.seeds) | when_and_where() | {"seeds": given.seeds}
    write_text(given.folder / f"{name}.json", json.dumps(results))
    for file in write_page(results, given.docs):
        print(file)
