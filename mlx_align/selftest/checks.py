"""The measurements of a self-test. Each runs in its own process (`python -m` this module).

A process that mlx aborts, or that uses too much memory, is then a line of the table, and memory
left over from one measurement does not count in the next.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes, quantize_model

from mlx_align.algorithms.dpo import PreferenceObjective
from mlx_align.algorithms.update import (
    accumulate,
    collate_microbatches,
    compiled_gradient,
    make_optimizer,
)
from mlx_align.data.batching import Microbatch, microbatch_stream
from mlx_align.data.buckets import Shape
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.losses.registry import combine, parse_losses
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.backbone import split_backbone
from mlx_align.models.generation import generate_groups
from mlx_align.models.loading import LanguageModel, ModelFolder, load_module, set_memory_limits
from mlx_align.models.verification import verify_forward
from mlx_align.models.weights import AdapterWeights
from mlx_align.planning.memory import MemoryPlan, Workload, plan_memory
from mlx_align.planning.model_shape import read_model_shape
from mlx_align.selftest.cases import Case, GradientCase, RandomModel, SamplingCase, StepCase
from mlx_align.training.metrics import Progress
from mlx_align.training.offline import OfflineTrainer
from mlx_align.types import TokenizedGroup

RANK = 8
# Updates of a step case; the first one also compiles.
UPDATES = 3


def run(case: Case) -> dict[str, Any]:
    """The numbers of a case, as JSON values; see the functions for their names."""
    if isinstance(case, GradientCase):
        return measure_gradient(case)
    return measure_step(case) if isinstance(case, StepCase) else measure_sampling(case)


# Models and pairs


def write_model(model: RandomModel, folder: Path) -> dict[str, Any]:
    """Write a random model as mlx-lm would; returns its configuration."""
    config: dict[str, Any] = {
        "model_type": model.family,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "intermediate_size": model.intermediate,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head,
        "vocab_size": model.vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
    }
    if model.family == "qwen3_5":
        keys, values = model.linear_heads
        config |= {
            "linear_num_key_heads": keys,
            "linear_num_value_heads": values,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            # Outputs of linear attention are normalised, and may be nearly 0 in a random model: a
            # small epsilon would then amplify rounding.
            "rms_norm_eps": 1e-2,
        }
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    module = model_class(args_class.from_dict(config))
    if model.precision != "float32":
        module.set_dtype(mx.bfloat16)
    if model.precision == "4-bit":
        module, config = quantize_model(module, config, 64, 4)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return config


def _load(path: Path, config: dict[str, Any]) -> LanguageModel:
    # Without the check at load, which takes long for a large vocabulary: both families share
    # prompts.
    backbone = replace(split_backbone(load_module(path)), mask_axes=0)
    return LanguageModel(ModelFolder("random", path, config, None), backbone, True, "")


def _random_pairs(vocabulary: int, lengths: Any) -> list[TokenizedGroup]:
    random = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray[Any, Any]:
        return random.integers(0, vocabulary, count).astype(np.int32)

    return [
        TokenizedGroup(tokens(prompt), tuple(map(tokens, completions)), f"pair {i}")
        for i, (prompt, *completions) in enumerate(lengths)
    ]


def _objective(model: LanguageModel, pairs: list[TokenizedGroup]) -> PreferenceObjective:
    # Near the log-probs of random tokens, so that no pair's loss is saturated.
    each = -float(np.log(model.folder.config["vocab_size"]))
    return PreferenceObjective(
        model,
        combine(parse_losses("sigmoid"), {}),
        pairs,
        [tuple(np.full(len(c), each, np.float32) for c in pair.completions) for pair in pairs],
        make_logprob_scorer(model),
        grad_checkpoint=True,
    )


# Loss and gradient


def measure_gradient(case: GradientCase) -> dict[str, Any]:
    """Loss and LoRA gradient on the default device and on the CPU.

    Returns:
        `loss`, `loss_cpu` and `loss_exact`: on the default device, on the CPU, and on the CPU with
            all weights in float32 (the same values).
        `error` and `error_cpu`: relative distances ‖gradient − exact‖ / ‖exact‖ of the gradients on
            the default device and on the CPU.
        `load_check`: In float32, what the check at load says on the default device.
    """
    with tempfile.TemporaryDirectory() as name:
        config = write_model(case.model, Path(name))
        model = _load(Path(name), config)
    start = install_adapters(model.module, AdapterLayout(rank=RANK))
    mx.random.seed(1)
    # Away from the start, at which half of the adapters have no gradient.
    weights = tree_map(lambda p: p + 0.02 * mx.random.normal(p.shape).astype(p.dtype), start)
    mx.eval(model.module.parameters(), weights)
    model.module.train()
    pairs = _random_pairs(case.model.vocabulary, case.pairs)
    loss, gradient = _dpo_gradient(model, weights, pairs, compiled=True)
    numbers: dict[str, Any] = {}
    if case.model.precision == "float32":
        model.module.eval()
        _, _, numbers["load_check"] = verify_forward(model.backbone, case.model.vocabulary)
        model.module.train()
    mx.set_default_device(mx.cpu)
    loss_cpu, gradient_cpu = _dpo_gradient(model, weights, pairs, compiled=False)
    model.module.update(tree_map(_in_float32, model.module.parameters()))
    loss_exact, exact = _dpo_gradient(model, weights, pairs, compiled=False)
    return {
        "loss": loss,
        "loss_cpu": loss_cpu,
        "loss_exact": loss_exact,
        "error": _distance(gradient, exact),
        "error_cpu": _distance(gradient_cpu, exact),
        **numbers,
    }


def _in_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _dpo_gradient(
    model: LanguageModel, weights: AdapterWeights, pairs: list[TokenizedGroup], *, compiled: bool
) -> tuple[float, dict[str, np.ndarray[Any, Any]]]:
    objective = _objective(model, pairs)
    width = max(len(c) for pair in pairs for c in pair.completions)
    shape = Shape(max(len(pair.prompt) for pair in pairs), width, len(pairs))
    micro = [Microbatch(tuple(range(len(pairs))), shape)]
    batches = [objective.collate(one) for one in micro]
    gradient: Any = (
        compiled_gradient(objective.loss) if compiled else mx.value_and_grad(objective.loss)
    )
    loss, _, grads = accumulate(
        gradient,
        weights,
        collate_microbatches(objective, batches, micro),
        objective.totals(batches),
    )
    flat = tree_flatten(grads)
    return float(loss), {name: np.array(g.astype(mx.float32), np.float64) for name, g in flat}


def _distance(got: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    off = sum(float(((got[name] - exact[name]) ** 2).sum()) for name in exact)
    return float((off / sum(float((array**2).sum()) for array in exact.values())) ** 0.5)


# Memory and time


def measure_step(case: StepCase) -> dict[str, Any]:
    """Updates of DPO with one pair, checkpointed, with LoRA on all linear layers.

    Returns:
        `peak` and `planned`: The peak of an update, and the plan's, bytes.
        `fixed`: Of the peak: weights, adapters and optimizer, bytes.
        `parts`: The plan's parts, bytes.
        `first_seconds` and `seconds`: Of the first update, and of the fastest later one.
        `tokens_per_second`: Of the latter; prompt tokens count once.
    """
    prompt, completion = case.length // 2, case.length // 4
    shape = Shape(prompt, completion, 1)
    work = Workload((shape,), accumulation=1, rank=RANK)
    with tempfile.TemporaryDirectory() as name:
        config = write_model(case.model, Path(name))
        mx.clear_cache()
        plan: MemoryPlan = plan_memory(read_model_shape(Path(name), config), work)
        set_memory_limits()
        model = _load(Path(name), config)
    start = install_adapters(model.module, AdapterLayout(rank=RANK))
    pairs = _random_pairs(case.model.vocabulary, [(prompt, completion, completion)])
    trainer = OfflineTrainer(
        model,
        _objective(model, pairs),
        lambda begin: microbatch_stream(pairs, [shape], seed=0, start=begin),
        start,
        make_optimizer(start, 0.0),
        accumulation=1,
        max_grad_norm=1.0,
    )
    mx.reset_peak_memory()
    with trainer.memory:
        results = [trainer.step(Progress(), 1e-4)]
        peak = mx.get_peak_memory()  # later updates may run ahead
        results += [trainer.step(Progress(), 1e-4) for _ in range(UPDATES - 1)]
    best = min(results[1:], key=lambda result: result.seconds)
    return {
        "peak": peak,
        "planned": plan.needed_bytes,
        "fixed": plan.parts["weights"] + plan.parts["adapters and optimizer"],
        "parts": dict(plan.parts),
        "first_seconds": results[0].seconds,
        "seconds": best.seconds,
        "tokens_per_second": best.tokens / best.seconds,
    }


def measure_sampling(case: SamplingCase) -> dict[str, Any]:
    """Sampling at temperature 1.

    Returns:
        `tokens_per_second`: Sampled tokens, all completions together.
        `seconds`: Time of the prompt and all completions.
    """
    with tempfile.TemporaryDirectory() as name:
        config = write_model(case.model, Path(name))
        module = load_module(Path(name))
    module.eval()
    (pair,) = _random_pairs(case.model.vocabulary, [(case.prompt,)])

    def sample(count: int) -> int:
        prompt = [int(token) for token in pair.prompt]
        groups = generate_groups(
            module, [prompt], case.group_size, [], max_tokens=count, temperature=1.0, seed=0
        )
        return sum(len(completion.tokens) for group in groups for completion in group)

    assert config["vocab_size"] == case.model.vocabulary
    sample(2)
    began = time.perf_counter()
    tokens = sample(case.completion)
    seconds = time.perf_counter() - began
    return {"tokens_per_second": tokens / seconds, "seconds": seconds}


# The process


def case_to_json(case: Case) -> str:
    """A case as text, for the command line of the process that runs it."""
    return json.dumps({"kind": type(case).__name__, **asdict(case)})


def case_from_json(text: str) -> Case:
    """The case that `case_to_json` wrote."""
    values = json.loads(text)
    kinds: tuple[type[Case], ...] = (GradientCase, StepCase, SamplingCase)
    kind = {k.__name__: k for k in kinds}[values.pop("kind")]
    model = values.pop("model")
    model["linear_heads"] = tuple(model["linear_heads"])
    if "pairs" in values:
        values["pairs"] = tuple(map(tuple, values["pairs"]))
    return kind(model=RandomModel(**model), **values)


if __name__ == "__main__":
    print(json.dumps(run(case_from_json(sys.argv[1]))))
