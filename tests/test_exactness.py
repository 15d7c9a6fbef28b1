"""build_attention against the float64 oracle: out, lse, dq, dk, dv, and gradients through lse."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention import Dilated, Full, Global, Local, Random, Strided, build_attention
from dilated_attention.backends.aten import CpuFlash
from dilated_attention.core import merging
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DensePiece
from dilated_attention.core.pattern import Pattern

from . import strategies
from .kernel_kit import check_emulated
from .support import NAMES, error, inputs, oracle, ours

LONGNET = Dilated(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
PATTERNS: list[Pattern] = [
    Full(),
    LONGNET,
    Dilated(segment_lengths=(10, 23, 50, 23), dilation_rates=(3, 5, 7, 5)),
    Dilated(segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4), offsets="blocked"),
    Dilated(segment_lengths=(16, 32), dilation_rates=(2, 4), heads="split"),
    Local(window_size=9),
    Local(window_size=(70, 3)),
    Strided(stride=3),
    Local(window_size=5) | Global(tokens=3),
    Local(window_size=5) + LONGNET,
    LONGNET | Local(window_size=6),
    Strided(stride=4) + Strided(stride=4) + Full(),
]
HALF = Geometry.self_attention(389, 4)


def check(
    pattern: Pattern, geometry: Geometry, dtype: torch.dtype, bound: float, *, batch: int = 2, through_lse: bool = True
) -> None:
    attention = build_attention(
        pattern=pattern,
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=8,
        is_causal=geometry.is_causal,
        dtype=dtype,
        backend="sdpa",
    )
    tensors = inputs(geometry, batch=batch, head_dim=8, dtype=dtype)
    actual = ours(attention, tensors, geometry, through_lse=through_lse)
    expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
    # dk of a lone key vanishes: as many terms as dv has, each the rounding of a difference of numbers of order 1.
    summed = {"dk": max(1.0, float(expected[4].square().mean().sqrt()))}
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e, summed.get(name, 1.0)) < bound, (name, pattern, geometry)


@given(strategies.patterns(), strategies.geometries(), st.sampled_from([1, 2, 3]), st.booleans())
@example(Full(), Geometry(q_len=1, kv_len=40, num_heads=4, num_kv_heads=2, is_causal=True), 2, True)
@example(LONGNET, Geometry(q_len=12, kv_len=11, num_heads=4, num_kv_heads=4, is_causal=True, kv_offset=1), 3, True)
@example(Dilated((99,), (3,)), Geometry(q_len=99, kv_len=99, num_heads=4, num_kv_heads=2, is_causal=False), 2, True)
@example(Full(), Geometry(q_len=24, kv_len=1, num_heads=4, num_kv_heads=1, is_causal=False), 1, False)
@settings(max_examples=150, deadline=None)
def test_random_configurations_agree_in_float32(
    pattern: Pattern, geometry: Geometry, batch: int, through_lse: bool
) -> None:
    check(pattern, geometry, torch.float32, 1e-5, batch=batch, through_lse=through_lse)


@given(strategies.patterns(), strategies.geometries(max_len=40))
@settings(max_examples=60, deadline=None)
def test_random_configurations_agree_in_float64(pattern: Pattern, geometry: Geometry) -> None:
    check(pattern, geometry, torch.float64, 1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_over_several_blocks(pattern: Pattern, is_causal: bool) -> None:
    geometry = Geometry(q_len=389, kv_len=389, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    check(pattern, geometry, torch.float32, 1e-5)


@functools.cache
def dense_errors(dtype: torch.dtype, is_causal: bool) -> list[float]:
    """Of out, lse (a bound, of float32), dq, dk and dv of dense `scaled_dot_product_attention`, for `HALF`'s inputs."""
    tensors = inputs(HALF, batch=1, head_dim=64, dtype=dtype)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), is_causal=is_causal)  # type: ignore[misc,arg-type]
    exact = oracle(Full(), tensors, attrs.evolve(HALF, is_causal=is_causal), through_lse=False)
    dout = torch.randn(dense.transpose(1, 2).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(dense.transpose(1, 2), tensors, dout.to(dtype))
    return [
        error(dense.transpose(1, 2), exact[0]),
        1e-5,
        *(error(a, e) for a, e in zip(grads, exact[2:], strict=True)),
    ]


# Every pattern in both dtypes, with and without causality; neighbours have the other pairs of them.
@pytest.mark.parametrize(
    ("pattern", "dtype", "is_causal"),
    [
        (pattern, dtype, (number + (dtype == torch.float16)) % 2 == 0)
        for number, pattern in enumerate(PATTERNS)
        for dtype in (torch.bfloat16, torch.float16)
    ],
    ids=str,
)
def test_half_precision_is_at_most_twice_as_far_off_as_dense_sdpa(
    pattern: Pattern, dtype: torch.dtype, is_causal: bool
) -> None:
    geometry = attrs.evolve(HALF, is_causal=is_causal)
    tensors = inputs(geometry, batch=1, head_dim=64, dtype=dtype)
    attention = build_attention(pattern=pattern, num_heads=4, head_dim=64, is_causal=is_causal, dtype=dtype)
    actual = ours(attention, tensors, geometry, through_lse=False)
    expected = oracle(pattern, tensors, geometry, through_lse=False)
    for name, a, e, bound in zip(NAMES, actual, expected, dense_errors(dtype, is_causal), strict=True):
        assert error(a, e) <= 2 * bound, (name, error(a, e), bound)


def test_rows_without_keys_give_zero_and_minus_infinity_and_no_gradient() -> None:
    geometry = Geometry(q_len=9, kv_len=4, num_heads=4, num_kv_heads=4, is_causal=True)
    for pattern in (Full(), LONGNET, Local(window_size=2)):
        attention = build_attention(pattern=pattern, num_heads=4, head_dim=8, is_causal=True)
        tensors = inputs(geometry, batch=1, head_dim=8, dtype=torch.float32)
        out, lse, dq, dk, dv = ours(attention, tensors, geometry, through_lse=True)
        assert (out[:, :5] == 0).all()
        assert (lse[:, :, :5] == -torch.inf).all()
        assert (dq[:, :5] == 0).all()
        assert torch.isfinite(torch.stack([dk, dv])).all()
        assert torch.isfinite(lse[:, :, 5:]).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_negative_scale(pattern: Pattern) -> None:
    """That of the negated queries; aten's kernel for CPUs alone makes NaN of it under causality."""
    geometry = Geometry(q_len=77, kv_len=61, num_heads=4, num_kv_heads=2, is_causal=True, q_offset=0)
    tensors = inputs(geometry, batch=2, head_dim=8, dtype=torch.float32)
    attention = build_attention(pattern=pattern, num_heads=4, num_kv_heads=2, head_dim=8, is_causal=True, scale=-0.5)
    negated = [(-tensors[0] * 0.5 * 8**0.5).detach().requires_grad_(), *tensors[1:]]  # the oracle has the default scale
    expected = oracle(pattern, negated, geometry, through_lse=True)
    expected[2] *= -0.5 * 8**0.5
    for name, a, e in zip(NAMES, ours(attention, tensors, geometry, through_lse=True), expected, strict=True):
        assert error(a, e) < 1e-5, name


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_of_one_give_one(pattern: Pattern) -> None:
    attention = build_attention(pattern=pattern, num_heads=4, head_dim=8, is_causal=True)
    query, key, _ = inputs(Geometry.self_attention(77, 4), batch=1, head_dim=8, dtype=torch.float32)
    out, lse = attention(query, key, torch.ones_like(key), return_lse=True)
    seen = torch.isfinite(lse).transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(out, seen.float().expand_as(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_changed_token_moves_exactly_the_rows_that_see_it(pattern: Pattern) -> None:
    from dilated_attention.core import reference

    geometry = Geometry.self_attention(77, 4, is_causal=True)
    sees = reference.multiplicity(pattern, geometry) > 0
    attention = build_attention(pattern=pattern, num_heads=4, head_dim=8, is_causal=True)
    query, key, value = (x.detach() for x in inputs(geometry, batch=1, head_dim=8, dtype=torch.float32))
    before = attention(query, key, value)
    for token in (0, 5, 31, 76):
        changed = value.clone()
        changed[:, token] += 1.0
        moved = (attention(query, key, changed) != before).any(dim=-1)[0].T
        assert torch.equal(moved, sees[:, :, token])


def test_strided_and_sliced_inputs_are_read_in_place() -> None:
    geometry = Geometry.self_attention(64, 4, is_causal=True)
    attention = build_attention(pattern=LONGNET, num_heads=4, head_dim=8, is_causal=True)
    fused = torch.randn(3, 70, 12, 8, generator=torch.Generator().manual_seed(2))
    views = [x.requires_grad_() for x in fused[:, 3:67].detach().split(4, dim=2)]  # type: ignore[no-untyped-call]
    assert not views[0].is_contiguous()
    for swap in (False, True):
        tensors = [x.detach().mT.contiguous().mT.requires_grad_() for x in views] if swap else views
        actual = ours(attention, tensors, geometry, through_lse=True)
        for a, e in zip(actual, oracle(LONGNET, tensors, geometry, through_lse=True), strict=True):
            assert error(a, e) < 1e-5


def test_heads_that_share_their_queries() -> None:
    """Expanded over the heads, in several batch rows, where one call covers all and a shorter segment tiles it."""
    pattern = Dilated(segment_lengths=(64, 8), dilation_rates=(1, 2))
    geometry = Geometry.self_attention(64, 4)
    query, key, value = inputs(geometry, batch=3, head_dim=8, dtype=torch.float32)
    tensors = [query.detach()[:, :, :1].expand_as(query).requires_grad_(), key, value]
    actual = ours(build_attention(pattern=pattern, like=query), tensors, geometry, through_lse=True)
    for a, e in zip(actual, oracle(pattern, tensors, geometry, through_lse=True), strict=True):
        assert error(a, e) < 1e-5


class HeadsFirst(CpuFlash):
    """The kernel with results in another memory order, as CUDA's have it: (B, H, S, D) and (B, H, S)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return heads_first(out), lse.contiguous()

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(dout, query, key, value, out, lse, piece)
        return heads_first(dq), heads_first(dk), heads_first(dv)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("lengths", [(64, 8), (8, 80), (16, 32), (64, 20)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_memory_order_of_a_kernels_results_does_not_matter(lengths: tuple[int, int], is_causal: bool) -> None:
    geometry = Geometry.self_attention(64, 2, is_causal=is_causal)
    check_emulated(HeadsFirst(), geometry, Dilated(lengths, (1, 1)), 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False])
def test_nan_is_never_lost(dtype: torch.dtype, is_causal: bool) -> None:
    """aten's kernel for CPUs makes zeros of rows that are NaN all over, if their keys do not fill a vector."""
    query = torch.randn(2, 9, 4, 8, dtype=dtype)
    key, value = torch.randn(2, 2, 9, 2, 8, dtype=dtype).unbind()
    query[0, 2, 1, 3] = key[1, 0] = key[0, 4, 0] = torch.nan
    for pattern in (Dilated((2,), (1,)), Dilated((5, 16), (1, 3)), Full(), Local(2)):
        fields: dict[str, Any] = {"pattern": pattern, "num_kv_heads": 2, "is_causal": is_causal}
        found, exact = (
            build_attention(like=query, backend=backend, **fields)(query, key, value, return_lse=True)
            for backend in ("sdpa", "reference")
        )
        for a, e in zip(found, exact, strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert torch.isnan(e).any()
    query, key, value = (torch.zeros_like(x) for x in (query, key, value))  # whose rows of one key have an lse of 0
    out, lse = build_attention(like=query, num_kv_heads=2, pattern=Dilated((1,), (1,)))(
        query, key, value, return_lse=True
    )
    assert not out.any()
    assert not lse.any()


def test_a_weighted_repetition_is_the_branch_counted_twice() -> None:
    once = Dilated(segment_lengths=(16, 32), dilation_rates=(1, 2))
    twice = Dilated(segment_lengths=(16, 32, 16), dilation_rates=(1, 2, 1))
    geometry = Geometry.self_attention(64, 2)
    tensors = inputs(geometry, batch=1, head_dim=8, dtype=torch.float32)
    results = [
        build_attention(pattern=pattern, num_heads=2, head_dim=8)(*tensors)
        for pattern in (twice, once + Dilated(segment_lengths=(16,), dilation_rates=(1,)), once)
    ]
    assert error(results[0], results[1]) < 1e-6
    assert error(results[0], results[2]) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_one_key_pass_no_gradient_to_scores(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks in half precision: what backward takes off dout·v is the same sum, so that nothing is left."""
    geometry = Geometry.self_attention(70, 4)
    tensors = inputs(geometry, batch=2, head_dim=24, dtype=dtype)
    attention = build_attention(pattern=Random(1, 1), num_heads=4, head_dim=24, dtype=dtype, backend="sdpa")
    once = ours(attention, tensors, geometry, through_lse=False)
    assert all(float(grad.abs().max()) < 1e-5 for grad in once[2:4])
    monkeypatch.setattr(merging, "_SUMMED_AT_ONCE", 1000)  # five rows
    for by_parts, whole in zip(ours(attention, tensors, geometry, through_lse=False), once, strict=True):
        assert torch.equal(by_parts, whole)
