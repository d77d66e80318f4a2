"""The pages: one run, or several side by side. A function of run folders; it writes nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mlx_align.report.charts import EXTRA, can_draw
from mlx_align.report.describe import (
    data_rows,
    judged_rows,
    number_rows,
    option_text,
    rollout_rows,
    sample_rows,
)
from mlx_align.report.figures import compared_figures, judged_figures, run_figures
from mlx_align.report.health import warnings_of
from mlx_align.report.numbers import say, say_date, say_duration
from mlx_align.report.runs import RunFacts

PAGE_FILE = "report.html"
# Of an open page, while the run goes on.
RELOAD_SECONDS = 30
SHOWN_SAMPLES = 12
# Of the last rollout batch.
SHOWN_PROMPTS, SHOWN_ROLLOUTS = 6, 4

# Control characters have no place in HTML, and half a surrogate pair none in a file: whoever put
# them into the data, they are shown as what they are.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


@dataclass(frozen=True)
class Headline:
    """A number worth standing large, in the order of what people ask first.

    Attributes:
        key: The metric.
        label: What it says.
        unit: As in `panels.Panel`.
        since: Whether the value before training is worth standing beside it.
    """

    key: str
    label: str
    unit: str = ""
    since: bool = True


HEADLINES = (
    Headline(
        "eval/logps/accuracies", "held-out: gives the chosen answer more probability", "share"
    ),
    # Implicit rewards are 0 before training.
    Headline(
        "eval/rewards/accuracies", "held-out: the chosen has the higher reward", "share", False
    ),
    Headline("eval/rewards/margins", "held-out: margin of rewards", "", False),
    Headline("eval/perplexity", "held-out: perplexity"),
    Headline("eval/held_out", "held-out: reward of another judge"),
    Headline("eval/reward", "held-out: reward"),
    Headline("reward", "reward"),
    Headline("objective/kl", "KL from the reference, a completion", "nats", False),
    Headline("completions/mean_length", "length of a completion", "tokens"),
    Headline("eval/loss", "held-out: loss"),
    Headline("loss", "training loss"),
)


@dataclass(frozen=True)
class Card:
    """A headline number: what, how much, and since when."""

    label: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class State:
    """Where a run is: a word, a sentence, how much of it is done, and how to go on with it.

    `share` is None once the run is over, `command` empty where there is nothing to go on with.
    """

    kind: str
    badge: str
    text: str
    share: float | None = None
    command: str = ""


def render_run(run: RunFacts, *, charts: bool = True) -> str:
    """The page of one run, whole and self-contained; with `charts`, where they can be drawn."""
    drawing = charts and can_draw()
    judged = run.summary.get("held_out") or {}
    samples = [sample_rows(sample) for sample in run.samples]
    state = state_of(run)
    facts = run.summary.get("data_facts") or run.status.get("data_facts") or {}
    return _render(
        "run.html",
        title=f"{run.name} – {state.badge} – mlx-align {run.command}",
        reload=RELOAD_SECONDS if state.kind == "running" else None,
        run=run,
        date=say_date(run.status.get("began")),
        model=_short_name(run.config.get("model")),
        data=_short_name(run.config.get("data")),
        state=state,
        lead=_lead(run, judged),
        cards=_cards(run),
        warnings=warnings_of(run),
        figures=run_figures(run) if drawing else [],
        can_draw=drawing,
        extra=EXTRA,
        judged=judged_rows(judged),
        judged_figures=judged_figures(judged) if drawing else [],
        samples=samples[:SHOWN_SAMPLES],
        more_samples=max(0, len(samples) - SHOWN_SAMPLES),
        rollouts=rollout_rows(run.rollouts, SHOWN_PROMPTS, SHOWN_ROLLOUTS),
        rollout_step=run.rollouts[0].get("step") if run.rollouts else None,
        scored=any("completions" in sample for sample in run.samples),
        numbers=number_rows(run),
        facts=data_rows(facts),
        example=facts.get("example") or (),
        options=[(name, option_text(value)) for name, value in run.config.items()],
        versions=list((run.summary.get("versions") or run.status.get("versions") or {}).items()),
        talk=run.summary.get("talk"),
    )


def render_comparison(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    """The page of several runs; `names` tell them apart."""
    drawing = can_draw()
    labelled = [
        {"name": name, "command": f"{run.command}, {state_of(run).badge}"}
        for name, run in zip(names, runs, strict=True)
    ]
    found = [warnings_of(run) for run in runs]
    return _render(
        "comparison.html",
        title=f"{', '.join(names)} – mlx-align",
        reload=None,
        runs=labelled,
        outcomes=_outcomes(runs, found),
        differences=_differences(runs),
        figures=compared_figures(runs, names) if drawing else [],
        can_draw=drawing,
        extra=EXTRA,
        warned=[pair for pair in zip(labelled, found, strict=True) if pair[1]],
    )


def _render(template: str, **content: Any) -> str:
    folder = Path(__file__).with_name("templates")
    # Everything from data and models is escaped: drawings alone are Markup.
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flags"] = _flags
    return environment.get_template(template).render(**content).translate(_VISIBLE)


def _flags(text: str) -> Markup:
    """Text, in which options are set as such and not broken at their hyphens."""
    return Markup(re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", str(escape(text))))


def _short_name(name: object) -> str:
    """A hub name as it is; of a path its last two parts."""
    parts = str(name or "–").rstrip("/").split("/")
    return "/".join(parts[-2:])


def state_of(run: RunFacts) -> State:
    """Where the run is, by the files it left."""
    seconds, step = run.status.get("seconds"), run.step
    total = run.status.get("total") or run.config.get("iters")
    of = f"{step:,} of {total:,}" if total else f"{step:,}"
    share = min(1.0, step / total) if total else None
    if run.finished:
        took = run.summary.get("seconds_in_all")
        in_all = "" if took is None else f" in {say_duration(took)}"
        return State("finished", "finished", f"{run.summary.get('steps', step):,} updates{in_all}")
    state, when = run.status.get("state"), say_date(run.status.get("written"))
    if state == "running":
        left = ""
        if total and step and seconds:
            left = f", about {say_duration((total - step) * seconds / step)} left"
        when = f"; as of {when}" if when else ""
        return State("running", "running", f"update {of}{left}{when}", share)
    if state == "interrupted":
        again = f"mlx-align {run.command} --resume {shlex.quote(str(run.config.get('output')))}"
        return State("stopped", "interrupted", f"after update {of}; go on with", share, again)
    if state == "failed":
        reason = run.status.get("error") or "an error"
        return State("stopped", "failed", f"after update {of}: {reason}", share)
    return State("stopped", "not finished", f"after update {of}", share)


def _lead(run: RunFacts, judged: Mapping[str, Any]) -> str:
    """What came of it, in a sentence."""
    accuracy = judged.get("accuracy")
    if accuracy is not None:
        low, high = judged["accuracy_low"], judged["accuracy_high"]
        return (
            f"It tells the better of two held-out answers in {accuracy:.1%} of "
            f"{judged['comparisons']:,} comparisons (95%: {low:.1%} to {high:.1%}); picking the "
            f"longer one would be right in {judged['longer_accuracy']:.1%}."
        )
    prefers, perplexity = run.values("eval/logps/accuracies"), run.values("eval/perplexity")
    if len(prefers) > 1:
        return (
            f"Of two held-out answers, the model now gives the chosen one more probability in "
            f"{prefers[-1]:.1%} of the pairs; before training it was {prefers[0]:.1%}."
        )
    if len(perplexity) > 1:
        return (
            f"Perplexity on held-out answers went from {say(perplexity[0])} to "
            f"{say(perplexity[-1])}."
        )
    reward = run.values("reward")
    if len(reward) > 1:
        kl = run.lately("objective/kl")
        far = "" if kl is None else f", {say(kl)} nats a completion away from the reference"
        now = run.lately("reward")
        return f"The mean reward went from {say(reward[0])} to {say(now or reward[-1])}{far}."
    return ""


def _cards(run: RunFacts) -> list[Card]:
    cards = []
    for headline in HEADLINES:
        values = run.values(headline.key)
        # What is said of held-out data need not be said of training data again.
        if not values or (headline.key == "loss" and run.held_out):
            continue
        since = headline.since or run.command == "reward"
        beside = f"at first {say(values[0], headline.unit)}" if since and len(values) > 1 else ""
        cards.append(Card(headline.label, say(values[-1], headline.unit), beside))
    kl = run.summary.get("kl")
    if kl and kl.get("mean") is not None:
        error = kl.get("standard_error")
        spread = "" if error is None else f"± {say(error)}, {kl.get('samples')} samples"
        cards.append(Card("KL from the reference, an answer", say(kl["mean"], "nats"), spread))
    seconds, speed = run.status.get("seconds"), run.last("tokens_per_second")
    seconds = run.summary.get("seconds", seconds)
    if seconds:
        beside = say(run.summary.get("tokens_per_second", speed), "tokens/s") if speed else ""
        cards.append(Card("time in updates", say_duration(seconds), beside))
    if (memory := run.last("peak_memory_bytes")) is not None:
        cards.append(Card("peak memory", say(memory, "bytes")))
    return cards


def _outcomes(runs: Sequence[RunFacts], found: Sequence[Sequence[Any]]) -> list[list[str]]:
    rows = [["state", *(state_of(run).badge for run in runs)]]
    rows.append(["updates", *(f"{run.step:,}" for run in runs)])
    for headline in HEADLINES:
        values = [run.last(headline.key) for run in runs]
        if any(value is not None for value in values):
            rows.append([headline.label, *(say(value, headline.unit) for value in values)])
    for label, key, unit in (
        ("KL from the reference, an answer", "kl", "nats"),
        ("accuracy on all held-out comparisons", "held_out", "share"),
    ):
        inner = "mean" if key == "kl" else "accuracy"
        values = [(run.summary.get(key) or {}).get(inner) for run in runs]
        if any(value is not None for value in values):
            rows.append([label, *(say(value, unit) for value in values)])
    for label, key, unit in (
        ("speed", "tokens_per_second", "tokens/s"),
        ("peak memory", "peak_memory_bytes", "bytes"),
    ):
        rows.append([label, *(say(run.last(key), unit) for run in runs)])
    rows.append(["warnings", *(str(len(warnings)) for warnings in found)])
    return rows


def _differences(runs: Sequence[RunFacts]) -> list[list[str]]:
    """Options that are not the same in all runs; where a run is written always differs."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    rows = [[name, *(option_text(run.config.get(name)) for run in runs)] for name in names]
    rows.insert(0, ["command", *(run.command for run in runs)])
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] != "output"]
