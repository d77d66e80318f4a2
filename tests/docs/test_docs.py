"""The documentation is true: links lead somewhere, and its commands and programs run.

Every `bash` and `python` block of README.md and docs/ runs here, page by page, except those under a
comment `<!-- not run: reason -->`. The pages name real models; here folders of the same names hold
the starter. Training and sampling are cut short by extra options, added to what the page says.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from mlx_align.cli.main import run as cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STARTER = ROOT / "data" / "starter"
MODELS = ("mlx-community/Qwen2.5-7B-Instruct-4bit", "mlx-community/Qwen2.5-7B-4bit")
TRAINING = ("sft", "dpo", "kto", "reward", "ppo", "grpo")
SHORT = {
    **{command: ["--iters", "2", "--samples", "1"] for command in TRAINING},
    "ppo": [
        *("--iters", "1", "--samples", "1", "--val-batches", "1", "--max-completion-length", "8"),
        *("--critic-warmup", "0", "--reward-rollouts", "8", "--grad-accumulation-steps", "2"),
    ],
    "grpo": [
        *("--iters", "1", "--samples", "1", "--val-batches", "1", "--max-completion-length", "8"),
        *("--group-size", "2", "--grad-accumulation-steps", "2"),
    ],
    "eval": ["--samples", "2", "-n", "2", "--sample-tokens", "8"],
    "rerank": ["-n", "2", "--max-tokens", "8"],
    "data sample": ["--max-tokens", "8"],
}


class Block(NamedTuple):
    """A fenced block: its language, its text, the line it starts at, and whether it is run."""

    language: str
    text: str
    line: int
    runs: bool


def blocks_of(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language = lines[start][3:].strip()
        before = next((text for text in reversed(lines[:start]) if text.strip()), "")
        skipped = re.fullmatch(r"<!-- not run: .{8,} -->", before) is not None
        text = "\n".join(lines[start + 1 : number])
        found.append(Block(language, text, start + 1, not skipped))
        start = None
    assert start is None, f"{page}: a block is not closed"
    return found


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"[\s]+", "-", slug) for slug in slugs}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors_of(found), f"{name_of(page)}: {target}"


def test_files_that_the_docs_name_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:scripts|tests|mlx_align|data)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{name_of(page)}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_json_is_json(page):
    for block in blocks_of(page):
        if block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with everything that the pages name: models, data, finished runs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in MODELS:
        shutil.copytree(STARTER / "model", folder / name)
    pairs = (STARTER / "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    rows = [json.loads(line) for line in pairs]

    def write(name, content):
        lines = (json.dumps(row) for row in content)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    write("pairs.jsonl", rows)
    write("prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[:24]])
    write("demonstrations.jsonl", [{"messages": row["prompt"] + row["chosen"]} for row in rows])
    sums = [
        ([{"role": "user", "content": f"What is {a} + {b}?"}], str(a + b))
        for a in range(5)
        for b in range(5)
    ]
    write("sums.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in sums])
    write("cities.jsonl", [{"prompt": row["prompt"], "city": "Canberra"} for row in rows[:24]])
    (folder / "notes.txt").write_text("Canberra is the capital of Australia.\n" * 20)
    page = ROOT / "docs" / "reference" / "rewards.md"
    function = next(b.text for b in blocks_of(page) if b.text.startswith("# my_rewards.py"))
    (folder / "my_rewards.py").write_text(function + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in ("runs/first", "runs/style", "runs/sft"):
            assert cli(["dpo", *_shared(run), "--iters", "2", "--samples", "0"]) == 0
        assert cli(["reward", *_shared("runs/rm"), "--iters", "2", "--samples", "0"]) == 0
    return folder


def _shared(run):
    return ["--model", MODELS[0], "--data", "pairs.jsonl", "--output", run]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_it_says_runs(page, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        if not block.runs:
            continue
        where = f"{name_of(page)}:{block.line}"
        if block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "bash":
            for command in block.text.splitlines():
                _run(command, where)
    capsys.readouterr()


def _run(command, where):
    words = shlex.split(command, comments=True)
    assert words[0] == "mlx-align", f"{where}: {command}: mark it as not run, and say why"
    name = " ".join(words[1:3]) if words[1] in ("data",) else words[1]
    if "export" not in words:
        words += SHORT.get(name, []) if "--resume" not in words else []
    if "--output" in words:
        output = Path(words[words.index("--output") + 1])
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
    assert cli(words[1:]) == 0, f"{where}: {command}"
