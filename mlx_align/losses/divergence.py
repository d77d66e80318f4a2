"""f-divergences: what takes the place of the log-ratio when the KL penalty is another one.

DPO's closed form holds for any f whose derivative is invertible and goes to −∞ at 0: the implicit
reward becomes β·f′(π/π_ref) plus a term of the prompt alone, which cancels between the two
completions of a pair. So only losses of the difference φ(a) − φ(d) can take one.
"""

from __future__ import annotations

import math
from typing import Annotated

import mlx.core as mx

from mlx_align.losses.numerics import log_sigmoid
from mlx_align.losses.options import Choice, UnitInterval

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
Divergence = Annotated[str, Choice(DIVERGENCES)]

# e^80 is the last round number whose difference to another still fits float32: beyond it a
# pair's score stops growing instead of becoming inf − inf.
MAX_EXPONENT = 80.0


def phi(logratio: mx.array, f_divergence: Divergence, f_alpha: UnitInterval) -> mx.array:
    """φ(x) = f′(e^x), elementwise, of log-ratios x in nats.

    reverse_kl: x; forward_kl: 1 − e^(−x); js: log 2 + ls(x); alpha: (e^((α−1)x) − 1)/(α−1), which
    runs from forward (α → 0) to reverse KL (α → 1). Exponents are clamped at 80.

    Source: Wang et al. 2024, "Beyond Reverse KL", table 1 (f′ there, of u = e^x).
    """
    if f_divergence == "reverse_kl":
        return logratio
    if f_divergence == "forward_kl":
        return -mx.expm1(mx.minimum(-logratio, MAX_EXPONENT))
    if f_divergence == "js":
        return math.log(2) + log_sigmoid(logratio)
    if f_divergence == "alpha":
        return mx.expm1(mx.minimum((f_alpha - 1) * logratio, MAX_EXPONENT)) / (f_alpha - 1)
    raise ValueError(f"f_divergence {f_divergence!r}: choose from {', '.join(DIVERGENCES)}")
