"""What the numerical tests share: inputs, the oracle's answer, and the error measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention.core import reference
from dilated_attention.core.attention import Attention
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.pattern import Pattern

NAMES = ("out", "lse", "dq", "dk", "dv")


def error(actual: Tensor, expected: Tensor, terms: float = 1.0) -> float:
    """Norm of the difference over the norm of the expected; infinities must agree, NaN is never equal.

    Inputs are of order 1, so what should vanish (dq of a row with a single key) is measured against 0.1 an element;
    where the sum of many terms should vanish, against 0.1 of `terms`, the size that such a sum has.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = torch.isfinite(expected)
    if actual.shape != expected.shape or not torch.equal(actual[~finite], expected[~finite]):
        return float("inf")
    expected_norm = expected[finite].norm().clamp_min(0.1 * terms * max(1, int(finite.sum())) ** 0.5)
    difference = (actual - expected)[finite].norm() / expected_norm
    return float(difference) if torch.isfinite(difference) else float("inf")


def inputs(geometry: Geometry, *, batch: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Random query, key, value that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, geometry.q_len, geometry.num_heads, head_dim)]
    shapes += [(batch, geometry.kv_len, geometry.num_kv_heads, head_dim)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def with_gradients(out: Tensor, lse: Tensor, tensors: Sequence[Tensor], *, through_lse: bool) -> list[Tensor]:
    """out, lse, dq, dk, dv for random gradients that depend on the shapes alone."""
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    outputs, grads = [out], [dout]
    if through_lse:
        dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.device, lse.dtype)
        outputs.append(lse)
        grads.append(dlse)
    return [out, lse, *torch.autograd.grad(outputs, list(tensors), grads)]


def ours(attention: Attention, tensors: Sequence[Tensor], geometry: Geometry, *, through_lse: bool) -> list[Tensor]:
    """The attention's out, lse, dq, dk, dv."""
    out, lse = attention(*tensors, return_lse=True, q_offset=geometry.q_offset, kv_offset=geometry.kv_offset)
    return with_gradients(out, lse, tensors, through_lse=through_lse)


def oracle(pattern: Pattern, tensors: Sequence[Tensor], geometry: Geometry, *, through_lse: bool) -> list[Tensor]:
    """The same five from the dense float64 definition, for the same values."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    out, lse = reference.attention(
        leaves[0],
        leaves[1],
        leaves[2],
        pattern=pattern,
        is_causal=geometry.is_causal,
        q_offset=geometry.q_offset,
        kv_offset=geometry.kv_offset,
    )
    return with_gradients(out, lse, leaves, through_lse=through_lse)
