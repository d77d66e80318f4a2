"""The offline losses against TRL's own numbers: loss, whole gradients, gradient norms.

`tests/oracle` holds what TRL 1.16 computed for one fixed batch of a tiny random llama (float32,
CPU); `scripts/make_oracle.py` makes it. Compared are the loss to 1e-5 relative, the norm of every
parameter's gradient to 1e-4, and where the full gradient is stored, ‖difference‖/‖gradient‖ to
1e-4. Log-probs come from a plain slow function (one unpadded row at a time, all logits), which is
a parameter of these tests.

Cases that the package does not have in this form, and how they are compared:

    case               why                                     compared as
    orpo               TRL's NLL includes the prompt; the      odds-ratio loss, plus NLL of the
                       paper's, and ours, does not             full rows
    cpo_hinge, cpo_ipo CPO is only the sigmoid loss here       hinge / ipo on log-probs instead
                                                               of log-ratios, + sft
    sft_full           prompts are never trained on here       rows with a prompt of one token
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.oracle import (
    BATCHES,
    DPO_CASES,
    ORACLE,
    Row,
    TokenLogps,
    case,
    check,
    check_numbers,
    collated_rows,
    dpo_loss_of,
    flat_log_square_sums,
    flat_token_logps,
    load,
    mask_of,
    pair_rows,
)
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.lora import LoRALinear

from mlx_align.losses import masking
from mlx_align.losses.pairwise import linear_loss, loss_and_logps_gradient, odds_ratio_loss
from mlx_align.losses.registry import TOKEN_LOSSES, UNPAIRED_LOSSES, combine, parse_losses
from mlx_align.losses.reward import reward_bt
from mlx_align.losses.unpaired import kto_kl
from mlx_align.types import PairLogps


@pytest.fixture(params=[flat_token_logps], ids=["flat"])
def token_logps_fn(request) -> TokenLogps:
    return request.param


# ---------------------------------------------------------------- rows, models, records


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: load(name) for name in ("policy", "reference")}


# ---------------------------------------------------------------- pairs with a reference


@pytest.mark.parametrize("name", DPO_CASES)
def test_dpo_family(name, models, token_logps_fn):
    config = case(name)["config"]
    key = "dpo_chat" if name.endswith("chat") else "dpo_text"
    rows = pair_rows("dpo_implicit" if "implicit" in name else key, config.get("max_length"))
    policy, mask = models["policy"], mask_of(rows)
    reference = mx.stop_gradient(token_logps_fn(models["reference"], rows))
    weight = None
    if "ld_alpha" in config:
        weight = masking.ld_mask(mask, masking.shared_lengths(mask), config["ld_alpha"])
    loss = dpo_loss_of(config)
    mean_chosen_length = mx.mean(masking.lengths(mask)[0::2])

    def loss_fn() -> mx.array:
        logps = token_logps_fn(policy, rows)
        pairs = masking.pair_logps(logps, reference, mask, mx.ones(4), weight)
        values = loss(pairs, mean_chosen_length)
        if config.get("use_weighting"):
            weights = masking.wpo_weight(logps, flat_log_square_sums(policy, rows), mask)
            values = values * weights[0::2] * weights[1::2]
        return masking.weighted_sum(values, mx.ones(4)) / 4

    # e^(−a) is near 70 there: TRL's own float32 number is 1.2e-5 from float64, ours 0.3e-5.
    check(name, policy, loss_fn, 2e-5 if "forward_kl" in name else 1e-5)


@pytest.mark.parametrize("name", ["dpo_aot", "dpo_aot_unpaired", "dpo_mpo_sigmoid+bco_pair+sft"])
def test_one_pair_at_a_time_is_one_batch(name, models, token_logps_fn):
    """Microbatches of one pair add up to TRL's batch of four, also where the loss sorts."""
    rows, policy = pair_rows("dpo_text"), models["policy"]
    mask, loss = mask_of(rows), dpo_loss_of(case(name)["config"])
    reference = token_logps_fn(models["reference"], rows)
    mean_chosen_length = mx.mean(masking.lengths(mask)[0::2])

    def pair(index: int) -> PairLogps:
        at = slice(2 * index, 2 * index + 2)
        logps = token_logps_fn(policy, rows[at])
        width = logps.shape[1]
        return masking.pair_logps(logps, reference[at, :width], mask[at, :width], mx.ones(1))

    if loss.couples_batch:
        update = PairLogps(*(mx.concatenate(f) for f in zip(*map(pair, range(4)), strict=True)))
        values, by_logps = loss_and_logps_gradient(loss, update, mean_chosen_length)

    total, gradient = 0.0, {}
    for index in range(4):

        def loss_fn(index: int = index) -> mx.array:
            if loss.couples_batch:
                return linear_loss(
                    pair(index), PairLogps(*(f[index : index + 1] for f in by_logps))
                )
            return mx.sum(loss(pair(index), mean_chosen_length)) / 4

        value, tree = nn.value_and_grad(policy, loss_fn)()
        total += value.item()
        for key, part in tree_flatten(tree):
            gradient[key] = part + gradient.get(key, 0)
    total = mx.mean(values).item() if loss.couples_batch else total
    check_numbers(case(name), name, total, gradient)


def test_dpo_with_lora(token_logps_fn):
    policy, base, rows = load("policy"), load("policy"), pair_rows("dpo_text")
    policy.freeze()
    adapter, names = mx.load(str(ORACLE / "dpo_lora_r4_a8_adapter.safetensors")), {}
    for index, layer in enumerate(policy.layers):
        for target in ("q_proj", "v_proj"):
            lora = LoRALinear.from_base(layer.self_attn[target], r=4, scale=8 / 4)
            stem = f"base_model.model.model.layers.{index}.self_attn.{target}"
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                (key,) = (k for k in adapter if k.startswith(f"{stem}.{theirs}."))
                lora[ours] = adapter[key].T
                names[f"model.layers.{index}.self_attn.{target}.{ours}"] = key
            layer.self_attn[target] = lora
    mask = mask_of(rows)
    reference = token_logps_fn(base, rows)
    loss = combine(parse_losses("sigmoid"), {})

    def loss_fn() -> mx.array:
        pairs = masking.pair_logps(token_logps_fn(policy, rows), reference, mask, mx.ones(4))
        return mx.mean(loss(pairs, 1.0))

    value, tree = nn.value_and_grad(policy, loss_fn)()
    gradient = {names[key]: part.T for key, part in tree_flatten(tree)}
    check_numbers(case("dpo_lora_r4_a8"), "dpo_lora_r4_a8", value.item(), gradient)


# ---------------------------------------------------------------- pairs without one


@pytest.mark.parametrize(
    ("name", "losses", "options"),
    [
        ("cpo_sigmoid", "cpo", {}),
        ("cpo_hinge", "hinge,sft", {}),
        ("cpo_ipo", "ipo,sft", {}),
        ("cpo_simpo_alpha0", "simpo", {"gamma": 0.5}),
        ("cpo_simpo_alpha1", "simpo=1,sft=1", {"gamma": 0.5}),
        ("cpo_alphapo", "alphapo", {"gamma": 0.5}),
    ],
)
def test_reference_free(name, losses, options, models, token_logps_fn):
    rows, policy = pair_rows("cpotrainer_text"), models["policy"]
    mask, loss = mask_of(rows), combine(parse_losses(losses), options)

    def loss_fn() -> mx.array:
        logps = token_logps_fn(policy, rows)
        pairs = masking.pair_logps(logps, mx.zeros(logps.shape), mask, mx.ones(4))
        return mx.mean(loss(pairs, mx.mean(pairs.chosen_length)))

    check(name, policy, loss_fn)


def test_orpo(models, token_logps_fn):
    rows, policy = pair_rows("orpotrainer_text"), models["policy"]
    whole = [
        Row(tokens[:1], tokens[1:], [True] * (len(tokens) - 1))
        for tokens in (row.prompt + row.completion for row in rows[0::2])
    ]
    mask, whole_mask = mask_of(rows), mask_of(whole)

    def loss_fn() -> mx.array:
        logps = token_logps_fn(policy, rows)
        pairs = masking.pair_logps(logps, mx.zeros(logps.shape), mask, mx.ones(4))
        nll = TOKEN_LOSSES["nll"](token_logps_fn(policy, whole))
        return masking.masked_mean(nll, whole_mask, None) + 0.1 * mx.mean(odds_ratio_loss(pairs))

    check("orpo", policy, loss_fn)


# ---------------------------------------------------------------- single completions


@pytest.mark.parametrize("name", ["kto", "kto_swapped", "kto_weights", "kto_apo_zero_unpaired"])
def test_kto(name, models, token_logps_fn):
    config, batch = case(name)["config"], BATCHES["kto_text"]["collated"]
    policy, reference = (models[Path(config[role]).name] for role in ("policy", "ref"))
    rows, mismatched = collated_rows(batch), collated_rows(batch, "KL_")
    desirable = mx.array(batch["label"])

    def logratios(rows: list[Row]) -> mx.array:
        difference = token_logps_fn(policy, rows) - mx.stop_gradient(
            token_logps_fn(reference, rows)
        )
        return masking.masked_sum(difference, mask_of(rows))

    kl = kto_kl(logratios(mismatched), mx.ones(4))
    assert (kl.item() > 0) == (name == "kto_swapped")  # elsewhere it is clamped
    loss = UNPAIRED_LOSSES[config.pop("loss_type", "kto")]
    options = {k: v for k, v in config.items() if k.endswith("weight")}
    point = (kl,) if loss.needs_kl else ()

    def loss_fn() -> mx.array:
        return mx.mean(loss.function(logratios(rows), desirable, *point, **options))

    check(name, policy, loss_fn)


@pytest.mark.parametrize(
    "name", ["sft_prompt_completion", "sft_full", "sft_dft", "sft_chat_assistant_only"]
)
def test_sft(name, models, token_logps_fn):
    rows, policy = collated_rows(BATCHES[name]["collated"]), models["policy"]
    mask, loss = mask_of(rows), TOKEN_LOSSES["dft" if name == "sft_dft" else "nll"]

    def loss_fn() -> mx.array:
        values = loss(token_logps_fn(policy, rows))
        return masking.masked_sum(values, mask, None) / mx.sum(mask)

    check(name, policy, loss_fn)


# ---------------------------------------------------------------- scores


class RewardModel(nn.Module):
    """The tiny llama with a scalar head on its last token."""

    def __init__(self) -> None:
        super().__init__()
        folder = ORACLE / "models" / "reward"
        config = json.loads((folder / "config.json").read_text())
        self.model = llama.LlamaModel(llama.ModelArgs.from_dict(config))
        self.score = nn.Linear(config["hidden_size"], 1, bias=False)
        self.load_weights(str(folder / "model.safetensors"))

    def __call__(self, tokens: list[int]) -> mx.array:
        return self.score(self.model(mx.array([tokens]))[0, -1])[0]


@pytest.mark.parametrize("name", ["reward_bt", "reward_bt_center0.01", "reward_bt_margin"])
def test_reward(name):
    config, rows, model = case(name)["config"], BATCHES["reward_text"]["rows"], RewardModel()
    margin = mx.array(config["margin"] or [0.0] * 4)
    center = config.get("center_rewards_coefficient", 0.0)

    def loss_fn() -> mx.array:
        chosen = mx.stack([model(row["chosen_ids"]) for row in rows])
        rejected = mx.stack([model(row["rejected_ids"]) for row in rows])
        return mx.mean(reward_bt(chosen, rejected, margin, center=center))

    check(name, model, loss_fn)
