"""The charts of the page, as a table: a metric is added by a line.

Names are those of metrics.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from mlx_align.report.runs import RunFacts


class Curve(NamedTuple):
    """One metric of a panel.

    Attributes:
        key: Its name in training rows; a `*` in it makes a curve of each metric that fits, named
            by what stands for the `*`.
        label: What a reader calls it; empty where the panel's title says it.
    """

    key: str
    label: str = ""

    @property
    def twin(self) -> str:
        """The metric on held-out data."""
        return f"eval/{self.key}"


@dataclass(frozen=True)
class Panel:
    """One chart; it is drawn where the run has one of its metrics.

    Attributes:
        title: Above it.
        curves: What it shows.
        unit: Of its values: share (drawn in per cent), bytes, nats, tokens …, or nothing.
        about: What it tells, in half a sentence.
        level: A value worth a line: where nothing is gained, or too much is.
        over: A metric whose square root is the horizontal axis, in place of the update.
        marks_fall: Whether the first curve below where it began is marked.
        bounds: Ends of the vertical axis; those of the data as a rule.
        not_at_first: Whether a held-out value before any update says nothing, as of implicit
            rewards, which are all 0 then.
        exact: Whether its values have no noise that a running mean would take out.
    """

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""
    about: str = ""
    level: float | None = None
    over: str | None = None
    marks_fall: bool = False
    bounds: tuple[float, float] | None = None
    not_at_first: bool = False
    exact: bool = False


def _one(key: str) -> tuple[Curve, ...]:
    return (Curve(key),)


_SHARE = (0.0, 1.0)
_SIDES = (("chosen", "chosen"), ("rejected", "rejected"))
_REWARD_SIDES = tuple(Curve(f"rewards/{key}", label) for key, label in _SIDES)
_LOGP_SIDES = tuple(Curve(f"logps/{key}", label) for key, label in _SIDES)
_LENGTHS = tuple(
    Curve(f"completions/{key}_length", label)
    for key, label in (("mean", "mean"), ("max", "longest"), ("min", "shortest"))
)

PANELS = (
    Panel("Reward", _one("reward"), "", "what is being optimised"),
    Panel("Reward of another judge", _one("held_out"), "", "which is not trained on"),
    Panel("Rewards, each apart", _one("rewards/*/mean"), "", "means over completions"),
    Panel("Spread of rewards", _one("reward_std"), "", "standard deviation"),
    Panel("Reward against √KL", _one("reward"), "", "gain for the distance", over="objective/kl"),
    Panel("KL from the reference", _one("objective/kl"), "nats", "of a completion", 15),
    Panel("Loss", _one("loss"), "", "lower is better"),
    Panel("Perplexity", _one("perplexity"), "", "lower is better"),
    Panel(
        "Accuracy",
        _one("rewards/accuracies"),
        "share",
        "how often the chosen answer has the higher reward",
        0.5,
        bounds=_SHARE,
        not_at_first=True,
    ),
    Panel("A good answer's reward beats a bad one's", _one("rewards/auc"), "share", "", 0.5),
    Panel("Margin", _one("rewards/margins"), "", "reward of chosen − rejected", 0),
    Panel("Rewards", _REWARD_SIDES, "", "what the margin is made of", 0),
    Panel("Log-probs", _LOGP_SIDES, "nats", "of a whole completion", marks_fall=True),
    Panel(
        "Prefers the chosen",
        _one("logps/accuracies"),
        "share",
        "by its own log-prob, without a reference",
        0.5,
        bounds=_SHARE,
    ),
    Panel("KL point", _one("kl"), "nats", "of mismatched answers"),
    Panel("KL of an update", _one("policy/approx_kl"), "nats", "old to new policy, a token", 0.03),
    Panel("Ratio", _one("policy/ratio"), "", "new over old probability of a token", 1),
    Panel("Clipped", _one("policy/clip_ratio"), "share", "tokens beyond the clip range", 0.3),
    Panel("Entropy", _one("objective/entropy"), "nats", "of a token"),
    Panel("Completion length", _LENGTHS, "tokens"),
    Panel("Ended by themselves", _one("completions/ended"), "share", "end token sampled", 0.8),
    Panel("Repeats itself", _one("text/repeated_4grams"), "share", "of runs of four tokens"),
    Panel("Variety", _one("text/distinct_2"), "share", "different pairs of tokens"),
    Panel("Sampler gap", _one("sampler/gap"), "nats", "log-prob when sampled and when learned"),
    Panel("Explained variance", _one("value/explained_variance"), "", "of returns, by critic", 0),
    Panel("Value loss", _one("value/loss"), "", "of the critic"),
    Panel("Groups without contrast", _one("frac_reward_zero_std"), "share", "nothing to learn"),
    Panel("KL coefficient", _one("kl_coef"), exact=True),
    Panel("Learning rate", _one("learning_rate"), exact=True),
    Panel("Gradient norm", _one("grad_norm"), "", "before it is scaled down"),
    Panel("Speed", _one("tokens_per_second"), "tokens/s"),
    Panel("Peak memory", _one("peak_memory_bytes"), "bytes", exact=True),
)


def curves_of(panel: Panel, run: RunFacts) -> tuple[Curve, ...]:
    """The curves of a panel for which the run has numbers, patterns filled in."""
    keys = {key for row in run.training for key in row}
    twins = {key for row in run.held_out for key in row}
    if panel.over is not None and panel.over not in keys:
        return ()
    found: list[Curve] = []
    for curve in panel.curves:
        if "*" in curve.key:
            head, tail = curve.key.split("*")
            matching = sorted(key for key in keys if fnmatchcase(key, curve.key))
            found += [Curve(key, key[len(head) : len(key) - len(tail)]) for key in matching]
        elif curve.key in keys or curve.twin in twins:
            found.append(curve)
    return tuple(found)
