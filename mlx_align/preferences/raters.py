"""A report on raters: agreement, reliability, biases and speed, from their judgements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from mlx_align.data.agreement import (
    MISSING,
    Labels,
    alpha_interval,
    cohen_kappa,
    fit_preferences,
    fleiss_kappa,
    verdict_table,
)
from mlx_align.data.judgements import DECIDED, Judgement, latest_judgements
from mlx_align.data.messages import plain_text
from mlx_align.preferences.spot_check import SpotCheckReport, report_spot_checks
from mlx_align.system.intervals import Estimate, wilson_interval

# Raters who say a or b and are right in 72% have this alpha: (2 · .72 − 1)².
LOW_ALPHA = 0.2
# Biases are pointed out if the interval of the share is beyond these, and the rater has given this
# many verdicts.
MIN_SHARE, MAX_SHARE = 0.4, 0.6
MIN_VERDICTS = 20
MIN_RELIABILITY = 0.6
MIN_SECONDS = 2.0


@dataclass(frozen=True)
class RaterReport:
    """One rater.

    Attributes:
        name: The rater.
        verdicts: Judgements that prefer an answer or call both equal.
        ties: Of these, those that call both equal.
        unsure: Pairs that the rater couldn't decide.
        skipped: Pairs left for later.
        agreement: Share of the other raters' verdicts on the same pairs that are the same; None
            without pairs in common.
        reliability: Probability that a preference of the rater is right, by the model of Dawid and
            Skene; None for a single rater.
        first: Share of preferences for the answer that was shown first.
        longer: Share of preferences for the longer answer.
        seconds: Median time per judgement.
    """

    name: str
    verdicts: int
    ties: int
    unsure: int
    skipped: int
    agreement: Estimate | None
    reliability: float | None
    first: Estimate | None
    longer: Estimate | None
    seconds: float | None


@dataclass(frozen=True)
class AgreementReport:
    """All raters.

    Attributes:
        pairs: Pairs with a verdict.
        several: Pairs with verdicts of two or more raters.
        raters: The raters.
        alpha_nominal: Krippendorff's alpha of a, tie and b; None without pairs in common.
        alpha_ordinal: The same with a tie between a and b.
        fleiss: Fleiss' kappa, on the pairs that all raters judged; None without such pairs.
        cohen: Cohen's kappa of every two raters with pairs in common, by "NAME, NAME".
        criteria: Krippendorff's nominal alpha on each criterion.
        spot_checks: Agreement with each judge whose labels were checked (`label --spot-check`).
    """

    pairs: int
    several: int
    raters: Sequence[RaterReport]
    alpha_nominal: Estimate | None
    alpha_ordinal: Estimate | None
    fleiss: float | None
    cohen: Mapping[str, float] = field(default_factory=dict)
    criteria: Mapping[str, Estimate] = field(default_factory=dict)
    spot_checks: Sequence[SpotCheckReport] = ()


def report_agreement(judgements: Sequence[Judgement], *, seed: int = 0) -> AgreementReport:
    """The report on the raters of these judgements; only the last of each on a pair counts."""
    latest = latest_judgements(judgements)
    names, _, table = verdict_table({(one.rater, one.pair.id): one.winner for one in latest})
    rated = table != MISSING
    several = int((rated.sum(0) > 1).sum())
    # Only raters with a verdict take part in the model.
    active = rated.any(1)
    model = fit_preferences(table[active]) if active.sum() > 1 else None
    reliability: dict[str, float] = {}
    if model is not None:
        present = [name for name, is_active in zip(names, active, strict=True) if is_active]
        reliability = dict(zip(present, model.reliability.tolist(), strict=True))
    everyone = rated[active].all(0) & active.any()
    counts = np.stack([(table[active][:, everyone] == k).sum(0) for k in range(3)], 1)
    return AgreementReport(
        pairs=int(rated.any(0).sum()),
        several=several,
        raters=[
            _report_rater(
                name,
                [one for one in latest if one.rater == name],
                _agreement_with_rest(table, row),
                reliability.get(name),
            )
            for row, name in enumerate(names)
        ],
        alpha_nominal=alpha_interval(table, "nominal", seed=seed) if several else None,
        alpha_ordinal=alpha_interval(table, "ordinal", seed=seed) if several else None,
        fleiss=fleiss_kappa(counts.astype(np.float64))
        if active.sum() > 1 and everyone.any()
        else None,
        cohen={
            f"{names[i]}, {names[j]}": cohen_kappa(table[i], table[j])
            for i, j in combinations(range(len(names)), 2)
            if (rated[i] & rated[j]).any()
        },
        criteria=_criteria(latest, seed),
        spot_checks=report_spot_checks(latest, seed=seed),
    )


def _criteria(latest: Sequence[Judgement], seed: int) -> dict[str, Estimate]:
    found = {}
    for name in dict.fromkeys(name for one in latest for name in one.criteria):
        given = {
            (one.rater, one.pair.id): verdict
            for one in latest
            if (verdict := one.criteria.get(name)) is not None
        }
        if given:
            _, _, table = verdict_table(given)
            if ((table != MISSING).sum(0) > 1).any():
                found[name] = alpha_interval(table, seed=seed)
    return found


def _agreement_with_rest(table: Labels, row: int) -> Estimate | None:
    """The share of other raters' verdicts that are this rater's; each pair counts once."""
    others = np.delete(table, row, 0)
    common = (table[row] != MISSING) & (others != MISSING).any(0)
    if not common.any():
        return None
    others, own = others[:, common], table[row, common]
    share = (others == own).sum(0) / (others != MISSING).sum(0)
    return wilson_interval(float(share.mean()), int(common.sum()))


def _report_rater(
    name: str,
    judgements: Sequence[Judgement],
    agreement: Estimate | None,
    reliability: float | None,
) -> RaterReport:
    winners = Counter(one.winner for one in judgements)
    preferred = [one for one in judgements if one.winner in ("a", "b")]
    seconds = [one.seconds for one in judgements if one.seconds is not None]

    def share(of: Callable[[Judgement], str | None]) -> Estimate | None:
        """How often the answer that `of` names is preferred, where it names one."""
        pairs = [(one.winner, side) for one in preferred if (side := of(one)) is not None]
        if not pairs:
            return None
        return wilson_interval(float(np.mean([a == b for a, b in pairs])), len(pairs))

    return RaterReport(
        name=name,
        verdicts=sum(one.winner in DECIDED for one in judgements),
        ties=winners["tie"],
        unsure=winners["unsure"],
        skipped=winners["skip"],
        agreement=agreement,
        reliability=reliability,
        first=share(lambda one: one.shown_first),
        longer=share(_longer),
        seconds=float(np.median(seconds)) if seconds else None,
    )


def _longer(judgement: Judgement) -> str | None:
    a, b = (len(plain_text(text)) for text in (judgement.pair.a, judgement.pair.b))
    return None if a == b else "a" if a > b else "b"


def warnings_of(report: AgreementReport) -> list[str]:
    """What is wrong with the raters' judgements, in sentences."""
    found = []
    alpha = report.alpha_nominal
    if len(report.raters) > 1 and alpha is None:
        found.append("no pair has verdicts of two raters; let them label some of the same pairs")
    if alpha is not None and alpha.value < LOW_ALPHA:
        found.append(
            f"the raters agree little more than by chance (alpha {alpha.value:.2f}); make the "
            "rubric clearer, or compare answers that differ more"
        )
    for rater in report.raters:
        if rater.verdicts < MIN_VERDICTS:
            continue
        if (first := rater.first) is not None and (first.low > MAX_SHARE or first.high < MIN_SHARE):
            found.append(f"{rater.name} prefers the answer shown first in {first.value:.0%}")
        if (longer := rater.longer) is not None and longer.low > MAX_SHARE:
            found.append(f"{rater.name} prefers the longer answer in {longer.value:.0%}")
        if rater.reliability is not None and rater.reliability < MIN_RELIABILITY:
            found.append(
                f"{rater.name} is right in {rater.reliability:.0%}, little more than a coin; "
                "leave the rater out, or explain the rubric again"
            )
        if rater.seconds is not None and rater.seconds < MIN_SECONDS:
            found.append(f"{rater.name} takes {rater.seconds:.1f} s per pair, too few to read it")
    return found + [check.warning for check in report.spot_checks if check.warning]


def render_agreement(report: AgreementReport) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report.pairs:,} pairs, {len(report.raters)} raters; {report.several:,} pairs have "
        "verdicts of two or more"
    ]
    for name, alpha in (
        ("a, b or tie", report.alpha_nominal),
        ("a < tie < b", report.alpha_ordinal),
    ):
        if alpha is not None:
            lines.append(f"Krippendorff's alpha, {name}: {_number(alpha)}")
    if report.fleiss is not None and not np.isnan(report.fleiss):
        lines.append(f"Fleiss' kappa, pairs that all judged: {report.fleiss:.2f}")
    for names, kappa in report.cohen.items():
        if not np.isnan(kappa):
            lines.append(f"Cohen's kappa of {names}: {kappa:.2f}")
    for name, alpha in report.criteria.items():
        lines.append(f"alpha on {name}: {_number(alpha)}")
    for rater in report.raters:
        parts = [f"{rater.verdicts:,} verdicts"]
        for count, what in (
            (rater.ties, "ties"),
            (rater.unsure, "unsure"),
            (rater.skipped, "skipped"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        if rater.agreement is not None:
            parts.append(f"agrees with the rest in {_percent(rater.agreement)}")
        if rater.reliability is not None:
            parts.append(f"right in {rater.reliability:.0%} (Dawid-Skene)")
        if rater.first is not None:
            parts.append(f"first shown {_percent(rater.first)}")
        if rater.longer is not None:
            parts.append(f"longer {_percent(rater.longer)}")
        if rater.seconds is not None:
            parts.append(f"{rater.seconds:.0f} s each")
        lines.append(f"{rater.name}: {', '.join(parts)}")
    lines += [str(check) for check in report.spot_checks]
    lines += [f"! {line}" for line in warnings_of(report)]
    return "\n".join(lines)


def _number(value: Estimate) -> str:
    if np.isnan(value.value):
        return "undefined: all verdicts are the same"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _percent(rate: Estimate) -> str:
    return f"{rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%})"
