"""Health checks: problems that the metrics of a run show, and advice.

`CHECKS` is the one list of checks. The terminal and the guard use it during a run, through
`HealthMonitor`; the run page uses it through `diagnose`. A check is a pure function of a `History`
of metrics. Every threshold is a named constant with its reason.

Thresholds of ratios and KLs follow Schulman et al. 2017 ("Proximal Policy Optimization
Algorithms"), Huang et al. 2024 ("The N+ Implementation Details of RLHF with PPO") and OpenRLHF's
defaults. Those of text statistics are the values at which samples were seen to degrade.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from mlx_align.system.formatting import counted, format_value
from mlx_align.system.intervals import Estimate, kl_interval, metric_interval, prompts_of
from mlx_align.tracking.run_dir import RunRecord, held_out_examples

Level = Literal["warn", "halve", "stop"]

_RANK: Mapping[str, int] = {"warn": 0, "halve": 1, "stop": 2}

# Pairs. A chosen log-prob that falls by a tenth is common and harmless while margins grow; beyond
# that, probability moves to completions that are in neither column of the data.
CHOSEN_FALL = 0.1
# Nats per token. e^-1 per token makes a completion of 20 tokens 5e8 times less likely.
STOP_CHOSEN_FALL_PER_TOKEN = 1.0
# Held-out reward margin, in the units of beta times the log-ratio: sigmoid(5) is 99.3%.
WIDE_MARGIN = 5.0
# Held-out accuracy that gains less than this in the second half of the evaluations is flat.
FLAT_ACCURACY = 0.01
# Training minus held-out accuracy. 40 held-out pairs have a standard error of 0.06.
OVERFITTING_GAP = 0.15
# Evaluations after which an accuracy near 50%, on training and held-out pairs, is called stuck.
STUCK_EVALUATIONS = 4
STUCK_ACCURACY = 0.55
# A held-out loss that rose in this many evaluations in a row, to this many times its lowest value.
RISING_EVALUATIONS = 3
RISING_LOSS = 1.02

# KL from the policy that sampled, in nats per token. Passes over a rollout batch end above the
# first; the learning rate is halved above the second.
STOP_EPOCHS_ABOVE_KL = 0.03
HALVE_LR_ABOVE_KL = 0.1
# Rollout batches in a row above one of them.
LARGE_UPDATES_IN_A_ROW = 3
# Fraction of tokens whose ratio is clipped. They give no gradient.
MAX_CLIP_RATIO = 0.3
# Fraction of completions that end with an end token.
MIN_FINISHED_SHARE = 0.8
# Fraction of groups whose completions all have the same reward.
MAX_ZERO_STD_SHARE = 0.8
# Rollout batches after which a critic must explain some of the returns' variance.
CRITIC_WARMUP_STEPS = 30
# Fraction of the entropy at the start.
STOP_ENTROPY_SHARE = 0.3
# KL from the reference, in nats per completion of up to this many tokens. A KL is a sum over
# tokens, so the thresholds grow in proportion for longer completions.
WARN_KL, STOP_KL = 15.0, 30.0
KL_TOKENS = 128
# Mean length as a multiple of the length at the start.
WARN_LENGTH, STOP_LENGTH = 1.5, 2.5
# Increase of the fraction of repeated 4-grams, and relative decrease of that of distinct bigrams.
WARN_REPEATED, STOP_REPEATED = 0.05, 0.15
WARN_DISTINCT, STOP_DISTINCT = 0.2, 0.4
# Over-optimisation: the held-out reward falls in this many evaluations in a row, and is this many
# standard deviations (of the first evaluation) behind the reward that is trained on.
FALLING_EVALUATIONS = 3
STOP_REWARD_GAP = 1.0

# Rows after which a run that has learned nothing is called that before its end: the rewards of a
# few batches may be equal by chance.
MIN_ROWS_WITHOUT_CHANGE = 5
# Relative rounding of a loss: that of an unchanged policy is ln 2 to within 2e-7 (float32).
ROUNDING = 1e-6

# Smallest changes of held-out means that can change an answer. In SmolLM2-135M, 4 updates at 1e-5,
# after which all answers were as before, moved chosen against rejected completions by 0.04 nats; 16
# updates of the defaults moved them by 2 nats (docs/verified/defaults.md). There is no smallest
# number of updates: a few at a high learning rate do move a model.
MIN_LOGP_CHANGE = 0.1  # nats per completion
MIN_TOKEN_CHANGE = 0.001  # nats per token: 0.1 nats in 100 tokens
MIN_SCORE_CHANGE = 0.01  # of a reward margin: 0.25% of a probability
# Smallest relative change of a perplexity that counts where it has no interval.
PERPLEXITY_CHANGE = 0.01
# Of five tosses of a coin, all are the same in 6.3% of cases; of six, in 3.1%.
MIN_EXAMPLES = 6
# A rate of "the longer completion is chosen" (or the shorter one) that could explain an accuracy.
LENGTH_RULE = 0.55

# A finding is shown again once its severity is this many times what it was when last shown.
WORSE_BY = 2.0

# Values kept from each end of a metric. Training rows are of different examples, so the start and
# the end of a noisy metric are means over this many rows.
_KEPT = 5
# Rows whose mean is the recent value of a noisy training metric.
_RECENT = 3

_PAIRS = frozenset({"dpo", "kto"})
_PREFERENCES = frozenset({"dpo", "kto", "reward"})
_OFFLINE = frozenset({"dpo", "kto", "sft", "reward"})
_ON_POLICY = frozenset({"ppo", "grpo"})


@dataclass(frozen=True)
class Finding:
    """The result of a failed check.

    Attributes:
        level: "warn", "halve" (the learning rate is halved) or "stop" (continuing makes it worse).
        signal: The metric that shows the problem.
        problem: One sentence on what is wrong.
        advice: One sentence on what to do.
        severity: How far the metric is beyond its threshold, 1 at the threshold.
        untrained: Whether it means that the run learned nothing.
    """

    level: Level
    signal: str
    problem: str
    advice: str
    severity: float = 1.0
    untrained: bool = False

    @property
    def text(self) -> str:
        """Problem and advice."""
        return f"{self.problem} {self.advice}"

    def to_json(self, step: int) -> dict[str, Any]:
        """The finding for status.json and checkpoints; `step` is when it was found."""
        return {
            "step": step,
            "level": self.level,
            "signal": self.signal,
            "problem": self.problem,
            "advice": self.advice,
        }


@dataclass
class History:
    """The metrics that the checks need: first and last values of each, and all evaluations.

    Attributes:
        command: The training command; "run" if unknown, then every check applies.
        completion_tokens: Mean tokens of a completion in the training data, if known.
        step: The last step seen.
        head: The first values of each training metric.
        tail: The last values of each training metric.
        counts: Number of values of each training metric.
        lowest: The lowest value of each training metric.
        highest: The highest value of each training metric.
        held_out: All values of each held-out metric, without the prefix `eval/`.
        trained_rewards: At each evaluation, the recent mean of the training reward.
        answers: Metrics of answers to held-out prompts before (`before/…`) and after an offline run
            (`after/…`), from `answer_metrics`, and the KL of its samples, `kl`.
        deviations: For each evaluation, the reward trained on and the held-out reward, as changes
            since the first evaluation in units of its standard deviation.
        over: Whether the run is finished.
    """

    command: str = "run"
    completion_tokens: float | None = None
    step: int = 0
    head: dict[str, list[float]] = field(default_factory=dict)
    tail: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, list[float]] = field(default_factory=dict)
    trained_rewards: list[float] = field(default_factory=list)
    answers: dict[str, float] = field(default_factory=dict)
    deviations: list[list[float]] = field(default_factory=list)
    over: bool = False

    def add(self, row: Mapping[str, float], step: int) -> None:
        """Add a row of training metrics."""
        self.step = step
        for key in TRAINING_METRICS:
            value = row.get(key)
            if value is None or not math.isfinite(value):
                continue
            self.counts[key] = self.counts.get(key, 0) + 1
            self.lowest[key] = min(value, self.lowest.get(key, math.inf))
            self.highest[key] = max(value, self.highest.get(key, -math.inf))
            head, tail = self.head.setdefault(key, []), self.tail.setdefault(key, [])
            if len(head) < _KEPT:
                head.append(float(value))
            tail.append(float(value))
            del tail[:-_KEPT]

    def add_evaluation(
        self,
        metrics: Mapping[str, float],
        step: int,
        deviations: tuple[float, float] | None = None,
    ) -> None:
        """Add held-out metrics, without the prefix `eval/`."""
        self.step = max(self.step, step)
        for key in HELD_OUT_METRICS:
            value = metrics.get(key)
            if value is not None and math.isfinite(value):
                self.held_out.setdefault(key, []).append(float(value))
        if rewards := self.tail.get("reward", [])[-_RECENT:]:
            self.trained_rewards.append(sum(rewards) / len(rewards))
        if deviations is not None:
            self.deviations.append([float(one) for one in deviations])

    def always(self, key: str, value: float, tolerance: float = 0.0) -> bool:
        """Whether a training metric had this value in every row, of which there are enough."""
        rows = self.counts.get(key, 0)
        if rows < MIN_ROWS_WITHOUT_CHANGE and not (self.over and rows):
            return False
        lowest, highest = self.lowest.get(key, math.inf), self.highest.get(key, math.inf)
        return max(abs(lowest - value), abs(highest - value)) <= tolerance

    def first(self, key: str) -> float | None:
        """The first value of a training metric."""
        return self.head[key][0] if key in self.head else None

    def last(self, key: str) -> float | None:
        """The last value of a training metric."""
        return self.tail[key][-1] if self.tail.get(key) else None

    def recent_mean(self, key: str, rows: int = _RECENT) -> float | None:
        """The mean of the last `rows` values of a training metric, or None if there are fewer."""
        values = self.tail.get(key, [])[-rows:]
        return sum(values) / rows if len(values) == rows else None

    def change(self, key: str) -> tuple[float, float] | None:
        """A metric at the start and now.

        On held-out data if there are two evaluations; else means of five rows of training data.
        """
        held_out = self.held_out.get(key, [])
        if len(held_out) >= 2:
            return held_out[0], held_out[-1]
        return self.training_change(key)

    def training_change(self, key: str) -> tuple[float, float] | None:
        """A training metric at the start and now, or None if there are fewer than ten rows."""
        if self.counts.get(key, 0) < 2 * _KEPT:
            return None
        return sum(self.head[key]) / _KEPT, sum(self.tail[key]) / _KEPT


# Checks of whether anything was learned


def _no_reward(history: History) -> Finding | None:
    # A batch without rewards has no mean, but a deviation of 0.
    batches = history.counts.get("reward_std", 0)
    enough = batches >= MIN_ROWS_WITHOUT_CHANGE or (history.over and batches > 0)
    if not enough or history.counts.get("reward", 0):
        return None
    return Finding(
        "warn",
        "reward",
        "Nothing was learned: no completion got a reward.",
        "Check the reward functions, which returned None every time, or the reward model.",
        untrained=True,
    )


def _equal_rewards(history: History) -> Finding | None:
    if not history.counts.get("reward", 0):
        return None
    if history.always("frac_reward_zero_std", 1.0):
        key, what = "frac_reward_zero_std", "the completions of every prompt had equal rewards"
    elif "frac_reward_zero_std" not in history.counts and history.always("reward_std", 0.0):
        key, what = "reward_std", "all completions of every rollout batch had equal rewards"
    else:
        return None
    return Finding(
        "warn",
        key,
        f"Nothing was learned from the rewards: {what}.",
        "Use harder or easier prompts, a finer reward, or a larger --group-size.",
        # Shown again after the warning about most of the prompts.
        WORSE_BY / MAX_ZERO_STD_SHARE,
        untrained=True,
    )


def _zero_gradient(history: History) -> Finding | None:
    if _no_reward(history) or _equal_rewards(history) or not history.always("grad_norm", 0.0):
        return None
    return Finding(
        "warn",
        "grad_norm",
        "Nothing was learned: the gradient was zero in every update.",
        "Check the data, the loss and its options.",
        untrained=True,
    )


def _constant_loss(history: History) -> Finding | None:
    rows, value = history.counts.get("loss", 0), history.lowest.get("loss")
    if rows < 2 or value is None or _zero_gradient(history):
        return None
    if not history.always("loss", value, ROUNDING * abs(value)):
        return None
    return Finding(
        "warn",
        "loss",
        f"Nothing was learned: the loss was {value:.6g} in every row.",
        "Raise --learning-rate, and check the data.",
        untrained=True,
    )


# Checks of offline runs


def chosen_fall(history: History) -> float | None:
    """The relative fall of the chosen completions' log-prob, if it is too large; else None."""
    change = history.change("logps/chosen")
    if change is None or change[0] == 0:
        return None
    fall = (change[0] - change[1]) / abs(change[0])
    return fall if fall > CHOSEN_FALL else None


def _chosen_falls(history: History) -> Finding | None:
    share = chosen_fall(history)
    chosen, rejected = history.change("logps/chosen"), history.change("logps/rejected")
    if share is None or chosen is None or rejected is None:
        return None
    fell = chosen[0] - chosen[1]
    both = "that of rejected ones fell too, so" if rejected[1] < rejected[0] else "so"
    tokens = history.completion_tokens
    stop = tokens is not None and fell / tokens > STOP_CHOSEN_FALL_PER_TOKEN
    advice = (
        "Lower --learning-rate or raise --beta."
        if history.command == "kto"
        else "Lower --learning-rate, add the SFT loss (--loss sigmoid=1,sft=0.2), or drop pairs "
        "whose two completions are nearly the same."
    )
    return Finding(
        "stop" if stop else "warn",
        "logps/chosen",
        f"The log-prob of chosen completions fell from {format_value(chosen[0])} to "
        f"{format_value(chosen[1])} nats ({share:.0%}); {both} probability moves to completions "
        "that are not in the data.",
        advice,
        share / CHOSEN_FALL,
    )


def _margin_too_wide(history: History) -> Finding | None:
    margins = history.held_out.get("rewards/margins", [])
    # The first evaluation is before training, where all implicit rewards are 0.
    accuracies = history.held_out.get("rewards/accuracies", [])[1:]
    if len(accuracies) < 3 or not margins or margins[-1] <= WIDE_MARGIN:
        return None
    half = len(accuracies) // 2
    if accuracies[-1] - accuracies[half - 1] > FLAT_ACCURACY:
        return None
    return Finding(
        "warn",
        "eval/rewards/margins",
        f"The held-out margin has reached {format_value(margins[-1])} while held-out accuracy "
        f"stays at {accuracies[-1]:.1%}: more training only widens margins.",
        "Train for fewer steps, lower --learning-rate, or raise --beta.",
        margins[-1] / WIDE_MARGIN,
    )


def _accuracy_gap(history: History) -> Finding | None:
    training = history.recent_mean("rewards/accuracies")
    held_out = history.held_out.get("rewards/accuracies", [])
    if training is None or len(held_out) < 2 or training - held_out[-1] <= OVERFITTING_GAP:
        return None
    return Finding(
        "warn",
        "rewards/accuracies",
        f"Accuracy is {training:.0%} on training pairs and {held_out[-1]:.0%} on held-out ones: "
        "the model overfits.",
        "Use fewer --epochs, a lower --learning-rate or --lora-rank, or more data.",
        (training - held_out[-1]) / OVERFITTING_GAP,
    )


def _held_out_loss_rises(history: History) -> Finding | None:
    losses, training = history.held_out.get("loss", []), history.training_change("loss")
    recent = losses[-RISING_EVALUATIONS - 1 :]
    rising = len(recent) > RISING_EVALUATIONS and all(b > a for a, b in pairwise(recent))
    if not rising or training is None or training[1] >= training[0]:
        return None
    lowest = min(losses)
    if losses[-1] <= lowest + (RISING_LOSS - 1) * abs(lowest):
        return None
    return Finding(
        "warn",
        "eval/loss",
        f"The held-out loss rose in {RISING_EVALUATIONS} evaluations in a row, from "
        f"{format_value(lowest)} to {format_value(losses[-1])}, while the training loss fell: the "
        "model overfits.",
        "Use the checkpoint with the lowest held-out loss, fewer --epochs, or a lower "
        "--learning-rate.",
        (losses[-1] - lowest) / max((RISING_LOSS - 1) * abs(lowest), 1e-9),
    )


def _accuracy_stuck(history: History) -> Finding | None:
    held_out = history.held_out.get("rewards/accuracies", [])[1:]
    training = history.recent_mean("rewards/accuracies")
    if training is None or len(held_out) < STUCK_EVALUATIONS:
        return None
    if max(training, *held_out[-STUCK_EVALUATIONS:]) > STUCK_ACCURACY:
        return None
    return Finding(
        "warn",
        "eval/rewards/accuracies",
        f"After {history.step} steps accuracy is still {training:.0%} on training pairs and "
        f"{held_out[-1]:.0%} on held-out ones: the model does not learn the preference.",
        "Raise --learning-rate or train longer, and check that chosen and rejected are not mixed "
        "up in the data.",
    )


def _far_from_start(history: History) -> Finding | None:
    kl, tokens = history.answers.get("kl"), history.answers.get("after/mean_length", 0.0)
    if kl is None:
        return None
    scale = max(1.0, tokens / KL_TOKENS)
    # An overflow is as far as it gets.
    kl = math.inf if math.isnan(kl) else kl
    if kl <= WARN_KL * scale:
        return None
    return Finding(
        "stop" if kl > STOP_KL * scale else "warn",
        "kl",
        f"The policy's own samples are {kl:.0f} nats from the start (above {WARN_KL * scale:.0f}).",
        "Lower --learning-rate, raise --beta, or train for fewer updates, and read the answers.",
        kl / (WARN_KL * scale),
    )


def _answers_repeat(history: History) -> Finding | None:
    key = "text/repeated_4grams"
    start, now = history.answers.get(f"before/{key}", 0.0), history.answers.get(f"after/{key}")
    if now is None or now - start <= WARN_REPEATED:
        return None
    return Finding(
        "stop" if now - start > STOP_REPEATED else "warn",
        "answers",
        f"The answers after training repeat {now:.0%} of their 4-grams, before it {start:.0%}.",
        "Lower --learning-rate, raise --beta, or train for fewer updates, and read the answers.",
        (now - start) / WARN_REPEATED,
    )


# Checks of on-policy runs. One row is the mean over a whole rollout batch, so the last one counts.


def _large_updates(history: History) -> Finding | None:
    recent = history.tail.get("policy/approx_kl", [])[-LARGE_UPDATES_IN_A_ROW:]
    if len(recent) < LARGE_UPDATES_IN_A_ROW or min(recent) <= STOP_EPOCHS_ABOVE_KL:
        return None
    halve = min(recent) > HALVE_LR_ABOVE_KL
    limit = HALVE_LR_ABOVE_KL if halve else STOP_EPOCHS_ABOVE_KL
    mean = sum(recent) / len(recent)
    return Finding(
        "halve" if halve else "warn",
        "policy/approx_kl",
        f"An update moves the policy by {format_value(mean)} nats per token (above {limit}, "
        f"{LARGE_UPDATES_IN_A_ROW} times in a row), so its samples are out of date before they are "
        "used up.",
        "The learning rate is halved for the rest of the run; next time, lower --learning-rate."
        if halve
        else "Lower --update-epochs or --learning-rate.",
        mean / STOP_EPOCHS_ABOVE_KL,
    )


def _clipped(history: History) -> Finding | None:
    share = history.last("policy/clip_ratio")
    if share is None or share <= MAX_CLIP_RATIO:
        return None
    return Finding(
        "warn",
        "policy/clip_ratio",
        f"{share:.0%} of the tokens are clipped and give no gradient.",
        "Lower --learning-rate or --update-epochs.",
        share / MAX_CLIP_RATIO,
    )


def _far_from_reference(history: History) -> Finding | None:
    kl = history.last("objective/kl")
    scale = max(1.0, (history.last("completions/mean_length") or 0.0) / KL_TOKENS)
    if kl is None or kl <= WARN_KL * scale:
        return None
    return Finding(
        "stop" if kl > STOP_KL * scale else "warn",
        "objective/kl",
        f"Completions are {kl:.0f} nats from the reference (above {WARN_KL * scale:.0f}; "
        f"{STOP_KL * scale:.0f} stops the run): the reward is computed on text unlike any it was "
        "made for.",
        "Raise --kl-coef or lower --learning-rate, and read the samples.",
        kl / (WARN_KL * scale),
    )


def _no_contrast(history: History) -> Finding | None:
    share = history.last("frac_reward_zero_std")
    if share is None or share <= MAX_ZERO_STD_SHARE:
        return None
    if _no_reward(history) or _equal_rewards(history):
        return None
    return Finding(
        "warn",
        "frac_reward_zero_std",
        f"{share:.0%} of the prompts have completions with equal rewards, which give no gradient.",
        "Use harder or easier prompts, a finer reward, or a larger --group-size.",
        share / MAX_ZERO_STD_SHARE,
    )


def _unfinished(history: History) -> Finding | None:
    share = history.last("completions/ended")
    if share is None or share >= MIN_FINISHED_SHARE:
        return None
    return Finding(
        "warn",
        "completions/ended",
        f"Only {share:.0%} of the completions are finished; the others are truncated.",
        "Raise --max-completion-length, penalise unfinished completions, or teach the model to end "
        "with mlx-align sft.",
        (1 - share) / (1 - MIN_FINISHED_SHARE),
    )


def _critic_explains_nothing(history: History) -> Finding | None:
    explained = history.last("value/explained_variance")
    if explained is None or explained >= 0 or history.step <= CRITIC_WARMUP_STEPS:
        return None
    return Finding(
        "warn",
        "value/explained_variance",
        f"The critic explains less of the returns than their mean would (explained variance "
        f"{format_value(explained)} after {history.step} batches): advantages are noise.",
        "Raise --critic-learning-rate or --critic-warmup, or start the critic from a reward model.",
        1 - explained,
    )


def _entropy_collapse(history: History) -> Finding | None:
    start, now = history.first("objective/entropy"), history.last("objective/entropy")
    if start is None or now is None or start <= 0 or now / start >= STOP_ENTROPY_SHARE:
        return None
    return Finding(
        "stop",
        "objective/entropy",
        f"Entropy is {now / start:.0%} of what it was at the start: completions are nearly the "
        "same every time, and nothing new is explored.",
        "Start again with a lower --learning-rate or a higher --kl-coef.",
        STOP_ENTROPY_SHARE / max(now / start, 1e-9),
    )


def _lengthens(history: History) -> Finding | None:
    key = "completions/mean_length"
    start, now = history.first(key), history.last(key)
    if start is None or now is None or start <= 0 or now / start <= WARN_LENGTH:
        return None
    return Finding(
        "stop" if now / start > STOP_LENGTH else "warn",
        key,
        f"Completions are {now / start:.1f} times as long as at the start: the reward may favour "
        "length.",
        "Read the samples, or add --reward overlong.",
        now / start / WARN_LENGTH,
    )


def _repetitive(history: History) -> Finding | None:
    key = "text/repeated_4grams"
    start, now = history.first(key), history.last(key)
    if start is None or now is None or now - start <= WARN_REPEATED:
        return None
    return Finding(
        "stop" if now - start > STOP_REPEATED else "warn",
        key,
        f"Completions repeat {now:.0%} of their 4-grams, at the start {start:.0%}.",
        "Read the samples, or add --reward repetition.",
        (now - start) / WARN_REPEATED,
    )


def _less_varied(history: History) -> Finding | None:
    key = "text/distinct_2"
    start, now = history.first(key), history.last(key)
    if start is None or now is None:
        return None
    fall = (start - now) / max(start, 1e-9)
    if fall <= WARN_DISTINCT:
        return None
    return Finding(
        "stop" if fall > STOP_DISTINCT else "warn",
        key,
        f"{now:.0%} of the token pairs in a completion are distinct, at the start {start:.0%}: the "
        "text gets monotonous.",
        "Read the samples, raise --kl-coef, or add --reward repetition.",
        fall / WARN_DISTINCT,
    )


def _over_optimised(history: History) -> Finding | None:
    """The reward that is trained on rises, and the reward on held-out prompts falls."""
    if history.deviations:
        falling = [held_out for _, held_out in history.deviations]
        trained, held_out = history.deviations[-1]
        gap = trained - held_out
        if not _is_falling(falling) or gap <= STOP_REWARD_GAP:
            return None
        return Finding(
            "stop",
            "eval/held_out",
            f"The reward that is trained on is {trained:+.1f} standard deviations from its start, "
            f"the held-out reward {held_out:+.1f} and falling for {FALLING_EVALUATIONS} "
            "evaluations: the policy exploits the reward.",
            "Fix the reward, raise --kl-coef, or train for fewer steps.",
            gap / STOP_REWARD_GAP,
        )
    other = history.held_out.get("held_out")
    falling = other or history.held_out.get("reward", [])
    rising = history.held_out.get("reward", []) if other else history.trained_rewards
    if not _is_falling(falling) or len(rising) <= FALLING_EVALUATIONS:
        return None
    if rising[-1] <= rising[-FALLING_EVALUATIONS - 1]:
        return None
    return Finding(
        "warn",
        "eval/held_out" if other else "eval/reward",
        f"The held-out reward fell in three evaluations in a row, to {format_value(falling[-1])}, "
        "while the reward that is trained on rose.",
        "Train for fewer steps, raise --kl-coef, or fix the reward.",
    )


def _is_falling(values: Sequence[float]) -> bool:
    recent = values[-FALLING_EVALUATIONS - 1 :]
    return len(recent) > FALLING_EVALUATIONS and all(b < a for a, b in pairwise(recent))


@dataclass(frozen=True)
class Check:
    """One health check.

    Attributes:
        commands: The training commands that it applies to.
        reads: Training metrics that it reads.
        held_out: Held-out metrics that it reads, without the prefix `eval/`.
        find: The check itself; returns None if it finds no problem.
        answers: Metrics of the answers at the end of an offline run that it reads.
    """

    commands: frozenset[str]
    reads: tuple[str, ...]
    held_out: tuple[str, ...]
    find: Callable[[History], Finding | None]
    answers: tuple[str, ...] = ()


_LOGPS = ("logps/chosen", "logps/rejected")
_ACCURACIES = ("rewards/accuracies",)
_REPETITION = ("before/text/repeated_4grams", "after/text/repeated_4grams")

CHECKS: tuple[Check, ...] = (
    Check(_ON_POLICY, ("reward", "reward_std"), (), _no_reward),
    Check(_ON_POLICY, ("reward", "frac_reward_zero_std", "reward_std"), (), _equal_rewards),
    Check(_OFFLINE | _ON_POLICY, ("grad_norm",), (), _zero_gradient),
    Check(_OFFLINE, ("loss",), (), _constant_loss),
    Check(_PAIRS, _LOGPS, _LOGPS, _chosen_falls),
    Check(_PAIRS, (), ("rewards/margins", "rewards/accuracies"), _margin_too_wide),
    Check(_PREFERENCES, _ACCURACIES, _ACCURACIES, _accuracy_gap),
    Check(frozenset({"dpo", "reward"}), _ACCURACIES, _ACCURACIES, _accuracy_stuck),
    Check(_OFFLINE, ("loss",), ("loss",), _held_out_loss_rises),
    Check(_OFFLINE, (), (), _far_from_start, ("kl", "after/mean_length")),
    Check(_OFFLINE, (), (), _answers_repeat, _REPETITION),
    Check(_ON_POLICY, ("policy/approx_kl",), (), _large_updates),
    Check(_ON_POLICY, ("policy/clip_ratio",), (), _clipped),
    Check(_ON_POLICY, ("objective/kl", "completions/mean_length"), (), _far_from_reference),
    Check(_ON_POLICY, ("frac_reward_zero_std",), (), _no_contrast),
    Check(_ON_POLICY, ("completions/ended",), (), _unfinished),
    Check(_ON_POLICY, ("value/explained_variance",), (), _critic_explains_nothing),
    Check(_ON_POLICY, ("objective/entropy",), (), _entropy_collapse),
    Check(_ON_POLICY, ("completions/mean_length",), (), _lengthens),
    Check(_ON_POLICY, ("text/repeated_4grams",), (), _repetitive),
    Check(_ON_POLICY, ("text/distinct_2",), (), _less_varied),
    Check(_ON_POLICY, ("reward",), ("reward", "held_out"), _over_optimised),
)

TRAINING_METRICS = tuple(dict.fromkeys(key for check in CHECKS for key in check.reads))
HELD_OUT_METRICS = tuple(dict.fromkeys(key for check in CHECKS for key in check.held_out))


def run_checks(history: History) -> list[Finding]:
    """The findings of all checks that apply to the run, the most serious first."""
    known = any(history.command in check.commands for check in CHECKS)
    found = [
        finding
        for check in CHECKS
        if not known or history.command in check.commands
        if (finding := check.find(history)) is not None
    ]
    return sorted(found, key=lambda finding: -_RANK[finding.level])


# Checks of a whole run, which need its answers and its data too


def unmoved(record: RunRecord) -> Finding | None:
    """The policy, or reward model, is what it was before training."""
    updates = counted(record.step, "update")
    advice = "Train for more updates, or raise --learning-rate."
    answers = [(row["before"], row["after"]) for row in record.samples if "before" in row]
    if answers:
        perplexity = _held_out_change(record, "eval/perplexity")
        if any(before != after for before, after in answers) or _kl_shows_change(record):
            return None
        if perplexity and abs(perplexity[1] / perplexity[0] - 1) >= PERPLEXITY_CHANGE:
            return None
        what = f"all {len(answers)} held-out prompts"
        if len(answers) <= 2:
            what = "both held-out prompts" if len(answers) == 2 else "the held-out prompt"
        kl, distance = _kl_from_start(record), ""
        if kl is not None:
            nats = format_value(kl.value)
            distance = f", and its KL from the start ({nats} nats) is within its error of 0"
        problem = f"After {updates} the policy answers {what} as before{distance}."
        return Finding("warn", "samples", problem, advice, untrained=True)
    if moved_on_held_out(record) is not False:
        return None
    effect = "scores" if record.command == "reward" else "answers"
    problem = f"After {updates} {_HARDLY_MOVED[record.command]}: too little to change {effect}."
    return Finding("warn", "samples", problem, advice, untrained=True)


def _kl_from_start(record: RunRecord) -> Estimate | None:
    """The KL from the start, measured on samples, in nats per completion."""
    kl = record.summary.get("kl")
    return kl_interval(kl) if isinstance(kl, Mapping) else None


def _kl_shows_change(record: RunRecord) -> bool:
    """Whether the KL from the start is above 0 by more than its error."""
    kl = _kl_from_start(record)
    return kl is not None and kl.low > 0


def moved_on_held_out(record: RunRecord) -> bool | None:
    """Whether held-out means changed enough to change an answer; None if that isn't known."""
    if _kl_shows_change(record):
        return True
    for limits in _SMALLEST_CHANGES.get(record.command, ()):
        changes = {key: _held_out_change(record, key) for key in limits}
        known = {key: abs(one[1] - one[0]) for key, one in changes.items() if one is not None}
        if known:
            return any(change >= limits[key] for key, change in known.items())
    return None


_LOGP_CHANGES = dict.fromkeys(("eval/logps/chosen", "eval/logps/rejected"), MIN_LOGP_CHANGE)
_SCORE_CHANGES = dict.fromkeys(("eval/rewards/margins", "eval/loss"), MIN_SCORE_CHANGE)
# By training command: held-out metrics and their smallest changes; the second ones for runs without
# the first. Log-probs come first, because losses and margins have scales.
_SMALLEST_CHANGES: Mapping[str, Sequence[Mapping[str, float]]] = {
    "dpo": (_LOGP_CHANGES, _SCORE_CHANGES),
    "kto": (_LOGP_CHANGES, _SCORE_CHANGES),
    "sft": ({"eval/loss": MIN_TOKEN_CHANGE},),
    "reward": (_SCORE_CHANGES,),
}
_HARDLY_MOVED = {
    "dpo": f"log-probs of held-out completions changed by less than {MIN_LOGP_CHANGE} nats",
    "kto": f"log-probs of held-out completions changed by less than {MIN_LOGP_CHANGE} nats",
    "sft": f"the held-out loss changed by less than {MIN_TOKEN_CHANGE} nats per token",
    "reward": f"held-out loss and margin changed by less than {MIN_SCORE_CHANGE}",
}


def _held_out_change(record: RunRecord, key: str) -> tuple[float, float] | None:
    """A held-out metric before training and of the adapter that was kept."""
    rows = [row for row in record.held_out if key in row]
    kept = record.kept_evaluation
    if not rows or rows[0]["step"] != 0 or key not in kept or kept["step"] == 0:
        return None
    return rows[0][key], kept[key]


def _length_explains(record: RunRecord) -> Finding | None:
    """Held-out accuracy is above 50%, but not above that of choosing by length."""
    statistics, n = record.data_statistics, held_out_examples(record)
    longer, shorter = statistics.get("chosen_longer"), statistics.get("rejected_longer")
    if not isinstance(longer, float) or not isinstance(shorter, float):
        return None
    which, rate = ("longer", longer) if longer >= shorter else ("shorter", shorter)
    kept = record.kept_evaluation
    found = metric_interval(kept, record.rate_key, n)
    if record.command not in _PAIRS or found is None or kept["step"] == 0:
        return None
    if (prompts_of(kept) or n or 0) < MIN_EXAMPLES:
        return None
    if rate <= LENGTH_RULE or found.low <= 0.5 or found.low > rate:
        return None
    return Finding(
        "warn",
        "chosen_longer",
        f"Length alone may explain the result, because the {which} completion is chosen in "
        f"{rate:.0%} of the training pairs.",
        "Compare answers of equal length: mlx-align eval with --reward-model does. Or add pairs in "
        f"which the {'shorter' if which == 'longer' else 'longer'} completion is chosen.",
        rate / LENGTH_RULE,
    )


def diagnose(record: RunRecord) -> list[Finding]:
    """The findings of a run, from its folder; the most serious first.

    Findings that halved the learning rate or stopped the run are read from status.json if the
    metrics no longer show them. The warnings of a reward model's report come last.
    """
    history = history_of(record)
    found = run_checks(history)
    over = record.finished or record.status.get("state") != "running"
    # While a run trains, that it hasn't moved yet is no problem.
    if over and not any(finding.untrained for finding in found):
        found += [finding for finding in (unmoved(record),) if finding is not None]
    if (length := _length_explains(record)) is not None:
        found.append(length)
    shown = {finding.signal for finding in found}
    for kept in _recorded(record):
        if kept.signal not in shown:
            found.append(kept)
            shown.add(kept.signal)
    circular = record.data_statistics.get("circular")
    if isinstance(circular, str) and circular:
        found.append(_circular_finding(circular))
    found += _changed_inputs(record)
    report = record.summary.get("held_out")
    if isinstance(report, Mapping):
        found += [_report_finding(str(text)) for text in report.get("warnings") or ()]
    return sorted(found, key=lambda finding: -_RANK[finding.level])


def mean_completion_tokens(statistics: Mapping[str, Any]) -> float | None:
    """Mean tokens of a training completion, from the facts of a run's data; None if unknown."""
    tokens, count = statistics.get("scored_tokens"), statistics.get("completions")
    return tokens / count if tokens and count else None


def history_of(record: RunRecord) -> History:
    """The history of a run from its folder."""
    history = History(record.command, mean_completion_tokens(record.data_statistics))
    for key in TRAINING_METRICS:
        if values := record.values(key):
            history.head[key], history.tail[key] = values[:_KEPT], values[-_KEPT:]
            history.counts[key] = len(values)
            history.lowest[key], history.highest[key] = min(values), max(values)
    first: dict[str, tuple[float, float]] = {}
    rewards = record.values("reward")
    steps = [row["step"] for row in record.training if "reward" in row]
    for row in record.held_out:
        seen = bisect_right(steps, row["step"])
        history.tail["reward"] = rewards[max(0, seen - _RECENT) : seen]
        metrics = {key.removeprefix("eval/"): value for key, value in row.items()}
        changes = []
        for name in ("reward", "held_out"):
            if name in metrics:
                first.setdefault(name, (metrics[name], metrics.get(f"{name}_std", 0.0)))
                mean, spread = first[name]
                changes += [(metrics[name] - mean) / spread] if spread > 0 else []
        deviations = (changes[0], changes[1]) if len(changes) == 2 else None
        history.add_evaluation(metrics, int(row["step"]), deviations)
    history.tail["reward"] = rewards[-_KEPT:]
    history.step = record.step
    history.answers = answers_in(record.summary)
    history.over = record.finished
    return history


def answers_in(summary: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the answers of an offline run, and its KL, from its summary."""
    found: dict[str, float] = {}
    answers, kl = summary.get("answers"), summary.get("kl")
    for when in ("before", "after"):
        metrics = answers.get(when) if isinstance(answers, Mapping) else None
        if isinstance(metrics, Mapping):
            found |= {f"{when}/{k}": float(v) for k, v in metrics.items() if _is_number(v)}
    if isinstance(kl, Mapping) and _is_number(kl.get("mean")):
        found["kl"] = float(kl["mean"])
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _recorded(record: RunRecord) -> list[Finding]:
    kept = record.status.get("findings")
    if not isinstance(kept, list):
        return []
    found = []
    for one in kept:
        if isinstance(one, Mapping) and one.get("level") in _RANK:
            problem = f"After step {one.get('step')}: {one.get('problem')}"
            signal, advice = str(one.get("signal")), str(one.get("advice"))
            found.append(Finding(one["level"], signal, problem, advice))
    return found


def _circular_finding(text: str) -> Finding:
    """The run was started with --allow-circular: its judge is the policy or a descendant."""
    return Finding(
        "warn",
        "provenance",
        f"Circular: {text}.",
        "It may only reinforce what the model prefers already; evaluate it with another judge.",
    )


def _changed_inputs(record: RunRecord) -> list[Finding]:
    """A finding for every resume with changed data or rewards."""
    found = []
    for row in record.resumes:
        changed = row.get("changed")
        inputs = changed.get("inputs") if isinstance(changed, Mapping) else None
        if isinstance(inputs, list) and inputs:
            names = " and ".join(f"the {name}" for name in inputs)
            problem = f"After step {row.get('step')}, {names} changed (--accept-changed)."
            advice = "Compare training metrics only with those on the same side of it."
            found.append(Finding("warn", "resume", problem, advice))
    return found


def _report_finding(text: str) -> Finding:
    """A warning of a reward model's report, which is "problem: advice"."""
    problem, colon, advice = text.partition(": ")
    parts = [f"{part[:1].upper()}{part[1:]}." for part in (problem, advice) if part]
    return Finding("warn", "held_out", parts[0] if parts else "", parts[1] if colon else "")


class HealthMonitor:
    """Runs the checks during a run, for any training command.

    Call `observe` with each row of training metrics (on-policy: of each rollout batch) and
    `observe_evaluation` with each evaluation. Both return the findings to show: each is returned
    once, and again only if it got worse.

    Attributes:
        lr_scale: Factor for all learning rates; halved each time updates are too large.
        stop: The most serious finding of the last observation with level "stop", or None. It is
            set even if it was shown before.
        recorded: Findings that halved the learning rate or are a reason to stop, for status.json.
    """

    def __init__(self, command: str = "run", completion_tokens: float | None = None) -> None:
        """Start without history.

        Args:
            command: The training command, which decides what checks apply.
            completion_tokens: Mean tokens of a completion in the training data, if known.
        """
        self.history = History(command, completion_tokens)
        self.lr_scale = 1.0
        self.stop: Finding | None = None
        self.recorded: list[dict[str, Any]] = []
        # Level and severity at which each signal was last shown.
        self._shown: dict[str, tuple[Level, float]] = {}

    def observe(self, row: Mapping[str, float], step: int) -> list[Finding]:
        """Check a row of training metrics; `step` counts from 1."""
        self.history.add(row, step)
        if "policy/approx_kl" not in row:
            # Large updates count only if they are consecutive.
            self.history.tail.pop("policy/approx_kl", None)
        found = self._new(step)
        if any(finding.level == "halve" for finding in found):
            self.lr_scale /= 2
            self.history.tail.pop("policy/approx_kl")
        return found

    def observe_evaluation(
        self,
        metrics: Mapping[str, float],
        step: int,
        deviations: tuple[float, float] | None = None,
    ) -> list[Finding]:
        """Check held-out metrics.

        Args:
            metrics: Held-out metrics, without the prefix `eval/`.
            step: Steps done; 0 before training.
            deviations: The reward trained on and the held-out reward, as changes since the first
                evaluation in units of its standard deviation; None if there are not two rewards.
        """
        self.history.add_evaluation(metrics, step, deviations)
        return self._new(step)

    def observe_summary(self, summary: Mapping[str, Any]) -> list[Finding]:
        """Check the answers and the KL at the end of an offline run, from its summary."""
        self.history.answers = answers_in(summary)
        return self._new(self.history.step)

    def _new(self, step: int) -> list[Finding]:
        found = run_checks(self.history)
        self.stop = next((finding for finding in found if finding.level == "stop"), None)
        new = [finding for finding in found if self._should_show(finding)]
        for finding in new:
            self._shown[finding.signal] = finding.level, finding.severity
            if finding.level != "warn":
                self.recorded.append(finding.to_json(step))
        return new

    def _should_show(self, finding: Finding) -> bool:
        shown = self._shown.get(finding.signal)
        if shown is None or finding.level == "halve":
            return True
        level, severity = shown
        worse = finding.severity >= WORSE_BY * severity
        return _RANK[finding.level] > _RANK[level] or (finding.level == level and worse)

    def finish(self) -> list[Finding]:
        """The findings that only the whole run shows, to be called after its last step."""
        self.history.over = True
        return self._new(self.history.step)

    @property
    def stopped_run(self) -> bool:
        """Whether a finding so far was a reason to stop the run."""
        return any(one.get("level") == "stop" for one in self.recorded)

    def forget_evaluations(self) -> None:
        """Forget held-out metrics, because later ones are of other data or rewards."""
        self.history.held_out.clear()
        self.history.trained_rewards.clear()
        self.history.deviations.clear()

    def state(self) -> dict[str, Any]:
        """The monitor's state for a checkpoint, JSON-serialisable."""
        history = self.history
        return {
            "rate_scale": self.lr_scale,
            "said": {signal: list(shown) for signal, shown in self._shown.items()},
            "evaluations": [list(pair) for pair in history.deviations],
            "step": history.step,
            "head": {key: list(values) for key, values in history.head.items()},
            "tail": {key: list(values) for key, values in history.tail.items()},
            "counts": dict(history.counts),
            "lowest": dict(history.lowest),
            "highest": dict(history.highest),
            "held_out": {key: list(values) for key, values in history.held_out.items()},
            "trained_rewards": list(history.trained_rewards),
            "recorded": [dict(one) for one in self.recorded],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` returned.

        Also reads checkpoints of older versions, which have the values at the start (`start`), the
        number of large updates in a row (`far_updates`) and the names of signals shown.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: It is not such a state.
        """
        history = History(self.history.command, self.history.completion_tokens)
        history.step = int(state.get("step", 0))
        history.head = _lists(state.get("head", {}))
        history.tail = _lists(state.get("tail", {}))
        history.counts = {str(key): int(n) for key, n in state.get("counts", {}).items()}
        for name, pick in (("lowest", min), ("highest", max)):
            # Older versions kept the first and last rows only.
            known = {key: pick(history.head.get(key, []) + v) for key, v in history.tail.items()}
            known = {str(key): float(value) for key, value in state.get(name, known).items()}
            setattr(history, name, known)
        history.held_out = _lists(state.get("held_out", {}))
        history.trained_rewards = [float(one) for one in state.get("trained_rewards", ())]
        history.deviations = [[float(a), float(b)] for a, b in state["evaluations"]]
        for key, value in state.get("start", {}).items():
            history.head[str(key)] = [float(value)]
        if far := int(state.get("far_updates", 0)):
            history.tail["policy/approx_kl"] = [2 * HALVE_LR_ABOVE_KL] * far
        last_shown = state["said"]
        if not isinstance(last_shown, Mapping):
            last_shown = dict.fromkeys(last_shown, ("warn", 1.0))
        shown = {
            str(signal): (_level(level), float(s)) for signal, (level, s) in last_shown.items()
        }
        self.lr_scale = float(state["rate_scale"])
        self.recorded = [dict(one) for one in state.get("recorded", ())]
        self.history, self._shown, self.stop = history, shown, None


def _lists(state: Mapping[str, Any]) -> dict[str, list[float]]:
    return {str(key): [float(value) for value in values] for key, values in state.items()}


def _level(name: Any) -> Level:
    if name not in _RANK:
        raise ValueError(f"{name!r} is not a level of a finding")
    level: Level = name
    return level


def answer_metrics(completions: Sequence[Sequence[int]]) -> dict[str, float]:
    """`text_metrics` of answers, and `mean_length` in tokens; {} without answers."""
    if not completions:
        return {}
    lengths = sum(len(ids) for ids in completions)
    return {"mean_length": lengths / len(completions), **text_metrics(completions)}


def text_metrics(completions: Sequence[Sequence[int]]) -> dict[str, float]:
    """Metrics of repetition in completions, from their token ids.

    `text/repeated_4grams` is the fraction of a completion's 4-grams that occurred in it before,
    `text/distinct_2` the fraction of distinct bigrams. Both are means over completions that are
    long enough, and are left out if no completion is.
    """
    repeated = [share for ids in completions if (share := _repeated_share(ids, 4)) is not None]
    distinct = [1 - share for ids in completions if (share := _repeated_share(ids, 2)) is not None]
    found = {}
    if repeated:
        found["text/repeated_4grams"] = math.fsum(repeated) / len(repeated)
    if distinct:
        found["text/distinct_2"] = math.fsum(distinct) / len(distinct)
    return found


def _repeated_share(ids: Sequence[int], n: int) -> float | None:
    grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    return 1 - len(grams) / grams.total() if grams else None
