"""Implicit rewards against two separately loaded models, whole rows and full logits."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.data import assistant, read_rows, write_rows
from helpers.inference import (
    ANSWERS,
    PROMPT,
    dpo_config,
    two_model_rewards,
    whole_row_logps,
    write_adapter,
)
from helpers.paths import TINY_MODEL
from helpers.runs import fingerprint, mlx_align
from mlx_lm.convert import convert

from mlx_align.config import KTOConfig, SFTConfig
from mlx_align.errors import ConfigError, ModelError
from mlx_align.inference.implicit_reward import (
    implicit_rewards,
    load_implicit_reward,
    load_logprob_scorer,
)
from mlx_align.inference.rerank import make_ranking
from mlx_align.inference.scoring import GroupScores, make_group
from mlx_align.inference.trained_run import ImplicitRewardSettings, read_trained_run
from mlx_align.models.adapters import (
    AdapterLayout,
    common_layout,
    fingerprint_folder,
)
from mlx_align.types import Message, TokenizedGroup

GIVEN = [text for text in ANSWERS if text]
STARTS = {
    "bare base": None,
    "other rank and scale": AdapterLayout(rank=2, scale=7.0),
    "other layers": AdapterLayout(rank=3, scale=0.5, num_layers=1, keys=("self_attn.v_proj",)),
    "a larger rank": AdapterLayout(rank=9, scale=1.0),
}


@pytest.mark.parametrize("start", STARTS)
def test_implicit_rewards_equal_a_two_model_computation(tmp_path, start):
    init = None
    if STARTS[start] is not None:
        init = write_adapter(tmp_path / "init", STARTS[start], seed=2)
    options = {} if init is None else {"init_adapter": str(init)}
    folder = write_adapter(
        tmp_path / "run", AdapterLayout(rank=4, scale=2.0), dpo_config(**options)
    )
    implicit = load_implicit_reward(str(TINY_MODEL), folder)
    (scored,) = implicit.score_groups([make_group("row", PROMPT, ANSWERS)])
    wanted = two_model_rewards(scored.tokens, folder, init, beta=0.1)
    assert np.abs(wanted).max() > 0.05  # so that a wrong one would show
    np.testing.assert_allclose(scored.scores, wanted, atol=1e-5)
    assert ("reference: the base model" in implicit.description) == (init is None)
    for found, where in ((scored.policy_logps, folder), (scored.reference_logps, init)):
        totals = [row.sum() for row in whole_row_logps(scored.tokens, where)]
        np.testing.assert_allclose(found, totals, atol=2e-5)
    per_token = load_implicit_reward(str(TINY_MODEL), folder, per_token=True, beta=3.0)
    (again,) = per_token.score_groups([make_group("row", PROMPT, ANSWERS)])
    lengths = [len(ids) for ids in scored.tokens.completions]
    np.testing.assert_allclose(again.scores, 30 * wanted / lengths, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_dora_and_full_fine_tuning_equal_a_two_model_computation(tmp_path, kind):
    folder = write_adapter(
        tmp_path / "run", AdapterLayout(kind, rank=4), dpo_config(beta=0.5), size=0.02
    )
    implicit = load_implicit_reward(str(TINY_MODEL), folder)
    (scored,) = implicit.score_groups([make_group("row", PROMPT, ANSWERS)])
    wanted = two_model_rewards(scored.tokens, folder, None, beta=0.5)
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(scored.scores, wanted, atol=1e-5)


def test_a_quantised_base_equals_a_two_model_computation(tmp_path):
    convert(str(TINY_MODEL), str(tmp_path / "base"), quantize=True, q_bits=4, q_group_size=32)
    base = tmp_path / "base"
    folder = write_adapter(tmp_path / "run", AdapterLayout(rank=4), dpo_config(), base=base)
    implicit = load_implicit_reward(str(base), folder)
    (scored,) = implicit.score_groups([make_group("row", PROMPT, ANSWERS)])
    wanted = two_model_rewards(scored.tokens, folder, None, 0.1, base)
    np.testing.assert_allclose(scored.scores, wanted, atol=1e-4)


def test_log_probs_are_those_of_the_model(tmp_path):
    folder = write_adapter(tmp_path / "run", AdapterLayout(rank=4), dpo_config())
    for where in (None, folder):
        scorer = load_logprob_scorer(str(TINY_MODEL), where)
        (scored,) = scorer.score_groups([make_group("row", PROMPT, ANSWERS)])
        totals = [row.sum() for row in whole_row_logps(scored.tokens, where)]
        np.testing.assert_allclose(scored.scores, totals, atol=2e-5)
        assert scored.reference_logps is None


def test_ranking_by_the_optimal_policy_is_ranking_by_the_reward():
    random = np.random.default_rng(0)
    reference = random.normal(size=8)
    reference -= np.log(np.exp(reference).sum())
    reward, beta = random.normal(size=8), 0.5
    optimum = reference + reward / beta
    partition = np.log(np.exp(optimum).sum())
    optimum -= partition
    rows = [[np.array([v], np.float64)] for v in optimum], [[np.array([v])] for v in reference]
    one = [np.ones(1, bool)]
    implicit = np.concatenate(
        [implicit_rewards(p, r, one, beta) for p, r in zip(*rows, strict=True)]
    )
    np.testing.assert_allclose(reward - implicit, beta * partition, atol=1e-12)
    group = make_group("bandit", "Which?", [f"arm {k}" for k in range(8)])
    texts = [str(text) for text in group.completions]
    tokens = TokenizedGroup(np.zeros(1, np.int32), (np.zeros(1, np.int32),) * 8, "bandit")
    chosen = [
        make_ranking(group, GroupScores(by, tokens=tokens), texts)
        for by in (implicit, reward, reward + 1e3)
    ]
    orders = [[one.index for one in ranking.ranked] for ranking in chosen]
    assert orders[0] == orders[1] == orders[2] == list(np.argsort(-reward))
    # The log-probs of the optimum alone are another order: they have the reference in them.
    assert orders[0] != list(np.argsort(-optimum))


def test_long_completions_keep_small_differences():
    policy = [np.full(4000, -0.25, np.float32) + np.float32(1e-5)]
    reference = [np.full(4000, -0.25, np.float32)]
    (found,) = implicit_rewards(policy, reference, [np.ones(4000, bool)], 1.0)
    assert found == pytest.approx(4000 * float(policy[0][0] - reference[0][0]), rel=1e-6)


def test_beta_is_read_from_the_run(tmp_path):
    def settings(name, config, **given):
        folder = tmp_path / name
        if not folder.exists():
            write_adapter(folder, AdapterLayout(rank=2), config)
        return ImplicitRewardSettings.from_run(read_trained_run(folder), **given)

    assert settings("default", dpo_config()).beta == 0.1
    assert settings("given", dpo_config(beta=0.3)).beta == 0.3
    assert settings("option", dpo_config(loss_option={"beta": 0.4})).beta == 0.4
    assert settings("sum", dpo_config(loss="sft=0.5,sigmoid=1", beta=0.2)).beta == 0.2
    # Of a sum, that of the loss which is held to a reference: simpo's own default is 2.
    assert settings("mixed", dpo_config(loss="simpo=1,sigmoid=1")).beta == 0.1
    assert settings("ipo", dpo_config(loss="ipo")).per_token
    assert not settings("ipo", dpo_config(loss="ipo"), per_token=False).per_token
    kto = KTOConfig(model=str(TINY_MODEL), data="rows", beta=0.25)
    assert settings("kto", kto).beta == 0.25
    for name, made in (
        ("simpo", dpo_config(loss="simpo")),
        ("sft", SFTConfig(model=str(TINY_MODEL), data="rows")),
        ("own", dpo_config(loss="my_loss")),  # a function passed from Python
    ):
        with pytest.raises(
            ConfigError, match="has no β, because it was not trained against a reference; give --b"
        ):
            settings(name, made)
        assert settings(name, made, beta=1.5).beta == 1.5
    with pytest.raises(ConfigError, match=r"no config\.yaml in it.*give --beta"):
        settings("foreign", None)
    assert settings("foreign", None, beta=0.7).beta == 0.7
    with pytest.raises(ConfigError, match="--beta -1: must be above 0"):
        settings("default", dpo_config(), beta=-1)


def test_a_changed_reference_is_refused(tmp_path):
    first = write_adapter(tmp_path / "first", AdapterLayout(rank=2))
    folder = write_adapter(
        tmp_path / "run", AdapterLayout(rank=2), dpo_config(init_adapter=str(first))
    )
    hashes = {"hashes": {"init adapter": fingerprint_folder(first, "*adapter*")}}
    (folder / "fingerprints.json").write_text(json.dumps(hashes))
    load_implicit_reward(str(TINY_MODEL), folder)
    shutil.rmtree(first)
    write_adapter(first, AdapterLayout(rank=2), seed=9)
    with pytest.raises(ModelError, match="which has changed since the run began"):
        load_implicit_reward(str(TINY_MODEL), folder)
    # The one it started from, kept elsewhere, can be named.
    load_implicit_reward(str(TINY_MODEL), folder, reference_adapter=first)


def test_a_missing_reference_can_be_given(tmp_path):
    start = dpo_config(init_adapter=str(tmp_path / "gone"))
    folder = write_adapter(tmp_path / "run", AdapterLayout(rank=2), start)
    with pytest.raises(
        ModelError, match="pass the adapter it started from with --reference-adapter"
    ):
        load_implicit_reward(str(TINY_MODEL), folder)
    with pytest.raises(ModelError, match="--reference-adapter nowhere: no such folder"):
        load_implicit_reward(str(TINY_MODEL), folder, reference_adapter="nowhere")
    moved = write_adapter(tmp_path / "moved", AdapterLayout(rank=4, scale=5.0), seed=3)
    implicit = load_implicit_reward(str(TINY_MODEL), folder, reference_adapter=moved)
    (scored,) = implicit.score_groups([make_group("row", PROMPT, ANSWERS)])
    wanted = two_model_rewards(scored.tokens, folder, moved, 0.1)
    np.testing.assert_allclose(scored.scores, wanted, atol=1e-5)
    assert str(moved) in implicit.description


def test_common_layout():
    named = AdapterLayout(rank=4, num_layers=2, keys=("a", "b"))
    both = common_layout([named, AdapterLayout(rank=9, num_layers=3, keys=("b", "c"), scale=8.0)])
    assert both == AdapterLayout(rank=9, num_layers=3, keys=("a", "b", "c"), scale=named.scale)
    assert common_layout([named, AdapterLayout()]).keys is None
    assert common_layout([named, AdapterLayout()]).num_layers == -1
    assert common_layout([named, AdapterLayout("dora")]) is None


def test_only_assistant_turns_count(tmp_path):
    """Of a completion of several turns, the user's are there and do not count."""
    folder = write_adapter(tmp_path / "run", AdapterLayout(rank=4), dpo_config(beta=1.0))
    implicit = load_implicit_reward(str(TINY_MODEL), folder)
    turns = [Message("assistant", "yes"), Message("user", "and rain?"), Message("assistant", "no")]
    turns = [{"role": turn.role, "content": turn.content} for turn in turns]
    (scored,) = implicit.score_groups([make_group("row", PROMPT, [turns])])
    mask = scored.tokens.loss_masks[0]
    assert 0 < mask.sum() < len(mask)
    policy, reference = (whole_row_logps(scored.tokens, w)[0] for w in (folder, None))
    assert scored.scores[0] == pytest.approx((policy - reference)[mask].sum(), abs=1e-5)


# ---------------------------------------------------------------- mlx-align score


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Runs `mlx-align score` on a few pairs; exit code, output rows, what was printed."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": PROMPT, "chosen": assistant(chosen), "rejected": assistant(rejected), "id": i}
        for i, (chosen, rejected) in enumerate(pairwise(GIVEN))
    ]
    write_rows("pairs.jsonl", rows)

    def call(*options):
        Path("out.jsonl").unlink(missing_ok=True)
        where = ("--model", TINY_MODEL, "--data", "pairs.jsonl", "--output", "out.jsonl")
        code = mlx_align("score", *where, *options)
        captured = capsys.readouterr()
        if code:
            return code, [], captured.err
        return code, read_rows("out.jsonl"), captured.out

    return call


def test_score_by_implicit_reward_and_log_probs(score, tmp_path):
    folder = write_adapter(tmp_path / "run", AdapterLayout(rank=4), dpo_config(beta=0.5))
    before = fingerprint(folder)
    code, rows, out = score("--adapter-path", folder, "--json")
    assert code == 0
    implicit = load_implicit_reward(str(TINY_MODEL), folder)
    (scored,) = implicit.score_groups([make_group("row", PROMPT, GIVEN)])
    for i, row in enumerate(rows):
        assert row["id"] == i
        assert row["model_scores"] == pytest.approx(scored.scores[i : i + 2], abs=1e-6)
        logratios = np.subtract(row["policy_logps"], row["reference_logps"])
        np.testing.assert_allclose(0.5 * logratios, row["model_scores"], atol=1e-5)
    pairs = json.loads(out)["pairs"]
    margins = [row["model_scores"][0] - row["model_scores"][1] for row in rows]
    assert pairs["margin"] == pytest.approx(np.mean(margins), abs=1e-9)
    assert pairs["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert pairs["margin_low"] <= pairs["margin"] <= pairs["margin_high"]
    code, rows, out = score("--adapter-path", folder, "--logps", "--per-token")
    assert code == 0
    assert "log-probs of the completions, nats per token" in out
    assert "margin" in out
    totals = [row.sum() / len(row) for row in whole_row_logps(scored.tokens, folder)]
    for i, row in enumerate(rows):
        assert row["model_scores"] == pytest.approx(totals[i : i + 2], abs=1e-5)
        assert "reference_logps" not in row
    assert fingerprint(folder) == before


def test_score_errors(score, tmp_path):
    folder = write_adapter(tmp_path / "run", AdapterLayout(rank=2), dpo_config())
    for options, message in (
        (("--adapter-path", folder, "--combine", "min"), "--combine: has no effect on implicit"),
        (("--logps", "--beta", 0.2), "--beta: has no effect on --logps"),
        (("--logps", "--variance-penalty", 1), "--variance-penalty: has no effect on --logps"),
        (("--per-token",), "--per-token: has no effect on a reward model's scores"),
        (("--adapter-path", "nowhere"), "--adapter-path nowhere: no such folder"),
        ((), "not a reward model"),
    ):
        code, _, error = score(*options)
        assert code == 1
        assert message in error
        assert error.count("\n") == 1
