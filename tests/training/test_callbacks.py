"""What a run lets others see while it trains: the page's times, how runs end, trackers."""

import dataclasses
import json
import re
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.runs import mlx_align
from mlx_lm.tuner import callbacks as mlx_lm_callbacks

from mlx_align.config import DPOConfig
from mlx_align.errors import ConfigError, TrainingError
from mlx_align.system.interrupts import Interrupted
from mlx_align.system.progress import SilentConsole
from mlx_align.system.starter import resolve_starter
from mlx_align.tracking import run_dir
from mlx_align.tracking.diagnostics import HealthMonitor
from mlx_align.training import callbacks, offline
from mlx_align.training import run as run_module
from mlx_align.training.callbacks import Callback, Callbacks, RunPage, Trackers, check_trackers
from mlx_align.training.metrics import Progress
from mlx_align.training.run import make_algorithm, train

FACTS = {"groups": 3, "read_as": "read as: pairs"}


class Said(SilentConsole):
    """Keeps what is said."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told, and the times at which pages were rendered."""
    state = SimpleNamespace(now=0.0, cost=0.0, pages=[])

    def render(run):
        state.pages.append((state.now, run.step))
        state.now += state.cost
        return "page"

    monkeypatch.setattr(callbacks.time, "monotonic", lambda: state.now)
    monkeypatch.setattr(callbacks, "render_run", render)
    return state


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the wandb package, as mlx-lm's callbacks hold it."""
    sent = SimpleNamespace(inits=[], logs=[])
    package = SimpleNamespace(
        init=lambda **options: sent.inits.append(options),
        log=lambda info, step: sent.logs.append((step, info)),
    )
    monkeypatch.setattr(mlx_lm_callbacks, "wandb", package)
    return sent


class Training:
    """Tells the callbacks of a run what happens in it."""

    def __init__(self, callbacks):
        self.callbacks, self.progress = callbacks, Progress()

    @contextmanager
    def training(self, step, total, seconds=0.0):
        self.progress.step, self.progress.seconds = step, seconds
        with self.callbacks.training(self.progress, total):
            yield

    def tell(self, step, seconds, *, evaluated=False):
        self.progress.step, self.progress.seconds = step, seconds
        if evaluated:
            self.callbacks.on_evaluate(step, {})
        else:
            self.callbacks.on_log(step, {})

    def finish(self):
        self.callbacks.on_run_end({})


def start(folder, console=None, **options):
    folder.mkdir(exist_ok=True)
    config, console = DPOConfig(**options), console or SilentConsole()
    trackers = Trackers(config, folder, console)
    return Training(
        Callbacks([trackers, RunPage(folder, "dpo", FACTS, 20, HealthMonitor("dpo"), console)])
    )


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def test_the_page_is_written_at_most_every_30_seconds(tmp_path, clock):
    publication = start(tmp_path)
    with publication.training(0, 100):
        for step in range(1, 31):
            clock.now += 7
            publication.tell(step, 7.0 * step)
    publication.finish()
    times = [at for at, _ in clock.pages]
    assert times == [0, 35, 70, 105, 140, 175, 210, 210]
    assert status_of(tmp_path)["state"] == "finished"


def test_evaluations_update_the_page_at_once_unless_that_is_slow(tmp_path, clock):
    publication = start(tmp_path)
    with publication.training(0, 100):
        clock.now = 1
        publication.tell(1, 1.0, evaluated=True)
        assert len(clock.pages) == 2
        clock.now, clock.cost = 40, 4.0
        publication.tell(2, 2.0)  # takes 4 s: not again before 200 s have gone by
        for step, now in ((3, 100), (4, 243), (5, 245)):
            clock.now = now
            publication.tell(step, 2.0, evaluated=True)
    assert [at for at, _ in clock.pages] == [0, 1, 40, 245]


@pytest.mark.parametrize(
    ("error", "state", "says"),
    [
        (Interrupted(signal.SIGINT), "interrupted", None),
        (KeyboardInterrupt(), "interrupted", None),
        (TrainingError("the loss is not finite on rows a:3"), "failed", "the loss is not finite"),
        (ZeroDivisionError("oh"), "failed", "ZeroDivisionError: oh"),
    ],
)
def test_status_and_page_of_interrupted_and_failed_runs(tmp_path, error, state, says):
    publication = start(tmp_path)
    (tmp_path / "config.yaml").write_text("output: runs/x\n")

    def cut():
        with publication.training(0, 100):
            publication.tell(7, 70.0)
            raise error

    with pytest.raises(type(error)):
        cut()
    found = status_of(tmp_path)
    assert (found["state"], found["step"], found["total"]) == (state, 7, 100)
    assert says is None or says in found["error"]
    assert found["data_facts"] == FACTS
    text = (tmp_path / "report.html").read_text()
    assert (says or "mlx-align dpo --resume runs/x") in text


def test_a_resumed_run_keeps_its_start_time(tmp_path):
    with start(tmp_path).training(0, 10):
        pass
    file = tmp_path / "status.json"
    file.write_text(json.dumps({**status_of(tmp_path), "began": "2026-01-02T03:04:05+00:00"}))
    with start(tmp_path).training(5, 10, 50.0):
        pass
    assert status_of(tmp_path)["began"] == "2026-01-02T03:04:05+00:00"
    with start(tmp_path).training(0, 10):
        pass
    assert status_of(tmp_path)["began"] != "2026-01-02T03:04:05+00:00"


def test_an_error_of_the_page_does_not_end_the_run(tmp_path, monkeypatch):
    def render(_run):
        raise RuntimeError("no\ntemplate")

    monkeypatch.setattr(callbacks, "render_run", render)
    display = Said()
    publication = start(tmp_path, display)
    with publication.training(0, 2):
        publication.tell(1, 1.0, evaluated=True)
    publication.finish()
    assert display.notes == [
        "! the run page could not be written, but training continues: no template",
    ]


def test_every_row_reaches_the_tracker(tmp_path, wandb):
    publication = start(tmp_path, report_to=("wandb",), project_name="capitals")
    run_dir.append_metrics(tmp_path, {"step": 0, "eval/loss": 0.7})
    with publication.training(0, 2):
        run_dir.append_metrics(tmp_path, {"step": 1, "loss": 0.6, "eval_like": 1.0})
        publication.tell(1, 1.0)
        run_dir.append_metrics(tmp_path, {"step": 1, "eval/loss": 0.5})
        publication.tell(1, 1.0, evaluated=True)
    assert wandb.logs == [
        (0, {"iteration": 0, "eval/loss": 0.7}),
        (1, {"iteration": 1, "loss": 0.6, "eval_like": 1.0}),
        (1, {"iteration": 1, "eval/loss": 0.5}),
    ]
    init = wandb.inits[0]
    assert init["project"] == "capitals"
    assert init["dir"] == str(tmp_path)
    assert init["config"] == dataclasses.asdict(
        DPOConfig(report_to=("wandb",), project_name="capitals")
    )
    resumed = start(tmp_path, report_to=("wandb",))
    with resumed.training(1, 2):
        run_dir.append_metrics(tmp_path, {"step": 2, "loss": 0.4})
    resumed.finish()
    assert wandb.logs[3:] == [(2, {"iteration": 2, "loss": 0.4})]


def test_training_and_held_out_rows_reach_different_callbacks(tmp_path, monkeypatch):
    heard = []
    callback = SimpleNamespace(
        on_train_loss_report=lambda info: heard.append(("train", info["iteration"])),
        on_val_loss_report=lambda info: heard.append(("val", info["iteration"])),
    )
    monkeypatch.setattr(mlx_lm_callbacks, "get_reporting_callbacks", lambda *_, **__: callback)
    publication = start(tmp_path, report_to=("wandb",))
    with publication.training(0, 1):
        run_dir.append_metrics(tmp_path, {"step": 1, "loss": 1.0})
        run_dir.append_metrics(tmp_path, {"step": 1, "eval/loss": 1.0})
        publication.tell(1, 1.0)
    assert heard == [("train", 1), ("val", 1)]


def test_an_error_of_a_tracker_does_not_end_the_run(tmp_path, wandb, monkeypatch):
    def log(_info, step):
        raise OSError("no network")

    monkeypatch.setattr(mlx_lm_callbacks.wandb, "log", log)
    display = Said()
    publication = start(tmp_path, display, report_to=("wandb",))
    with publication.training(0, 2):
        for step in (1, 2):
            run_dir.append_metrics(tmp_path, {"step": step, "loss": 1.0})
            publication.tell(step, 1.0)
    assert display.notes == ["! --report-to failed, but training continues: no network"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"report_to": ("wandb", "tensorboard")},
            "tensorboard is unknown; choose from wandb, swan",
        ),
        ({"report_to": ("swanlab",)}, "swanlab is not installed; pip install swanlab"),
        ({"project_name": "p"}, "--project-name needs --report-to"),
    ],
)
def test_trackers_that_are_unknown_or_missing_are_refused(wandb, monkeypatch, options, says):
    monkeypatch.setattr(mlx_lm_callbacks, "swanlab", None)
    with pytest.raises(ConfigError, match=says):
        check_trackers(DPOConfig(**options))


def test_a_missing_tracker_is_refused_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlx_lm_callbacks, "wandb", None)
    options = ["--model", str(tmp_path / "none"), "--data", "none", "--report-to", "wandb"]
    assert mlx_align("dpo", *options, "--output", tmp_path / "run") == 1
    assert capsys.readouterr().err == (
        "error: --report-to: wandb is not installed; pip install wandb\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_error_at_the_start_of_a_tracker_is_one_line(tmp_path, wandb, monkeypatch):
    def init(**_options):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(mlx_lm_callbacks.wandb, "init", init)
    with pytest.raises(ConfigError, match=r"wandb: can't be started \(no API key configured\)"):
        start(tmp_path, report_to=("wandb",))


def test_page_and_tracker_of_an_interrupted_and_resumed_run(tmp_path, monkeypatch, wandb):
    """A real run on the starter: interrupted, then resumed, with a tracker."""
    monkeypatch.chdir(tmp_path)
    seen = []
    evaluate = offline.Evaluation.evaluate

    def interrupt(self, step, weights):
        result = evaluate(self, step, weights)
        if step == 2 and not seen:
            seen.append(step)
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(offline.Evaluation, "evaluate", interrupt)
    options = ["--model", "starter", "--data", "starter", "--iters", "4", "--batch-size", "2"]
    options += ["--grad-accumulation-steps", "1", "--val-batches", "2", "--samples", "2"]
    options += ["--steps-per-report", "1", "--steps-per-eval", "2", "--sample-tokens", "4"]
    options += ["--reference-cache", "cache", "--report-to", "wandb", "--output", "run"]
    assert mlx_align("dpo", *options) == 130
    text = (tmp_path / "run" / "report.html").read_text()
    assert "interrupted" in text
    assert "after update 2 of 4" in text
    assert "mlx-align dpo --resume run" in text
    assert "792" in text  # the data's facts, though there is no summary
    assert mlx_align("dpo", "--resume", "run") == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "4 updates in" in text
    [charts] = re.findall(r'<script[^>]*id="chart-data"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert len(json.loads(charts)) == text.count("<figure") == 10
    assert "Which one is it?" in text
    steps = [step for step, info in wandb.logs if "loss" in info]
    assert steps == [1, 2, 3, 4]
    assert [step for step, info in wandb.logs if "eval/loss" in info] == [0, 2, 4]


class Recorder(Callback):
    """Keeps what it is told, and stops the run after a step."""

    def __init__(self, stop_after=None):
        self.events, self.stop_after = [], stop_after

    def on_train_begin(self, progress, total_steps):
        self.events.append(("begin", progress.step, total_steps))

    def on_step_end(self, step, metrics):
        self.events.append(("step", step, metrics["loss"]))
        return step == self.stop_after

    def on_log(self, step, metrics):
        self.events.append(("log", step, metrics["loss"]))

    def on_evaluate(self, step, metrics):
        self.events.append(("evaluate", step, metrics["loss"]))

    def on_save(self, step, folder):
        self.events.append(("save", step, folder.is_dir()))

    def on_train_end(self, error):
        self.events.append(("end", error))

    def on_run_end(self, summary):
        self.events.append(("run", summary["steps"]))


def run_with(recorder, **options):
    config = DPOConfig(
        model="starter",
        data="starter",
        batch_size=2,
        grad_accumulation_steps=1,
        val_batches=1,
        samples=0,
        iters=4,
        steps_per_eval=2,
        steps_per_report=3,
        reference_cache="cache",
        **options,
    )
    config = dataclasses.replace(
        config, **{name: resolve_starter("starter", name) for name in ("model", "data")}
    )
    console = Said()
    return train(make_algorithm(config), config, Path("run"), console, callbacks=[recorder])


def test_a_callback_gets_every_event(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    summary = run_with(recorder)
    assert [event[:2] for event in recorder.events] == [
        ("begin", 0),
        ("evaluate", 0),
        *[("step", 1), ("log", 1)],
        *[("step", 2), ("evaluate", 2), ("save", 2)],
        *[("step", 3), ("log", 3)],
        *[("step", 4), ("log", 4), ("evaluate", 4), ("save", 4)],
        ("end", None),
        ("run", 4),
    ]
    logged = {event[1]: event[2] for event in recorder.events if event[0] == "log"}
    steps = {event[1]: event[2] for event in recorder.events if event[0] == "step"}
    assert logged[1] == steps[1]
    assert logged[3] == pytest.approx((steps[2] + steps[3]) / 2)
    assert summary["train"]["loss"] == logged[4]


def test_a_callback_can_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(stop_after=2)
    summary = run_with(recorder)
    assert summary["steps"] == 2
    assert [event[:2] for event in recorder.events][-6:] == [
        *[("step", 2), ("evaluate", 2), ("log", 2), ("save", 2)],
        ("end", None),
        ("run", 2),
    ]
    assert Path("run", "checkpoints", "0000002").is_dir()


def test_a_run_that_ends_while_it_answers_is_not_running(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupt(policy, weights, prompts, config):
        if weights is not policy.start:
            raise Interrupted(signal.SIGTERM)
        return []

    monkeypatch.setattr(run_module, "answers", interrupt)
    with pytest.raises(Interrupted):
        run_with(Recorder())
    assert status_of(Path("run"))["state"] == "interrupted"
    assert 'http-equiv="refresh"' not in Path("run", "report.html").read_text()
