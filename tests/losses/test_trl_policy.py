"""The policy-gradient losses against TRL's own numbers: loss, metrics, gradients, advantages.

Like `test_trl_losses.py` and `test_trl_objectives.py`: on log-probs of a plain slow function,
and through collating, shared prompts and the chunked head, as one batch and accumulated one group
at a time. TRL 1.16 has no PPO: `ppo_*` are the formulas of its last one, rewritten in torch.

Not compared: TRL's `clip_ratio/low_min` and `high_max`, which are extrema over completions where
this package reports means.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers.oracle import (
    BATCHES,
    ONE_BY_ONE,
    ORACLE,
    SHAPE,
    TOGETHER,
    Row,
    case,
    check_numbers,
    group_of,
    load,
    microbatches,
)
from mlx.utils import tree_flatten, tree_map

from mlx_align.data.batching import collate_groups
from mlx_align.losses.masking import masked_mean, masked_sum
from mlx_align.losses.policy import POLICY_METHODS, PolicyMethod, policy_loss, policy_totals
from mlx_align.losses.value import value_loss
from mlx_align.models.backbone import split_backbone
from mlx_align.models.forward import token_logprobs_and_entropies
from mlx_align.rollout.advantages import (
    GROUP_ADVANTAGES,
    gae,
    leave_one_out,
    normalize_then_sum,
    token_rewards,
    whiten,
    zero_variance_share,
)
from mlx_align.rollout.reward_functions import combine
from mlx_align.types import PolicySample

BATCH = BATCHES["grpo"]
MASK = np.array(BATCH["completion_mask"], bool)
MAX_LENGTH = 32


def unpadded(side: str) -> list[list[int]]:
    pairs = zip(BATCH[f"{side}_ids"], BATCH[f"{side}_mask"], strict=True)
    return [[t for t, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


ROWS = [
    Row(prompt, completion, [True] * len(completion))
    for prompt, completion in zip(unpadded("prompt"), unpadded("completion"), strict=True)
]
GROUPS = [group_of(pair) for pair in zip(ROWS[0::2], ROWS[1::2], strict=True)]


@pytest.fixture(scope="module")
def policy() -> nn.Module:
    return load("policy")


@pytest.fixture(scope="module")
def reference_logps() -> mx.array:
    """(8, C) of the reference, plainly computed."""
    return plain_values(load("reference"), 1.0)[0]


def plain_values(model: nn.Module, temperature: float) -> tuple[mx.array, mx.array]:
    """Log-probs and entropies (8, C): rows one by one, all logits."""
    stacked = []
    for row in ROWS:
        tokens = mx.array([row.prompt + row.completion])
        logits = model(tokens[:, :-1])[0, len(row.prompt) - 1 :] / temperature
        every = nn.log_softmax(logits, axis=-1)
        logps = mx.take_along_axis(every, mx.array(row.completion)[:, None], axis=-1)[:, 0]
        entropies = -(mx.exp(every) * every).sum(-1)
        room = MASK.shape[1] - len(row.completion)
        stacked.append(mx.pad(mx.stack([logps, entropies]), [(0, 0), (0, room)]))
    both = mx.stack(stacked, axis=1)
    return both[0], both[1]


def shared_values(model: nn.Module, temperature: float, indices) -> tuple[mx.array, mx.array]:
    """The same of some of the groups, the package's way."""
    backbone = replace(split_backbone(model), temperature=temperature)
    groups = [GROUPS[i] for i in indices]
    batch = collate_groups(groups, SHAPE._replace(groups=len(groups)))
    logps, entropies = token_logprobs_and_entropies(backbone, batch)
    return logps[:, : MASK.shape[1]], entropies[:, : MASK.shape[1]]


def method_of(config: dict[str, Any]) -> PolicyMethod:
    """Our method for a recorded configuration of TRL's GRPO trainer."""
    loss = config["loss_type"]
    base = POLICY_METHODS["grpo" if loss == "bnpo" else loss]
    low = config.get("epsilon", 0.2)
    changes: dict[str, Any] = {
        "clip_low": low,
        "clip_high": config.get("epsilon_high", low),
        "delta": config.get("delta"),
        "entropy_quantile": 1 - config.get("top_entropy_quantile", 1.0),
        "off_policy_threshold": config.get("off_policy_mask_threshold"),
        "kl": "none",
    }
    if loss == "bnpo":
        changes["aggregation"] = "local_token_mean"
    if "importance_sampling_level" in config:
        changes["ratio"] = config["importance_sampling_level"]
    if "beta" in config:
        corrected = config.get("use_bias_correction_kl", True)
        changes["kl"] = "k3_corrected" if corrected else "k3"
    return replace(base, **changes)


def sample_of(config, logps, entropies, rows=slice(None)) -> PolicySample:
    old = logps if config["onpolicy"] else mx.array(BATCH["old_per_token_logps"])[rows]
    advantages = mx.array(BATCH["advantages"])[rows]
    return PolicySample(
        logps,
        old,
        mx.array(BATCH["ref_per_token_logps"])[rows],
        mx.broadcast_to(advantages[:, None], logps.shape),
        mx.array(MASK)[rows],
        mx.ones(logps.shape),
        entropies,
    )


def check_metrics(record, sums, absent=("clip_ratio/low_min", "clip_ratio/high_max")):
    weight = sums["weight"]
    assert weight == MASK.sum()
    expected = {k: v for k, v in record["metrics"].items() if k not in absent}
    got = {name: sums[name] / weight for name in expected}
    assert got == pytest.approx(expected, rel=2e-5, abs=1e-6)


def check_policy(name, model, sample_and_values, sizes, loss_tol=1e-5):
    """Accumulate a recorded GRPO case over microbatches of `sizes` groups and hold it to TRL's."""
    record = case(name)
    config, method = record["config"], method_of(record["config"])
    coefs = {"kl_coef": config.get("beta", 0.0), "entropy_coef": config.get("entropy_coef", 0.0)}
    temperature = config.get("temperature", 1.0)
    micro = [m.indices for m in microbatches(sizes)]
    rows = [slice(2 * m[0], 2 * m[-1] + 2) for m in micro]
    entropies = [sample_and_values(model, temperature, m)[1] for m in micro]
    totals = policy_totals([mx.array(MASK)[r] for r in rows], method, MAX_LENGTH, entropies)
    loss, grads, sums = 0.0, None, {}
    for m, r in zip(micro, rows, strict=True):

        def share(m=m, r=r):
            sample = sample_of(config, *sample_and_values(model, temperature, m), r)
            return policy_loss(method, sample, totals, **coefs)

        (value, metrics), part = nn.value_and_grad(model, share)()
        loss += value.item()
        grads = part if grads is None else tree_map(mx.add, grads, part)
        for key, metric in metrics.items():
            sums[key] = sums.get(key, 0.0) + metric.item()
    check_numbers(record, name, loss, dict(tree_flatten(grads)), loss_tol)
    if config.get("entropy_coef"):
        sums["entropy_coef"] = config["entropy_coef"] * sums["weight"]
    check_metrics(record, sums)


GRPO_CASES = sorted(path.stem for path in (ORACLE / "cases").glob("grpo_*.json"))


def test_all_recorded_cases_are_tested():
    counts = {
        kind: len(list((ORACLE / "cases").glob(f"{kind}_*.json")))
        for kind in ("grpo", "rloo", "adv", "ppo")
    }
    assert counts == {"grpo": 18, "rloo": 2, "adv": 6, "ppo": 3}


@pytest.mark.parametrize("name", GRPO_CASES)
def test_grpo_family_computed_directly(name, policy):
    check_policy(name, policy, lambda model, temperature, _: plain_values(model, temperature), (4,))


@pytest.mark.parametrize("name", GRPO_CASES)
@pytest.mark.parametrize("sizes", [TOGETHER, ONE_BY_ONE], ids=["batch", "accumulated"])
def test_grpo_family_through_the_package(name, sizes, policy):
    if name == "grpo_bnpo" and sizes == ONE_BY_ONE:
        pytest.skip("bnpo is the mean of a microbatch's tokens: another loss when it is split")
    policy.train()
    check_policy(name, policy, shared_values, sizes)
    policy.eval()


def test_mutants_of_the_cases_fail(policy, monkeypatch):
    """What a recorded case must notice."""
    values = {"logps": plain_values(policy, 1.0)}

    def held(name, **changes):
        record = case(name)
        method = replace(method_of(record["config"]), **changes)
        sample = sample_of(record["config"], *values["logps"])
        totals = policy_totals([mx.array(MASK)], method, MAX_LENGTH)
        loss, _ = policy_loss(method, sample, totals, kl_coef=record["config"].get("beta", 0.0))
        return loss.item() == pytest.approx(record["loss"], rel=1e-5)

    assert held("grpo_beta0.04")
    assert not held("grpo_beta0.04", kl="k3")
    assert not held("grpo_beta0.04", kl="k2")
    assert held("grpo_gspo")
    assert not held("grpo_gspo", ratio="token")
    assert held("grpo_dapo_cliphigher")
    assert not held("grpo_dapo_cliphigher", clip_high=0.02)
    assert not held("grpo_dapo_cliphigher", aggregation="sequence_mean")
    assert held("grpo_delta")
    assert not held("grpo_delta", delta=None)
    assert held("grpo_offpolicy_mask")
    assert not held("grpo_offpolicy_mask", off_policy_threshold=None)


# ---------------------------------------------------------------- RLOO


@pytest.mark.parametrize("name", ["rloo_beta0.05", "rloo_beta0_norm"])
@pytest.mark.parametrize("way", ["plain", "package"])
def test_rloo(name, way, policy, reference_logps):
    """TRL's RLOO is PPO's clip on whole completions; our preset has no ratio: the same gradient."""
    record = case(name)
    config = record["config"]
    logps, _ = plain_values(policy, 1.0)
    mask = mx.array(MASK)
    assert masked_sum(logps, mask).tolist() == pytest.approx(record["old_logps"], rel=1e-6)
    rewards = np.array(CASE_REWARDS)
    if config.get("beta", 0.05):
        kl = masked_mean(logps - reference_logps, mask, axis=None)
        assert kl.item() == pytest.approx(record["metrics"]["kl"], rel=1e-4)
        by_token = token_rewards(rewards, logps, reference_logps, MASK, 0.05)
        rewards = by_token.sum(axis=1)
    rewards = rewards.reshape(4, 2)
    assert zero_variance_share(rewards) == record["metrics"]["frac_reward_zero_std"]
    advantages = leave_one_out(rewards).reshape(-1)
    if config.get("normalize_advantages"):
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-4)
    assert advantages == pytest.approx(record["advantages"], rel=1e-4, abs=1e-5)

    trl = PolicyMethod("leave_one_out", "trajectory", aggregation="sequence_mean")
    ours = replace(POLICY_METHODS["rloo"], kl="none")
    given = mx.array(record["advantages"])[:, None]
    for method in (trl, ours):
        policy.train()

        def loss(method=method):
            if way == "plain":
                values = plain_values(policy, 1.0)
            else:
                values = shared_values(policy, 1.0, range(4))
            sample = PolicySample(
                values[0],
                logps,
                mx.zeros(logps.shape),
                mx.broadcast_to(given, logps.shape),
                mask,
                mx.ones(logps.shape),
                values[1],
            )
            totals = policy_totals([mask], method, MAX_LENGTH)
            return policy_loss(method, sample, totals, kl_coef=0.0)

        (value, metrics), grads = nn.value_and_grad(policy, loss)()
        policy.eval()
        if method is trl:
            # TRL's is 0 but for rounding: sums of 18 log-probs near −118, e^x of their noise.
            assert value.item() == pytest.approx(record["loss"], abs=1e-4)
        check_numbers(record, name, record["loss"], dict(tree_flatten(grads)))
        sums = {key: metric.item() for key, metric in metrics.items()}
        assert sums["entropy"] / sums["weight"] == pytest.approx(record["metrics"]["entropy"])
        for key in ("low_mean", "high_mean", "region_mean"):
            assert sums.get(f"clip_ratio/{key}", 0.0) == record["metrics"][f"clip_ratio/{key}"]


# ---------------------------------------------------------------- advantages

CASE_REWARDS = case("adv_grpo_group")["rewards_fixed"]


def lengths_reward() -> list[float]:
    """TRL's second reward of these cases: a tenth of the text's length."""
    _, tokenizer = mlx_lm.load(str(ORACLE / "models" / "policy"))
    texts = [tokenizer.decode(row.completion, skip_special_tokens=True) for row in ROWS]
    return [len(text) / 10 for text in texts]


@pytest.mark.parametrize(
    ("name", "advantage"),
    [
        ("adv_grpo_group", "group_std"),
        ("adv_grpo_batch", "batch_std"),
        ("adv_grpo_none", "centred"),
        ("adv_mask_truncated", "group_std"),
    ],
)
def test_group_advantages(name, advantage):
    record = case(name)
    rewards = np.array(record["rewards_fixed"]).reshape(4, 2)
    got = GROUP_ADVANTAGES[advantage](rewards).reshape(-1)
    assert got == pytest.approx(record["advantages"], rel=1e-5, abs=1e-6)
    if advantage != "batch_std":  # TRL looks at the deviation it scales by
        assert zero_variance_share(rewards) == record["metrics"]["frac_reward_zero_std"]


@pytest.mark.parametrize("name", ["adv_sum_2rewards", "adv_gdpo_2rewards"])
def test_advantages_of_several_rewards(name):
    record = case(name)
    rewards = np.array([record["rewards_fixed"], lengths_reward()]).reshape(2, 4, 2)
    assert rewards[1].mean() == pytest.approx(record["metrics"]["rewards/reward_len/mean"])
    weights = record["config"]["reward_weights"]
    table = combine(["task", "reward_len"], rewards.reshape(2, -1).T, weights)
    together = table.total.reshape(4, 2)
    assert together.mean() == pytest.approx(record["metrics"]["reward"])
    assert zero_variance_share(together) == record["metrics"]["frac_reward_zero_std"]
    if "multi_objective_aggregation" in record["config"]:
        got = normalize_then_sum(*table.by_group(2))
    else:
        got = GROUP_ADVANTAGES["group_std"](together)
    assert got.reshape(-1) == pytest.approx(record["advantages"], rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- PPO


@pytest.mark.parametrize("name", ["ppo_k1", "ppo_k3", "ppo_whiten"])
def test_ppo(name):
    """Rewards, advantages, returns, both losses and their gradients.

    There the score of a completion shorter than the batch is one position *behind* its last
    token, where the critic has a value too; k3 in the reward is there to be compared with.
    """
    record = case(name)
    config, inputs = record["config"], {k: np.array(v) for k, v in record["inputs"].items()}
    lengths, width = inputs["lengths"], inputs["values"].shape[1]
    position = np.arange(width)[None]
    mask, value_mask = position < lengths[:, None], position < lengths[:, None] + 1
    old, reference = inputs["old_logps"], inputs["ref_logps"]
    rewards = token_rewards(np.zeros(len(lengths)), old, reference, mask, config["kl_coef"])
    if config["kl"] == "k3":
        logratio = reference - old
        rewards = np.where(mask, -config["kl_coef"] * (np.exp(logratio) - 1 - logratio), 0.0)
    rewards[np.arange(len(lengths)), np.minimum(lengths, width - 1)] += inputs["scores"]
    if config["whiten_rewards"]:
        mean = rewards[value_mask].mean()
        rewards = np.where(value_mask, whiten(rewards, value_mask) + mean, 0.0)
    assert rewards == pytest.approx(np.array(record["rewards"]), abs=1e-6)
    raw, returns = gae(rewards, inputs["values"], value_mask, config["gamma"], config["lam"])
    assert raw == pytest.approx(np.array(record["gae_raw"]), abs=2e-6)
    assert returns == pytest.approx(np.array(record["returns"]), abs=2e-6)
    advantages = whiten(raw, mask)
    assert advantages == pytest.approx(np.array(record["advantages"]), abs=2e-6)

    method = POLICY_METHODS["ppo"]
    assert (method.clip_low, method.clip_high) == (config["cliprange"],) * 2
    real = mx.array(mask)
    totals = policy_totals([real], method, width)
    arrays = {k: mx.array(v.astype(np.float32)) for k, v in inputs.items()}
    targets = mx.array(returns.astype(np.float32))

    def losses(new, values):
        sample = PolicySample(
            new,
            arrays["old_logps"],
            arrays["ref_logps"],
            mx.array(advantages.astype(np.float32)),
            real,
            mx.ones(new.shape),
        )
        by_policy, _ = policy_loss(method, sample, totals, kl_coef=config["kl_coef"])
        clip, critic_mask = config["cliprange_value"], mx.array(value_mask)
        by_token = value_loss(values, arrays["values"], targets, critic_mask, clip=clip)
        by_critic = masked_mean(by_token, critic_mask, axis=None)
        return by_policy + config["vf_coef"] * by_critic, (by_policy, by_critic)

    (loss, parts), grads = mx.value_and_grad(losses, argnums=(0, 1))(
        arrays["new_logps"], arrays["vpred"]
    )
    got = [loss.item(), *(part.item() for part in parts)]
    assert got == pytest.approx([record[k] for k in ("loss", "pg_loss", "vf_loss")], rel=1e-5)
    expected = [np.array(record[k]) for k in ("d_new_logps", "d_vpred")]
    gaps = [np.square(np.array(g) - e).sum() for g, e in zip(grads, expected, strict=True)]
    assert math.sqrt(sum(gaps)) < 1e-4 * record["grad_norm"]
