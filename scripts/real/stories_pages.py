"""Pages and drawings of the studies on the stories model, written from their stored results."""

import math
import platform
import textwrap
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from curves import Fit, Floats, Series, draw, fit_best_of, fit_rl

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
WIDTH = 125  # characters of a line of a page
SHOWN = (1, 2, 4, 16, 64, 256)
GUIDE = "../guides/reward-model-and-ppo.md#dont-optimise-the-reward-model-too-far"
LEAST_KL = 0.05  # nats; below, the estimate of KL may be negative
MEASURED = """
The model is stories260K (`data/real/stories260K`, MIT), a Llama of 260,000 parameters that
continues stories for children. SmolLM2-135M would take days on a CPU for curves with as many
points. The gold reward is a fixed rule (`scripts/real/story_rule.py`): happy words minus sad ones,
direct speech, the name of the hero, and how many of the words are different. Prompts are first
sentences of stories, completions have {tokens} tokens, and rewards are given in standard
deviations of the model's own completions, above their mean. All weights are trained. The
{held_out} held-out prompts have other heroes' names than the training prompts.
"""
OVEROPTIMIZATION = """
# Overoptimising a reward model

A policy that is optimised against a reward model gets better at first; later it only gets better at
fooling it. Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", measured when that
happens. `scripts/real/overoptimization.py` repeats their experiment on a small scale: it trains
proxy reward models on few pairs, and optimises each by best-of-n and by PPO.

{measured}

## The proxies

Each proxy is a run of `mlx-align reward` on pairs of the model's own completions. The rule labels
the pairs, and a quarter of the labels are flipped, as in Coste et al. 2023. Accuracy on
{pairs} held-out pairs, judged by the rule, one number per seed:

{accuracies}

## Best of n

The best by the proxy of n samples, from 512 samples of each of {prompts} prompts. The unbiased
estimator averages over all subsets of n samples; the KL is ln n − (n − 1)/n. Gains over one sample,
means of {seeds}; 95% intervals over prompts.

{best_of}

![Gold and proxy reward of best-of-n against the square root of KL](../images/best-of-n.svg)

## PPO

`mlx-align ppo` with `--kl-coef 0`, `--no-guard` and the rule as `--eval-reward`: {batches} rollout
batches of 32 completions at a learning rate of 3e-4. The KL is measured with samples, in nats per
completion. Means of {seeds}; the intervals are those of a single run, over prompts.

{ppo}

![Gold and proxy reward along PPO against the square root of KL](../images/overoptimization.svg)

Greedy completions of the first held-out prompt after PPO (seed 0). The prompt is "{prompt}"

{texts}

## The fitted curves

Least squares on the gold reward, with d = √KL: best-of-n on its means, PPO on all evaluations of
all seeds.

{fits}

## What it shows

{conclusions}

What to do about it is in the guide: [don't optimise the reward model too far]({guide}). With a
held-out reward, `ppo` keeps the checkpoint where that one was highest, and its guard stops the run;
the study turns both off.

The gold reward is a rule and not a large reward model as in the paper, because a reward model of
this size shares the faults of its proxies. It was tried first: one trained on 2,000 pairs that the
rule had labelled. PPO against a proxy of it raised it by 2.5 standard deviations, while the rule
fell by 0.6.

{how}
"""
FRONTIER = """
# Reward against KL

How much reward does a method gain for how much drift? Rafailov et al. 2023, "Direct Preference
Optimization", compare DPO with PPO by this frontier (figure 2). `scripts/real/frontier.py` draws it
for `mlx-align dpo`, `mlx-align ppo` and best-of-n on a small model, with a reward that is known.

{measured}

DPO learns from {pairs} pairs of the model's own completions, which the rule labels without errors,
for two epochs at a learning rate of 3e-4. PPO is trained on the rule itself, for {batches} rollout
batches of 32 completions at the same rate. Best-of-n chooses by the rule.

![Gold reward against KL for DPO, PPO and best-of-n](../images/frontier.svg)

Means of {seeds}; ± is half of a 95% interval over prompts for one run. The KL is measured with
samples, per completion. The last column is interpolated, and ends at best of 256.

{policies}

{best_of}

## What it shows

{conclusions}

{how}
"""


def half_width(std: float, n: int) -> float:
    """Half of the 95% interval of a mean of n values."""
    return 1.96 * std / math.sqrt(n)


def when_and_where() -> dict[str, str]:
    """Date and machine, for the page."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


class Point(NamedTuple):
    """A policy: its KL from the start (nats), gold gain with half its interval, and proxy gain."""

    kl: float
    gold: float
    half: float
    proxy: float


def best_of_points(proxies: Sequence[dict[str, Any]]) -> dict[int, Point]:
    """Best-of-n by proxies of one size: means over their seeds, intervals over prompts."""
    found = {}
    for rows in zip(*(one["best_of"] for one in proxies), strict=True):
        gold = np.mean([row["gold"] for row in rows], axis=0)
        half = half_width(float(gold.std(ddof=1)), len(gold))
        proxy = float(np.mean([row["proxy"] for row in rows]))
        found[rows[0]["n"]] = Point(rows[0]["kl"], float(gold.mean()), half, proxy)
    return found


def ppo_points(proxies: Sequence[dict[str, Any]]) -> dict[int, Point]:
    """PPO against proxies of one size, by rollout batch: means over their seeds.

    Intervals are over the prompts of one run, so they are too wide for means of several.
    """
    found = {}
    for rows in zip(*(one["ppo"] for one in proxies), strict=True):
        means = (
            float(np.mean([row[name] for row in rows]))
            for name in ("kl", "gold", "gold_half", "proxy")
        )
        found[int(rows[0]["step"])] = Point(*means)
    return found


def peak_of(points: dict[int, Point]) -> int:
    """Where the gold reward is highest."""
    return max(points, key=lambda key: points[key].gold)


def falls(peak: Point, last: Point) -> bool:
    """Whether the gold reward ends below its highest, beyond both intervals."""
    return peak.gold - last.gold > math.hypot(peak.half, last.half)


def fits(proxies: Sequence[dict[str, Any]]) -> tuple[Fit, Fit]:
    """The curves of best-of-n and of PPO, fitted to the gold rewards of all seeds."""
    best = [point for n, point in best_of_points(proxies).items() if n > 1]
    rows = [row for one in proxies for row in one["ppo"] if row["kl"] > LEAST_KL]
    return (
        fit_best_of(_root(point.kl for point in best), np.array([point.gold for point in best])),
        fit_rl(_root(row["kl"] for row in rows), np.array([row["gold"] for row in rows])),
    )


def _root(values: Iterable[float]) -> Floats:
    return np.sqrt(np.array(list(values)))


def by_size(results: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The proxies of each size."""
    found: dict[int, list[dict[str, Any]]] = {}
    for proxy in results["proxies"]:
        found.setdefault(proxy["size"], []).append(proxy)
    return found


def write_overoptimization(results: dict[str, Any], docs: Path) -> list[Path]:
    """Write the page of overoptimization.py, and its drawings; returns the files."""
    sizes = by_size(results)
    drawings = {"best-of-n.svg": best_of_drawing(sizes), "overoptimization.svg": ppo_drawing(sizes)}
    return _write(docs, "overoptimization.md", overoptimization_page(results), drawings)


def _write(docs: Path, name: str, page: str, drawings: dict[str, str]) -> list[Path]:
    files = {docs / "verified" / name: page}
    files |= {docs / "images" / drawing: text for drawing, text in drawings.items()}
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(files)


def best_of_drawing(sizes: dict[int, list[dict[str, Any]]]) -> str:
    """Gold and proxy reward of best-of-n."""
    series = []
    for colour, (size, proxies) in enumerate(sizes.items()):
        points = best_of_points(proxies)
        at = [math.sqrt(point.kl) for point in points.values()]
        series += _three(
            f"{size} pairs",
            (at, [p.gold for p in points.values()], [p.half for p in points.values()]),
            (at, [p.proxy for p in points.values()]),
            fits(proxies)[0],
            colour,
        )
    return _gao("Best of n by a proxy", "under best-of-n, for n = 1 to 256", series)


def ppo_drawing(sizes: dict[int, list[dict[str, Any]]]) -> str:
    """Gold and proxy reward of PPO, all seeds."""
    series = []
    for colour, (size, proxies) in enumerate(sizes.items()):
        rows = [row for one in proxies for row in one["ppo"] if row["kl"] > LEAST_KL]
        rows.sort(key=lambda row: row["kl"])
        means = sorted(ppo_points(proxies).values())
        series += _three(
            f"{size} pairs",
            (_root(row["kl"] for row in rows), [r["gold"] for r in rows], None),
            (_root(max(p.kl, 0) for p in means), [p.proxy for p in means]),
            fits(proxies)[1],
            colour,
        )
    return _gao("PPO against a proxy", "under PPO, along the runs of all seeds", series)


def _three(name: str, gold: Any, proxy: Any, fit: Fit, colour: int) -> list[Series]:
    x, y, half = gold
    line = np.linspace(1e-3, max(x), 120)
    return [
        Series(f"proxy of {name}: gold reward", x, y, half, colour),
        Series(
            f"proxy of {name}: fitted curve",
            line,
            fit.curve(line),
            None,
            colour,
            False,
            False,
            "solid",
        ),
        Series(f"proxy of {name}: its own reward", *proxy, None, colour, True, True, "dashed"),
    ]


def _gao(title: str, how: str, series: list[Series]) -> str:
    text = f"Gold and proxy reward {how}, against the square root of the KL from the start."
    return draw(title, text, "d = √KL, √nat", "reward, standard deviations", series)


def overoptimization_page(results: dict[str, Any]) -> str:
    """The page of overoptimization.py."""
    sizes, first = by_size(results), results["proxies"][0]
    accuracies = [
        f"| {size} | {', '.join(format(one['accuracy'], '.1%') for one in proxies)} |"
        for size, proxies in sizes.items()
    ]
    best = {size: best_of_points(proxies) for size, proxies in sizes.items()}
    ppo = {size: ppo_points(proxies) for size, proxies in sizes.items()}
    columns = "".join(f" proxy of {size} | its gold |" for size in sizes)
    ruler = "|---:|---:|" + "---:|---|" * len(sizes)
    best_rows = [
        f"| {n} | {next(iter(best.values()))[n].kl:.2f} |"
        + "".join(f" {b[n].proxy:+.2f} | {_value(b[n])} |" for b in best.values())
        for n in SHOWN
    ]
    ppo_rows, fit_rows = [], []
    for size, points in ppo.items():
        for name, step in (("start", 0), ("gold highest", peak_of(points)), ("end", max(points))):
            at = points[step]
            ppo_rows.append(
                f"| {size} | {name} | {step} | {at.kl:.1f} | {at.proxy:+.2f} | {_value(at)} |"
            )
        for name, fit, unit in zip(
            ("best-of-n", "PPO"), fits(sizes[size]), ("β·d", "β·ln d"), strict=True
        ):
            peak = "none" if math.isinf(fit.peak) else f"{fit.best:+.2f} at {fit.peak**2:.1f} nats"
            fit_rows.append(
                f"| {size} | {name} | d(α − {unit}) | {fit.alpha:.3f} | {fit.beta:.3f} | "
                f"{fit.error:.3f} | {peak} |"
            )
    texts = [f"- proxy of {size}: {_quoted(p[0]['text'])}" for size, p in sizes.items()]
    return _filled(
        OVEROPTIMIZATION,
        measured=_measured(results),
        pairs=first["pairs"],
        prompts=len(first["best_of"][0]["gold"]),
        seeds=_seeds(len(next(iter(sizes.values())))),
        batches=max(next(iter(ppo.values()))),
        prompt=results["prompt"],
        accuracies=_table("| pairs | accuracy |", "|---:|---|", accuracies),
        best_of=_table(f"| n | KL, nats |{columns}", ruler, best_rows),
        ppo=_table(
            "| pairs | | rollout batch | KL, nats | proxy | gold |",
            "|---:|---|---:|---:|---:|---|",
            ppo_rows,
        ),
        guide=GUIDE,
        texts="\n".join(texts),
        fits=_table(
            "| pairs | by | form | α | β | error (RMS) | its maximum |",
            "|---:|---|---|---:|---:|---:|---|",
            fit_rows,
        ),
        conclusions=_listed(conclusions(best, ppo)),
        how=_how("overoptimization", results),
    )


def conclusions(best: dict[int, dict[int, Point]], ppo: dict[int, dict[int, Point]]) -> list[str]:
    """What the numbers say, by method and size of the proxies."""
    found = []
    for size, points in ppo.items():
        peak, last = points[peak_of(points)], points[max(points)]
        end = (
            f"and then falls to {last.gold:+.2f} at {last.kl:.0f} nats"
            if falls(peak, last)
            else f"and ends at {last.gold:+.2f}, which is within the intervals of its highest"
        )
        found.append(
            f"PPO against proxies of {size} pairs raises the gold reward to {peak.gold:+.2f} at "
            f"{peak.kl:.1f} nats, {end}. The proxy itself rises to {last.proxy:+.2f}."
        )
    for size, points in best.items():
        n, largest = peak_of(points), max(points)
        peak, last = points[n], points[largest]
        end = (
            f"and falls to {last.gold:+.2f} at n = {largest}"
            if falls(peak, last)
            else f"and is {last.gold:+.2f} at n = {largest}: no fall beyond the intervals"
        )
        found.append(
            f"Best-of-n by proxies of {size} pairs gains at most {peak.gold:+.2f} (n = {n}), {end}."
        )
    small, large = min(ppo), max(ppo)
    if small != large:
        low, high = (ppo[size][peak_of(ppo[size])] for size in (small, large))
        sure = high.gold - low.gold > math.hypot(high.half, low.half)
        found.append(
            f"With {large} pairs instead of {small}, the highest gold reward of PPO is "
            f"{high.gold:+.2f} instead of {low.gold:+.2f}"
            + ("." if sure else ", a difference within the intervals.")
        )
    return found


def write_frontier(results: dict[str, Any], docs: Path) -> list[Path]:
    """Write the page of frontier.py, and its drawing; returns the files."""
    drawings = {"frontier.svg": frontier_drawing(results)}
    return _write(docs, "frontier.md", frontier_page(results), drawings)


def settings_of(results: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The policies of each method and setting, one per seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in results["policies"]:
        found.setdefault((one["method"], one["setting"]), []).append(one)
    return found


def gold_best_of(results: dict[str, Any]) -> dict[int, Point]:
    """Best-of-n by the gold reward itself."""
    return best_of_points([results])


def frontier_drawing(results: dict[str, Any]) -> str:
    """Gold reward against KL."""
    best = gold_best_of(results)
    optimum = results["optimum"]
    series = [
        Series(
            "the optimum, start × exp(reward/β), estimated from 512 samples",
            [row["kl"] for row in optimum],
            [row["gold"] for row in optimum],
            None,
            3,
            False,
            False,
            "dashed",
        ),
        Series(
            "best of 1 to 256 by the gold reward",
            [point.kl for point in best.values()],
            [point.gold for point in best.values()],
            [point.half for point in best.values()],
            2,
            line="solid",
        ),
    ]
    for colour, (method, name) in enumerate(
        (
            ("DPO", "DPO on gold-labelled pairs, by β"),
            ("PPO", "PPO with the gold reward, by KL coefficient"),
        )
    ):
        rows = [row for row in results["policies"] if row["method"] == method]
        columns = ([row[key] for row in rows] for key in ("kl", "gold", "half"))
        series.append(Series(name, *columns, colour))
    return draw(
        "Reward against KL",
        "Gold reward of DPO, PPO and best-of-n against the KL from the start, on held-out prompts.",
        "KL from the start, nats per completion",
        "gold reward, standard deviations",
        series,
    )


def best_of_at(results: dict[str, Any], kl: float) -> float | None:
    """The gold gain of best-of-n at a KL, interpolated; None beyond the largest n."""
    points = sorted(gold_best_of(results).values())
    if not points[0].kl <= kl <= points[-1].kl:
        return None
    return float(np.interp(kl, [p.kl for p in points], [p.gold for p in points]))


def frontier_page(results: dict[str, Any]) -> str:
    """The page of frontier.py."""
    settings = settings_of(results)
    best = gold_best_of(results)
    rows = []
    for (method, setting), policies in settings.items():
        kl, gold, half = (float(np.mean([p[k] for p in policies])) for k in ("kl", "gold", "half"))
        golds = [p["gold"] for p in policies]
        other = best_of_at(results, kl)
        beside = "–" if other is None else f"{other:+.2f}"
        rows.append(
            f"| {method} | {setting} | {kl:.2f} | {_value(Point(kl, gold, half, 0))} | "
            f"{min(golds):+.2f} to {max(golds):+.2f} | {beside} |"
        )
    best_rows = [f"| {n} | {best[n].kl:.2f} | {_value(best[n])} |" for n in SHOWN]
    return _filled(
        FRONTIER,
        measured=_measured(results),
        pairs=results["pairs"],
        batches=results["batches"],
        seeds=_seeds(max(len(rows) for rows in settings.values())),
        policies=_table(
            "| | setting | KL, nats | gold | over seeds | best-of-n at this KL |",
            "|---|---|---:|---|---|---:|",
            rows,
        ),
        best_of=_table("| best of | KL, nats | gold |", "|---:|---:|---|", best_rows),
        conclusions=_listed(frontier_conclusions(results)),
        how=_how("frontier", results),
    )


def frontier_conclusions(results: dict[str, Any]) -> list[str]:
    """What the numbers say."""
    best, found = gold_best_of(results), []
    if (top := _optimum_at(results, best[4].kl)) is not None:
        found.append(
            f"Best-of-n is close to the optimum: best of 4 gains {best[4].gold:+.2f} for "
            f"{best[4].kl:.2f} nats, and the most that can be had for them is {top:+.2f}."
        )
    for method in ("DPO", "PPO"):
        own = {
            key[1]: Point(
                *(float(np.mean([p[k] for p in rows])) for k in ("kl", "gold", "half")), 0
            )
            for key, rows in settings_of(results).items()
            if key[0] == method
        }
        top = max(own, key=lambda setting: own[setting].gold)
        found.append(
            f"{method} reaches at most {own[top].gold:+.2f}, at {own[top].kl:.1f} nats ({top}). "
            f"Best of 256 reaches {best[256].gold:+.2f} at {best[256].kl:.1f} nats."
        )
        gaps = [
            (point.gold - at, point.half)
            for point in own.values()
            if (at := best_of_at(results, point.kl)) is not None and point.kl > LEAST_KL
        ]
        if gaps:
            below = sum(gap < -half for gap, half in gaps)
            found.append(
                f"{method} can be compared with best-of-n at the same KL in {len(gaps)} settings. "
                f"It is below by more than the interval in {below} of them, and "
                f"{np.mean([gap for gap, _ in gaps]):+.2f} on average."
            )
    found.append("Best-of-n needs n completions for each answer; DPO and PPO need one.")
    return found


def _optimum_at(results: dict[str, Any], kl: float) -> float | None:
    rows = sorted(results["optimum"], key=lambda row: row["kl"])
    if not rows or not rows[0]["kl"] <= kl <= rows[-1]["kl"]:
        return None
    return float(np.interp(kl, [row["kl"] for row in rows], [row["gold"] for row in rows]))


def _value(point: Point) -> str:
    return f"{point.gold:+.2f} ± {point.half:.2f}"


def _table(head: str, ruler: str, rows: Sequence[str]) -> str:
    return "\n".join([head, ruler, *rows])


def _quoted(text: str) -> str:
    return f'"… {" ".join(text.split())}"'


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _measured(results: dict[str, Any]) -> str:
    return MEASURED.format(tokens=results["tokens"], held_out=results["held_out"])


def _how(name: str, results: dict[str, Any]) -> str:
    return (
        f"`python scripts/real/{name}.py` repeats the study and writes this page. "
        f"{results['date']}, {results['machine']}, mlx's CPU backend with OpenBLAS."
    )


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {_wrap(one, '  ')}" for one in sentences)


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _filled(template: str, **values: Any) -> str:
    """A page from its template: placeholders filled, paragraphs wrapped."""
    parts = template.format(**values).strip().split("\n\n")
    kept = ("|", "#", "- ", "!")
    lines = [part if part.startswith(kept) else _wrap(" ".join(part.split())) for part in parts]
    return "\n\n".join(part.strip() for part in lines) + "\n"
