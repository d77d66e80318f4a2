"""TRL's numbers through the package's own forward pass: what a training step runs.

`test_trl_losses.py` compares the losses on log-probs of a plain slow function. Here the recorded
batches become tokenised groups and go through collating, shared prompts, the chunked head and the
objective, as one batch and accumulated one group at a time. All weights are trained, embeddings and
head too, because the recorded gradients are of all weights.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.families import make_model
from helpers.oracle import (
    BATCHES,
    DPO_CASES,
    ORACLE,
    SMALL,
    WAYS,
    assert_accumulation_is_exact,
    assert_same_update,
    case,
    check_numbers,
    collated_rows,
    dpo_loss_of,
    group_of,
    language_model,
    load,
    microbatches,
    pair_groups,
    random_groups,
    reference_near,
    scores,
    trainable_weights,
    update,
    zeros_like,
)
from mlx_lm.tuner.lora import LoRALinear

from mlx_align.algorithms.dpo import PreferenceObjective
from mlx_align.algorithms.kto import KtoLoss, UnpairedObjective
from mlx_align.algorithms.sft import SupervisedObjective
from mlx_align.data.batching import Microbatch, collate_groups, epoch_order
from mlx_align.data.buckets import Shape
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.losses.registry import (
    PAIRWISE_LOSSES,
    UNPAIRED_LOSSES,
    combine,
    parse_losses,
    resolve_options,
)
from mlx_align.models.forward import (
    completion_hidden_states,
    token_logprobs,
    token_logprobs_and_square_sums,
)
from mlx_align.models.loading import LanguageModel
from mlx_align.types import TokenizedGroup

# ---------------------------------------------------------------- TRL's cases


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    """Policy and reference with all weights trainable."""
    return {name: language_model(load(name)) for name in ("policy", "reference")}


@WAYS
@pytest.mark.parametrize("name", DPO_CASES)
def test_dpo_family(name, sizes, models):
    config, policy = case(name)["config"], models["policy"]
    key = "dpo_chat" if name.endswith("chat") else "dpo_text"
    key = "dpo_implicit" if "implicit" in name else key
    groups = pair_groups(key, config.get("max_length"))
    objective = PreferenceObjective(
        policy,
        dpo_loss_of(config),
        groups,
        scores(models["reference"], trainable_weights(models["reference"]), groups),
        make_logprob_scorer(policy),
        grad_checkpoint=False,
        wpo=config.get("use_weighting", False),
        ld_alpha=config.get("ld_alpha"),
    )
    loss, gradient, _ = update(policy, objective, trainable_weights(policy), microbatches(sizes))
    # As in test_trl_losses.py: e^(−a) is near 70 there, and TRL's own number 1.2e-5 off.
    check_numbers(case(name), name, loss, gradient, 2e-5 if "forward_kl" in name else 1e-5)


@WAYS
def test_dpo_with_lora(sizes, models):
    module, base = load("policy"), models["policy"]
    module.freeze()
    adapter, names = mx.load(str(ORACLE / "dpo_lora_r4_a8_adapter.safetensors")), {}
    for index, layer in enumerate(module.layers):
        for target in ("q_proj", "v_proj"):
            lora = LoRALinear.from_base(layer.self_attn[target], r=4, scale=8 / 4)
            stem = f"base_model.model.model.layers.{index}.self_attn.{target}"
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                (key,) = (k for k in adapter if k.startswith(f"{stem}.{theirs}."))
                lora[ours] = adapter[key].T
                names[f"model.layers.{index}.self_attn.{target}.{ours}"] = key
            layer.self_attn[target] = lora
    policy, groups = language_model(module), pair_groups("dpo_text")
    objective = PreferenceObjective(
        policy,
        combine(parse_losses("sigmoid"), {}),
        groups,
        scores(base, trainable_weights(base), groups),
        make_logprob_scorer(policy),
        grad_checkpoint=True,
    )
    loss, gradient, _ = update(policy, objective, trainable_weights(policy), microbatches(sizes))
    gradient = {names[key]: part.T for key, part in gradient.items()}
    check_numbers(case("dpo_lora_r4_a8"), "dpo_lora_r4_a8", loss, gradient)


@WAYS
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
def test_reference_free(name, losses, options, sizes, models):
    policy, groups = models["policy"], pair_groups("cpotrainer_text")
    loss = combine(parse_losses(losses), options)
    # TRL's hinge and ipo without a reference: log-ratios against a log-prob of 0.
    reference = zeros_like(groups) if loss.needs_reference else None
    objective = PreferenceObjective(
        policy, loss, groups, reference, make_logprob_scorer(policy), grad_checkpoint=False
    )
    check_numbers(
        case(name),
        name,
        *update(policy, objective, trainable_weights(policy), microbatches(sizes))[:2],
    )


@WAYS
def test_orpo(sizes, models):
    """TRL's NLL runs over the prompt too: ours is taken off, and one of whole rows put there."""
    policy, groups = models["policy"], pair_groups("orpotrainer_text")
    chosen = [(group.prompt, group.completions[0]) for group in groups]
    answers = [TokenizedGroup(prompt, (ids,), "") for prompt, ids in chosen]
    whole = [TokenizedGroup(p[:1], (np.concatenate([p[1:], ids]),), "") for p, ids in chosen]
    loss = combine(parse_losses("orpo"), {})
    checkpoint = {"grad_checkpoint": False}
    parts = (
        (PreferenceObjective(policy, loss, groups, None, None, **checkpoint), 1),
        (SupervisedObjective(policy, "nll", answers, **checkpoint), -1),
        (SupervisedObjective(policy, "nll", whole, **checkpoint), 1),
    )
    total, gradient = 0.0, {}
    for objective, sign in parts:
        value, part, _ = update(policy, objective, trainable_weights(policy), microbatches(sizes))
        total += sign * value
        gradient = {key: gradient.get(key, 0) + sign * g for key, g in part.items()}
    check_numbers(case("orpo"), "orpo", total, gradient)


@WAYS
@pytest.mark.parametrize("name", ["kto", "kto_swapped", "kto_weights", "kto_apo_zero_unpaired"])
def test_kto(name, sizes, models):
    config, batch = case(name)["config"], BATCHES["kto_text"]["collated"]
    policy, reference = (models[config.pop(role).split("/")[1]] for role in ("policy", "ref"))
    rows = zip(collated_rows(batch), collated_rows(batch, "KL_"), strict=True)
    groups = [group_of(pair, label=label) for pair, label in zip(rows, batch["label"], strict=True)]
    loss = config.pop("loss_type", "kto")
    objective = UnpairedObjective(
        policy,
        KtoLoss(loss, UNPAIRED_LOSSES[loss], resolve_options(loss, config)),
        groups,
        scores(reference, trainable_weights(reference), groups),
        make_logprob_scorer(policy),
        grad_checkpoint=False,
    )
    value, gradient, sums = update(
        policy, objective, trainable_weights(policy), microbatches(sizes)
    )
    check_numbers(case(name), name, value, gradient)
    metrics = case(name)["metrics"]
    if loss == "kto":
        assert sums["kl"] / 4 == pytest.approx(metrics["kl"], abs=1e-5)
    for kind in ("chosen", "rejected"):
        assert sums[f"rewards/{kind}"] / 2 == pytest.approx(metrics[f"rewards/{kind}"], abs=1e-5)
        assert sums[f"logps/{kind}"] / 2 == pytest.approx(metrics[f"logps/{kind}"], rel=1e-6)


@WAYS
@pytest.mark.parametrize(
    "name", ["sft_prompt_completion", "sft_full", "sft_dft", "sft_chat_assistant_only"]
)
def test_sft(name, sizes, models):
    policy = models["policy"]
    groups = [group_of([row]) for row in collated_rows(BATCHES[name]["collated"])]
    objective = SupervisedObjective(
        policy, "dft" if name == "sft_dft" else "nll", groups, grad_checkpoint=False
    )
    check_numbers(
        case(name),
        name,
        *update(policy, objective, trainable_weights(policy), microbatches(sizes))[:2],
    )


# ---------------------------------------------------------------- 8 x 1 is 1 x 8


@pytest.mark.parametrize("loss", [*PAIRWISE_LOSSES, "sigmoid=1,sft=0.2", "wpo", "ld"])
def test_pairs_accumulate_exactly(loss, tiny_policy):
    groups = random_groups(7, 2)
    extra = {"wpo": {"wpo": True}, "ld": {"ld_alpha": 0.3}}.get(loss, {})
    combined = combine(parse_losses("sigmoid" if extra else loss), {})
    reference = reference_near(tiny_policy, groups)
    assert_accumulation_is_exact(
        tiny_policy,
        PreferenceObjective(
            tiny_policy,
            combined,
            groups,
            reference if combined.needs_reference else None,
            make_logprob_scorer(tiny_policy),
            grad_checkpoint=False,
            **extra,
        ),
    )


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "kto", "nll"])
def test_microbatches_of_different_shapes_equal_one_large_batch(loss, tiny_policy):
    """Microbatches with a token budget: the update is that of all groups at once."""
    groups = random_groups(13, 1 if loss == "nll" else 2)
    log_probs = reference_near(tiny_policy, groups)
    checkpoint = {"grad_checkpoint": False}
    if loss == "nll":
        objective = SupervisedObjective(tiny_policy, loss, groups, **checkpoint)
    elif loss == "kto":
        kto = KtoLoss(loss, UNPAIRED_LOSSES[loss], resolve_options(loss, {}))
        scorer = make_logprob_scorer(tiny_policy)
        objective = UnpairedObjective(tiny_policy, kto, groups, log_probs, scorer, **checkpoint)
    else:
        made = combine(parse_losses(loss), {})
        scorer = make_logprob_scorer(tiny_policy)
        objective = PreferenceObjective(tiny_policy, made, groups, log_probs, scorer, **checkpoint)
    more = loss == "nll"  # so that a batch is not full there either
    shapes = [Shape(8, 8, 3 + more), Shape(8, 16, 2 + more)]
    several = epoch_order(groups, shapes, seed=0)
    assert {batch.shape for batch in several} == set(shapes)
    assert sorted(i for batch in several for i in batch.indices) == list(range(13))
    assert any(len(batch.indices) < batch.shape.groups for batch in several)
    whole = [Microbatch(tuple(range(13)), Shape(16, 16, 13))]
    results = [
        update(tiny_policy, objective, trainable_weights(tiny_policy), micro)
        for micro in (several, whole)
    ]
    assert_same_update(*results)


def test_square_sums_come_from_the_same_pass(tiny_policy, monkeypatch):
    """log Σ p² under both heads, equal to the full distribution's, without a pass of its own."""
    groups = random_groups(3, 2)
    batch = collate_groups(groups, SMALL._replace(groups=3))
    full = language_model(make_model("llama", seed=3))
    for model in (tiny_policy, full):
        hidden = completion_hidden_states(model.backbone, batch)
        logits = model.backbone.logits(hidden)
        logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        expected = mx.where(batch.completion_mask, mx.logsumexp(2 * logps, axis=-1), 0)
        passes = []
        original = type(model.backbone).logits

        def counting(self, hidden, original=original, passes=passes):
            passes.append(hidden.shape[0])
            return original(self, hidden)

        monkeypatch.setattr(type(model.backbone), "logits", counting)
        for training in (False, True):
            model.module.train(training)
            passes.clear()
            plain = token_logprobs(model.backbone, batch)
            asked_nothing = len(passes)
            passes.clear()
            values, squares = token_logprobs_and_square_sums(model.backbone, batch)
            assert len(passes) == asked_nothing
            assert mx.abs(values - plain).max().item() < 1e-6
            assert mx.abs(squares - expected).max().item() < 1e-5
        model.module.eval()
        monkeypatch.setattr(type(model.backbone), "logits", original)
