"""What a run's numbers warn of, in words, with what to do.

Thresholds are where others' runs, and ours, were found to go wrong; a single row is noise, so it
takes the mean of the last three, unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from mlx_align.report.numbers import say
from mlx_align.report.runs import RunFacts
from mlx_align.thresholds import (
    CLIPPED_WARNS,
    DISTINCT_STOPS,
    DISTINCT_WARNS,
    ENDED_WARNS,
    ENTROPY_STOPS,
    EXPLAINED_FROM,
    KL_ENDS_EPOCHS,
    KL_HALVES,
    KL_STOPS,
    KL_TOKENS,
    KL_WARNS,
    LENGTH_STOPS,
    LENGTH_WARNS,
    REPEATED_STOPS,
    REPEATED_WARNS,
)

# Pairs: the chosen answer losing more than this share of its log-prob, or nats a token.
CHOSEN_FALL = 0.1
CHOSEN_FALL_A_TOKEN = 1.0
WIDE_MARGIN = 5.0
FLAT = 0.01
GAP = 0.15


class Warning(NamedTuple):
    """One sentence on what is amiss, one on what to do; `stop` where going on makes it worse."""

    what: str
    do: str
    stop: bool = False


def warnings_of(run: RunFacts) -> list[Warning]:
    """All that a run's numbers warn of, what should stop it first."""
    found = [check(run) for check in _CHECKS]
    all_found = [*(warning for warning in found if warning is not None), *_judged(run)]
    return sorted(all_found, key=lambda warning: not warning.stop)


def chosen_fall(run: RunFacts) -> float | None:
    """By what share of itself the chosen answers' log-prob fell, if that is too much.

    On held-out data where there are two evaluations, else on training data.
    """
    change = _change(run, "logps/chosen")
    if change is None:
        return None
    first, last = change
    return (
        (first - last) / abs(first) if first and last < first - CHOSEN_FALL * abs(first) else None
    )


def _change(run: RunFacts, key: str) -> tuple[float, float] | None:
    """A metric at its start and now; training rows are of different pairs, so means of five."""
    held_out = run.values(f"eval/{key}")
    if len(held_out) >= 2:
        return held_out[0], held_out[-1]
    rows = run.values(key)
    if len(rows) < 10:
        return None
    return sum(rows[:5]) / 5, sum(rows[-5:]) / 5


def _falling_chosen(run: RunFacts) -> Warning | None:
    share = chosen_fall(run)
    chosen, rejected = _change(run, "logps/chosen"), _change(run, "logps/rejected")
    if share is None or chosen is None or rejected is None:
        return None
    fell = chosen[0] - chosen[1]
    too = "the rejected one's too, so" if rejected[1] < rejected[0] else "and"
    tokens = _completion_tokens(run)
    stop = tokens is not None and fell / tokens > CHOSEN_FALL_A_TOKEN
    return Warning(
        f"The chosen answer's log-prob fell from {say(chosen[0])} to {say(chosen[1])} nats "
        f"({share:.0%}), {too} probability goes to answers that nobody rated.",
        "Lower --learning-rate, add the SFT loss (--loss sigmoid=1,sft=0.2), or leave out pairs "
        "whose two answers are nearly the same.",
        stop,
    )


def _completion_tokens(run: RunFacts) -> float | None:
    facts = run.summary.get("data_facts") or run.status.get("data_facts") or {}
    tokens, count = facts.get("scored_tokens"), facts.get("completions")
    return tokens / count if tokens and count else None


def _wide_margin(run: RunFacts) -> Warning | None:
    margins, accuracies = (run.values(f"eval/rewards/{k}") for k in ("margins", "accuracies"))
    # At the start all implicit rewards are 0: no accuracy to come from.
    accuracies = accuracies[1:]
    if run.command == "reward" or len(accuracies) < 3 or margins[-1] <= WIDE_MARGIN:
        return None
    half = len(accuracies) // 2
    gained = accuracies[-1] - accuracies[half - 1]
    if gained > FLAT:
        return None
    return Warning(
        f"The held-out margin is {say(margins[-1])}, while held-out accuracy stays at "
        f"{accuracies[-1]:.1%}: more training widens what was already decided.",
        "Stop earlier, lower --learning-rate, or raise --beta.",
    )


def _overfitted(run: RunFacts) -> Warning | None:
    training, held_out = run.lately("rewards/accuracies"), run.last("eval/rewards/accuracies")
    evaluations = len(run.values("eval/rewards/accuracies"))
    if training is None or held_out is None or evaluations < 2 or training - held_out <= GAP:
        return None
    return Warning(
        f"Accuracy is {training:.0%} on training pairs and {held_out:.0%} on held-out ones: the "
        "run learns its data by heart.",
        "Fewer --epochs, a lower --learning-rate or --lora-rank, or more data.",
    )


def _large_updates(run: RunFacts) -> Warning | None:
    recent, mean = run.values("policy/approx_kl")[-3:], run.lately("policy/approx_kl")
    if mean is None or mean <= KL_ENDS_EPOCHS:
        return None
    high = min(recent) > KL_HALVES
    return Warning(
        f"An update moves the policy by {say(mean)} nats a token, more than {KL_ENDS_EPOCHS}: "
        "its data is stale before it is used up.",
        "Halve --learning-rate."
        if high
        else "Fewer passes over a batch, or a lower --learning-rate.",
        high,
    )


def _much_clipped(run: RunFacts) -> Warning | None:
    mean = run.lately("policy/clip_ratio")
    if mean is None or mean <= CLIPPED_WARNS:
        return None
    return Warning(
        f"{mean:.0%} of the tokens are beyond the clip range, where they teach nothing.",
        "Lower --learning-rate.",
    )


def _broken_critic(run: RunFacts) -> Warning | None:
    mean = run.lately("value/explained_variance")
    if mean is None or mean >= 0 or run.step < EXPLAINED_FROM:
        return None
    return Warning(
        f"The critic explains less of the returns than their mean would (explained variance "
        f"{say(mean)} after {run.step} updates): advantages are noise.",
        "Raise --critic-learning-rate, or start the critic from a reward model.",
        True,
    )


def _collapsing(run: RunFacts) -> Warning | None:
    entropy, now = run.values("objective/entropy"), run.lately("objective/entropy")
    if now is None or entropy[0] <= 0 or now >= ENTROPY_STOPS * entropy[0]:
        return None
    return Warning(
        f"Entropy is {now / entropy[0]:.0%} of what it was at the start: the policy says nearly "
        "the same every time and finds nothing new.",
        "Go back to an earlier checkpoint with a higher --kl-coef or a lower --learning-rate.",
        True,
    )


def _far_away(run: RunFacts) -> Warning | None:
    mean = run.lately("objective/kl")
    scale = max(1.0, (run.lately("completions/mean_length") or 0.0) / KL_TOKENS)
    if mean is None or mean <= KL_WARNS * scale:
        return None
    return Warning(
        f"The policy is {mean:.0f} nats a completion away from the reference (more than "
        f"{KL_WARNS * scale:.0f}): the reward model is asked about text it has never seen.",
        "Raise --kl-coef or stop earlier; read samples of the last checkpoints.",
        mean > KL_STOPS * scale,
    )


def _endless(run: RunFacts) -> Warning | None:
    mean = run.lately("completions/ended")
    if mean is None or mean >= ENDED_WARNS:
        return None
    return Warning(
        f"Only {mean:.0%} of the completions end by themselves; the rest are cut and judged as "
        "they stand.",
        "Raise --max-completion-length, or penalise completions that do not end.",
    )


def _longer(run: RunFacts) -> Warning | None:
    lengths, now = run.values("completions/mean_length"), run.lately("completions/mean_length")
    if now is None or not 0 < LENGTH_WARNS * lengths[0] < now:
        return None
    return Warning(
        f"Completions are {now / lengths[0]:.1f} times as long as at the start: the reward may be "
        "paid for length.",
        "Look at reward against length, and penalise length or balance the reward model's data.",
        now > LENGTH_STOPS * lengths[0],
    )


def _repeats(run: RunFacts) -> Warning | None:
    shares, now = run.values("text/repeated_4grams"), run.lately("text/repeated_4grams")
    if now is None or now - shares[0] <= REPEATED_WARNS:
        return None
    return Warning(
        f"Completions repeat {now:.0%} of their runs of four tokens, at the start {shares[0]:.0%}.",
        "Read the samples, and penalise repetition.",
        now - shares[0] > REPEATED_STOPS,
    )


def _monotonous(run: RunFacts) -> Warning | None:
    shares, now = run.values("text/distinct_2"), run.lately("text/distinct_2")
    if now is None or shares[0] <= 0 or 1 - now / shares[0] <= DISTINCT_WARNS:
        return None
    return Warning(
        f"{now:.0%} of the pairs of tokens are different ones, at the start {shares[0]:.0%}: the "
        "completions grow alike.",
        "Raise --kl-coef or lower --learning-rate.",
        1 - now / shares[0] > DISTINCT_STOPS,
    )


def _over_optimised(run: RunFacts) -> Warning | None:
    """The reward that is trained on rises, and one that is not falls in three evaluations."""
    keys = ("eval/held_out", "eval/reward") if run.values("eval/held_out") else ("eval/reward", "")
    held_out, trained = run.values(keys[0])[-4:], run.values(keys[1] or "reward")
    falls = len(held_out) == 4 and all(b < a for a, b in pairwise(held_out))
    if not falls or len(trained) < 4 or trained[-1] <= trained[-4]:
        return None
    return Warning(
        f"The held-out reward fell in three evaluations running, to {say(held_out[-1])}, while the "
        "reward that is trained on rose.",
        "Go back to the checkpoint before that, raise --kl-coef, or mend the reward.",
        True,
    )


def _judged(run: RunFacts) -> list[Warning]:
    """What a reward model's own report warns of: length, leaks, too few comparisons."""
    found = []
    for text in (run.summary.get("held_out") or {}).get("warnings", ()):
        what, colon, do = str(text).partition(": ")
        sentences = [f"{part[:1].upper()}{part[1:]}." for part in (what, do) if part]
        found.append(Warning(sentences[0], sentences[1] if colon else ""))
    return found


_CHECKS: Sequence[Callable[[RunFacts], Warning | None]] = (
    _falling_chosen,
    _wide_margin,
    _overfitted,
    _large_updates,
    _much_clipped,
    _broken_critic,
    _collapsing,
    _far_away,
    _endless,
    _longer,
    _repeats,
    _monotonous,
    _over_optimised,
)
