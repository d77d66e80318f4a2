"""The documentation is true: links lead somewhere, its programs run, what it lists exists.

Every `bash` and `python` block of README.md and docs/ runs here, page by page, except those under a
comment `<!-- not run: reason -->`. The pages name real models; here folders of the same names hold
the starter. Training and sampling are cut short by extra options, added to what the page says.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from helpers.paths import ROOT, STARTER
from helpers.scripts import load_script

from mlx_align.cli.group import cli
from mlx_align.cli.main import run as run_command
from mlx_align.data.formats import (
    FORMAT_NAMES,
    PREFERENCE_FORMATS,
    read_preferences,
    read_prompts,
    read_supervised,
    read_unpaired,
)
from mlx_align.losses.registry import PAIRWISE_LOSSES, TOKEN_LOSSES, UNPAIRED_LOSSES
from mlx_align.rollout.builtin_rewards import BUILTIN_REWARDS
from mlx_align.tracking.diagnostics import HELD_OUT_METRICS, TRAINING_METRICS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = ("mlx-community/Qwen2.5-7B-Instruct-4bit", "mlx-community/Qwen2.5-7B-4bit")
OFFLINE = "--iters 1 --samples 0 --grad-accumulation-steps 2 --val-batches 1"
ON_POLICY = f"{OFFLINE} --max-completion-length 8 --group-size 2"
SHORT = {
    **dict.fromkeys(("sft", "dpo", "kto", "reward"), OFFLINE),
    "ppo": f"{ON_POLICY} --critic-warmup 0 --reward-rollouts 8",
    "grpo": ON_POLICY,
    "eval": "--samples 2 -n 2 --sample-tokens 8",
    "chat": "--max-tokens 8",
    "rerank": "-n 2 --max-tokens 8",
    "data sample": "--max-tokens 8",
}
# Options in the text that belong to scripts, not to a command of the package.
OTHER_OPTIONS = {
    "--attention",
    "--check",
    "--power-exponential",
    "--large",
    "--only",
    "--real",
    "--runs",
    "--seeds",
}


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: What follows the opening fence.
        text: The lines between the fences.
        line: The line of the opening fence.
        comment: The HTML comment in front of it, without `<!--` and `-->`; "" if there is none.
    """

    language: str
    text: str
    line: int
    comment: str

    @property
    def runs(self) -> bool:
        return re.fullmatch(r"not run: .{8,}", self.comment) is None


def blocks_of(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = next((text for text in reversed(lines[:start]) if text.strip()), "")
        comment = re.fullmatch(r"<!-- (.*) -->", before)
        text = "\n".join(lines[start + 1 : number])
        language = lines[start][3:].strip()
        found.append(Block(language, text, start + 1, comment[1] if comment else ""))
        start = None
    assert start is None, f"{page}: a block is not closed"
    return found


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"[\s]+", "-", slug) for slug in slugs}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Links, names and lists


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors_of(found), f"{name_of(page)}: {target}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert pages == set(re.findall(r"[\w/-]+\.md", navigation))


def test_files_that_the_docs_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:scripts|tests|mlx_align|data)/[\w./*-]+)", prose_of(page)):
            assert list(ROOT.glob(name.rstrip("."))), f"{name_of(page)}: {name}"


@cache
def flags() -> set[str]:
    """Every option of every command."""

    def of(command: click.Command) -> set[str]:
        found = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
        for name in getattr(command, "commands", {}):
            found |= of(command.commands[name])
        return found

    return of(cli) | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_that_the_docs_name_exist(page):
    for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert flag in flags() | OTHER_OPTIONS, f"{name_of(page)}: {flag}"


def test_readme_is_short_and_has_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for command in cli.commands:
        assert f"`mlx-align {command}" in text, command


def test_readme_maps_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)/` \| (.+) \|$", text, re.MULTILINE))
    package = ROOT / "mlx_align"
    for folder in (package, *(init.parent for init in sorted(package.glob("*/__init__.py")))):
        files = {file.stem for file in folder.glob("*.py")} - {"__init__", "__main__"}
        mapped = set(re.findall(r"`(\w+)`", rows[folder.name]))
        assert mapped == files, folder.name


def test_list_of_files_is_up_to_date():
    make = load_script("make_map")
    assert make.PAGE.read_text(encoding="utf-8") == make.files_page(), "run scripts/make_map.py"


def test_losses_and_their_defaults_are_listed():
    page = (ROOT / "docs" / "reference" / "losses.md").read_text(encoding="utf-8")
    for name, loss in {**PAIRWISE_LOSSES, **UNPAIRED_LOSSES}.items():
        row = re.search(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert row, name
        listed = dict(re.findall(r"`(\w+)=([\w.]+)`", row[0]))
        assert listed == {key: str(value).removesuffix(".0") for key, value in loss.options.items()}
    for name in TOKEN_LOSSES:
        assert f"| `{name}` |" in page


def test_rewards_are_listed():
    page = (ROOT / "docs" / "reference" / "rewards.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)", page, re.MULTILINE)) == set(BUILTIN_REWARDS)


def test_metrics_of_health_checks_are_listed():
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    for name in (*TRAINING_METRICS, *HELD_OUT_METRICS):
        assert f"`{name}`" in page or f"`eval/{name}`" in page, name


# Examples of data


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_json_is_json(page):
    for block in blocks_of(page):
        if block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)


def test_examples_of_data_are_read_as_the_format_they_show(tmp_path):
    readers = (read_preferences, read_unpaired, read_supervised, read_prompts)
    shown = set()
    for block in blocks_of(ROOT / "docs" / "data-formats.md"):
        name = block.comment.removeprefix("format: ")
        if block.language != "json" or name == block.comment:
            continue
        shown.add(name)
        joined = any(one.name == name and one.expand is not None for one in PREFERENCE_FORMATS)
        for line in [block.text] if joined else block.text.splitlines():
            (tmp_path / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
            found = set()
            for read in readers:
                try:
                    found.add(read(str(tmp_path / "rows.jsonl"))[1].format)
                except Exception:  # another kind of data
                    continue
            assert name in found, f"line {block.line}: {name}, read as {found}"
    assert shown == set(FORMAT_NAMES)


# Messages that are quoted


@cache
def message_patterns() -> tuple[re.Pattern[str], ...]:
    """A pattern for every string and f-string of the package with enough fixed text."""
    patterns = set()
    for file in (ROOT / "mlx_align").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    one.value if isinstance(one, ast.Constant) else None for one in node.values
                ]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if sum(len(part) for part in parts if part) >= 12:
                pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
                patterns.add(re.compile(pattern, re.DOTALL))
    return tuple(patterns)


def quoted_messages() -> list[str]:
    page = ROOT / "docs" / "troubleshooting.md"
    lines = [
        line
        for one in blocks_of(page)
        if one.language == "console"
        for line in one.text.split("\n")
    ]
    return [re.sub(r"^(error: |! )", "", line) for line in lines]


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_those_of_the_program(message):
    assert any(pattern.search(message) for pattern in message_patterns())


# Programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with everything that the pages name: models, data, finished runs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in MODELS:
        shutil.copytree(STARTER / "model", folder / name)
    lines = (STARTER / "train.jsonl").read_text(encoding="utf-8").splitlines()
    many = [json.loads(line) for line in lines[:60]]
    rows = many[:24]

    def write(name, content):
        lines = (json.dumps(row) for row in content)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    write("pairs.jsonl", rows)
    questions = [{"question": row["prompt"][-1]["content"]} for row in rows]
    votes = zip(questions, rows, strict=True)
    write(
        "votes.jsonl",
        [
            {"task": q, "reply_x": r["rejected"], "reply_y": r["chosen"], "best": "reply_y"}
            for q, r in votes
        ],
    )
    write("human.jsonl", many)
    both = ([row["rejected"], row["chosen"]] for row in many)
    answers = zip(many, both, strict=True)
    write("answers.jsonl", [{"prompt": r["prompt"], "completions": c} for r, c in answers])
    write("prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write("demonstrations.jsonl", [{"messages": row["prompt"] + row["chosen"]} for row in rows])
    labels = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in many)
    write("labelled.jsonl", [{**row, "label": i % 2 == 0} for i, row in enumerate(labels)])
    sums = [
        ([{"role": "user", "content": f"What is {a} + {b}?"}], str(a + b))
        for a in range(4)
        for b in range(5)
    ]
    # The starter knows no numbers, but says some of these.
    sums += [(row["prompt"], row["rejected"][-1]["content"]) for row in many[:10]]
    write("sums.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in sums])
    write("cities.jsonl", [{"prompt": row["prompt"], "city": "Canberra"} for row in rows])
    (folder / "notes.txt").write_text("Canberra is the capital of Australia.\n" * 20)
    # A block whose first line is a comment with a file's name is that file.
    for page in PAGES:
        for block in blocks_of(page):
            if name := re.match(r"# ([\w-]+\.(?:py|yaml))\b", block.text):
                (folder / name[1]).write_text(block.text + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in ("first", "style"):
            training = ["--model", MODELS[0], "--data", "pairs.jsonl", "--output", f"runs/{run}"]
            assert run_command(["dpo", *training, *OFFLINE.split()]) == 0
        training[-1] = "runs/rm"
        assert run_command(["reward", *training, *OFFLINE.split()]) == 0
    return folder


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_it_says_runs(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.stdin", io.StringIO("Capital of Australia?\n"))
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        if not block.runs:
            continue
        where = f"{name_of(page)}:{block.line}"
        if block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "bash":
            for command in block.text.replace("\\\n", " ").splitlines():
                run_line(command, where)
    capsys.readouterr()


def run_line(command: str, where: str) -> None:
    """Run a line of a page, with the options that make it short."""
    words = shlex.split(command, comments=True)
    assert words[0] == "mlx-align", f"{where}: {command}: mark it as not run, and say why"
    name = " ".join(words[1:3]) if words[1] == "data" else words[1]
    if "export" not in words and "--resume" not in words:
        shorten(words, SHORT.get(name, "").split())
    if "--output" in words:
        output = Path(words[words.index("--output") + 1])
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
    assert run_command(words[1:]) == 0, f"{where}: {command}"


def shorten(words: list[str], short: list[str]) -> None:
    """Give a command the options in `short`, in place of its own values of these options."""
    for flag, value in zip(short[::2], short[1::2], strict=True):
        own = "--epochs" if flag == "--iters" and "--epochs" in words else flag
        if own in words:
            place = words.index(own)
            del words[place : place + 2]
        words += [flag, value]


def test_metrics_of_the_runs_above_are_listed(folder):
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([\w/<>]+)`", page)) | {"step"}
    for file in folder.glob("runs/*/metrics.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            for key in json.loads(line):
                bare = re.sub(r"^rewards/.+/(mean|std|none)$", r"rewards/<name>/\1", key)
                names = {key, bare, bare.removeprefix("eval/")}
                names |= {re.sub(r"^rewards/.+/", "rewards/<name>/", bare.removeprefix("eval/"))}
                assert names & listed, f"{file.parent.name}: {key}"
