"""The run page from synthetic run folders: what it says, warns of, draws and never lets through."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from mlx_align.cli.main import run as mlx_align
from mlx_align.report import charts, page
from mlx_align.report.page import render_comparison, render_run
from mlx_align.report.panels import PANELS, curves_of
from mlx_align.system.formatting import format_value, tick_labels
from mlx_align.tracking.diagnostics import diagnose
from mlx_align.tracking.run_dir import read_run_record

VOID = {"meta", "br", "img", "input", "hr", "link"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


@pytest.fixture
def drawn(monkeypatch):
    """Charts are drawn."""
    monkeypatch.setattr(page, "can_draw", charts.can_draw)


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
    """Reports every 5 updates and an evaluation every 25; log-probs move by so many nats in all."""
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
    """Checks that tags close in order; keeps attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.attributes, self.said = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


def assert_self_contained(text):
    tags = Tags(text)
    assert {"script", "img", "link", "iframe", "object", "base"}.isdisjoint(tags.names)
    for tag, name, value in tags.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith("#"), (tag, name, value)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policies = [value for _, name, value in tags.attributes if name == "content"]
    assert sum(value.startswith("default-src 'none'; style-src") for value in policies) == 1
    return tags


def test_a_finished_dpo_run_has_all_its_charts(tmp_path, drawn):
    summary = {
        "command": "dpo",
        "steps": 100,
        "seconds": 90.0,
        "seconds_in_all": 130.0,
        "tokens_per_second": 1000,
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
    assert tags.names.count("svg") == tags.names.count("figure") == 9
    for part in ("100 updates in 2 min", "1.25 nats", "± 0.100, 8 samples", "2.00 GB"):
        assert part in tags.said
    for part in ("Hi?", "No.", "Yes.", "dropped: too long", "0.32.2", "mlx_lm.chat"):
        assert part in tags.said
    assert "in 71.2% of the pairs; before training it was 50.0%" in tags.said
    assert "Nothing in the numbers so far" in tags.said
    assert 'http-equiv="refresh"' not in text
    assert "http://" not in text
    assert "https://" not in text


def test_bytes_depend_on_the_folder_alone(tmp_path, drawn):
    one = render_run(read_run_record(write(tmp_path / "a" / "run", dpo_rows())))
    other = render_run(read_run_record(write(tmp_path / "b" / "run", dpo_rows())))
    assert one == other


def test_the_users_own_style_changes_nothing(tmp_path, drawn):
    import matplotlib

    run = read_run_record(write(tmp_path / "run", dpo_rows()))
    plain = render_run(run)
    styled = {"font.size": 20, "axes.facecolor": "red", "svg.fonttype": "path", "xtick.top": True}
    with matplotlib.rc_context(styled):
        assert render_run(run) == plain
        assert matplotlib.rcParams["font.size"] == 20


def test_colours_are_the_pages_own(tmp_path, drawn):
    text = render_run(read_run_record(write(tmp_path / "run", dpo_rows(chosen=-20, rejected=-30))))
    charts_alone = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", charts_alone)
    assert "var(--c1)" in charts_alone
    assert "var(--warn)" in charts_alone
    assert {f"--{ink}:" in text for ink in ("c1", "c8", "ink", "muted", "rule", "warn")} == {True}
    assert "font-family: 'DejaVu" not in text


def test_everything_from_data_is_text(tmp_path, drawn):
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
    assert "<script" not in text
    assert "x" * 10_000 in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert "␀␛[31m␡�" in text
    assert '<div class="text" dir="auto">ما هي</div>' in text
    assert "unicode-bidi: isolate" in text
    text.encode()
    both = render_comparison([read_run_record(folder)] * 2, [EVIL, f"{EVIL}2"])
    assert_self_contained(both)


def test_without_matplotlib_the_page_has_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    assert not charts.can_draw()
    folder = write(tmp_path / "run", dpo_rows())
    text = render_run(read_run_record(folder))
    tags = assert_self_contained(text)
    assert "svg" not in tags.names
    assert 'pip install "mlx-align[report]"' in tags.said
    assert "logps/chosen" in tags.said
    assert "−30.0" in tags.said
    assert mlx_align(["report", str(folder)]) == 0
    assert "matplotlib" in capsys.readouterr().out


def test_a_run_that_goes_on(tmp_path):
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
def test_little_is_enough(tmp_path, drawn, rows):
    folder = write(tmp_path / "run", rows, torn="\n\n[1]\nnull\n{")
    Tags(render_run(read_run_record(folder)))
    for file in ("config.yaml", "metrics.jsonl"):
        (folder / file).unlink()
        if file == "config.yaml":
            Tags(render_run(read_run_record(folder)))


def test_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert mlx_align(["report", str(tmp_path / name)]) == 1
        found = capsys.readouterr().err
        assert found.startswith("error: ")
        assert found.count("\n") == 1
        assert name in found


def test_report_writes_where_it_is_told(tmp_path, capsys, monkeypatch):
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


def test_a_comparison_overlays_and_names_what_differs(tmp_path, drawn):
    folders = [
        write(tmp_path / "slow", dpo_rows(margin=0.5), {"beta": 0.1, "lr": 1e-5, "output": "a"}),
        write(tmp_path / "fast", dpo_rows(margin=2), {"beta": 0.1, "lr": 1e-4, "output": "b"}),
        write(tmp_path / "ppo", ppo_rows(), {"lr": 1e-5}),
    ]
    runs = [read_run_record(folder) for folder in folders]
    text = render_comparison(runs, [run.name for run in runs])
    tags = assert_self_contained(text)
    differing = text[text.index("What differs") : text.index("Courses")]
    assert re.findall(r'<th scope="row">([^<]*)', differing) == ["beta", "lr"]
    margins = text[text.index('"title">Margin, held-out') :].split("</figure>")[0]
    assert "slow" in margins
    assert "fast" in margins
    assert ">0.500<" in margins
    assert ">2.00<" in margins
    assert "ppo" not in margins.split("<svg")[0]
    assert "stroke: var(--c1)" in margins
    assert "stroke: var(--c2)" in margins
    assert "Log-probs: rejected, held-out" in text
    assert tags.names.count("svg") == tags.names.count("figure") > 20


def test_every_panel_is_drawn_where_its_metric_is(tmp_path, drawn):
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


def test_a_policys_kl_is_not_ktos(tmp_path):
    rows = [*ppo_rows(2), {"step": 2, "eval/objective/kl": 3.0, "eval/reward": 1.0}]
    run = read_run_record(write(tmp_path / "run", rows))
    shown = {panel.title: curves_of(panel, run) for panel in PANELS}
    assert shown["KL from the reference"][0].twin == "eval/objective/kl"
    assert shown["KL point"] == ()
    assert [curve.label for curve in shown["Rewards, each apart"]] == ["form", "helpful"]
    kto = read_run_record(
        write(tmp_path / "kto", [{"step": 1, "loss": 1, "kl": 2}, {"step": 1, "eval/kl": 3}])
    )
    shown = {panel.title: curves_of(panel, kto) for panel in PANELS}
    assert shown["KL from the reference"] == ()
    assert shown["KL point"][0].twin == "eval/kl"


def test_a_reward_models_report(tmp_path, drawn):
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
    assert "63.8% of 271 comparisons (95%: 57.9% to 69.4%)" in tags.said
    assert '"pick the longer" alone gains 11.4%.' in tags.said
    assert "It may have learned length; balance it." in tags.said
    assert "&lt; 0.5" in text
    assert "30 at 55%: 60% right" in text
    assert "−0.65" in tags.said


@pytest.mark.parametrize(
    ("change", "begins", "stop"),
    [
        ({"chosen": -2.9, "rejected": -5}, None, None),  # less than a tenth of −30
        ({"chosen": -3.1, "rejected": -5}, "The chosen answer's log-prob fell", False),
        ({"chosen": -12.0, "rejected": -15}, "The chosen answer's log-prob fell", True),
        ({"margin": 5.1}, "The held-out margin is 5.10", False),
        ({"margin": 4.9}, None, None),
        ({"training": 0.95, "held_out": 0.79}, "Accuracy is 95% on training pairs and 79%", False),
        ({"training": 0.95, "held_out": 0.81}, None, None),
    ],
)
def test_what_pairs_warn_of(tmp_path, change, begins, stop):
    facts = {"data_facts": {"scored_tokens": 100, "completions": 10}}  # ten tokens a completion
    found = warned(tmp_path / "run", dpo_rows(**change), "dpo", **facts)
    assert [w.what.startswith(begins or "?") for w in found] == ([] if begins is None else [True])
    assert [w.stop for w in found] == ([] if stop is None else [stop])
    assert all(w.do for w in found)


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
        ("policy__clip_ratio", 0.3, 0.31, "31% of the tokens", False),
        ("value__explained_variance", 0.0, -0.01, "The critic explains less", True),
        ("objective__entropy", 0.61, 0.59, "Entropy is 30% of", True),
        ("objective__kl", 15.0, 16.0, "16 nats a completion", False),
        ("objective__kl", 15.0, 31.0, "31 nats a completion", True),
        ("completions__ended", 0.8, 0.79, "Only 79%", False),
        ("completions__mean_length", 75.0, 76.0, "1.5 times as long", False),
        ("completions__mean_length", 75.0, 126.0, "2.5 times as long", True),
        ("text__repeated_4grams", 0.06, 0.08, "Completions repeat 8%", False),
        ("text__repeated_4grams", 0.06, 0.18, "Completions repeat 18%", True),
        ("text__distinct_2", 0.41, 0.39, "39% of the pairs of tokens", False),
        ("text__distinct_2", 0.41, 0.29, "29% of the pairs of tokens", True),
    ],
)
def test_what_policies_warn_of(tmp_path, metric, well, ill, says, stop):
    assert warned(tmp_path / "run", ppo_rows(**{metric: well})) == []
    found = warned(tmp_path / "run", ppo_rows(**{metric: ill}))
    assert len(found) == 1
    assert says in found[0].what
    assert found[0].stop == stop
    assert found[0].do


def test_a_critic_has_thirty_updates(tmp_path):
    assert warned(tmp_path / "run", ppo_rows(29, value__explained_variance=-1.0)) == []
    assert len(warned(tmp_path / "run", ppo_rows(30, value__explained_variance=-1.0))) == 1


def test_over_optimisation(tmp_path):
    rows = ppo_rows(40)
    for i, row in enumerate(rows):
        row["reward"] = i / 10
    for falls, step in ((0.9, 10), (0.8, 20), (0.7, 30)):
        rows.append({"step": step, "eval/reward": falls})
    assert warned(tmp_path / "run", rows) == []
    found = warned(tmp_path / "run", [*rows, {"step": 40, "eval/reward": 0.6}])
    assert "held-out reward fell in three evaluations running" in found[0].what
    assert found[0].stop


def test_over_optimisation_by_another_judge(tmp_path):
    rows = ppo_rows(5)
    for step in range(1, 6):
        rows.append({"step": step, "eval/reward": step / 10, "eval/held_out": 1 - step / 10})
    found = warned(tmp_path / "run", rows)
    assert "to 0.500, while" in found[0].what
    rows[-1]["eval/held_out"] = 0.7
    assert warned(tmp_path / "run", rows) == []


def test_longer_completions_may_go_further_from_the_reference(tmp_path):
    rows = [row | {"completions/mean_length": 256.0} for row in ppo_rows(objective__kl=29.0)]
    assert warned(tmp_path / "run", rows) == []
    rows = [row | {"completions/mean_length": 256.0} for row in ppo_rows(objective__kl=31.0)]
    assert [warning.stop for warning in warned(tmp_path / "run", rows)] == [False]


def test_long_runs_are_thinned_not_cut():
    x = list(range(1, 10_001))
    thin_x, thin_y = charts._thinned(x, [float(v) for v in x])
    assert len(thin_x) <= charts.MOST_POINTS + 1
    assert thin_x == thin_y
    assert thin_x[-1] == 10_000
    assert thin_x[0] == sum(x[:25]) / 25
    smooth = charts._running_mean([0.0, 3.0, 0.0, 3.0, 0.0], 3)
    assert smooth == pytest.approx([0, 1, 2, 1, 0])


def test_a_pointer_reads_values_everywhere(drawn):
    lines = [charts.Line("training", [1, 2, 3], [0.5, 0.25, 0.125], 0)]
    lines.append(charts.Line("held-out", [2], [0.75], 1, True))
    drawing = charts.draw_lines(lines, charts.Axis(unit="share"), "Loss")
    said = re.findall(r"<title>(.*?)</title>", drawing, flags=re.DOTALL)
    assert said == [
        "update 1\ntraining: 50.0%",
        "update 2\ntraining: 25.0%\nheld-out: 75.0%",
        "update 3\ntraining: 12.5%",
    ]


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
    ],
)
def test_tick_labels(ticks, unit, labels):
    assert tick_labels(ticks, unit) == labels


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
    page = render_run(read_run_record(tmp_path), charts=False)
    assert "What it said last" in page
    assert "Rollout batch 2" in page
    assert "Capital &lt;of&gt; Peru?" in page
    assert "of 1" not in page.split("What it said last")[1].split("</section>")[0]
    places = [page.index(f"answer {n} of 2") for n in (1, 3, 4, 2)]
    assert places == sorted(places)
    assert "Before and after" in page
