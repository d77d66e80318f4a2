"""Compare planned and measured peak memory on random llama models, and print a table.

Each configuration runs in its own process: a random model is written to a folder, its peak is
planned from the folder's config.json and safetensors headers, then it is loaded and trained as by
`mlx-align dpo` (or `reward`, `ppo`, `grpo`). `mx.get_peak_memory` is reset after the model is
loaded; it counts the weights.

    python scripts/verify_plan.py                # the table; on a Mac, this measures Metal
    python scripts/verify_plan.py --markdown     # as Markdown
    python scripts/verify_plan.py --large        # also a 4-bit Qwen2.5-7B's shape; an hour on a CPU

Exits with 1 if a planned peak is off by more than 10%. On Linux float32 is about 60 times faster
with LD_PRELOAD naming libopenblas (apt-get install libopenblas0-pthread).
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 0.10
SECONDS = 7200


@dataclass(frozen=True)
class Case:
    """A model and a workload; lengths in tokens."""

    name: str
    hidden: int = 256
    layers: int = 4
    intermediate: int = 704
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 8192
    dtype: str = "float32"  # or bf16, or 4-bit (with bf16 scales), or 4-bit float32 (with those)
    prompt: int = 128
    completion: int = 128
    batch_size: int = 1
    accumulation: int = 2
    rank: int = 16
    num_layers: int = -1
    fine_tune_type: str = "lora"
    grad_checkpoint: bool = True
    adapter_dtype: str = "float32"
    tied: bool = False  # the vocabulary head is the embedding
    reward: bool = False
    algorithm: str = ""  # ppo or grpo: one iteration, with a swapped reward model, instead of dpo
    group_size: int = 2
    family: str = "llama"
    others: dict[str, Any] = field(default_factory=dict)  # more of config.json


CASES = (
    Case("base"),
    Case("no checkpointing", grad_checkpoint=False),
    Case("8 blocks, 3 microbatches", layers=8, accumulation=3),
    Case("width 512", hidden=512, intermediate=1408, vocabulary=16384, prompt=64, completion=64),
    Case("vocabulary 32k", vocabulary=32768, completion=192, layers=6),
    Case("long, no checkpointing", prompt=320, completion=192, grad_checkpoint=False),
    Case("long prompts", prompt=448, completion=64),
    Case("batch 4", batch_size=4, prompt=64, completion=64, rank=32),
    Case("bf16", dtype="bf16", prompt=64, completion=64),
    Case("bf16, no checkpointing", dtype="bf16", prompt=64, completion=64, grad_checkpoint=False),
    Case("bf16 adapters", dtype="bf16", prompt=64, completion=64, adapter_dtype="bfloat16"),
    Case(
        "bf16 adapters, no checkpointing",
        dtype="bf16",
        prompt=64,
        completion=64,
        adapter_dtype="bfloat16",
        grad_checkpoint=False,
    ),
    Case("4-bit", dtype="4-bit", prompt=64, completion=64),
    Case("4-bit, last 2 of 4 blocks", 512, 4, 1408, dtype="4-bit", num_layers=2),
    Case("full fine-tuning", fine_tune_type="full"),
    Case("DoRA, 4-bit", dtype="4-bit", prompt=64, completion=64, fine_tune_type="dora"),
    Case("reward model", reward=True),
    Case("reward model, plain, batch 2", reward=True, grad_checkpoint=False, batch_size=2),
    Case("reward model, 4-bit", reward=True, dtype="4-bit"),
)
# Hybrids: proportions of Qwen3.5-9B, Qwen3-Next-80B-A3B and Kimi-Linear-48B-A3B, narrower and with
# fewer experts.
_DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
_NEXT = {
    **_DELTA,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10_000.0,
}
_KIMI = {
    "linear_attn_config": {
        "kda_layers": [1, 2, 3],
        "full_attn_layers": [4],
        "num_heads": 8,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
    "head_dim": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_experts": 16,
    "num_experts_per_token": 4,
    "moe_intermediate_size": 128,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "model_max_length": 4096,
    "rope_theta": 10_000.0,
}
_HYBRID = Case("", vocabulary=2048, heads=4, kv_heads=2)
_QWEN35 = replace(_HYBRID, name="hybrid, Qwen3.5", family="qwen3_5", others=_DELTA)
_QWEN_NEXT = replace(_HYBRID, name="hybrid, Qwen3-Next", family="qwen3_next", others=_NEXT)
_KIMI_LINEAR = replace(
    _HYBRID, name="hybrid, Kimi-Linear", heads=8, kv_heads=8, family="kimi_linear", others=_KIMI
)
HYBRIDS = tuple(
    replace(case, name=f"{case.name}{name}", **other)
    for case in (_QWEN35, _QWEN_NEXT, _KIMI_LINEAR)
    for name, other in (
        ("", {}),
        (", long prompts", {"prompt": 448, "completion": 64}),
        (", no checkpointing", {"grad_checkpoint": False}),
        (", bf16", {"dtype": "bf16", "prompt": 64, "completion": 64}),
    )
    # mlx's CPU backend multiplies unquantised experts in float32 only.
    if case is _QWEN35 or other.get("dtype") != "bf16"
)
# Iterations of on-policy algorithms, from sampling to the updates. The first two have the same
# number of tokens, and an adapter takes about the share of the peak (2.2%) that rank 16 takes in a
# 4-bit 7B.
_FOUR_ROLES = Case("four roles, DPO", prompt=96, completion=32, rank=11)
ON_POLICY = (
    _FOUR_ROLES,
    replace(_FOUR_ROLES, name="four roles, PPO", algorithm="ppo"),
    Case("on policy, PPO", algorithm="ppo", group_size=4, prompt=64, completion=32),
    Case("on policy, GRPO", algorithm="grpo", group_size=4, prompt=64, completion=32),
    Case(
        "on policy, GRPO, 4-bit",
        algorithm="grpo",
        group_size=8,
        dtype="4-bit",
        prompt=32,
        completion=24,
    ),
    Case(
        "on policy, PPO, mostly sampling",
        algorithm="ppo",
        group_size=8,
        accumulation=4,
        prompt=16,
        completion=16,
        kv_heads=8,
        layers=8,
    ),
)
# Allowed ratio of the peaks of a PPO update with four roles and a DPO update of the same tokens.
ROLES_ALLOWED = 1.15
# The cost of a large vocabulary: width and vocabulary of Qwen2.5-0.5B, compared with 8,000 words.
_HEAD = Case("", 896, 2, 2048, 14, 2, tied=True)
HEADS = tuple(
    replace(_HEAD, name=f"{words:,} words, {dtype}", vocabulary=words, dtype=dtype)
    for dtype in ("float32", "4-bit float32", "4-bit")
    for words in (8_000, 152_000)
)
# Qwen2.5-7B's shape. On mlx's CPU backend a 4-bit product does 2 to 8 GFLOP/s in float32, which
# makes these 15 to 35 minutes of a core each, and 0.3 to 1.4 in bf16.
_7B = Case(
    "7B",
    hidden=3584,
    intermediate=18944,
    heads=28,
    kv_heads=4,
    vocabulary=152064,
    dtype="4-bit float32",
    accumulation=1,
)
LARGE = (
    replace(_7B, name="7B, 2 blocks, 1,024 tokens", layers=2, prompt=512, completion=256),
    replace(_7B, name="7B, 4 blocks, 1,024 tokens", layers=4, prompt=512, completion=256),
    replace(_7B, name="7B, 28 blocks, 64 tokens", layers=28, prompt=32, completion=16),
)


def write_model(case: Case, folder: Path) -> dict[str, Any]:
    """A random model in `folder`, as mlx-lm writes one; its configuration."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model

    family = importlib.import_module(f"mlx_lm.models.{case.family}")
    config: dict[str, Any] = {
        "model_type": case.family,
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "intermediate_size": case.intermediate,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": case.vocabulary,
        "tie_word_embeddings": case.tied,
        **case.others,
    }
    mx.random.seed(0)
    model = family.Model(family.ModelArgs.from_dict(config))
    if not case.dtype.endswith("float32"):
        model.set_dtype(mx.bfloat16)
    if case.dtype.startswith("4-bit"):
        model, config = quantize_model(model, config, 64, 4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return config


def words_tokenizer() -> Any:
    """The starter's tokenizer without end tokens, so that all completions are of full length."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    tokenizer = load_tokenizer(ROOT / "data" / "starter" / "model")
    tokenizer._eos_token_ids = set()
    return tokenizer


def on_policy_work(case: Case) -> dict[str, Any]:
    """Fields of the workload that `dpo` does not set."""
    from mlx_align.planning.memory import Sampling

    if not case.algorithm:
        return {}
    prompts = case.batch_size * case.accumulation
    said = Sampling(prompts, 0, case.group_size, case.prompt, case.completion)
    return {"rows": case.group_size, "sampling": said, "critic": case.algorithm == "ppo"}


def peak_since() -> int:
    """The peak since the last call, bytes."""
    import mlx.core as mx

    peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    return int(peak)


def iterate(case: Case, model: Any, layout: Any, start: Any, shape: Any) -> dict[str, int]:
    """Two iterations of an on-policy algorithm, sampling to updates; peaks of the second, bytes.

    In the second iteration no two roles share arrays any more.
    """
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_map

    from mlx_align.algorithms.grpo import GRPO
    from mlx_align.algorithms.ppo import PPO
    from mlx_align.config import GRPOConfig, PPOConfig
    from mlx_align.models.heads import REWARD_HEAD, add_reward_head
    from mlx_align.models.policy import Policy
    from mlx_align.rollout.collector import RolloutCollector
    from mlx_align.rollout.reward_models import AdapterRewardModel
    from mlx_align.rollout.rewards import Rewards, RewardSettings
    from mlx_align.rollout.sampler import Prompt
    from mlx_align.system.memory_limit import MemoryLimit
    from mlx_align.types import PromptGroup, TokenizedGroup

    options = {
        "batch_size": case.batch_size,
        "grad_accumulation_steps": case.accumulation,
        "group_size": case.group_size,
        "max_completion_length": case.completion,
        "grad_checkpoint": case.grad_checkpoint,
        "update_epochs": 1,
        "learning_rate": 1e-4,
    }
    random = np.random.default_rng(0)
    prompts = []
    for i in range(case.batch_size * case.accumulation):
        ids = random.integers(0, case.vocabulary, case.prompt).astype(np.int32)
        prompts.append(Prompt(PromptGroup("", (), f"row {i}"), TokenizedGroup(ids, (), f"row {i}")))
    shapes = [shape]
    reward = tree_map(lambda array: array + 0, start)
    head = add_reward_head(model.backbone)
    head.freeze()
    reward[REWARD_HEAD] = {"weight": head.weight}
    mx.eval(reward)
    settings = RewardSettings(("length(target=40,unit='words')",), "a reward model", 1.0, 60.0)
    policy = Policy(model, layout, start)

    class NothingAhead(MemoryLimit):
        """Never lets mlx run ahead, so that the peak is what is needed."""

        @contextmanager
        def bounded(self, shapes: Collection[Any]) -> Iterator[None]:
            yield

        @contextmanager
        def suspended(self) -> Iterator[None]:
            yield

    scorer = AdapterRewardModel(model, reward, shapes)
    with Rewards(settings, scorer) as rewards, NothingAhead() as memory:
        if case.algorithm == "ppo":
            config = PPOConfig(**options, critic_warmup=0)
            collector = RolloutCollector(config, policy, reward, prompts, shapes, memory, rewards)
            algorithm = PPO(config, collector)
        else:
            config = GRPOConfig(**options)
            collector = RolloutCollector(config, policy, reward, prompts, shapes, memory, rewards)
            algorithm = GRPO(config, collector)
        mx.reset_peak_memory()
        peaks = {}
        for step in range(2):
            weights = algorithm.weights["policy"]
            sampled = collector.sample_and_reward(
                weights, collector.stream(0), step, lambda: None, dynamic_sampling=False
            )
            peaks["sampling"] = peak_since()
            batch = collector.add_logprobs(weights, *sampled)
            peaks["log-probs"] = peak_since()
            algorithm.update(batch, step, 1e-4)
            peaks["updates"] = peak_since()
    return peaks


def measure(case: Case) -> dict[str, Any]:
    """Planned and measured peaks, bytes."""
    import mlx.core as mx
    import numpy as np

    from mlx_align.algorithms.dpo import PreferenceObjective
    from mlx_align.algorithms.reward_modeling import RewardObjective
    from mlx_align.algorithms.update import make_optimizer
    from mlx_align.config import RewardConfig
    from mlx_align.data.batching import microbatch_stream
    from mlx_align.data.buckets import Shape
    from mlx_align.inference.scoring import make_logprob_scorer
    from mlx_align.losses.registry import combine, parse_losses
    from mlx_align.models.adapters import AdapterLayout, install_adapters, resolve_adapter_dtype
    from mlx_align.models.backbone import split_backbone
    from mlx_align.models.device import on_gpu
    from mlx_align.models.heads import REWARD_HEAD, add_reward_head
    from mlx_align.models.loading import LanguageModel, ModelFolder, load_module, set_memory_limits
    from mlx_align.planning.memory import ADAPTER_BYTES, Workload, plan_memory, trained_parameters
    from mlx_align.planning.model_shape import read_model_shape
    from mlx_align.training.metrics import Progress
    from mlx_align.training.offline import OfflineTrainer
    from mlx_align.types import TokenizedGroup

    shape = Shape(case.prompt, case.completion, case.batch_size)
    with tempfile.TemporaryDirectory() as name:
        config = write_model(case, Path(name))
        mx.clear_cache()
        work = Workload(
            (shape,),
            accumulation=case.accumulation,
            fine_tune_type=case.fine_tune_type,
            rank=case.rank,
            num_layers=case.num_layers,
            grad_checkpoint=case.grad_checkpoint,
            adapter_bytes=4 if case.adapter_dtype == "float32" else 2,
            vocabulary=not case.reward,
            attention="kernel" if on_gpu() else "scores",
            **on_policy_work(case),
        )
        read = read_model_shape(Path(name), config)
        if case.algorithm:
            tree = trained_parameters(read, work) * ADAPTER_BYTES
            work = replace(work, reward_model_bytes=tree)
        planned = plan_memory(read, work)
        # Without the check at load: a llama is known to share its prompts, and it takes long.
        folder = ModelFolder(
            case.name, Path(name), config, words_tokenizer() if case.algorithm else None
        )
        set_memory_limits()
        backbone = replace(split_backbone(load_module(Path(name))), mask_axes=0)
        model = LanguageModel(folder, backbone, shared=True, check="")
        computed = resolve_adapter_dtype(case.adapter_dtype, [mx.bfloat16])
        model = replace(model, adapter_dtype=computed)
    weights = mx.get_active_memory()
    layout = AdapterLayout(case.fine_tune_type, rank=case.rank, num_layers=case.num_layers)
    start = install_adapters(model.module, layout)
    if case.algorithm:
        before, began = mx.get_active_memory(), time.perf_counter()
        peaks = iterate(case, model, layout, start, shape)
        seconds = time.perf_counter() - began
        return {**numbers(planned, max(peaks.values()), weights, before, seconds), "peaks": peaks}
    random = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return random.integers(0, case.vocabulary, count).astype(np.int32)

    groups = [
        TokenizedGroup(
            tokens(case.prompt), (tokens(case.completion), tokens(case.completion)), f"row {i}"
        )
        for i in range(case.batch_size * case.accumulation)
    ]
    if case.reward:
        start[REWARD_HEAD] = add_reward_head(model.backbone).parameters()
        config = RewardConfig(batch_size=case.batch_size, grad_checkpoint=case.grad_checkpoint)
        objective = RewardObjective(model, groups, config)
    else:
        zeros = np.full(case.completion, -9, np.float32)
        objective = PreferenceObjective(
            model,
            combine(parse_losses("sigmoid"), {}),
            groups,
            [(zeros, zeros)] * len(groups),
            make_logprob_scorer(model),
            grad_checkpoint=case.grad_checkpoint,
        )
    optimizer = make_optimizer(start, 0.0)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    trainer = OfflineTrainer(
        model,
        objective,
        lambda begin: microbatch_stream(groups, [shape], seed=0, start=begin),
        start,
        optimizer,
        accumulation=case.accumulation,
        max_grad_norm=1.0,
    )
    with trainer.memory:
        trainer.step(Progress(), 1e-4)
    return numbers(planned, mx.get_peak_memory(), weights, before, time.perf_counter() - began)


def numbers(planned: Any, peak: int, weights: int, before: int, seconds: float) -> dict[str, Any]:
    return {
        "parts": dict(planned.parts),
        "moment": planned.moment,
        # With one update of one shape nothing runs ahead: the peak is what is needed.
        "planned": planned.needed_bytes,
        "measured": peak,
        "measured_weights": weights,
        "measured_trained_before": before - weights,
        "seconds": seconds,
    }


def in_own_process(case: Case) -> dict[str, Any]:
    """Run `measure` in a fresh process, without memory left over from other configurations."""
    # As mlx_align/cli/main.py sets it.
    environment = {"MLX_BFS_MAX_WIDTH": "1", **os.environ}
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(asdict(case))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{case.name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(cells: list[str], markdown: bool) -> str:
    if markdown:
        return "| " + " | ".join(cells) + " |"
    return f"{cells[0]:<30}" + "".join(f"{cell:>11}" for cell in cells[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers there")
    parser.add_argument("--only", metavar="NAME", help="cases whose name holds this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(Case(**json.loads(arguments.one)))))
        return
    cases = [*CASES, *HYBRIDS, *ON_POLICY, *HEADS, *(LARGE if arguments.large else ())]
    cases = [case for case in cases if not arguments.only or arguments.only in case.name]
    titles = ["MB", "weights", "(measured)", "trained", "rewards", "activ.", "attention", "head"]
    titles += ["planned", "measured", "off"]
    print(row(titles, arguments.markdown))
    if arguments.markdown:
        print("|---|" + "---:|" * (len(titles) - 1))
    worst, results = 0.0, []
    for case in cases:
        found = in_own_process(case)
        results.append({**asdict(case), **found})
        off = found["planned"] / found["measured"] - 1
        worst = max(worst, abs(off))
        parts = [f"{value / 1e6:.1f}" for value in list(found["parts"].values())[:-1]]
        parts.insert(1, f"{found['measured_weights'] / 1e6:.1f}")
        totals = [f"{found[name] / 1e6:.1f}" for name in ("planned", "measured")]
        print(row([case.name, *parts, *totals, f"{off:+.1%}"], arguments.markdown), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1))
    print(f"\nWorst: {worst:.1%}; allowed {ALLOWED:.0%}.")
    updates = {found["name"]: found.get("peaks", {}).get("updates") for found in results}
    ratio = 0.0
    if (four := updates.get("four roles, PPO")) is not None:
        dpo = next(found for found in results if found["name"] == _FOUR_ROLES.name)
        ratio = four / dpo["measured"]
        print(f"A PPO update with four roles: {ratio:.2f} of DPO's peak at the same tokens.")
    sys.exit(worst > ALLOWED or ratio > ROLES_ALLOWED)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
