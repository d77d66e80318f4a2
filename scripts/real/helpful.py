"""Train SmolLM2-135M-Instruct on people's preferences, and measure what that is worth.

Anthropic's HH-RLHF (helpful) in data/real/hh-helpful, conversations of up to 200 tokens. Half of
the training pairs (A) train the policies, and a reward model that ranks answers. The other half (B)
trains the judge: a reward model that no policy was trained with. Conversations of A, B and the
held-out pairs are different ones.

    python scripts/real/helpful.py                 # 2 hours on 2 cores, minutes on a Mac
    python scripts/real/helpful.py --only judge,reward,dpo

Finished parts are not repeated, and interrupted ones continue. The page, docs/verified/helpful.md,
has what was measured, here or before. On Linux LD_PRELOAD should name libopenblas.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from models import smollm2
from studies import (
    REAL,
    add_only,
    evaluate,
    read_json,
    read_rows,
    record,
    recorded,
    run,
    shown,
    shown_kl,
    study_folder,
    table,
    train,
    write_page,
    write_rows,
)
from tokenizers import Tokenizer

from mlx_align.evaluation.metrics import expected_best
from mlx_align.evaluation.statistics import mean_estimate
from mlx_align.system.intervals import Estimate

MAX_TOKENS = 200
# Prompts completed by policy and start, and the longest completion.
ANSWERS = ("--samples", 64, "-n", 1, "--max-completion-length", 64)
# PPO's and GRPO's options: batches of 16 completions.
ROLLOUTS = (
    "--iters 20 --learning-rate 5e-4 --group-size 4 --grad-accumulation-steps 4 "
    "--max-completion-length 64 --steps-per-eval 0"
)
CRITIC = "--critic-learning-rate 3e-4"  # PPO's
RERANKED, COMPLETIONS = 32, 16
COUNTS = (1, 2, 4, 8, 16)
REWARD_MODELS = {
    "judge": "judge, trained on B",
    "reward": "reward model, trained on A",
}
RANKERS = {
    "dpo": "implicit reward of the DPO run",
    "reward": "reward model of A",
    "judge": "the judge itself (the most there is)",
}
POLICIES = {
    "dpo": "DPO",
    "dpo-rate-2e-4": "DPO, learning rate 2e-4",
    "dpo-bfloat16": "DPO, base in bf16",
    "dpo-4-bit": "DPO, base in 4 bits",
    "sft": "SFT on the chosen answers",
    "sft-dpo": "SFT, then DPO",
    "ppo": "PPO, reward model of A",
    "grpo": "GRPO, reward model of A",
}

FINDINGS = (
    "DPO ranks 61% to 65% of the held-out pairs right, for bases in float32, bf16 and 4 bits, and "
    "for one that SFT trained. None of these policies is surely judged better than its start: with "
    "64 prompts an interval is 11 points wide to either side. At 0.2 to 0.4 nats, answers hardly "
    "change at all. SFT makes them as short as the chosen ones. GRPO and PPO drifted by 5 nats, "
    "and didn't surely raise their own reward: 320 completions are a twelfth of what they sample "
    "by default."
)
PPO_FINDINGS = (
    "PPO takes one deviation off the reward of an answer that is cut off (`--missing-eos-penalty`),"
    " and that is what the policy learned: 92% of its answers to held-out prompts end, of the "
    "start's 30%. Its critic starts as the reward model, scaled to the returns of completions of "
    "the reference. Without the scaling it explained −311% of the variance of the returns in the "
    "first batch and −78% in the last, and the policy of the same run didn't learn to end its "
    "answers (22%); its reward changed by +0.05 (-0.10 to +0.20). With it, it explained −2% and "
    "11%."
)


def write_data(folder: Path) -> None:
    """Write the parts A and B of the training pairs, each with the held-out pairs."""
    tokenizer = Tokenizer.from_file(str(smollm2() / "tokenizer.json"))

    def is_short(row: dict[str, Any]) -> bool:
        messages = [*row["prompt"], *row["chosen"], *row["rejected"]]
        # The template adds 5 tokens to a message, and a system message of 25.
        return 25 + sum(len(tokenizer.encode(m["content"]).ids) + 5 for m in messages) <= MAX_TOKENS

    rows = {
        split: [row for row in read_rows(REAL / "hh-helpful" / f"{split}.jsonl") if is_short(row)]
        for split in ("train", "valid")
    }
    # All rows of a conversation are on the same side.
    first = list(dict.fromkeys(row["prompt"][0]["content"] for row in rows["train"]))
    in_a = set(first[::2])
    for part in "ab":
        kept = [
            row for row in rows["train"] if (row["prompt"][0]["content"] in in_a) == (part == "a")
        ]
        write_rows(folder / f"data-{part}" / "train.jsonl", kept)
        write_rows(folder / f"data-{part}" / "valid.jsonl", rows["valid"])
    prompts = {json.dumps(row["prompt"]): {"prompt": row["prompt"]} for row in rows["valid"]}
    write_rows(folder / "prompts.jsonl", list(prompts.values())[:RERANKED])
    texts = [
        {"text": f"{row['prompt'][-1]['content']}\n{row['solution']}"}
        for row in read_rows(REAL / "gsm8k" / "valid.jsonl")[:40]
    ]
    write_rows(folder / "texts.jsonl", texts)


def stages(folder: Path) -> dict[str, Callable[[], None]]:
    """What is trained, measured and recorded, by name, in this order."""
    a, b = folder / "data-a", folder / "data-b"

    def reward_model(name: str, data: Path) -> None:
        train(folder / name, "reward", "--model", smollm2(), "--data", data)
        record("helpful", name, reward_row(name, folder / name))

    def trained(name: str, command: str, *options: object, dtype: str = "float32") -> Path:
        model = smollm2(dtype, in_float32=not mx.metal.is_available())
        return train(folder / name, command, "--model", model, "--data", a, *options)

    def policy(name: str, command: str, *options: object, dtype: str = "float32") -> None:
        trained(name, command, *options, dtype=dtype)
        judge = ("--reward-model", folder / "judge", "--perplexity-data", folder / "texts.jsonl")
        found = evaluate(folder / name, folder / f"eval-{name}", *judge, *ANSWERS)
        record("helpful", name, policy_row(name, found))

    def on_policy(name: str, *options: object) -> None:
        policy(name, name, "--reward-model", folder / "reward", *ROLLOUTS.split(), *options)
        record("helpful", f"{name}-reward", rewarded_row(name, folder / name))

    return {
        "judge": lambda: reward_model("judge", b),
        "reward": lambda: reward_model("reward", a),
        "dpo": lambda: policy("dpo", "dpo"),
        "rerank": lambda: rerank(folder),
        "dpo-rate-2e-4": lambda: policy("dpo-rate-2e-4", "dpo", "--learning-rate", "2e-4"),
        "sft": lambda: policy("sft", "sft"),
        "sft-dpo": lambda: policy("sft-dpo", "dpo", "--init-adapter", trained("sft", "sft")),
        "ppo": lambda: on_policy("ppo", *CRITIC.split()),
        "grpo": lambda: on_policy("grpo"),
        "dpo-bfloat16": lambda: policy("dpo-bfloat16", "dpo", dtype="bfloat16"),
        "dpo-4-bit": lambda: policy("dpo-4-bit", "dpo", dtype="4-bit"),
    }


def rerank(folder: Path) -> None:
    """Score 16 answers to each held-out prompt: by implicit reward, reward model and judge."""
    answers = folder / "answers.jsonl"
    if not answers.is_file():
        asked = ("--data", folder / "prompts.jsonl", "-n", COMPLETIONS)
        cut = ("--max-completion-length", 64, "--output", answers)
        run(["data", "sample", "--model", smollm2(), *asked, *cut])
    for name in RANKERS:
        scored = folder / f"scores-{name}.jsonl"
        if not scored.is_file():
            run(["score", folder / name, "--data", answers, "--output", scored])
    for name, cells in reranking_rows(folder).items():
        record("helpful", name, cells)


def best_of(ranking: np.ndarray, judged: np.ndarray, count: int) -> np.ndarray:
    """The expected judge's score of the best of `count` answers, per prompt.

    Args:
        ranking: Scores that rank, (prompts, N).
        judged: The judge's scores, (prompts, N).
        count: Answers to choose from.
    """
    rows = zip(ranking, judged, strict=True)
    return np.array([expected_best(scores, count, values) for scores, values in rows])


def reranking_rows(folder: Path) -> dict[str, list[str]]:
    """The judge's score of the best of n, by what ranked them, in deviations of its scores."""
    scores = {
        name: np.array([row["model_scores"] for row in read_rows(folder / f"scores-{name}.jsonl")])
        for name in RANKERS
    }
    judge = scores["judge"]
    judge = (judge - judge.mean()) / judge.std()
    prompts, rows = np.arange(len(judge)), {}
    for name, title in RANKERS.items():
        first = best_of(scores[name], judge, 1)
        gains = [best_of(scores[name], judge, count) - first for count in COUNTS[1:]]
        cells = [shown(mean_estimate(gain, prompts), "{:+.2f}") for gain in gains]
        rows[f"rerank-{name}"] = [title, *cells, judge_accuracy()]
    return rows


def judge_accuracy() -> str:
    """The held-out accuracy of the judge; a row keeps that of the judge that it was made with."""
    return recorded("helpful")["judge"][1]


def reward_row(name: str, run: Path) -> list[str]:
    """Accuracy and calibration of a reward model."""
    held_out = read_json(run / "summary.json")["held_out"]
    accuracy = [held_out[f"accuracy{end}"] for end in ("", "_low", "_high")]
    return [
        REWARD_MODELS[name],
        f"{shown(Estimate(*accuracy))} of {held_out['comparisons']}",
        f"{held_out['longer_accuracy']:.0%}",
        f"{held_out['accuracy_shorter_chosen']:.0%} of {held_out['shorter_chosen']}",
        f"{held_out['ece']:.1%}",
    ]


def policy_row(name: str, found: dict[str, Any]) -> list[str]:
    """What a policy gained and cost, next to the start."""
    wins, equal = found["wins"], found["wins"]["length_controlled"]
    return [
        POLICIES[name],
        shown(found["preferences"]["reward_accuracy"]),
        shown(wins["rate"]),
        "–" if equal is None else shown(equal),
        shown_kl(found["divergence"]["per_answer"], found["divergence"]["standard_error"]),
        f"{wins['reference_length']:.0f} → {wins['length']:.0f}",
        shown(found["perplexity"]["ratio"], "{:.3f}"),
        judge_accuracy(),
    ]


def rewarded_row(name: str, run: Path) -> list[str]:
    """What PPO or GRPO did to the reward that it was trained on."""
    summary = read_json(run / "summary.json")
    before, after = (summary[when]["reward"] for when in ("eval_before", "eval"))
    change = summary["verdict"]["estimate"]
    return [
        f"{POLICIES[name]}, {summary['completions']} completions",
        f"{before:+.2f}",
        f"{after:+.2f}",
        shown(change, "{:+.2f}"),
        f"{summary['seconds'] / 60:.0f}",
    ]


def remarks() -> dict[str, str]:
    """What the table of policies needs to be understood, by the row that needs it."""
    found = {"sft-dpo": "The start of the DPO that follows SFT is the SFT run."}
    if not mx.metal.is_available():
        found["dpo-4-bit"] = (
            "The weights of bases in bf16 and 4 bits are rounded to them, but computed with in "
            "float32: mlx's CPU kernels are 20 to 400 times slower there, and add up 4-bit "
            "products in bf16, which puts 2% of noise on every layer."
        )
    return found


def page(folder: Path) -> list[str]:
    """The parts of the page for what was measured."""
    valid = len(read_rows(folder / "data-a" / "valid.jsonl"))
    sizes = {part: len(read_rows(folder / f"data-{part}" / "train.jsonl")) for part in "ab"}
    rows = recorded("helpful")
    reward_models = [rows[name] for name in REWARD_MODELS if name in rows]
    policies = [rows[name] for name in POLICIES if name in rows]
    rankers = [rows[f"rerank-{name}"] for name in RANKERS if f"rerank-{name}" in rows]
    rewarded = [rows[f"{name}-reward"] for name in POLICIES if f"{name}-reward" in rows]
    reward_titles = ["", "held-out accuracy", "“pick the longer”", "where the shorter is chosen"]
    titles = ["", "held-out reward accuracy", "judged better than the start", "at equal length"]
    parts = [
        "# People's preferences on a real model",
        "SmolLM2-135M-Instruct on Anthropic's HH-RLHF (helpful-base, MIT), conversations of up to "
        f"{MAX_TOKENS} tokens: {sizes['a']} pairs (A) train the policies and a reward model, "
        f"{sizes['b']} pairs of other conversations (B) a second reward model, the judge. "
        f"{valid} pairs of further conversations are held out. All options are the defaults unless "
        "the table names others. 95% intervals, over prompts. `python scripts/real/helpful.py` "
        "measures it again.",
    ]
    if reward_models:
        reward_titles += ["calibration error"]
        parts += ["## Reward models", table(reward_titles, reward_models)]
    if policies:
        titles += ["KL, nats per answer", "tokens", "perplexity on other text, ×"]
        parts += [
            "## Policies",
            table(titles, [row[:-1] for row in policies]),
            f"{ANSWERS[1]} held-out prompts were completed by the policy and by the start at "
            f"temperature 1, up to {ANSWERS[-1]} tokens; the judge compared them. Perplexity is of "
            "40 questions of GSM8K with their solutions, over that of the start.",
            FINDINGS,
            *(text for name, text in remarks().items() if name in rows),
        ]
    if rewarded:
        parts += [
            f"The runs on a reward had `{ROLLOUTS}`{f', PPO `{CRITIC}`' if 'ppo' in rows else ''}. "
            "What they did to the score that they were trained on, on 100 held-out prompts:",
            table(["", "before", "after", "change", "minutes of training"], rewarded),
            *([PPO_FINDINGS] if "ppo" in rows else []),
        ]
    if rankers:
        parts += [
            "## Reranking",
            f"{COMPLETIONS} answers of the start to each of {RERANKED} held-out prompts. How much "
            "better the judge finds the best of n than one answer, in standard deviations of its "
            "scores (the mean over all subsets of n):",
            table(
                ["ranked by", *(f"best of {count}" for count in COUNTS[1:])],
                [row[:-1] for row in rankers],
            ),
            "The reward models learned from pairs of different conversations. But both start from "
            "the same model, so they may agree on more than people would.",
        ]
    made_with: dict[str, list[str]] = {}
    for title, *_, judge in (*policies, *rankers):
        made_with.setdefault(judge, []).append(title)
    parts += [
        f"Made with an earlier run of the judge ({judge}): {'; '.join(made)}."
        for judge, made in made_with.items()
        if judge != judge_accuracy()
    ]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = study_folder("helpful")
    known = stages(folder)
    add_only(parser, known)
    given = parser.parse_args()
    if not (folder / "texts.jsonl").is_file():
        write_data(folder)
    for name in given.only:
        known[name]()
        write_page("helpful", *page(folder))


if __name__ == "__main__":
    main()
