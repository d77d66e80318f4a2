"""SmolLM2-135M-Instruct as policy and as judge: whether a judge that is too small is found out.

    python scripts/real/judge.py [--output FOLDER] [--questions 30]

Samples two answers to short questions, labels them by a rule in place of people (fewer words are
better), and gives both to `mlx-align judge`: as it is, with a lower --min-verdict-mass, and with
--allow-unproven. Then `dpo` has to refuse the labels of its own model, and `constitution` and a
round of `improve` run. Prints what the commands print. Takes about ten minutes on 2 cores; on Linux
LD_PRELOAD should name libopenblas. The results are in docs/guides/ai-feedback.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from models import smollm2
from studies import read_rows, write_rows

QUESTIONS = """What is the capital of France? | Name three fruits. | How do I boil an egg?
What does a carpenter do? | Why is the sky blue? | Give me a name for a cat.
How many days are in a week? | What is the opposite of hot? | Write one sentence about the sea.
How do I tie my shoes? | What do bees make? | Which animal says moo? | What is a good breakfast?
How can I sleep better? | What is 7 plus 5? | Tell me a fact about the moon. | What colour is grass?
How do I remove a coffee stain? | Suggest a gift for my mother. | What is a synonym of happy?
How do I plant a tomato? | What is the largest ocean? | Explain gravity to a child.
Give me a tip for saving money. | What language is spoken in Brazil?
How do I say hello in Spanish? | What is a noun? | Why do leaves fall?
How long should I walk each day? | What should I pack for the beach?"""
RULES = '''
def short(prompts, completions):
    return [-len(text.split()) for text in completions]

def plain(prompts, completions):
    """Share of letters, spaces, points and commas."""
    kept = [sum(c.isascii() and (c.isalpha() or c in " .,") for c in text) for text in completions]
    return [count / max(len(text), 1) for count, text in zip(kept, completions, strict=True)]
'''


def run(*arguments: object) -> None:
    """Run a command and print it with its output; some are meant to fail."""
    command = [str(argument) for argument in arguments]
    print(f"\n$ mlx-align {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "mlx_align", *command], check=False).returncode
    print(f"exit code {code}", flush=True)


def label_by_rule(answers: Path) -> list[dict]:
    """The pairs of a file of answers; the one with fewer words is chosen."""
    pairs = []
    for row in read_rows(answers):
        first, second = sorted(row["completions"], key=lambda text: len(text.split()))[:2]
        if len(first.split()) < len(second.split()):
            sides = [[{"role": "assistant", "content": text}] for text in (first, second)]
            pairs.append({"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1]})
    return pairs


def main() -> None:
    """Run the trial."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("judge-trial"))
    parser.add_argument("--questions", type=int, default=30)
    given = parser.parse_args()
    folder = given.output
    texts = [one.strip() for line in QUESTIONS.splitlines() for one in line.split("|")]
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    prompts = prompts[: given.questions]
    model, answers = smollm2("float32"), folder / "answers.jsonl"
    data = write_rows(folder / "prompts.jsonl", prompts)
    rules = folder / "rules.py"
    rules.write_text(RULES, encoding="utf-8")
    short = ("--max-completion-length", 48)
    run("data", "sample", "--model", model, "--data", data, "-n", 2, *short, "--output", answers)
    human = write_rows(folder / "human.jsonl", label_by_rule(answers))
    judge = ("judge", "--model", model, "--data", answers, "--human", human, "--output")
    judged = folder / "judged.jsonl"
    run(*judge, judged)
    run(*judge, judged, "--min-verdict-mass", 0.1)
    run(*judge, judged, "--min-verdict-mass", 0.1, "--allow-unproven")
    run("dpo", "--model", model, "--data", judged, "--iters", 2, "--output", folder / "circular")
    ten = write_rows(folder / "ten.jsonl", prompts[:10])
    loose = ("--min-verdict-mass", 0.1, "--allow-unproven", "--max-completion-length", 64)
    run("constitution", "--model", model, "--data", ten, *loose, "--output", folder / "revised")
    split = max(len(prompts) * 2 // 3, 1)
    write_rows(folder / "split" / "train.jsonl", prompts[:split])
    write_rows(folder / "split" / "valid.jsonl", prompts[split:])
    judges = ("--reward", f"{rules}:short", "--allow-unproven", "--eval-reward", f"{rules}:plain")
    rounds = ("--rounds", 1, "--iters", 5, "--max-completion-length", 128)
    where = ("--model", model, "--data", folder / "split", "--output", folder / "improved")
    run("improve", *where, *judges, *rounds)


if __name__ == "__main__":
    main()
