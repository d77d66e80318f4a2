"""The run page from synthetic run folders: its verdict, warnings, charts, and what is escaped."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlx_align.cli.main import run as mlx_align
from mlx_align.report import charts
from mlx_align.report.page import render_comparison, render_run
from mlx_align.report.panels import PANELS, curves_of
from mlx_align.system.formatting import format_value
from mlx_align.tracking.diagnostics import diagnose
from mlx_align.tracking.run_dir import read_run_record

ASSETS = Path(charts.__file__).with_name("assets")
VOID = {"meta", "br", "img", "input", "hr", "link"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def write(folder, rows=(), config=None, torn="", samples=(), **files):
    """A run folder; `summary` and `status` are written where they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + torn)
    config = {"model": "m", "data": "d", "iters": 100} if config is None else config
    (folder / "config.yaml").write_text(json.dumps(config))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def dpo_rows(n=20, chosen=0.0, rejected=-1.0, training=0.9, held_out=0.85, margin=1.0):
    """Reports every 5 updates, evaluations every 25; log-probs change by these nats in all."""
    rows = [held_out_row(0, -30, -30, 0.0, 0.0)]
    for i in range(1, n + 1):
        share = i / n
        rows.append(
            {
                "step": 5 * i,
                "loss": 0.7 - 0.3 * share,
                "rewards/accuracies": training,
                "rewards/margins": margin * share,
                "logps/chosen": -30 + chosen * share,
                "logps/rejected": -30 + rejected * share,
                "learning_rate": 1e-5 * (1 - share),
                "grad_norm": 1.0,
                "tokens_per_second": 1000.0,
                "peak_memory_bytes": 2_000_000_000,
            }
        )
        if i % 5 == 0:
            logps = -30 + chosen * share, -30 + rejected * share
            rows.append(held_out_row(5 * i, *logps, held_out, margin * share))
    return rows


def held_out_row(step, chosen, rejected, accuracy, margin):
    return {
        "step": step,
        "eval/loss": 0.69,
        "eval/logps/chosen": chosen,
        "eval/logps/rejected": rejected,
        "eval/logps/accuracies": 0.5 + accuracy / 4,
        "eval/rewards/accuracies": accuracy,
        "eval/rewards/margins": margin,
    }


def ppo_rows(n=40, **last):
    """Healthy rows; each metric in `last` goes to that value straight away, but for the first."""
    healthy = {
        "loss": 0.1,
        "reward": 1.0,
        "reward_std": 0.5,
        "rewards/helpful/mean": 1.0,
        "rewards/form/mean": 0.5,
        "objective/kl": 4.0,
        "objective/entropy": 2.0,
        "policy/approx_kl": 0.01,
        "policy/clip_ratio": 0.1,
        "policy/ratio": 1.0,
        "value/loss": 0.1,
        "value/explained_variance": 0.5,
        "completions/mean_length": 50.0,
        "completions/min_length": 5.0,
        "completions/max_length": 100.0,
        "completions/ended": 0.97,
        "frac_reward_zero_std": 0.1,
        "text/repeated_4grams": 0.02,
        "text/distinct_2": 0.5,
        "sampler/gap": 0.001,
        "kl_coef": 0.05,
    }
    now = {**healthy, **{key.replace("__", "/"): value for key, value in last.items()}}
    return [{"step": i, **(healthy if i == 1 else now)} for i in range(1, n + 1)]


def warned(folder, rows, command="ppo", **facts):
    status = {"command": command, "state": "running", "step": 1, "total": 100, **facts}
    return diagnose(read_run_record(write(folder, rows, status=status)))


class Tags(HTMLParser):
    """Checks that tags close in order; keeps attributes, text, scripts and the style sheet."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.attributes, self.said = [], [], [], ""
        self.code = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            self.code.append([tag, dict(attrs), ""])

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.code[-1][2] += data
        else:
            self.said += data

    @property
    def charts(self):
        """The embedded data of the charts, by title."""
        (data,) = (text for _, attrs, text in self.code if attrs.get("id") == "chart-data")
        return json.loads(data)


def embedded(text):
    """The charts of a page: (title, data) in order."""
    titles = [unescape(title) for title in re.findall(r'class="title">([^<]*)<', text)]
    return list(zip(titles, Tags(text).charts, strict=True))


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def assert_self_contained(text):
    """Nothing is loaded, and nothing runs but our own scripts, which the policy names by hash."""
    tags = Tags(text)
    assert {"img", "link", "iframe", "object", "base"}.isdisjoint(tags.names)
    for tag, name, value in tags.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("style", "src"), (tag, name)
        if name in ("href", "xlink:href", "data", "action"):
            assert value.startswith("#"), (tag, name, value)
    styles = [content for tag, _, content in tags.code if tag == "style"]
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    policies = [value for _, name, value in tags.attributes if name == "content"]
    (policy,) = (value for value in policies if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src ")
    assert "unsafe" not in policy
    assert f"style-src {digest(styles[0])};" in policy
    scripts = [(attrs, content) for tag, attrs, content in tags.code if tag == "script"]
    run = [content for attrs, content in scripts if attrs.get("type") != "application/json"]
    hashes = " ".join(map(digest, run)) or "'none'"
    assert f"script-src {hashes};" in policy
    script = (ASSETS / "charts.js").read_text()
    library = (ASSETS / "uplot" / "uPlot.iife.min.js").read_text()
    assert [content for content in run if content != script and not content.endswith(library)] == []
    for attrs, content in scripts:
        if attrs.get("type") == "application/json":
            assert attrs["id"] == "chart-data"
            assert not set("<>&\u2028\u2029") & set(content)
            json.loads(content)
    return tags


def test_a_finished_dpo_run_has_all_its_charts(tmp_path):
    summary = {
        "command": "dpo",
        "steps": 100,
        "seconds": 90.0,
        "seconds_in_all": 130.0,
        "tokens_per_second": 1000,
        "eval_examples": 40,
        "kl": {"mean": 1.25, "standard_error": 0.1, "samples": 8},
        "data_facts": {"rows": 12, "groups": 10, "dropped": {"too long": 2}},
        "versions": {"mlx": "0.32.2"},
        "talk": "mlx_lm.chat --model m --adapter-path run",
    }
    samples = [{"source": "valid.jsonl:1", "prompt": "Hi?", "before": "No.", "after": "Yes."}]
    folder = write(tmp_path / "first", dpo_rows(), samples=samples, summary=summary)
    text = render_run(read_run_record(folder))
    tags = assert_self_contained(text)
    titles = {"Loss", "Accuracy", "Margin", "Log-probs", "Learning rate", "Speed", "Peak memory"}
    assert titles <= set(re.findall(r'class="title">([^<]*)<', text))
    assert tags.names.count("figure") == len(tags.charts) == 9
    for part in ("100 updates in 2 min", "1.25 nats", "1.01 to 1.49, 8 samples", "2.00 GB"):
        assert part in tags.said
    for part in ("Hi?", "No.", "Yes.", "dropped: too long", "0.32.2", "mlx_lm.chat"):
        assert part in tags.said
    assert (
        "in 71.2% of the pairs (95% interval 55.9% to 82.9%, n = 40); before training it was 50.0%."
    ) in tags.said
    assert "All health checks pass" in tags.said
    assert 'http-equiv="refresh"' not in text
    own = text.replace((ASSETS / "uplot" / "uPlot.iife.min.js").read_text(), "")
    assert "http://" not in own
    assert "https://" not in own
    assert "Copyright (c) 2022 Leon Sorokin" in text


@pytest.mark.parametrize("n", [40, 5, None])
def test_only_a_better_run_is_told_that_all_is_well(tmp_path, n):
    summary = {"command": "dpo", "steps": 100, "eval_examples": n}
    said = Tags(render_run(read_run_record(write(tmp_path / "run", dpo_rows(), summary=summary))))
    assert ("All health checks pass" in said.said) == (n == 40)


def test_a_run_that_ended_early_says_after_which_update(tmp_path):
    summary = {"command": "dpo", "steps": 100, "seconds_in_all": 130.0, "stopped_early": True}
    folder = write(tmp_path / "run", dpo_rows(), status={"total": 400}, summary=summary)
    said = Tags(render_run(read_run_record(folder))).said
    assert "ended early, after 100 of 400 updates in 2 min" in said


def test_bytes_depend_on_the_folder_alone(tmp_path):
    one = render_run(read_run_record(write(tmp_path / "a" / "run", dpo_rows())))
    other = render_run(read_run_record(write(tmp_path / "b" / "run", dpo_rows())))
    assert one == other


def test_charts_are_the_rows(tmp_path):
    rows = dpo_rows(chosen=-20, rejected=-30)
    text = render_run(read_run_record(write(tmp_path / "run", rows)))
    data = dict(embedded(text))
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval/loss" in row]
    loss = data["Loss"]
    assert (loss["kind"], loss["x"], loss["smooth"]) == ("lines", "update", True)
    assert [one["label"] for one in loss["series"]] == ["training", "held-out"]
    assert [one["heldOut"] for one in loss["series"]] == [False, True]
    assert loss["series"][0]["x"] == [row["step"] for row in training]
    assert loss["series"][0]["y"] == pytest.approx([row["loss"] for row in training], rel=1e-5)
    assert loss["series"][1]["x"] == [row["step"] for row in held_out]
    # The accuracy of implicit rewards before training says nothing.
    accuracy = data["Accuracy"]
    assert accuracy["series"][1]["x"] == [row["step"] for row in held_out[1:]]
    assert (accuracy["unit"], accuracy["level"], accuracy["bounds"]) == ("share", 0.5, [0, 1])
    logps = data["Log-probs"]
    assert [one["colour"] for one in logps["series"]] == [1, 1, 2, 2]
    assert logps["fall"] == 1  # the held-out chosen ones
    assert "▼ chosen fell by 67%" in Tags(text).said
    assert not data["Learning rate"]["smooth"]
    unmarked = render_run(read_run_record(write(tmp_path / "well", dpo_rows())))
    assert dict(embedded(unmarked))["Log-probs"]["fall"] is None


def test_colours_are_the_pages_own(tmp_path):
    text = render_run(read_run_record(write(tmp_path / "run", dpo_rows())))
    script = (ASSETS / "charts.js").read_text()
    assert not re.findall(r"#[0-9a-f]{6}\b", script)
    assert {f"--{ink}:" in text for ink in ("c1", "c8", "ink", "muted", "rule", "warn")} == {True}
    used = set(re.findall(r'ink\("(\w+)"\)', script))
    assert {"muted", "rule", "warn", "ink"} <= used
    assert all(f"--{name}:" in text for name in used)
    dark = text[text.index("@media (prefers-color-scheme: dark)") :]
    assert all(f"--{name}:" in dark for name in used)


def test_everything_from_data_is_text(tmp_path):
    rows = [{"step": i, "loss": 1.0, f"rewards/{EVIL}/mean": float(i)} for i in range(1, 9)]
    samples = [
        {"source": EVIL, "prompt": EVIL, "before": "x" * 10_000, "after": "</div></main>"},
        {"source": "b", "prompt": "ما هي", "before": "\x00\x1b[31m\x7f\x85", "after": "\ud800"},
        {"source": "c", "prompt": EVIL, "completions": [{"text": EVIL, "score": 1.5}]},
    ]
    summary = {
        "command": EVIL,
        "steps": 8,
        "talk": EVIL,
        "data_facts": {"read_as": EVIL, "notes": [EVIL], "dropped": {EVIL: 3}, "example": [EVIL]},
        "held_out": {"warnings": [EVIL]},
        "versions": {EVIL: EVIL},
    }
    config = {"model": EVIL, "data": EVIL, "loss_option": {EVIL: EVIL}}
    folder = write(tmp_path / "run", rows, config, samples=samples, summary=summary)
    text = render_run(read_run_record(folder))
    tags = assert_self_contained(text)
    assert "alert(1)" in tags.said
    assert "<script>alert" not in text
    assert text.count("<script") == text.count("</script>") == 3
    labels = {one["label"] for chart in tags.charts for one in chart.get("series", ())}
    assert EVIL in labels
    assert "x" * 10_000 in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert "␀␛[31m␡�" in text
    assert '<div class="text" dir="auto">ما هي</div>' in text
    assert "unicode-bidi: isolate" in text
    text.encode()
    both = render_comparison([read_run_record(folder)] * 2, [EVIL, f"{EVIL}2"])
    assert_self_contained(both)


def test_the_page_has_its_numbers_without_scripts(tmp_path, capsys):
    folder = write(tmp_path / "run", dpo_rows())
    tags = assert_self_contained(render_run(read_run_record(folder)))
    assert "The charts need JavaScript" in tags.said
    assert "logps/chosen" in tags.said
    assert "−30.0" in tags.said
    assert mlx_align(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"Wrote {folder / 'report.html'}\n"


def test_a_page_without_charts_has_no_scripts(tmp_path):
    tags = assert_self_contained(render_run(read_run_record(write(tmp_path / "run", []))))
    assert "script" not in tags.names


def test_a_running_run(tmp_path):
    status = {
        "command": "dpo",
        "state": "running",
        "step": 40,
        "total": 100,
        "seconds": 80.0,
        "began": "2026-11-24T20:05:00+01:00",
        "written": "2026-11-24T20:07:00+01:00",
    }
    # An earlier summary is not of this run's end, and the last line is half written.
    old = {"command": "dpo", "steps": 30, "seconds_in_all": 10}
    rows = dpo_rows(8)
    folder = write(tmp_path / "run", rows, torn='{"step": 45, "lo', status=status, summary=old)
    text = render_run(read_run_record(folder))
    assert "update 40 of 100, about 2 min left; as of 24 November 2026, 20:07" in text
    assert '<meta http-equiv="refresh" content="30">' in text
    assert "24 November 2026, 20:05" in text
    assert '<progress max="1" value="0.4">' in text
    write(
        tmp_path / "run",
        rows,
        {"iters": 100, "output": "r u"},
        status={**status, "state": "interrupted"},
    )
    text = render_run(read_run_record(folder))
    assert "mlx-align dpo --resume &#39;r u&#39;" in text
    assert "refresh" not in text
    failed = {**status, "state": "failed", "error": "the loss is not finite"}
    text = render_run(read_run_record(write(tmp_path / "run", rows, status=failed)))
    assert "after update 40 of 100: the loss is not finite" in text


@pytest.mark.parametrize("rows", [[], dpo_rows(1), dpo_rows(2)[:2], [{"step": 1, "loss": None}]])
def test_run_folders_with_few_files(tmp_path, rows):
    folder = write(tmp_path / "run", rows, torn="\n\n[1]\nnull\n{")
    Tags(render_run(read_run_record(folder)))
    for file in ("config.yaml", "metrics.jsonl"):
        (folder / file).unlink()
        if file == "config.yaml":
            Tags(render_run(read_run_record(folder)))


def test_a_folder_without_a_run_is_a_one_line_error(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert mlx_align(["report", str(tmp_path / name)]) == 1
        found = capsys.readouterr().err
        assert found.startswith("error: ")
        assert found.count("\n") == 1
        assert name in found


def test_output_option(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = write(tmp_path / "one", dpo_rows())
    two = write(tmp_path / "other" / "one", dpo_rows(), {"iters": 5})
    assert mlx_align(["report", "one"]) == 0
    assert (one / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert mlx_align(["report", str(one), str(two)]) == 0
    text = (tmp_path / "comparison.html").read_text()
    assert str(two) in text  # two folders of one name
    assert mlx_align(["report", str(one), "--output", str(tmp_path / "x" / "y.html")]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_a_comparison_overlays_and_names_what_differs(tmp_path):
    folders = [
        write(tmp_path / "slow", dpo_rows(margin=0.5), {"beta": 0.1, "lr": 1e-5, "output": "a"}),
        write(tmp_path / "fast", dpo_rows(margin=2), {"beta": 0.1, "lr": 1e-4, "output": "b"}),
        write(tmp_path / "ppo", ppo_rows(), {"lr": 1e-5}),
    ]
    runs = [read_run_record(folder) for folder in folders]
    text = render_comparison(runs, [run.name for run in runs])
    tags = assert_self_contained(text)
    differing = text[text.index("Differences in options") : text.index("Curves")]
    assert re.findall(r'<th scope="row">([^<]*)', differing) == ["beta", "lr"]
    data = dict(embedded(text))
    margins = data["Margin, held-out"]["series"]
    assert [(one["label"], one["colour"]) for one in margins] == [("slow", 1), ("fast", 2)]
    figure = text[text.index('"title">Margin, held-out') :].split("</figure>")[0]
    assert "slow" in figure
    assert "fast" in figure
    assert ">0.500<" in figure
    assert ">2.00<" in figure
    assert "ppo" not in figure
    assert "Log-probs: rejected, held-out" in text
    assert tags.names.count("figure") == len(tags.charts) > 20


def test_a_comparison_leaves_out_what_has_another_scale(tmp_path):
    def run(name, **config):
        kl = {"mean": 1.25, "standard_error": 0.1, "samples": 8}
        summary = {"command": "dpo", "steps": 100, "eval_examples": 40, "kl": kl}
        return read_run_record(write(tmp_path / name, dpo_rows(), config, summary=summary))

    def titles(*records):
        text = render_comparison(records, [record.name for record in records])
        rows = re.findall(r'<th scope="row">([^<]*)', text.partition("Differences in options")[0])
        return {title for title, _ in embedded(text)}, rows, Tags(text).said

    first = run("first", beta=0.1, loss="sigmoid")
    charts, rows, said = titles(first, run("same", beta=0.1, loss="sigmoid"))
    assert {"Loss, held-out", "Margin, held-out", "Accuracy, held-out"} <= charts
    assert {"held-out: loss", "held-out: reward margin"} <= set(rows)
    assert "held-out: prefers the chosen (implicit reward)" in rows
    assert "1.25 nats (1.01 to 1.49, n = 8)" in said
    charts, rows, _ = titles(first, run("other", beta=0.1, loss="ipo"))
    assert "Accuracy, held-out" in charts
    assert not {"Loss, held-out", "Margin, held-out"} & charts
    assert not {"held-out: loss", "held-out: reward margin"} & set(rows)


def test_every_panel_is_shown_if_its_metric_is_there(tmp_path):
    rows = ppo_rows()
    for row in rows:
        row |= {"kl": 1.0, "perplexity": 3.0, "rewards/auc": 0.6, "rewards/accuracies": 0.6}
        row |= {"rewards/margins": 1.0, "rewards/chosen": 1.0, "rewards/rejected": 0.0}
        row |= {"logps/chosen": -9.0, "logps/rejected": -9.0, "logps/accuracies": 0.5}
        row |= {"learning_rate": 1e-5, "grad_norm": 1.0, "tokens_per_second": 10.0}
        row |= {"peak_memory_bytes": 1e9, "held_out": 1.0}
    text = render_run(read_run_record(write(tmp_path / "run", rows)))
    titles = [unescape(t) for t in re.findall(r'class="title">([^<]*)<', text)]
    assert titles == [panel.title for panel in PANELS]


def test_kl_of_a_policy_and_of_kto_are_different_metrics(tmp_path):
    rows = [*ppo_rows(2), {"step": 2, "eval/objective/kl": 3.0, "eval/reward": 1.0}]
    run = read_run_record(write(tmp_path / "run", rows))
    shown = {panel.title: curves_of(panel, run) for panel in PANELS}
    assert shown["KL from the reference"][0].twin == "eval/objective/kl"
    assert shown["KL point"] == ()
    assert [curve.label for curve in shown["Single rewards"]] == ["form", "helpful"]
    kto = read_run_record(
        write(tmp_path / "kto", [{"step": 1, "loss": 1, "kl": 2}, {"step": 1, "eval/kl": 3}])
    )
    shown = {panel.title: curves_of(panel, kto) for panel in PANELS}
    assert shown["KL from the reference"] == ()
    assert shown["KL point"][0].twin == "eval/kl"


def test_a_reward_models_report(tmp_path):
    parts = [{"name": "below 0.5", "accuracy": 0.25, "comparisons": 8}]
    parts.append({"name": "above 2", "accuracy": None, "comparisons": 0})
    held_out = {
        "comparisons": 271,
        "accuracy": 0.638,
        "accuracy_low": 0.579,
        "accuracy_high": 0.694,
        "longer_accuracy": 0.614,
        "accuracy_shorter_chosen": None,
        "shorter_chosen": 0,
        "by_difference": parts,
        "by_length_ratio": parts,
        "calibration": [{"confidence": 0.55, "right": 0.6, "comparisons": 30}],
        "ece": 0.062,
        "temperature": 1.14,
        "ece_at_temperature": 0.041,
        "length_correlation": -0.65,
        "length_correlation_within": None,
        "warnings": ['"pick the longer" alone gains 11.4%: it may have learned length; balance it'],
    }
    summary = {"command": "reward", "steps": 5, "held_out": held_out}
    text = render_run(read_run_record(write(tmp_path / "run", [], summary=summary)))
    tags = assert_self_contained(text)
    assert re.findall(r'class="title">([^<]*)<', text) == [
        "Calibration",
        "Accuracy by length",
        "Accuracy by certainty",
    ]
    assert (
        "On 271 held-out comparisons the reward model ranks the better completion first in 63.8% "
        "(95% interval 57.9% to 69.4%): better than 50%, but can't be told apart from choosing the "
        "longer one (61.4%)."
    ) in tags.said
    assert '"pick the longer" alone gains 11.4%.' in tags.said
    assert "It may have learned length; balance it." in tags.said
    data = dict(embedded(text))
    assert data["Accuracy by length"]["labels"] == ["< 0.5\n8", "> 2\n0"]
    assert data["Accuracy by length"]["y"] == [0.25, None]
    assert data["Calibration"]["labels"] == ["30 at 55%: 60% right"]
    assert "−0.65" in tags.said


@pytest.mark.parametrize(
    ("change", "begins", "stop"),
    [
        ({"chosen": -2.9, "rejected": -5}, None, None),  # less than a tenth of −30
        ({"chosen": -3.1, "rejected": -5}, "The log-prob of chosen completions fell", False),
        ({"chosen": -12.0, "rejected": -15}, "The log-prob of chosen completions fell", True),
        ({"margin": 5.1}, "The held-out margin has reached 5.10", False),
        ({"margin": 4.9}, None, None),
        ({"training": 0.95, "held_out": 0.79}, "Accuracy is 95% on training pairs and 79%", False),
        ({"training": 0.95, "held_out": 0.81}, None, None),
    ],
)
def test_warnings_for_preference_runs(tmp_path, change, begins, stop):
    facts = {"data_facts": {"scored_tokens": 100, "completions": 10}}  # ten tokens a completion
    found = warned(tmp_path / "run", dpo_rows(**change), "dpo", **facts)
    assert [w.problem.startswith(begins or "?") for w in found] == (
        [] if begins is None else [True]
    )
    assert [w.level == "stop" for w in found] == ([] if stop is None else [stop])
    assert all(w.advice for w in found)


def test_a_wide_margin_is_no_warning_while_accuracy_rises(tmp_path):
    rows = dpo_rows(margin=9)
    for row in rows:
        if "eval/rewards/accuracies" in row:
            row["eval/rewards/accuracies"] = 0.5 + row["step"] / 250
    assert warned(tmp_path / "run", rows, "dpo") == []


@pytest.mark.parametrize(
    ("metric", "well", "ill", "says", "stop"),
    [
        ("policy__approx_kl", 0.029, 0.031, "moves the policy by 0.031 nats", False),
        ("policy__approx_kl", 0.029, 0.11, "moves the policy by 0.110 nats", True),
        ("policy__clip_ratio", 0.3, 0.31, "31% of the tokens are clipped", False),
        ("value__explained_variance", 0.0, -0.01, "The critic explains less", False),
        ("objective__entropy", 0.61, 0.59, "Entropy is 30% of", True),
        ("objective__kl", 15.0, 16.0, "16 nats from the reference", False),
        ("objective__kl", 15.0, 31.0, "31 nats from the reference", True),
        ("completions__ended", 0.8, 0.79, "Only 79%", False),
        ("completions__mean_length", 75.0, 76.0, "1.5 times as long", False),
        ("completions__mean_length", 75.0, 126.0, "2.5 times as long", True),
        ("frac_reward_zero_std", 0.8, 0.81, "81% of the prompts", False),
        ("text__repeated_4grams", 0.06, 0.08, "Completions repeat 8%", False),
        ("text__repeated_4grams", 0.06, 0.18, "Completions repeat 18%", True),
        ("text__distinct_2", 0.41, 0.39, "39% of the token pairs", False),
        ("text__distinct_2", 0.41, 0.29, "29% of the token pairs", True),
    ],
)
def test_warnings_for_on_policy_runs(tmp_path, metric, well, ill, says, stop):
    assert warned(tmp_path / "run", ppo_rows(**{metric: well})) == []
    found = warned(tmp_path / "run", ppo_rows(**{metric: ill}))
    assert len(found) == 1
    assert says in found[0].problem
    assert (found[0].level != "warn") == stop
    assert found[0].advice


def test_a_critic_is_not_checked_before_30_updates(tmp_path):
    # As for the guard: the warning comes after the 31st.
    assert warned(tmp_path / "run", ppo_rows(30, value__explained_variance=-1.0)) == []
    assert len(warned(tmp_path / "run", ppo_rows(31, value__explained_variance=-1.0))) == 1


def test_over_optimisation(tmp_path):
    rows = ppo_rows(40)
    for i, row in enumerate(rows):
        row["reward"] = i / 10
    for falls, step in ((0.9, 10), (0.8, 20), (0.7, 30)):
        rows.append({"step": step, "eval/reward": falls})
    assert warned(tmp_path / "run", rows) == []
    found = warned(tmp_path / "run", [*rows, {"step": 40, "eval/reward": 0.6}])
    assert "held-out reward fell in three evaluations in a row" in found[0].problem
    assert found[0].level == "warn"


def test_over_optimisation_of_a_held_out_reward(tmp_path):
    rows = ppo_rows(5)
    for step in range(1, 6):
        rows.append({"step": step, "eval/reward": step / 10, "eval/held_out": 1 - step / 10})
    found = warned(tmp_path / "run", rows)
    assert "to 0.500, while" in found[0].problem
    # A reason to stop, if it is known to be more than a standard deviation.
    spreads = {"eval/reward_std": 0.2, "eval/held_out_std": 0.2}
    known = [row | spreads if "eval/reward" in row else row for row in rows]
    found = warned(tmp_path / "run", known)
    assert [one.level for one in found] == ["stop"]
    assert "+2.0 standard deviations from its start, the held-out reward -2.0" in found[0].problem
    rows[-1]["eval/held_out"] = 0.7
    assert warned(tmp_path / "run", rows) == []


def test_what_stopped_a_run_is_on_its_page(tmp_path):
    finding = {
        "step": 7,
        "level": "stop",
        "signal": "objective/kl",
        "problem": "Far.",
        "advice": ".",
    }
    others = [finding | {"level": EVIL}, "text", None]
    found = warned(tmp_path / "run", ppo_rows(), findings=[finding, *others])
    assert [(one.level, one.problem) for one in found] == [("stop", "After step 7: Far.")]
    # Not twice, if the metrics show it too.
    found = warned(tmp_path / "run", ppo_rows(objective__kl=40.0), findings=[finding])
    assert ["40 nats" in one.problem for one in found] == [True]


def test_longer_completions_may_go_further_from_the_reference(tmp_path):
    rows = [row | {"completions/mean_length": 256.0} for row in ppo_rows(objective__kl=29.0)]
    assert warned(tmp_path / "run", rows) == []
    rows = [row | {"completions/mean_length": 256.0} for row in ppo_rows(objective__kl=31.0)]
    assert [warning.level == "stop" for warning in warned(tmp_path / "run", rows)] == [False]


def test_long_runs_are_thinned_and_keep_their_extremes():
    x = list(range(1, 20_001))
    y = [float(v) for v in x]
    y[7_776], y[12_344] = 1e6, -1e6
    thin_x, thin_y = charts.thin(x, y)
    assert len(thin_x) == len(thin_y) <= charts.MAX_POINTS
    assert len(thin_x) > 0.9 * charts.MAX_POINTS
    assert (thin_x[0], thin_x[-1]) == (1, 20_000)
    assert thin_x == sorted(set(thin_x))
    assert {(7_777, 1e6), (12_345, -1e6)} <= set(zip(thin_x, thin_y, strict=True))
    assert all(y[a - 1] == b for a, b in zip(thin_x, thin_y, strict=True))
    means = charts.bucket_means(x, [float(v) for v in x])
    assert len(means[0]) <= charts.MAX_POINTS // 2
    assert means[0] == means[1]
    assert means[0][0] == sum(x[:40]) / 40
    assert charts.thin(x[:1000], y[:1000]) == (x[:1000], y[:1000])
    for n in (1001, 1002, 1003, 1999, 2001):
        assert len(charts.thin(x[:n], y[:n])[0]) <= charts.MAX_POINTS


def test_a_page_of_20_000_rows_is_small(tmp_path):
    rows = [
        {"step": i, "loss": 1 / i, "rewards/accuracies": i % 2, "grad_norm": math.sin(i)}
        for i in range(1, 20_001)
    ]
    text = render_run(read_run_record(write(tmp_path / "run", rows)))
    assert len(text) < 300_000
    loss = dict(embedded(text))["Loss"]["series"][0]
    assert (loss["x"][0], loss["x"][-1], loss["y"][0]) == (1, 20_000, 1.0)
    assert len(loss["means"]["x"]) == len(loss["means"]["y"]) <= 500


def node(expression):
    """The value of an expression of the page's script, computed by node."""
    script = f"const c = require('./charts.js'); console.log(JSON.stringify({expression}))"
    command = ["node", "-e", script]
    done = subprocess.run(command, cwd=ASSETS, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@needs_node
def test_smoothing_is_a_centred_mean():
    assert node("c.runningMean([0, 3, 0, 3, 0], 3)") == pytest.approx([0, 1, 2, 1, 0])
    assert node("c.runningMean([1, 2, 3, 9], 1)") == [1, 2, 3, 9]


@needs_node
def test_a_pointer_reads_the_nearest_value():
    xs = [-5, 1, 1.4, 1.6, 9, 50]
    assert node(f"{xs}.map(x => c.nearest([1, 2, 8, 10], x))") == [0, 0, 0, 1, 2, 3]
    assert node("c.nearest([5], 1)") == 0


@needs_node
def test_an_axis_has_no_room_below_zero_for_data_that_has_none():
    low, high = node("c.verticalRange(0, 1)")
    assert -0.05 < low <= 0
    assert high > 1
    assert node("c.verticalRange(0.5, 1)")[0] > 0
    assert node("c.verticalRange(-1, 1)")[0] < -1
    assert node("c.verticalRange(0.2, 0.3, [0, 1])") == [-0.03, 1.03]
    low, high = node("c.verticalRange(3, 3)")
    assert low < 3 < high


@needs_node
@pytest.mark.parametrize(
    ("ticks", "unit", "labels"),
    [
        ([0.0, 0.5, 1.0], "share", ["0%", "50%", "100%"]),
        ([0.6925, 0.695, 0.6975], "", ["0.6925", "0.6950", "0.6975"]),
        ([0.0, 5e-6, 1e-5], "", ["0", "0.5e−5", "1.0e−5"]),
        ([-20.0, 0.0, 20.0], "nats", ["−20", "0", "20"]),
        ([0.0, 20_000.0, 40_000.0], "", ["0", "20k", "40k"]),
        ([1e9, 1.5e9], "bytes", ["1.0 GB", "1.5 GB"]),
        ([7.0], "", ["7"]),
        ([None, 0.0, 0.25], "share", ["", "0%", "25%"]),
    ],
)
def test_tick_labels(ticks, unit, labels):
    assert node(f"c.tickLabels({json.dumps(ticks)}, {json.dumps(unit)})") == labels


@needs_node
def test_the_script_formats_values_as_the_page_does():
    values = [0, 1, -1, 0.99166, -0.00789, 2.5e-7, -1e-9, 12_345.6, math.pi, 48e6, 2e9, 314, 99.96]
    for unit in ("", "share", "nats", "bytes", "tokens/s"):
        found = node(f"{json.dumps(values)}.map(x => c.formatValue(x, {json.dumps(unit)}))")
        assert found == [format_value(value, unit) for value in values]
    assert node("c.formatValue(null)") == format_value(None)


def test_numbers_read_well():
    assert format_value(None) == "–"
    assert format_value(0.99166, "share") == "99.2%"
    assert format_value(-0.00789, "nats") == "−0.008 nats"
    assert format_value(2.5e-7) == "2.5e−7"
    assert format_value(12_345.6, "tokens") == "12,346 tokens"
    assert format_value(math.pi) == "3.14"
    assert format_value(48e6, "bytes") == "48 MB"


def test_rollouts_of_the_last_batch_are_shown_best_first(tmp_path):
    rows = [
        {
            "step": step,
            "source": "train.jsonl:1",
            "prompt": [{"role": "user", "content": "Capital <of> Peru?"}],
            "completion": f"answer {n} of {step}",
            "reward": reward,
        }
        for step in (1, 2)
        for n, reward in enumerate((0.1, 0.9, None, 0.4, 0.2))
    ]
    rows.append({"source": "valid.jsonl:1", "prompt": "Hm?", "before": "one", "after": "two"})
    write(tmp_path, ppo_rows(3), samples=rows)
    page = render_run(read_run_record(tmp_path))
    assert "Last rollouts and their rewards" in page
    assert "Rollout batch 2" in page
    assert "Capital &lt;of&gt; Peru?" in page
    assert "of 1" not in page.split("Last rollouts and their rewards")[1].split("</section>")[0]
    places = [page.index(f"answer {n} of 2") for n in (1, 3, 4, 2)]
    assert places == sorted(places)
    assert "Before and after" in page
