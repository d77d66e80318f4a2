"""The checks of a self-test: what is computed, at which sizes, and in which order.

Models are random and made on the spot. A check that compares with the CPU is small at any size of
the self-test, because the CPU has to compute it too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Precision = Literal["float32", "bf16", "4-bit"]
Size = Literal["small", "full"]


@dataclass(frozen=True)
class RandomModel:
    """A random model: a Llama, or a hybrid with linear attention as Qwen3.5's.

    Attributes:
        family: mlx-lm's model type.
        hidden: Width of the residual stream.
        layers: Number of blocks; every fourth of a hybrid has full attention.
        intermediate: Width of the MLP.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head: Size of a head of full attention.
        vocabulary: Rows of the embedding and of the untied vocabulary head.
        precision: Type of the weights; 4-bit has scales and activations in bf16.
        linear_heads: Heads of keys and of values of linear attention, of size 128.
    """

    family: Literal["llama", "qwen3_5"] = "llama"
    hidden: int = 128
    layers: int = 2
    intermediate: int = 320
    heads: int = 2
    kv_heads: int = 1
    head: int = 64
    vocabulary: int = 512
    precision: Precision = "float32"
    linear_heads: tuple[int, int] = (16, 16)


@dataclass(frozen=True)
class GradientCase:
    """Loss and gradient of a DPO update, on the GPU and on the CPU.

    Attributes:
        name: Shown in the table.
        model: The model.
        pairs: For each pair the lengths of prompt, chosen and rejected completion, tokens.
    """

    name: str
    model: RandomModel
    pairs: tuple[tuple[int, int, int], ...] = ((70, 40, 9), (33, 12, 65))


@dataclass(frozen=True)
class StepCase:
    """Peak memory and time of DPO updates with one pair of `length` tokens.

    Half of them are the prompt's, and a quarter each completion's.

    Attributes:
        name: Shown in the table.
        model: The model.
        length: Tokens.
        twice: Name of the case with half the length, with which the peak is compared.
    """

    name: str
    model: RandomModel
    length: int
    twice: str | None = None


@dataclass(frozen=True)
class SamplingCase:
    """Speed of sampling a group of completions.

    Attributes:
        name: Shown in the table.
        model: The model.
        prompt: Length of the prompt, tokens.
        completion: Length of the completions, tokens.
        group_size: Completions of the prompt.
    """

    name: str
    model: RandomModel
    prompt: int
    completion: int
    group_size: int = 8


Case = GradientCase | StepCase | SamplingCase


def cases(size: Size) -> list[Case]:
    """All checks in the order in which they run: the most important first."""
    # mlx's kernel of linear attention needs 16 heads of keys. Without a GPU, two are enough.
    heads = (16, 16) if size == "full" else (2, 2)
    found: list[Case] = []
    precisions: tuple[Precision, ...] = ("float32", "bf16", "4-bit")
    for precision in precisions:
        llama = RandomModel(precision=precision)
        hybrid = RandomModel("qwen3_5", layers=4, precision=precision, linear_heads=heads)
        found.append(GradientCase(f"gradient, {precision}", llama))
        found.append(GradientCase(f"gradient of a hybrid, {precision}", hybrid))
    return [*found, *(_full() if size == "full" else _small())]


def _small() -> list[Case]:
    # In float32: on a CPU, 4-bit products in bf16 take some hundred times as long.
    llama = RandomModel(hidden=256, intermediate=704, heads=4, vocabulary=4096)
    hybrid = replace(llama, family="qwen3_5", layers=4, linear_heads=(2, 4))
    return [
        StepCase("256 tokens", llama, 256),
        StepCase("512 tokens", llama, 512, twice="256 tokens"),
        StepCase("256 tokens, hybrid", hybrid, 256),
        SamplingCase("sampling", llama, prompt=32, completion=16),
    ]


def _full() -> list[Case]:
    llama = RandomModel("llama", 1024, 4, 2816, 8, 2, 128, 32_000, "4-bit")
    # Width, heads, MLP and vocabulary of Qwen2.5-7B, and of Qwen3.5-9B.
    seven_b = RandomModel("llama", 3584, 4, 18_944, 28, 4, 128, 152_064, "4-bit")
    nine_b = RandomModel("qwen3_5", 4096, 4, 12_288, 16, 4, 256, 248_320, "4-bit", (16, 32))
    return [
        StepCase("4,096 tokens", llama, 4096),
        StepCase("8,192 tokens", llama, 8192, twice="4,096 tokens"),
        StepCase("4 blocks of a 7B, 1,024 tokens", seven_b, 1024),
        StepCase("4 blocks of a hybrid 9B, 1,024 tokens", nine_b, 1024),
        SamplingCase("sampling, 4 blocks of a 7B", seven_b, prompt=512, completion=128),
    ]
