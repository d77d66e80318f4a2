"""AI feedback: a judge compares answers in both orders, is measured, and labels pairs.

Every verdict is written to a log as soon as it is given, so an interrupted command continues where
it stopped. Verdicts are looked up by a hash of the judge, the text and the criterion.

Source: Bai et al. 2022, "Constitutional AI", section 4.1 (labels from the probabilities of the
verdict); Zheng et al. 2023, arXiv:2306.05685, section 3 (position bias, self-enhancement).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mlx_align.data.formats import ScorableRow, read_preferences, read_scorable
from mlx_align.data.judgements import AnswerPair
from mlx_align.data.messages import text_as_json
from mlx_align.data.provenance import PROVENANCE, Lineage
from mlx_align.data.readers import Data
from mlx_align.errors import DataError
from mlx_align.evaluation.statistics import sigmoid
from mlx_align.preferences.judge_statistics import (
    BothOrders,
    Calibration,
    JudgeReport,
    Sample,
    average_orders,
    log_odds,
    measure_judge,
)
from mlx_align.preferences.verdicts import Comparison, Judge, Verdict
from mlx_align.system.keyed_log import KeyedLog, hash_key
from mlx_align.system.progress import Console
from mlx_align.types import PromptGroup, Text

# Comparisons that are judged before their verdicts are written.
AT_ONCE = 32
# Fields for the author of an answer, per answer or per row.
AUTHOR_KEYS = ("model", "author", "generator")


@dataclass(frozen=True)
class JudgedPair:
    """A pair with the judge's verdicts in both orders.

    Attributes:
        pair: The pair.
        forward: Probability that the first answer is better with a first; averaged over criteria
            in log-odds.
        backward: The same with b first.
        tie: Probability of a tie, the mean of both orders.
        invalid: Why there is no verdict; empty if there is one.
    """

    pair: AnswerPair
    forward: float = 0.5
    backward: float = 0.5
    tie: float = 0.0
    invalid: str = ""


def read_answer_pairs(
    data: Data,
    split: str = "train",
    format: str | None = None,
    *,
    pairs_per_prompt: int | None = None,
    seed: int = 0,
) -> tuple[list[AnswerPair], str]:
    """Read pairs of answers: of rows with two answers, or every two of a row with more.

    Labels in the data are ignored, and the order of a pair's answers is drawn at random.

    Args:
        data: Pairs, or prompts with lists of completions.
        split: Split of the data.
        format: Its format; detected by default.
        pairs_per_prompt: Number of pairs drawn from a row with more; None for all.
        seed: Random seed.

    Returns:
        The pairs, and what the data was read as.

    Raises:
        DataError: The data can't be read, or has no two answers to a prompt.
    """
    source = read_scorable(data, split, format)
    draw = np.random.default_rng(seed)
    found: list[AnswerPair] = []
    skipped: Counter[str] = Counter()
    for row in source:
        if row.group is None:
            skipped[row.reason] += 1
            continue
        answers = row.group.completions
        authors = _authors(row, row.group)
        every = [
            (i, j) for i, j in combinations(range(len(answers)), 2) if answers[i] != answers[j]
        ]
        if not every:
            skipped["fewer than two different answers"] += 1
            continue
        if pairs_per_prompt is not None and len(every) > pairs_per_prompt:
            chosen = sorted(draw.choice(len(every), pairs_per_prompt, replace=False).tolist())
            every = [every[k] for k in chosen]
        for i, j in every:
            first, second = (i, j) if draw.random() < 0.5 else (j, i)
            found.append(
                AnswerPair(
                    row.group.prompt,
                    answers[first],
                    answers[second],
                    row.group.source,
                    (authors[first], authors[second]),
                    row.group.columns,
                )
            )
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"no two answers to compare in the {len(source.rows)} rows ({reasons})")
    left_out = sum(skipped.values())
    title = f"read as: {source.title} ({len(source.rows):,} rows, {len(found):,} pairs"
    return found, f"{title}{f', {left_out:,} rows without a pair' if left_out else ''})"


def _authors(row: ScorableRow, group: PromptGroup) -> list[str]:
    """The models that wrote a row's answers; "" where the row doesn't say."""
    fields = {**(row.row.extra or {}), **row.row.fields}
    count = len(group.completions)
    for key in AUTHOR_KEYS:
        if count == 2 and isinstance(fields.get(f"chosen_{key}"), str):
            return [str(fields.get(f"{side}_{key}") or "") for side in ("chosen", "rejected")]
        listed = fields.get(f"{key}s")
        if isinstance(listed, list) and len(listed) == count:
            return [str(one or "") for one in listed]
    for value in fields.values():
        if isinstance(value, list) and len(value) == count and all(map(_is_object, value)):
            return [next((str(one[k]) for k in AUTHOR_KEYS if one.get(k)), "") for one in value]
    return [""] * count


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and "role" not in value


def read_human_sample(data: Data, format: str | None = None) -> tuple[list[AnswerPair], str]:
    """Read pairs that people have labelled; ties, votes and soft labels count as probabilities.

    Raises:
        DataError: The data can't be read, or has no pair on which people decided.
    """
    groups, report = read_preferences(data, "train", format)
    found = []
    for group in groups:
        if len(group.completions) != 2:
            raise DataError(
                f"{group.source}: {len(group.completions)} answers; --human takes pairs"
            )
        a, b = group.completions
        author = [str(group.columns.get(f"{side}_model") or "") for side in ("chosen", "rejected")]
        label = 1.0 if group.soft_label is None else group.soft_label
        if group.votes is not None:
            # The share of the raters; the soft label is nearer to ½, and the calibration too.
            label = group.votes[0] / sum(group.votes)
        found.append(
            AnswerPair(group.prompt, a, b, group.source, (author[0], author[1]), human=label)
        )
    if all(pair.human == 0.5 for pair in found):
        raise DataError("--human: only ties; a judge can't be compared with them")
    return found, f"people's labels {report} ({len(found):,} pairs)"


# The fields of a row in the log of verdicts.
VERDICT_FIELDS = ("first", "second", "tie", "mass", "invalid")


@dataclass(frozen=True)
class Feedback:
    """A judge with its criteria, and the log of its verdicts.

    Attributes:
        judge: The judge.
        identity: What determines its verdicts, for the log: name, weights, settings.
        criteria: Names and descriptions of what to compare by.
        by_criterion: Ask for each criterion alone and average the log-odds.
        log: The verdicts so far.
    """

    judge: Judge
    identity: str
    criteria: Mapping[str, str]
    by_criterion: bool
    log: KeyedLog

    def judge_pairs(
        self, pairs: Sequence[AnswerPair], console: Console, label: str = "Comparing"
    ) -> list[JudgedPair]:
        """Compare each pair in both orders, by each criterion alone if `by_criterion`.

        Raises:
            MlxAlignError: The judge can't be used any longer; verdicts so far are in the log.
        """
        comparisons = [list(self._comparisons(pair)) for pair in pairs]
        every = {self._key(one): (one, about) for of_pair in comparisons for one, about in of_pair}
        waiting = [(key, entry) for key, entry in every.items() if self.log.get(key) is None]
        with console.bar(label, len(every), len(every) - len(waiting)) as bar:
            for start in range(0, len(waiting), AT_ONCE):
                part = waiting[start : start + AT_ONCE]
                verdicts = self.judge.compare([comparison for _, (comparison, _) in part])
                self.log.add(
                    [
                        {"key": key, **asdict(verdict), **about}
                        for (key, (_, about)), verdict in zip(part, verdicts, strict=True)
                    ]
                )
                bar.advance(len(part))
        return [
            self._combine(pair, [one for one, _ in of_pair])
            for pair, of_pair in zip(pairs, comparisons, strict=True)
        ]

    def _comparisons(self, pair: AnswerPair) -> Iterator[tuple[Comparison, Mapping[str, Any]]]:
        """All comparisons of a pair: for each criterion, a first and then b first."""
        criteria = self.criteria if pair.criteria is None else pair.criteria
        each = (
            [{name: text} for name, text in criteria.items()]
            if self.by_criterion
            else [dict(criteria)]
        )
        for criteria in each:
            comparison = Comparison(
                pair.prompt, pair.a, pair.b, criteria, pair.source, pair.columns
            )
            for order, shown in (("forward", comparison), ("backward", comparison.swapped())):
                if order == "backward" and self.judge.ignores_order:
                    continue
                about = {"source": pair.source, "order": order, "judge": self.judge.name}
                if self.by_criterion:
                    about["criterion"] = next(iter(criteria))
                yield shown, about

    def _key(self, comparison: Comparison) -> str:
        texts = (comparison.prompt, comparison.first, comparison.second)
        return hash_key(self.identity, *map(text_as_json, texts), dict(comparison.criteria))

    def _combine(self, pair: AnswerPair, comparisons: Sequence[Comparison]) -> JudgedPair:
        rows = [self.log.get(self._key(comparison)) for comparison in comparisons]
        verdicts = [Verdict(**{k: row[k] for k in VERDICT_FIELDS}) for row in rows if row]
        invalid = next((verdict.invalid for verdict in verdicts if verdict.invalid), "")
        if invalid:
            return JudgedPair(pair, invalid=invalid)
        wins = np.array([verdict.first_wins for verdict in verdicts])
        tie = float(np.mean([verdict.tie for verdict in verdicts]))
        if self.judge.ignores_order:
            forward, backward = wins, 1 - wins
        else:
            forward, backward = wins[::2], wins[1::2]
        if len(forward) > 1:
            forward, backward = (
                sigmoid(np.mean(log_odds(one), keepdims=True)) for one in (forward, backward)
            )
        return JudgedPair(pair, float(forward[0]), float(backward[0]), tie)


def as_sample(judged: Sequence[JudgedPair], own_names: Sequence[str] = ()) -> Sample:
    """Arrays of the pairs with valid verdicts.

    Args:
        judged: Pairs with people's labels.
        own_names: Names in the data of answers by the judge's own model.
    """
    valid = [one for one in judged if not one.invalid]
    prompts: dict[Text, int] = {}
    cluster = [prompts.setdefault(one.pair.prompt, len(prompts)) for one in valid]
    return Sample(
        both_orders(valid),
        np.array([0.5 if one.pair.human is None else one.pair.human for one in valid]),
        own_sides(valid, own_names),
        np.array(cluster, np.int64),
    )


def both_orders(judged: Sequence[JudgedPair]) -> BothOrders:
    """The verdicts of valid pairs as arrays."""
    return BothOrders(
        np.array([one.forward for one in judged]), np.array([one.backward for one in judged])
    )


def own_sides(judged: Sequence[JudgedPair], own_names: Sequence[str]) -> np.ndarray[Any, Any]:
    """(n,) 1 where only a is by the judge's own model, −1 where only b is, else 0."""
    names = {name for name in own_names if name}
    sides = [[author in names for author in one.pair.authors] for one in judged]
    return np.array([float(a) - float(b) for a, b in sides])


def measure_on_sample(
    judged: Sequence[JudgedPair], own_names: Sequence[str] = (), *, seed: int = 0
) -> JudgeReport | None:
    """The judge's report on pairs that people labelled; None if it decided none of them."""
    sample = as_sample(judged, own_names)
    if not (sample.human != 0.5).any():
        return None
    return measure_judge(sample, invalid=len(judged) - len(sample.human), seed=seed)


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs labelled by a judge.

    Attributes:
        rows: Rows to train on: `prompt`, `chosen`, `rejected`, `soft_label`, the authors, the
            provenance, and the other fields.
        invalid: Number of pairs without a valid verdict, by reason.
        ties: Pairs that the judge calls equally good.
        unsure: Pairs left out because the label is less certain than was demanded.
    """

    rows: list[dict[str, Any]]
    invalid: Mapping[str, int]
    ties: int
    unsure: int


def label_pairs(
    judged: Sequence[JudgedPair],
    calibration: Calibration,
    own_names: Sequence[str],
    provenance: Mapping[str, Any],
    *,
    keep_ties: bool = False,
    min_confidence: float = 0.5,
    soft: bool = True,
) -> LabelledPairs:
    """Turn verdicts into preferences. A pair without a valid verdict never becomes one.

    Args:
        judged: The pairs with their verdicts.
        calibration: Fitted to people's labels.
        own_names: Names in the data of answers by the judge's own model.
        provenance: What is written about the judge into every row.
        keep_ties: Write ties with the soft label .5 instead of leaving them out.
        min_confidence: Least calibrated probability of the chosen answer.
        soft: Write the calibrated probability as `soft_label`.
    """
    invalid = Counter(_kind(one.invalid) for one in judged if one.invalid)
    valid = [one for one in judged if not one.invalid]
    odds = average_orders(both_orders(valid)) if valid else np.zeros(0)
    probability = calibration.probability(odds, own_sides(valid, own_names))
    rows, ties, unsure = [], 0, 0
    for one, ell, p in zip(valid, odds.tolist(), probability.tolist(), strict=True):
        # Certain verdicts that contradict each other in the two orders cancel.
        tied = abs(ell) < 1e-9 or one.tie > 0.5
        ties += tied
        if tied and not keep_ties:
            continue
        if not tied and max(p, 1 - p) < min_confidence:
            unsure += 1
            continue
        a_chosen = p >= 0.5
        label = 0.5 if tied else max(p, 1 - p)
        rows.append(_training_row(one, a_chosen, label if soft or tied else None, provenance))
    return LabelledPairs(rows, dict(invalid), ties, unsure)


def _kind(reason: str) -> str:
    """A reason without its numbers and quotes, to count by."""
    for kind in ("no verdict in the reply", "too long for the judge"):
        if reason.startswith(kind):
            return kind
    return "too little probability on a verdict" if reason.startswith("only ") else reason


# Fields that would make a reader detect another format, or that belong to another label.
_DROPPED = {
    "prompt", "chosen", "rejected", "completion", "completions", "responses", "answers", "messages",
    "conversations", "text", "output", "label", "kto_tag", "scores", "ratings", "rank", "ranks",
    "score_chosen", "score_rejected", "soft_label", "chosen_prob", "votes_chosen",
    "votes_rejected", "margin", "instruction", "question", "input", "preferred_output",
    "non_preferred_output", "models", "authors", "generators", PROVENANCE,
}  # fmt: skip


def _training_row(
    judged: JudgedPair, a_chosen: bool, label: float | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    pair = judged.pair
    sides = (pair.a, pair.b) if a_chosen else (pair.b, pair.a)
    authors = pair.authors if a_chosen else pair.authors[::-1]
    row: dict[str, Any] = {k: v for k, v in pair.columns.items() if k not in _DROPPED}
    row |= {
        "prompt": text_as_json(pair.prompt),
        "chosen": text_as_json(sides[0]),
        "rejected": text_as_json(sides[1]),
    }
    for side, author in zip(("chosen", "rejected"), authors, strict=True):
        if author:
            row[f"{side}_model"] = author
    if label is not None:
        row["soft_label"] = round(label, 6)
    forward, backward = judged.forward, judged.backward
    if not a_chosen:
        forward, backward = backward, forward
    # Both as probabilities that the chosen answer is better.
    about = {"chosen_first": round(forward, 6), "chosen_second": round(1 - backward, 6)}
    row[PROVENANCE] = {**provenance, **about}
    return row


def provenance_of(name: str, lineage: Lineage, report: JudgeReport | None) -> dict[str, Any]:
    """What the rows say about the judge."""
    found: dict[str, Any] = {"judge": name}
    if lineage:
        found["judge_lineage"] = list(lineage)
    if report is not None:
        rate = report.agreement
        found["agreement"] = [round(x, 4) for x in (rate.value, rate.low, rate.high)]
        found["agreement_pairs"] = report.pairs
    return found
