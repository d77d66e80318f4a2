"""Is an on-policy run still learning what was meant? Signals, thresholds, and what to do.

Pure functions of the metrics of rollout batches. A finding warns, halves the learning rate, or
stops the run, which then keeps its best evaluated checkpoint.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from mlx_align.thresholds import (
    CLIPPED_WARNS,
    DISTINCT_STOPS,
    DISTINCT_WARNS,
    ENDED_WARNS,
    ENTROPY_STOPS,
    EXPLAINED_FROM,
    KL_HALVES,
    KL_STOPS,
    KL_TOKENS,
    KL_WARNS,
    LENGTH_STOPS,
    LENGTH_WARNS,
    REPEATED_STOPS,
    REPEATED_WARNS,
)

Level = Literal["warn", "halve", "stop"]

# Batches too far in a row; share of groups whose rewards are all equal; first deviations between
# the reward trained on and the one held out, and evaluations for which the latter falls.
HALVES_AFTER = 3
ALIKE_WARNS = 0.8
PROXY_GAP, FALLING_FOR = 1.0, 3


@dataclass(frozen=True)
class Finding:
    """Something is not as it should be: how bad that is, and what to do, in words."""

    level: Level
    signal: str
    text: str


@dataclass
class Health:
    """What a run's signals are compared with; part of its checkpoints.

    Attributes:
        start: The signals of the first rollout batch.
        far_updates: Rollout batches in a row that moved the policy too far.
        rate_scale: What learning rates are multiplied by.
        said: Signals that were warned of already.
        evaluations: Of each evaluation, rewards trained on and held out, in units of the first
            one's spread.
    """

    start: dict[str, float] = field(default_factory=dict)
    far_updates: int = 0
    rate_scale: float = 1.0
    said: list[str] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Health:
        """From such a state."""
        return cls(**state)

    def look(self, row: Mapping[str, float], step: int) -> list[Finding]:
        """What is wrong after the rollout batch `step` (from 1 on); a warning is given once."""
        if not self.start:
            self.start = {name: row[name] for name in WATCHED if name in row}
        found = [*self._against_start(row), *_by_themselves(row, step)]
        self.far_updates = self.far_updates + 1 if row.get("policy/approx_kl", 0) > KL_HALVES else 0
        if self.far_updates >= HALVES_AFTER:
            self.far_updates = 0
            self.rate_scale /= 2
            found.append(
                Finding(
                    "halve",
                    "policy/approx_kl",
                    f"the policy moved more than {KL_HALVES} nats a token, {HALVES_AFTER} times "
                    "in a row: learning rates are halved",
                )
            )
        return self._new(found)

    def look_at_evaluation(self, proxy: float, held_out: float) -> list[Finding]:
        """Whether the reward that is trained on rises while the held-out one falls.

        Both in units of their spread at the first evaluation, from its mean.
        """
        self.evaluations.append([proxy, held_out])
        recent = [held for _, held in self.evaluations[-FALLING_FOR - 1 :]]
        falling = len(recent) > FALLING_FOR and all(
            after < before for before, after in pairwise(recent)
        )
        if falling and proxy - held_out > PROXY_GAP:
            return [
                Finding(
                    "stop",
                    "eval/held_out",
                    f"the reward that is trained on is {proxy:+.1f} deviations up, the held-out "
                    f"one {held_out:+.1f} and falling for {FALLING_FOR} evaluations: the reward is "
                    "being gamed; mend it, raise --kl-coef, or train for less",
                )
            ]
        return []

    def _against_start(self, row: Mapping[str, float]) -> list[Finding]:
        found = []
        start = self.start
        if start.get("objective/entropy", 0) > 0 and "objective/entropy" in row:
            share = row["objective/entropy"] / start["objective/entropy"]
            if share < ENTROPY_STOPS:
                found.append(
                    Finding(
                        "stop",
                        "objective/entropy",
                        f"entropy has fallen to {share:.0%} of its start: the policy says one "
                        "thing only; lower --learning-rate or raise --kl-coef",
                    )
                )
        if start.get("completions/mean_length", 0) > 0:
            times = row["completions/mean_length"] / start["completions/mean_length"]
            if times > LENGTH_WARNS:
                level: Level = "stop" if times > LENGTH_STOPS else "warn"
                found.append(
                    Finding(
                        level,
                        "completions/mean_length",
                        f"completions are {times:.1f} times as long as at the start: the reward "
                        "may like length; look at the samples, or add --reward overlong",
                    )
                )
        for name, warns, stops, what, sign in (
            ("text/repeated_4grams", REPEATED_WARNS, REPEATED_STOPS, "repeat themselves more", 1),
            ("text/distinct_2", DISTINCT_WARNS, DISTINCT_STOPS, "have fewer different words", -1),
        ):
            if name not in row or name not in start:
                continue
            moved = sign * (row[name] - start[name])
            if sign < 0:
                moved /= max(start[name], 1e-9)
            if moved > warns:
                level = "stop" if moved > stops else "warn"
                found.append(
                    Finding(
                        level,
                        name,
                        f"completions {what} than at the start ({start[name]:.0%} then, "
                        f"{row[name]:.0%} now); look at the samples, or add --reward repetition",
                    )
                )
        return found

    def _new(self, found: Sequence[Finding]) -> list[Finding]:
        new = [one for one in found if one.level != "warn" or one.signal not in self.said]
        self.said += [one.signal for one in new if one.level == "warn"]
        return new


WATCHED = (
    "objective/entropy",
    "completions/mean_length",
    "text/repeated_4grams",
    "text/distinct_2",
)


def _by_themselves(row: Mapping[str, float], step: int) -> list[Finding]:
    found = []
    if row.get("policy/clip_ratio", 0) > CLIPPED_WARNS:
        found.append(
            Finding(
                "warn",
                "policy/clip_ratio",
                f"{row['policy/clip_ratio']:.0%} of the tokens are clipped: lower --learning-rate "
                "or --update-epochs",
            )
        )
    kl = row.get("objective/kl", 0.0)
    # In proportion: a KL is a sum over tokens.
    scale = max(1.0, row.get("completions/mean_length", 0.0) / KL_TOKENS)
    if kl > KL_WARNS * scale:
        level: Level = "stop" if kl > KL_STOPS * scale else "warn"
        found.append(
            Finding(
                level,
                "objective/kl",
                f"completions are {kl:.1f} nats from the reference ({KL_WARNS * scale:.0f} warn, "
                f"{KL_STOPS * scale:.0f} stop): raise --kl-coef or lower --learning-rate",
            )
        )
    if row.get("frac_reward_zero_std", 0.0) > ALIKE_WARNS:
        found.append(
            Finding(
                "warn",
                "frac_reward_zero_std",
                f"{row['frac_reward_zero_std']:.0%} of the prompts have completions that all earn "
                "the same, which teaches nothing: take harder or easier prompts, a finer reward, "
                "or a larger --group-size",
            )
        )
    if row.get("completions/ended", 1.0) < ENDED_WARNS:
        found.append(
            Finding(
                "warn",
                "completions/ended",
                f"only {row['completions/ended']:.0%} of the completions end by themselves: raise "
                "--max-completion-length, or teach the model to end by mlx-align sft",
            )
        )
    if row.get("value/explained_variance", 1.0) < 0 and step > EXPLAINED_FROM:
        found.append(
            Finding(
                "warn",
                "value/explained_variance",
                "the critic explains nothing of the returns: raise --critic-learning-rate or "
                "--critic-warmup",
            )
        )
    return found


def text_metrics(completions: Sequence[Sequence[int]]) -> dict[str, float]:
    """How much completions repeat themselves, from their tokens.

    `text/repeated_4grams` is the share of a completion's runs of four tokens that it has had
    before, `text/distinct_2` the share of different ones among all pairs of tokens; means over
    completions that are long enough, nothing where none is.
    """
    repeated = [share for ids in completions if (share := _repeated(ids, 4)) is not None]
    distinct = [1 - share for ids in completions if (share := _repeated(ids, 2)) is not None]
    found = {}
    if repeated:
        found["text/repeated_4grams"] = math.fsum(repeated) / len(repeated)
    if distinct:
        found["text/distinct_2"] = math.fsum(distinct) / len(distinct)
    return found


def _repeated(ids: Sequence[int], n: int) -> float | None:
    runs = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    return 1 - len(runs) / runs.total() if runs else None
