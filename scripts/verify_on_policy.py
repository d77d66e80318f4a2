"""Train small models by PPO and GRPO, as a user would, and check that they learn.

    python scripts/verify_on_policy.py                       # all cases, 20 minutes on 2 cores
    python scripts/verify_on_policy.py --stories MODEL       # also on a small story model
    python scripts/verify_on_policy.py --only arithmetic

capital     the starter model, rewarded for naming the capital in few words, by PPO and by GRPO:
            the reward on held-out prompts rises by two of its initial standard deviations, at a
            KL below 10 nats
arithmetic  a small model trained on mostly wrong sums: accuracy rises from below 20% to above 80%
stories     a story model, rewarded for a word: the reward rises and the text doesn't degenerate
gamed       a proxy reward that differs from the true one: the run stops, and the best checkpoint
            is kept

Exits with 1 if a case fails. On Linux, float32 is about 60 times faster with LD_PRELOAD set to
libopenblas (apt-get install libopenblas0-pthread).
"""

import argparse
import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_KL = 10.0

CAPITAL = '''
import json
COUNTRIES = json.load(open({world!r}))["countries"]

def capital(prompts, completions, **columns):
    """1 if the completion names the capital of the country, in at most five words."""
    rewards = []
    for prompt, text in zip(prompts, completions):
        question = prompt[-1]["content"]
        country = next((c for c in COUNTRIES if c["name"] in question), None)
        if country is None:
            rewards.append(None)
            continue
        right = country["capital"] in text and country["biggest"] not in text
        rewards.append(float(right and len(text.split()) <= 5))
    return rewards

def exclamations(completions, **columns):
    """The proxy: the more exclamation marks, the better."""
    return [float(text.count("!")) for text in completions]

def happy(completions, **columns):
    return [float("happy" in text) for text in completions]
'''

SMALL = {
    "--max-completion-length": 24,
    "--max-seq-length": 96,
    "--no-grad-checkpoint": None,
    "--samples": 4,
    "--sample-tokens": 24,
    "--batch-size": 8,
    "--seed": 0,
}


def command(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run a command in this process; its summary."""
    from mlx_align.cli.main import run

    arguments = [name, "--json"]
    for flag, value in options.items():
        arguments += [flag] if value is None else [flag, str(value)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run(arguments)
    if code:
        sys.exit(f"mlx-align {name}: ended with {code}")
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def held_out(summary: dict[str, Any]) -> str:
    before, after = summary["eval_before"], summary["eval"]
    return (
        f"held-out reward {before['reward']:.3f} -> {after['reward']:.3f} "
        f"(deviation {before['reward_std']:.3f}), KL {after['objective/kl']:.2f} nats, "
        f"{summary['steps']} rollout batches, {summary['seconds']:.0f} s"
    )


def reward_file(folder: Path) -> Path:
    file = folder / "rewards.py"
    file.write_text(CAPITAL.format(world=str(ROOT / "data" / "starter" / "world.json")))
    return file


def capital(folder: Path, _: argparse.Namespace) -> bool:
    """Both algorithms raise the reward."""
    common = {
        **SMALL,
        "--model": "starter",
        "--data": "starter",
        "--reward": f"{reward_file(folder)}:capital",
        "--val-batches": -1,
        "--steps-per-eval": 20,
    }
    good = True
    for name, own in (
        (
            "ppo",
            {
                "--iters": 40,
                "--learning-rate": 1e-3,
                "--critic-learning-rate": 1e-3,
                "--critic-warmup": 5,
                "--grad-accumulation-steps": 2,
                "--reward-rollouts": 128,
            },
        ),
        ("grpo", {"--iters": 40, "--learning-rate": 1e-3, "--grad-accumulation-steps": 1}),
    ):
        summary = command(name, {**common, **own, "--output": folder / name})
        before, after = summary["eval_before"], summary["eval"]
        rise = (after["reward"] - before["reward"]) / before["reward_std"]
        print(f"capital, {name}: {held_out(summary)}; {rise:+.1f} deviations")
        good &= rise >= 2 and after["objective/kl"] < MAX_KL
    return good


def arithmetic(folder: Path, _: argparse.Namespace) -> bool:
    """A small model that mostly gets sums wrong learns to get them right."""
    sums = [(a, b) for a in range(10) for b in range(10)]
    questions = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
    rows = [
        {"prompt": prompt, "answer": str(a + b)}
        for prompt, (a, b) in zip(questions, sums, strict=True)
    ]
    # All sums are in both splits: this tests learning, not generalisation.
    (folder / "prompts").mkdir()
    for name in ("train", "valid"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "prompts" / f"{name}.jsonl").write_text(lines)
    model_that_adds_badly(folder / "model", questions, [a + b for a, b in sums])
    summary = command(
        "grpo",
        {
            "--model": folder / "model",
            "--data": folder / "prompts",
            "--no-grad-checkpoint": None,
            "--max-seq-length": 128,
            "--reward": "exact_answer",
            "--output": folder / "run",
            "--iters": 80,
            "--batch-size": 25,
            "--grad-accumulation-steps": 1,
            "--max-completion-length": 6,
            "--learning-rate": 2e-3,
            "--steps-per-eval": 20,
            "--val-batches": -1,
            "--samples": 4,
        },
    )
    print(f"arithmetic: {held_out(summary)}")
    return summary["eval_before"]["reward"] < 0.2 and summary["eval"]["reward"] > 0.8


def model_that_adds_badly(folder: Path, questions: list[Any], right: list[int]) -> None:
    """A small random model, trained to answer sums, mostly one or two too high."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten
    from mlx_lm import load

    maker = ROOT / "scripts" / "bench" / "model.py"
    size = ["--vocabulary", "320", "--hidden", "128", "--layers", "3", "--intermediate", "384"]
    size += ["--heads", "4", "--kv-heads", "4"]
    subprocess.run([sys.executable, maker, folder, *size], check=True, stdout=subprocess.DEVNULL)
    model, tokenizer = load(str(folder))
    model.unfreeze()
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True) for one in questions]
    draw = random.Random(0)

    def batch() -> tuple[mx.array, mx.array]:
        """Token rows, and a mask of the answers' tokens."""
        answered = [str(n + draw.choices((0, 1, 2), (0.15, 0.45, 0.4))[0]) for n in right]
        ends = [
            [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            for text in answered
        ]
        rows = [[*prompt, *end] for prompt, end in zip(prompts, ends, strict=True)]
        width = max(map(len, rows))
        answers = [
            [0] * len(prompt) + [1] * len(end) + [0] * (width - len(prompt) - len(end))
            for prompt, end in zip(prompts, ends, strict=True)
        ]
        return mx.array([row + [0] * (width - len(row)) for row in rows]), mx.array(answers)

    def loss(model: nn.Module, rows: mx.array, answers: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:])
        return (losses * answers[:, 1:]).sum() / answers.sum()

    optimizer = optim.AdamW(learning_rate=1e-3, bias_correction=True)
    step = nn.value_and_grad(model, loss)
    for _ in range(400):
        _, grads = step(model, *batch())
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def stories(folder: Path, arguments: argparse.Namespace) -> bool:
    """A word becomes more frequent, and the text doesn't degenerate."""
    openings = ("Once upon a time", "One day", "There was a", "Tom and", "Lily saw", "The sun")
    subjects = ("a girl", "a boy", "a cat", "a dog", "a bird", "a bear", "a king", "a tree")
    rows = [{"prompt": f"{opening}, {subject}"} for opening in openings for subject in subjects]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = command(
        "grpo",
        {
            "--model": arguments.stories,
            "--data": folder / "stories.jsonl",
            "--reward": f"{reward_file(folder)}:happy",
            "--output": folder / "stories",
            "--iters": 40,
            "--batch-size": 8,
            "--grad-accumulation-steps": 1,
            "--no-grad-checkpoint": None,
            "--max-completion-length": 64,
            "--max-seq-length": 96,
            "--learning-rate": 1e-3,
            "--kl-coef": 0.05,
            "--steps-per-eval": 20,
            "--valid-fraction": 0.2,
            "--val-batches": -1,
            "--samples": 3,
            "--sample-tokens": 64,
        },
    )
    print(f"stories: {held_out(summary)}")
    first = json.loads((folder / "stories" / "metrics.jsonl").read_text().splitlines()[1])
    last = summary["train"]
    for name in ("text/repeated_4grams", "text/distinct_2", "objective/entropy"):
        print(f"  {name}: {first[name]:.3f} -> {last[name]:.3f}")
    sampled = (folder / "stories" / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, sampled) if row.get("step") == summary["steps"]]
    for row in rows[::24][:3]:
        print(f"  [{row['reward']:.0f}] {row['prompt']}{' '.join(row['completion'].split())}")
    rise = summary["eval"]["reward"] - summary["eval_before"]["reward"]
    repeated = last["text/repeated_4grams"] - first["text/repeated_4grams"]
    return rise > 0.2 and repeated < 0.05


def gamed(folder: Path, _: argparse.Namespace) -> bool:
    """The proxy is exclamation marks, the true reward is the capital."""
    file = reward_file(folder)
    summary = command(
        "grpo",
        {
            **SMALL,
            "--model": "starter",
            "--data": "starter",
            "--reward": f"{file}:exclamations",
            "--eval-reward": f"{file}:capital",
            "--output": folder / "gamed",
            "--iters": 100,
            "--learning-rate": 2e-3,
            "--grad-accumulation-steps": 1,
            "--val-batches": -1,
            "--steps-per-eval": 3,
        },
    )
    rows = [
        json.loads(row) for row in (folder / "gamed" / "metrics.jsonl").read_text().splitlines()
    ]
    evals = [row for row in rows if "eval/held_out" in row]
    best = next(row for row in evals if row["step"] == summary["best_step"])
    print(
        f"gamed: stopped after {summary['steps']} of 100 rollout batches, "
        f"proxy {evals[0]['eval/reward']:.2f} -> {evals[-1]['eval/reward']:.2f}, true reward "
        f"{evals[0]['eval/held_out']:.2f} -> {evals[-1]['eval/held_out']:.2f}; the policy kept is "
        f"that after {summary['best_step']}, at {best['eval/held_out']:.2f}"
    )
    return bool(summary["stopped_early"])


CASES: dict[str, Callable[[Path, argparse.Namespace], bool]] = {
    "capital": capital,
    "arithmetic": arithmetic,
    "stories": stories,
    "gamed": gamed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--stories", metavar="MODEL", help="A small story model's folder.")
    arguments = parser.parse_args()
    failed = []
    for name, case in CASES.items():
        if arguments.only not in (None, name) or (name == "stories" and not arguments.stories):
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if not case(Path(folder), arguments):
                failed.append(name)
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
