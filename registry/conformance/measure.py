"""How the kit compares: relative error, correlation, and the bounds that belong to a dtype.

Shapes: B batch, S query length, H query heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from ...core import reference

# Relative errors of float32 and float64; those of half precision come from dense attention in the same dtype.
FLOAT_BOUNDS: Final = {"float64": 1e-12, "float32": 1e-5}
# lse is float32 whatever the inputs are, and its only rounding is that of their products.
HALF_LSE_BOUND: Final = 2e-5
# How much worse than PyTorch's dense attention a result in half precision may be.
HALF_FACTOR: Final = 2.0

GRADIENTS: Final = ("dq", "dk", "dv")
NAMES: Final = ("out", "lse", *GRADIENTS)


@attrs.frozen(kw_only=True)
class Finding:
    """One thing that a check looked at.

    Attributes:
        what: what was looked at: `dq`, `row 5`, `dtype=float16`.
        error: relative error, where something was measured.
        bound: the largest error that passes.
        correlation: cosine between actual and expected, where something was measured: near 1 for a lack of
            precision, far from 1 for another function.
        problem: what is wrong, or an empty string. A finding with a problem fails whatever its error.
    """

    what: str
    error: float | None = None
    bound: float | None = None
    correlation: float | None = None
    problem: str = ""

    @property
    def passed(self) -> bool:
        """No problem, and an error within the bound; NaN never passes."""
        if self.problem:
            return False
        return self.error is None or (self.bound is not None and self.error <= self.bound)

    @property
    def severity(self) -> float:
        """Error in units of the bound; infinite for a problem and for NaN."""
        if self.problem or (self.error is not None and not math.isfinite(self.error)):
            return math.inf
        return self.error / self.bound if self.error is not None and self.bound else 0.0

    def __str__(self) -> str:
        if self.problem:
            return f"{self.what}: {self.problem}"
        if self.error is None or self.bound is None:
            return f"{self.what}: as it should be"
        alike = "" if self.correlation is None else f", correlation {self.correlation:.6f}"
        return f"{self.what}: off by {self.error:.2g}, allowed {self.bound:.2g}{alike}"


def compare(what: str, actual: Tensor, expected: Tensor, bound: float) -> Finding:
    """`actual` against `expected`: the same shape, the same infinities, no NaN, and a small relative error."""
    if actual.shape != expected.shape:
        problem = f"has the shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        return Finding(what=what, problem=problem)
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = torch.isfinite(expected)
    stray = (~torch.isfinite(actual) & finite) | ((actual != expected) & ~finite)
    if stray.any():
        place = tuple(int(i) for i in stray.nonzero()[0])
        problem = (
            f"{int(stray.sum())} of {stray.numel()} values are {float(actual[place])} or the like where they should be "
            f"{float(expected[place]):.4g}, the first at {place}"
        )
        return Finding(what=what, problem=problem)
    a, e = actual[finite], expected[finite]
    return Finding(what=what, error=_relative(a, e), bound=bound, correlation=_correlation(a, e))


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the expected.

    Inputs are of order 1, so what should vanish (dq of a row with one key) is measured against 0.1 an element.
    """
    floor = 0.1 * max(1, expected.numel()) ** 0.5
    return float((actual - expected).norm() / expected.norm().clamp_min(floor))


def _correlation(actual: Tensor, expected: Tensor) -> float | None:
    norms = float(actual.norm() * expected.norm())
    return float(actual @ expected) / norms if norms > 0 else None


def random_like(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, *, seed: int) -> Tensor:
    """Standard normal numbers that depend on shape and seed alone, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def gradients(
    out: Tensor, lse: Tensor, inputs: Sequence[Tensor], dtype: torch.dtype, *, through_lse: bool
) -> dict[str, Tensor]:
    """dq, dk, dv for random upstream gradients, the same for all results of these shapes.

    Args:
        out: (B, S, H, D).
        lse: (B, H, S).
        inputs: query, key, value.
        dtype: the upstream gradients are rounded to it, as those of a backend in that dtype are.
        through_lse: also send a gradient (in float32, or float64 for float64) through lse.
    """
    dout, dlse = upstream(out.shape, lse.shape, dtype, out.device)
    outputs, grads = [out], [dout.to(out.dtype)]
    if through_lse:
        outputs.append(lse)
        grads.append(dlse.to(lse.dtype))
    return dict(zip(GRADIENTS, torch.autograd.grad(outputs, list(inputs), grads), strict=True))


def lse_form(query: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape (B, H, S) and dtype of the lse of queries (B, S, H, D): float32, or float64 for float64."""
    batch, length, heads, _ = query.shape
    return (batch, heads, length), torch.float64 if query.dtype == torch.float64 else torch.float32


def upstream(
    out_shape: Sequence[int], lse_shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The gradients of out, in `dtype`, and of lse, in float32 (float64 for float64), that `gradients` sends."""
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return random_like(out_shape, dtype, device, seed=1), random_like(lse_shape, lse_dtype, device, seed=2)


def half_bounds(inputs: Sequence[Tensor], *, is_causal: bool, scale: float | None = None) -> dict[str, float]:
    """Twice the error of PyTorch's dense attention on the same inputs, in their dtype, for out, dq, dk and dv."""
    dtype = inputs[0].dtype
    causal = is_causal and inputs[0].shape[1] == inputs[1].shape[1]  # SDPA aligns unequal lengths at their start
    leaves = [x.detach().requires_grad_() for x in inputs]
    query, key, value = (x.transpose(1, 2) for x in leaves)
    # Of a negative scale the negated queries: aten's kernels for CPUs mask before they scale.
    size, query = (scale, query) if scale is None or scale > 0 else (-scale, -query)
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=size, enable_gqa=True
    ).transpose(1, 2)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, lse = reference.attention(exact[0], exact[1], exact[2], is_causal=causal, scale=scale)
    actual = {"out": out, **gradients(out, lse, leaves, dtype, through_lse=False)}
    right = {"out": expected, **gradients(expected, lse, exact, dtype, through_lse=False)}
    errors = {
        name: _relative(x.detach().double().flatten(), right[name].detach().flatten()) for name, x in actual.items()
    }
    return {"lse": HALF_LSE_BOUND, **{name: HALF_FACTOR * error for name, error in errors.items()}}
