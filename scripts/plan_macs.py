"""Print what Macs of common memory sizes can train, as a table.

4-bit models of common shapes with the defaults of `mlx-align dpo` (LoRA of rank 16 on all linear
layers, one pair at a time, checkpointing): the peak for pairs of up to 1,024 tokens, and per
machine the longest pairs (`--max-seq-length`, half of it prompt) that fit in its recommended
working set. Computed as in `mlx-align plan`, whose constants were measured on mlx's CPU backend. To
check on a Mac:

    mlx-align plan --model MODEL --data DATA --machine "16 GB M2"  # for your own run
    python scripts/verify_plan.py --large                         # planned and measured peaks
"""

import argparse
from typing import get_args

from mlx_align.data.buckets import Shape
from mlx_align.planning.machine import parse_machine
from mlx_align.planning.memory import Attention, Workload, plan_memory
from mlx_align.planning.model_shape import Linear, ModelShape

MACS = (16, 24, 32, 48, 64)
LENGTHS = (256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
# Name, hidden, blocks, MLP, heads, key-value heads, head size, vocabulary, tied: from the
# models' config.json.
MODELS = (
    ("Qwen2.5 0.5B", 896, 24, 4864, 14, 2, 64, 151936, True),
    ("Qwen2.5 1.5B", 1536, 28, 8960, 12, 2, 128, 151936, True),
    ("Qwen2.5 3B", 2048, 36, 11008, 16, 2, 128, 151936, True),
    ("Qwen2.5 7B", 3584, 28, 18944, 28, 4, 128, 152064, False),
    ("Llama 3.1 8B", 4096, 32, 14336, 32, 8, 128, 128256, False),
    ("Qwen2.5 14B", 5120, 48, 13824, 40, 8, 128, 152064, False),
    ("Qwen2.5 32B", 5120, 64, 27648, 40, 8, 128, 152064, False),
)
# 4 bits, and 16 bits each for a scale and a bias of 64 weights.
BYTES_PER_WEIGHT = (4 + 32 / 64) / 8


def shape(
    hidden: int,
    blocks: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    size: int,
    vocabulary: int,
    tied: bool,
) -> ModelShape:
    """The shape of a 4-bit model with bf16 activations."""
    queries, keys = heads * size, kv_heads * size
    sizes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    linears = tuple(
        Linear(block, name, inputs, outputs, 1)
        for block in range(blocks)
        for name, (inputs, outputs) in sizes.items()
    )
    in_blocks = sum(linear.inputs * linear.outputs for linear in linears)
    outside = vocabulary * hidden * (1 if tied else 2)
    return ModelShape(
        weights_bytes=int((in_blocks + outside) * BYTES_PER_WEIGHT),
        blocks=blocks,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_width=keys,
        query_width=queries,
        vocabulary=vocabulary,
        activation_bytes=2,
        activation_dtype="BF16",
        quantised=True,
        bits=4,
        linears=linears,
        linear_bytes=int(in_blocks * BYTES_PER_WEIGHT),
    )


def peak(model: ModelShape, length: int, attention: Attention) -> int:
    """Bytes for one pair of `length` tokens, half of them the prompt's."""
    work = Workload((Shape(length // 2, length // 2, 1),), attention=attention)
    return plan_memory(model, work).peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--attention",
        choices=get_args(Attention),
        default="kernel",
        help="mlx's kernel, blocks, or all scores kept, as before mlx 0.32.4",
    )
    attention = parser.parse_args().attention
    machines = [parse_machine(f"{memory} GB") for memory in MACS]
    print(f"| 4-bit model | at 1,024 | {' | '.join(f'{memory} GB' for memory in MACS)} |")
    print("|---|---:|" + "---:|" * len(MACS))
    for name, *sizes in MODELS:
        model = shape(*sizes)
        cells = []
        for machine in machines:
            fitting = [n for n in LENGTHS if peak(model, n, attention) <= machine.working_set_bytes]
            cells.append(f"{fitting[-1]:,}" if fitting else "–")
        print(f"| {name} | {peak(model, 1024, attention) / 1e9:.1f} GB | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
