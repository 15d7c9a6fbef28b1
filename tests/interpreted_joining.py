"""The kernels that join pieces, under Triton's interpreter on the CPU; `test_joining` runs this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention import AttentionConfig, Dilated, Local, Pattern, Strided
from dilated_attention.backends.joining import MOST_PIECES, JoiningKernel
from dilated_attention.core import composer
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import CALL_AXES, DenseKernel
from dilated_attention.core.ops import attend, intern
from dilated_attention.core.schedule import Rows
from dilated_attention.core.slabs import Place
from dilated_attention.registry.conformance.ring import ExactDense

from .strategies import dilated, geometries
from .support import NAMES, error, inputs, oracle, with_gradients

LONGNET = Dilated(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4))
APART = Dilated(segment_lengths=(7, 12), dilation_rates=(2, 3))  # of which some rows are in no call


@attrs.frozen
class Counted(JoiningKernel):
    """Dense pieces by the definition, joined by the kernels; lists what was joined."""

    kernel: DenseKernel = attrs.field(factory=ExactDense)
    joined: list[str] = attrs.field(factory=list)

    def merge_pieces(
        self, pieces: Sequence[tuple[Tensor, Tensor]], places: Sequence[Place], out: Tensor, lse: Tensor
    ) -> None:
        self.joined.append("merged")
        JoiningKernel.merge_pieces(self, pieces, places, out, lse)

    def add_pieces(self, pieces: Sequence[Tensor], places: Sequence[Place], total: Tensor) -> None:
        self.joined.append("added")
        JoiningKernel.add_pieces(self, pieces, places, total)


EACH = ["merged", "added", "added", "added"]


def computed(
    kernel: Any, pattern: Pattern, geometry: Geometry, tensors: list[Tensor], *, through_lse: bool, **fields: Any
) -> list[Tensor]:
    """Out, lse and gradients of the composition over that kernel."""
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    config = AttentionConfig(
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=tensors[0].shape[3],
        pattern=pattern,
        is_causal=geometry.is_causal,
        dtype=dtype,
        **fields,
    )
    engine = Engine(config, pattern, kernel, takes_layout=False, has_dlse=True, call_axes=frozenset(CALL_AXES))
    engine.key += str(id(kernel))
    offsets = {"q_offset": geometry.q_offset, "kv_offset": geometry.kv_offset}
    query, key, value = tensors
    out, lse = attend(query, key, value, intern(engine), **offsets, seed=None, tables=None, recompute=False)
    return with_gradients(out, lse, tensors, through_lse=through_lse)


def check(
    pattern: Pattern, geometry: Geometry, head_dim: int = 8, *, batch: int = 1, through_lse: bool = False, **fields: Any
) -> None:
    """Out, lse and all gradients against the oracle, in float32, where joining is not worth it but is seen exactly."""
    kernel = Counted()
    tensors = inputs(geometry, batch=batch, head_dim=head_dim, dtype=torch.float32)
    with patch.object(composer, "are_joined", return_value=True):
        actual = computed(kernel, pattern, geometry, tensors, through_lse=through_lse, **fields)
    assert kernel.joined == EACH
    if fields.get("scale", 1.0) < 0:  # the oracle has the default scale
        tensors = [-tensors[0], *tensors[1:]]
    expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
    if fields.get("scale", 1.0) < 0:
        expected[2] = -expected[2]
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e) < 1e-5, (name, error(a, e))


@pytest.mark.parametrize(
    ("length", "batch", "is_causal"),
    [
        (64, 2, True),
        (51, 1, False),
        pytest.param(64, 2, False, marks=pytest.mark.slow),
        pytest.param(51, 1, True, marks=pytest.mark.slow),
    ],
)
def test_longnet_of_whole_and_ragged_lengths(length: int, batch: int, is_causal: bool) -> None:
    check(LONGNET, Geometry.self_attention(length, 4, is_causal=is_causal), batch=batch)


def test_segments_of_a_batch_that_do_not_stack() -> None:
    """More batch rows than segments, then fewer: a launch for each segment, then for each batch row."""
    check(Dilated((20,), (2,)) + Dilated((12,), (1,)), Geometry.self_attention(43, 2), batch=3)
    check(Dilated((7, 12), (1, 2)), Geometry.self_attention(43, 2, is_causal=True), batch=2)


def test_segments_beyond_the_sequence() -> None:
    check(Dilated((8, 100, 1000), (1, 2, 5)), Geometry.self_attention(37, 5, is_causal=True))


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("offsets_by", ["query_head", pytest.param("kv_head", marks=pytest.mark.slow)])
def test_grouped_heads(offsets_by: str, is_causal: bool) -> None:
    pattern = Dilated((8, 16), (1, 2), offsets_by=offsets_by)
    check(pattern, Geometry(q_len=40, kv_len=40, num_heads=8, num_kv_heads=2, is_causal=is_causal))


@pytest.mark.parametrize("offsets", ["interleaved", pytest.param("blocked", marks=pytest.mark.slow)])
def test_offsets_of_heads(offsets: str) -> None:
    check(Dilated((8, 16, 32), (1, 2, 4), offsets=offsets), Geometry.self_attention(37, 6, is_causal=True))
    check(Dilated((8, 16), (2, 4), heads="split"), Geometry.self_attention(32, 5, is_causal=True))


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_that_no_call_touches(is_causal: bool) -> None:
    check(APART, Geometry(q_len=40, kv_len=40, num_heads=2, num_kv_heads=1, is_causal=is_causal), head_dim=24)


def test_offsets_and_unequal_lengths() -> None:
    """Causal segments are then cut into rectangles that share rows, and some rows have no keys."""
    pattern = Dilated((8, 12), (1, 3))
    check(pattern, Geometry(q_len=20, kv_len=15, num_heads=2, num_kv_heads=1, is_causal=True, q_offset=9, kv_offset=21))
    check(pattern, Geometry(q_len=30, kv_len=18, num_heads=2, num_kv_heads=2, is_causal=True))
    check(pattern, Geometry(q_len=9, kv_len=40, num_heads=2, num_kv_heads=2, is_causal=True), batch=2)


def test_pairs_that_count_twice() -> None:
    check(LONGNET + Dilated((8,), (1,)), Geometry.self_attention(40, 2, is_causal=True))


def test_gradients_through_lse() -> None:
    check(LONGNET, Geometry.self_attention(40, 4, is_causal=True), through_lse=True)
    check(APART, Geometry.self_attention(40, 2, is_causal=True), through_lse=True)


def test_a_negative_scale() -> None:
    check(LONGNET, Geometry.self_attention(40, 4, is_causal=True), scale=-(8**-0.5))


def test_beside_blocks() -> None:
    check(Strided(3) + Local(4), Geometry.self_attention(40, 2, is_causal=True))


@pytest.mark.parametrize("head_dim", [4, 24, 72, 128])
def test_widths(head_dim: int) -> None:
    check(Dilated((8, 16), (1, 2)), Geometry.self_attention(20, 2, is_causal=True), head_dim)


@settings(max_examples=5, deadline=None)
@given(dilated(), geometries(max_len=30), st.integers(1, 2))
def test_what_is_drawn(pattern: Pattern, geometry: Geometry, batch: int) -> None:
    """Against the composition that merges in turns."""
    tensors = inputs(geometry, batch=batch, head_dim=8, dtype=torch.float32)
    in_turns = computed(ExactDense(), pattern, geometry, tensors, through_lse=False)
    with patch.object(composer, "are_joined", lambda joins, sums, adds: 1 < len(sums[0][1]) <= MOST_PIECES):
        joined = computed(Counted(), pattern, geometry, tensors, through_lse=False)
    for name, a, e in zip(NAMES, joined, in_turns, strict=True):
        assert error(a, e) < 1e-5, (name, error(a, e))


def test_more_positions_than_a_tile_has() -> None:
    check(Dilated((50, 130), (1, 3)), Geometry.self_attention(150, 1, is_causal=True), 64)


@pytest.mark.parametrize("is_strided", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, is_strided: bool) -> None:
    """No worse than of pieces that are merged one after another in float32.

    Triton's interpreter rounds bfloat16 towards 0, with up to twice the error.
    """
    geometry = Geometry.self_attention(64, 4, is_causal=True)
    tensors = inputs(geometry, batch=1, head_dim=24, dtype=dtype)
    if is_strided:
        packed = torch.stack([x.detach() for x in tensors], dim=2)
        tensors = [packed[:, :, i].requires_grad_() for i in range(3)]
    kernel = Counted()
    joined = computed(kernel, LONGNET, geometry, tensors, through_lse=False)
    assert kernel.joined == EACH
    in_turns = computed(ExactDense(), LONGNET, geometry, tensors, through_lse=False)
    expected = oracle(LONGNET, tensors, geometry, through_lse=False)
    for name, a, b, e in zip(NAMES, joined, in_turns, expected, strict=True):
        assert a.dtype == b.dtype
        factor = 1.02 if dtype == torch.float16 else 2.0
        assert error(a, e) <= factor * error(b, e) + 1e-6, (name, error(a, e), error(b, e))


def stacked(rows: int, heads: int, *, start: int = 0) -> Place:
    """Rows and heads in their order."""
    return Place(Rows(start, 1, rows, 0, 0, 1, 0, heads), 1, 0, 1)


def test_pieces_without_a_share() -> None:
    """lse -inf in some pieces and in all, rows in none, and a NaN that stays where it is."""
    out, lse = torch.empty(1, 6, 1, 8), torch.empty(1, 1, 6)
    a, b = torch.randn(1, 5, 1, 8), torch.randn(1, 4, 1, 8)
    low = -float("inf")
    a[0, 1:3], b[0, 1] = 0, 0
    lse_a = torch.tensor([[[0.5, low, low, 300.0, float("nan")]]])
    lse_b = torch.tensor([[[low, low, 2.0, -300.0]]])
    Counted().merge_pieces([(a, lse_a), (b, lse_b)], [stacked(5, 1), stacked(4, 1)], out, lse)
    assert torch.equal(out[0, 0], a[0, 0])
    assert torch.equal(out[0, 1], torch.zeros(1, 8))
    assert torch.equal(out[0, 2:4], torch.stack([b[0, 2], a[0, 3]]))
    assert out[0, 4].isnan().all()
    assert torch.equal(out[0, 5], torch.zeros(1, 8))
    expected = torch.tensor([0.5, low, 2.0, 300.0, float("nan"), low])
    assert torch.equal(lse[0, 0].nan_to_num(77.0, 0.0, low), expected.nan_to_num(77.0, 0.0, low))


def test_pieces_of_any_strides_and_dtypes() -> None:
    """As kernels return them: heads before rows, lse of padded rows, float32 gradients of half-precision inputs."""
    out, lse = torch.empty(1, 5, 2, 8, dtype=torch.float16), torch.empty(1, 2, 5)
    pieces = [
        (torch.randn(1, 2, 5, 8).half().transpose(1, 2), torch.randn(1, 2, 32)[:, :, :5]),
        (torch.randn(1, 2, 2, 8).half(), torch.randn(1, 2, 2)),
    ]
    places = [stacked(5, 2), stacked(2, 2, start=3)]
    Counted().merge_pieces(pieces, places, out, lse)
    (x, a), (y, b) = pieces
    merged = torch.logaddexp(a[:, :, 3:], b)
    assert torch.allclose(lse, torch.cat([a[:, :, :3], merged], 2), atol=1e-6)
    share = [torch.exp(part - merged).transpose(1, 2)[..., None] for part in (a[:, :, 3:], b)]
    assert torch.allclose(out[:, 3:].float(), x[:, 3:] * share[0] + y * share[1], atol=2e-3)
    total = torch.empty(1, 5, 2, 8, dtype=torch.float16)
    Counted().add_pieces([x.float(), y.float()], places, total)
    expected = x.float()
    expected[:, 3:] += y.float()
    assert torch.equal(total, expected.half())
