"""The oracle against loops that follow the definition pair by pair, and against what it must equal in special cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional

from dilated_attention import build_attention, resolve_pattern
from dilated_attention.backends import reference as reference_backend
from dilated_attention.backends.reference import ReferenceBackend, ReferenceKernel
from dilated_attention.core.config import AttentionConfig
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import LayoutPiece
from dilated_attention.core.limits import Limits
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Full, Pattern
from dilated_attention.core.reference import attention, mask_bytes, multiplicity
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.registry.specs import Device, Request

from . import strategies

Tensors = tuple[Tensor, Tensor, Tensor]


def inputs(geometry: Geometry, *, batch: int = 2, dim: int = 5, seed: int = 0, requires_grad: bool = False) -> Tensors:
    """Random query, key and value of float64; values are narrower by one than keys."""
    generator = torch.Generator().manual_seed(seed)
    s, t, h, k = geometry.q_len, geometry.kv_len, geometry.num_heads, geometry.num_kv_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)

    return normal(batch, s, h, dim), normal(batch, t, k, dim), normal(batch, t, k, dim - 1)


def looped(tensors: Tensors, pattern: Pattern, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Every row on its own: the list of its keys, each as often as it counts, then a plain softmax."""
    query, key, value = tensors
    b, s, h, d = query.shape
    counts = multiplicity(pattern, geometry)
    out = query.new_zeros(b, s, h, value.shape[-1])
    lse = query.new_full((b, h, s), -torch.inf)
    for head in range(h):
        shared = head // geometry.group_size
        for row in range(s):
            keys = [j for j in range(geometry.kv_len) for _ in range(int(counts[head, row, j]))]
            if not keys:
                continue
            for batch in range(b):
                scores = key[batch, keys, shared] @ query[batch, row, head] / math.sqrt(d)
                out[batch, row, head] = torch.softmax(scores, 0) @ value[batch, keys, shared]
                lse[batch, head, row] = scores.exp().sum().log()
    return out, lse


def run(tensors: Tensors, pattern: Pattern, geometry: Geometry) -> tuple[Tensor, Tensor]:
    return attention(
        *tensors,
        pattern=pattern,
        is_causal=geometry.is_causal,
        q_offset=geometry.q_offset,
        kv_offset=geometry.kv_offset,
    )


def test_by_default_the_last_query_stands_at_the_last_key_wherever_that_is() -> None:
    query, key, value = inputs(Geometry(q_len=4, kv_len=9, num_heads=2, num_kv_heads=1, is_causal=True))
    pattern = Dilated((3, 7), (1, 2))
    expected = attention(query, key, value, pattern=pattern, is_causal=True, kv_offset=5, q_offset=10)
    actual = attention(query, key, value, pattern=pattern, is_causal=True, kv_offset=5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    fast = build_attention(pattern=pattern, like=query, num_kv_heads=1, is_causal=True)
    out = fast(query, key, functional.pad(value, (0, 1)), kv_offset=5)
    torch.testing.assert_close(out[..., :-1], expected[0], rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(strategies.patterns(), strategies.geometries(max_len=14))
def test_it_is_a_softmax_over_the_listed_keys(pattern: Pattern, geometry: Geometry) -> None:
    tensors = inputs(geometry)
    expected, actual = looped(tensors, pattern, geometry), run(tensors, pattern, geometry)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(strategies.patterns(), strategies.geometries(max_len=30))
def test_ones_stay_ones_and_empty_rows_are_zero(pattern: Pattern, geometry: Geometry) -> None:
    query, key, value = inputs(geometry, requires_grad=True)
    out, lse = run((query, key, torch.ones_like(value)), pattern, geometry)
    filled = multiplicity(pattern, geometry).sum(-1) > 0
    expected = filled.T[None, :, :, None].expand_as(out).double()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert bool((torch.isneginf(lse) == ~filled).all())
    out, lse = run((query, key, value), pattern, geometry)
    loss = out.sum() + lse.masked_fill(torch.isneginf(lse), 0.0).sum() + lse.exp().sum()
    grads = torch.autograd.grad(loss, (query, key, value))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    empty_rows = (~filled).T[None, :, :, None].expand_as(query)
    assert not grads[0][empty_rows].any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("s", "t", "h", "k"), [(17, 17, 4, 4), (9, 17, 4, 2), (1, 12, 3, 1)])
def test_full_is_scaled_dot_product_attention(s: int, t: int, h: int, k: int, is_causal: bool) -> None:
    geometry = Geometry(q_len=s, kv_len=t, num_heads=h, num_kv_heads=k, is_causal=is_causal)
    mine, theirs = inputs(geometry, requires_grad=True), inputs(geometry, requires_grad=True)
    out, _ = run(mine, Full(), geometry)
    mask = torch.ones(s, t, dtype=torch.bool).tril(t - s) if is_causal else None
    q_bhsd, k_bhtd, v_bhtd = (x.transpose(1, 2) for x in theirs)
    expected = functional.scaled_dot_product_attention(
        q_bhsd, k_bhtd, v_bhtd, attn_mask=mask, enable_gqa=h != k
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(out, mine, weight), torch.autograd.grad(expected, theirs, weight)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_heads_may_come_before_positions_as_in_torch() -> None:
    query, (key, value) = torch.randn(2, 4, 7, 5), torch.randn(2, 2, 2, 9, 5)
    turned = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = attention(query, key, value, pattern=Local(2), tensor_layout="bhsd")
    expected_out, expected_lse = attention(*turned, pattern=Local(2))
    assert torch.equal(out, expected_out.transpose(1, 2))
    assert torch.equal(lse, expected_lse)
    with pytest.raises(ConfigError, match="tensor_layout"):
        attention(query, key, value, tensor_layout="bhds")


@pytest.mark.parametrize("is_causal", [False, True])
def test_mixing_branches_by_their_denominators_is_the_joint_multiset(is_causal: bool) -> None:
    """LongNet, eq. 10: the branches' outputs weighted by their shares of the summed softmax denominators."""
    geometry = Geometry.self_attention(50, 4, is_causal=is_causal)
    lengths, rates = (8, 16, 32), (1, 2, 4)
    tensors = inputs(geometry)
    joint, joint_lse = run(tensors, Dilated(lengths, rates), geometry)
    parts = [run(tensors, Dilated((w,), (r,)), geometry) for w, r in zip(lengths, rates, strict=True)]
    lse = torch.stack([part[1] for part in parts])
    shares = torch.softmax(lse, 0).transpose(2, 3)[..., None]
    mixed = (shares * torch.stack([part[0] for part in parts])).sum(0)
    torch.testing.assert_close(mixed, joint, rtol=0, atol=2e-15)
    torch.testing.assert_close(torch.logsumexp(lse, 0), joint_lse, rtol=0, atol=2e-15)


def test_a_sum_counts_twice_and_a_union_once() -> None:
    geometry = Geometry.self_attention(20, 2)
    once = run(inputs(geometry), Local(2) | Local(2), geometry)
    torch.testing.assert_close(once, run(inputs(geometry), Local(2), geometry), rtol=0, atol=0)
    twice = run(inputs(geometry), Local(2) + Local(2), geometry)
    torch.testing.assert_close(twice[0], once[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(twice[1], once[1] + math.log(2), rtol=1e-14, atol=1e-14)
    counts = [multiplicity(p, geometry) for p in (Local(4), Global(3), Local(4) | Global(3), Local(4) + Global(3))]
    assert torch.equal(counts[2], torch.maximum(counts[0], counts[1]))
    assert torch.equal(counts[3], counts[0] + counts[1])


def test_its_gradients_are_those_of_finite_differences() -> None:
    geometry = Geometry(q_len=5, kv_len=7, num_heads=2, num_kv_heads=1, is_causal=True)
    tensors = inputs(geometry, batch=1, dim=3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: run((q, k, v), Dilated((4, 8), (1, 2)), geometry), tensors)


def test_large_scores_do_not_overflow() -> None:
    geometry = Geometry.self_attention(12, 1)
    query, key, value = inputs(geometry)
    out, lse = attention(1e4 * query, key, value)
    assert bool(out.isfinite().all())
    assert float(lse.max()) > 1e4


def test_dropout_drops_each_occurrence_on_its_own() -> None:
    geometry = Geometry.self_attention(6, 1)
    query, key, _ = inputs(geometry, batch=4000)
    query, value = torch.zeros_like(query), torch.eye(6, dtype=torch.float64)[None, :, None].expand(4000, 6, 1, 6)
    shares, lse = attention(
        query, key, value, pattern=Full() + Full(), dropout_p=0.25, generator=torch.Generator().manual_seed(1)
    )
    steps = shares * 12 * 0.75  # 0, 1 or 2 of the two occurrences of each key
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-12)
    frequency = torch.bincount(steps.round().long().flatten(), minlength=3) / steps.numel()
    torch.testing.assert_close(frequency, torch.tensor([0.0625, 0.375, 0.5625]), rtol=0, atol=5e-3)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(12)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), "do not fit together"),
        (((1, 4, 2, 8), (1, 4, 2, 6), (1, 4, 2, 8)), "do not fit together"),
        (((4, 2, 8), (4, 2, 8), (4, 2, 8)), "must have 4 dimensions"),
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "multiple of num_kv_heads, got 3 and 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes))


def request(seq_len: int | None, limit: int) -> Request:
    limits = Limits(reference_mask_bytes=limit)
    config = AttentionConfig(num_heads=4, head_dim=8, num_kv_heads=2, seq_len=seq_len, limits=limits)
    return Request(config=config, pattern=Full(), device=Device(type="cpu"), needs={})


def test_a_mapping_is_no_pattern_yet() -> None:
    geometry = Geometry.self_attention(7, 2, is_causal=True)
    mapping: Any = Local(2).to_dict()
    for call in (lambda pattern: run(inputs(geometry), pattern, geometry), lambda x: multiplicity(x, geometry)):
        with pytest.raises(
            ConfigError, match=r"such as Full.*got .*'local'.* dilated_attention.resolve_pattern.mapping. makes one"
        ):
            call(mapping)
    assert torch.equal(multiplicity(resolve_pattern(mapping), geometry), multiplicity(Local(2), geometry))


@pytest.mark.parametrize(
    ("rows", "length", "sequences"),
    [
        (1, 100_000, {}),
        (2, 40_000, {"key_padding_mask": torch.zeros(2, 40_000, dtype=torch.bool)}),
        (1, 100_000, {"cu_seqlens": torch.tensor([0, 5, 100_000])}),
    ],
)
def test_masks_beyond_the_limit_are_refused_before_they_are_made(
    rows: int, length: int, sequences: dict[str, Any]
) -> None:
    """At 100,000 tokens numpy would say that it has no memory, or the system would end the process."""
    x = torch.zeros(rows, length, 1, 1)
    counted = rf"of 1 heads, {length:,} queries and {length:,} keys takes {8 * rows * length**2:,} bytes"
    told = rf"{counted}, allowed are 17,179,869,184 \(limit_bytes\); shorten the sequence, or take fewer heads"
    with pytest.raises(ConfigError, match=told):
        attention(x, x, x, **sequences)
    if not sequences:
        with pytest.raises(ConfigError, match=told):
            multiplicity(Full(), Geometry.self_attention(length, 1))


def test_the_limit_of_a_mask_may_be_another() -> None:
    x = torch.ones(1, 4, 2, 1)
    assert attention(x, x, x, limit_bytes=8 * 2 * 4 * 4)[0].shape == x.shape
    with pytest.raises(ConfigError, match="takes 256 bytes, allowed are 255"):
        attention(x, x, x, limit_bytes=255)


def test_the_backend_refuses_masks_beyond_its_limit() -> None:
    backend = ReferenceBackend()
    assert not list(backend.refusals(request(None, 1)))
    assert not list(backend.refusals(request(100, 8 * 4 * 100 * 100)))
    (refusal,) = backend.refusals(request(100, 8 * 4 * 100 * 100 - 1))
    assert refusal.code == "reference_mask_bytes"
    assert "320,000 bytes" in refusal.required
    kernel = backend.build(request(None, 1000))
    assert kernel.name == backend.pin(request(None, 1000))
    geometry = Geometry.self_attention(16, 4)
    assert mask_bytes(geometry) == 8 * 4 * 16 * 16
    piece = LayoutPiece(layout=lower(Full(), geometry), scale=1.0)
    with pytest.raises(ConfigError, match="needs 8,192 bytes for the dense mask of 16 queries and 16 keys, allowed"):
        kernel.forward(*inputs(geometry), piece)


def test_the_backends_own_limit_holds_in_the_place_of_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def oracle(query: Tensor, key: Tensor, value: Tensor, **fields: Any) -> tuple[Tensor, Tensor]:
        told.update(fields)
        return attention(query, key, value, **fields)

    monkeypatch.setattr(reference_backend, "attention", oracle)
    geometry = Geometry.self_attention(16, 4)
    ReferenceKernel(1 << 40).forward(*inputs(geometry), LayoutPiece(layout=lower(Full(), geometry), scale=1.0))
    assert told["limit_bytes"] == 1 << 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_the_kernel_is_the_oracle_and_its_gradient(dtype: torch.dtype, dropout_p: float, with_dlse: bool) -> None:
    geometry = Geometry(q_len=9, kv_len=13, num_heads=4, num_kv_heads=2, is_causal=True, q_offset=2)
    pattern = Dilated((4, 8), (1, 2)) + Local(1)
    seed = torch.tensor(7) if dropout_p else None
    piece = LayoutPiece(layout=lower(pattern, geometry), scale=0.3, dropout_p=dropout_p, seed=seed)
    query, key, value = (x.to(dtype) for x in inputs(geometry))
    kernel = ReferenceKernel(1 << 20)
    out, lse = kernel.forward(query, key, value, piece)
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected, expected_lse = attention(
        *leaves,
        pattern=pattern,
        is_causal=True,
        scale=0.3,
        q_offset=2,
        dropout_p=dropout_p,
        generator=torch.Generator().manual_seed(7),
    )
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(lse, expected_lse.to(lse.dtype))
    generator = torch.Generator().manual_seed(2)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64) if with_dlse else None
    finite = expected_lse.masked_fill(torch.isneginf(expected_lse), 0.0)
    loss = (expected * dout).sum() + (0.0 if dlse is None else (finite * dlse).sum())
    expected_grads = torch.autograd.grad(loss, leaves)
    grads = kernel.backward(dout, query, key, value, out, lse, piece, dlse=dlse)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected_grad, rtol=torch.finfo(dtype).eps, atol=1e-14)
    if dropout_p:
        other = LayoutPiece(layout=piece.layout, scale=0.3, dropout_p=dropout_p, seed=torch.tensor(8))
        assert not torch.equal(kernel.forward(query, key, value, other)[0], out)


def returning(counts: Callable[[Any, Any], Any]) -> Pattern:
    """A pattern of a user's, which says of queries and keys what `counts` does."""

    @attrs.frozen
    class Mine(Pattern):
        kind: ClassVar[str] = "mine"

        def multiplicity(self, query: Any, key: Any, head: Any, geometry: Geometry) -> Any:
            return counts(query, key)

        def to_dict(self) -> dict[str, object]:
            return {"kind": self.kind}

    return Mine()


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (lambda query, key: np.exp(-abs(query - key)), "must be int64, how often a query counts a key; got float64"),
        (lambda query, key: query == key, "must be int64, how often a query counts a key; got bool"),
        (lambda query, key: np.minimum(key - query, 1), "must be at least 0, got -"),
        (lambda query, key: abs(query - key) % 3, "must be at most 1, which its max_multiplicity says, got 2"),
        (lambda query, key: np.ones((3, 3), dtype=np.int64), r"must have the shape of its positions, .*, got \(3, 3\)"),
    ],
)
def test_what_is_no_count_is_an_error_of_the_pattern(counts: Callable[[Any, Any], Any], told: str) -> None:
    pattern, query = returning(counts), torch.randn(1, 40, 2, 8)
    with pytest.raises(ConfigError, match=f"multiplicity of a mine pattern {told}"):
        attention(query, query, query, pattern=pattern)
    with pytest.raises(ConfigError, match=f"multiplicity of a mine pattern {told}"):
        build_attention(pattern=pattern, like=query, backend="sdpa")(query, query, query)


def test_a_pattern_without_parameters_is_told_of_to_dict() -> None:
    class Mine(Pattern):
        kind: ClassVar[str] = "mine"

        def multiplicity(self, query: Any, key: Any, head: Any, geometry: Geometry) -> Any:
            return np.ones_like(query + key + head)

    with pytest.raises(
        ConfigError, match=r"a mine pattern must say its parameters: write to_dict, as \{'kind': 'mine'\}"
    ):
        build_attention(pattern=Mine(), num_heads=2, head_dim=8)
