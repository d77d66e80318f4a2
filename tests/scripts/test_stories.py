"""The studies on the stories model: the estimator, the fits, and pages from stored results."""

import itertools
import math

import numpy as np
import pytest
from helpers.scripts import load_script


@pytest.fixture(scope="module")
def real():
    """The scripts' modules, by name."""
    names = ["curves", "story_rule", "stories", "frontier", "frontier_page", "overoptimization"]
    names += ["overoptimization_page"]
    return {name: load_script(f"real/{name}") for name in names}


def test_best_of_n_is_the_mean_over_all_subsets(real):
    proxy, gold = np.random.default_rng(0).normal(size=(2, 3, 6))
    rows = {}
    for n in (1, 2, 4):
        gains = []
        for by, values in zip(proxy, gold, strict=True):
            subsets = itertools.combinations(range(6), n)
            best = [values[max(subset, key=lambda i: by[i])] for subset in subsets]
            gains.append(np.mean(best) - values.mean())
        rows[n] = gains
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real["stories"], "BEST_OF", (1, 2, 4))
        found = real["stories"].best_of(proxy, gold)
    for row in found:
        assert row["gold"] == pytest.approx(rows[row["n"]])
        assert row["kl"] == pytest.approx(math.log(row["n"]) - (row["n"] - 1) / row["n"])


@pytest.mark.parametrize(
    ("name", "form", "peak"),
    [
        ("fit_best_of", lambda d: d * (1.2 - 0.3 * d), 2.0),
        ("fit_rl", lambda d: d * (1.2 - 0.3 * np.log(d)), math.exp(3)),
    ],
)
def test_fits_recover_the_curve(real, name, form, peak):
    d = np.linspace(0.2, 3, 20)
    fit = getattr(real["curves"], name)(d, form(d))
    assert (fit.alpha, fit.beta) == pytest.approx((1.2, 0.3))
    assert (fit.peak, fit.best) == pytest.approx((peak, form(peak)))
    assert fit.error < 1e-9
    # The curve is highest at its peak.
    around = fit.curve(np.array([0.99, 1, 1.01]) * fit.peak)
    assert around.argmax() == 1


def test_a_curve_that_never_falls_has_no_peak(real):
    d = np.linspace(0.2, 3, 20)
    fit = real["curves"].fit_rl(d, d * (0.5 + 0.2 * np.log(d)))
    assert fit.beta < 0
    assert math.isinf(fit.peak)
    with pytest.raises(ValueError, match="KL of 0"):
        real["curves"].fit_rl(np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def test_the_optimum_is_that_of_two_equally_likely_completions(real):
    # Rewards 0 and 1, half each: π* gives the better one p = σ(1/β).
    gold = np.tile([0.0, 1.0], (2, 200))
    for row in real["frontier"].optimum(gold, np.array([0.5, 1.0, 4.0])):
        p = 1 / (1 + math.exp(-1 / row["beta"]))
        assert row["gold"] == pytest.approx(p - 0.5)
        kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
        assert row["kl"] == pytest.approx(kl)


def test_the_rule(real):
    rule = real["story_rule"].rule
    prompt = "One day, a cat named Max went out."
    plain = rule(prompt, "He saw a tree")
    assert rule(prompt, "He saw a happy tree") == plain + 1
    assert rule(prompt, "He saw a sad tree") == plain - 1
    assert rule(prompt, "Max saw a tree") == plain + 1
    assert rule(prompt, '"He saw a tree"') == plain + 1.5
    assert rule(prompt, "play play play play play play") < rule(
        prompt, "play and have some fun now"
    )


def test_pairs_prefer_the_higher_score_but_for_the_flips(real):
    asked, texts = ["A"] * 400, [["good", "bad", "same", "same"]] * 400
    scores = np.tile([1.0, 0.0, 2.0, 2.0], (400, 1))
    rows = real["stories"].make_pairs(asked, texts, scores, 0.25, seed=0)
    assert len(rows) == 400
    flipped = sum(row["chosen"] == "bad" for row in rows) / 400
    assert 0.18 < flipped < 0.32
    clean = real["stories"].make_pairs(asked, texts, scores, 0, seed=0)
    assert {row["chosen"] for row in clean} == {"good"}


def test_held_out_prompts_are_others(real):
    stories = real["stories"]
    train = set(stories.prompts(stories.TRAIN_NAMES))
    held_out = stories.held_out()
    assert not train & set(held_out)
    assert len(set(held_out)) == stories.HELD_OUT
    assert len(train) >= stories.LABELLED


def proxy_results(size, seed, fall):
    """A proxy whose gold reward falls under PPO, or doesn't."""
    steps = [0, 2, 4, 6]
    gold = [0.0, 0.8, 1.0, -0.5 if fall else 1.1]
    ppo = [
        {"step": s, "kl": float(s * s), "gold": g, "gold_half": 0.1, "proxy": s * 1.0}
        for s, g in zip(steps, gold, strict=True)
    ]
    best_of = [
        {"n": 2**k, "kl": 0.5 * k, "gold": [0.1 * k, 0.1 * k + 0.02], "proxy": [0.3 * k, 0.3 * k]}
        for k in range(9)
    ]
    found = {"size": size, "seed": seed, "accuracy": 0.6, "pairs": 384, "text": "and he\nplayed"}
    return {**found, "best_of": best_of, "ppo": ppo}


COMMON = {"tokens": 24, "held_out": 96, "seeds": 2, "date": "2026-01-01", "machine": "Linux"}


def test_the_page_of_overoptimization(real, tmp_path):
    proxies = [proxy_results(s, seed, s == 60) for seed in (0, 1) for s in (60, 600)]
    guarded = {"stopped_early": True, "steps": 6, "best_step": 4}
    results = {**COMMON, "prompt": "One day.", "proxies": proxies, "guarded": guarded}
    files = real["overoptimization_page"].write_overoptimization(results, tmp_path)
    page = (tmp_path / "verified" / "overoptimization.md").read_text(encoding="utf-8")
    assert "| 60 | gold highest | 4 | 16.0 | +4.00 | +1.00 ± 0.10 |" in page
    text = " ".join(page.split())
    assert "60 pairs raises the gold reward to +1.00 at 16.0 nats, and then falls to −0.50" in text
    assert "600 pairs raises the gold reward to +1.10 at 36.0 nats, where the run ends" in text
    assert (
        "after 6 rollout batches, and the adapter that was kept is that of batch 4, at +1.00"
        in text
    )
    assert "{" not in page
    for file in files[1:]:
        drawing = file.read_text(encoding="utf-8")
        assert f"../images/{file.name}" in page
        assert drawing.count("<svg") == 1
        assert "nan" not in drawing


def test_the_page_of_the_frontier(real, tmp_path):
    policies = [
        {"method": m, "setting": f"{m} {k}", "seed": seed, "kl": k + 0.1, "gold": g, "half": 0.1}
        for m, g in (("DPO", 0.1), ("PPO", 0.2))
        for k in range(3)
        for seed in range(2)
    ]
    (best,) = [proxy_results(0, 0, False)["best_of"]]
    optimum = [{"kl": 0.2 * k, "gold": 0.3 * k} for k in range(10)]
    results = {**COMMON, "pairs": 400, "batches": 30, "best_of": best, "optimum": optimum}
    real["frontier_page"].write_frontier({**results, "policies": policies}, tmp_path)
    page = (tmp_path / "verified" / "frontier.md").read_text(encoding="utf-8")
    assert "| DPO | DPO 2 | 2.10 | +0.10 ± 0.10 | +0.10 to +0.10 | +0.43 |" in page
    assert "{" not in page


def test_ticks_are_round(real):
    assert real["curves"].ticks(-0.3, 2.1) == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert real["curves"].ticks(0, 57) == [0, 10, 20, 30, 40, 50]


def test_accuracy_leaves_ties_of_the_truth_out(real):
    truth = np.array([[1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 3.0, 1.0]])
    judged = np.array([[5.0, 1.0, 1.0, 2.0], [4.0, 1.0, 9.0, 8.0]])
    assert real["stories"].accuracy(judged, truth) == pytest.approx((2 / 3, 3))
