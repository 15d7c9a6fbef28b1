"""Windows by kernels that have none: causal squares, and mirrored ones whose rows are read backwards."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from dilated_attention import AttentionConfig, Dilated, Full, Global, Local, Pattern, build_attention
from dilated_attention.backends.aten import CpuFlash
from dilated_attention.core import band_squares
from dilated_attention.core.band_calls import dense_form
from dilated_attention.core.composed import Composers
from dilated_attention.core.composer import Composer
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DensePiece
from dilated_attention.core.limits import Limits
from dilated_attention.core.schedule import MOST_STACKED, Call
from dilated_attention.core.slabs import slabs_of
from dilated_attention.core.turned import Mirrored
from dilated_attention.exchange.shards import Shards

from .dense_math import ExactSquares
from .kernel_kit import check_emulated
from .ring_simulation import worst
from .support import NAMES, error, inputs, oracle, ours
from .test_bands import BANDED

WINDOWS: list[Pattern] = [
    Local((0, 0)),
    Local((15, 0)),
    Local((0, 15)),
    Local((7, 2)),
    Local((3, 60)),
    Local((500, 0)),
    Local((66, 66)),
    Local((8, 8)) | Global(5),
    Local((30, 0)) | Local((3, 40)) | Global(2),
    Local((9, 0)) + Local((4, 4)),
    Dilated((8, 16), (1, 2)) + Local((6, 3)),
    Full() + Local((2, 5)),
]


def calls_of(pattern: Pattern, geometry: Geometry) -> tuple[Call, ...]:
    found = dense_form(pattern, geometry, windows=False)
    assert found is not None
    return found.schedule.calls


def test_chunks_are_as_long_as_the_window_and_stack() -> None:
    own, mirrored = calls_of(Local((15, 0)), Geometry.self_attention(64, 2, is_causal=True))
    assert (own.query.count, own.key.count, own.segments, own.is_mirrored) == (16, 16, 4, False)
    assert (mirrored.query.count, mirrored.key.count, mirrored.segments, mirrored.is_mirrored) == (15, 15, 3, True)
    assert (mirrored.query.start, mirrored.query.segment_step) == (16, 16)
    assert (mirrored.key.start, mirrored.key.segment_step) == (1, 16)
    assert [call.name for call in (own, mirrored)] == ["band 1 squares", "band 1 mirrored squares"]


def counts(calls: tuple[Call, ...], geometry: Geometry) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """How often the calls count each query and key of the first head."""
    found = np.zeros((geometry.q_len, geometry.kv_len), dtype=np.int64)
    for call in calls:
        rows, cols = np.arange(call.query.count), np.arange(call.key.count)
        square = np.ones((rows.size, cols.size), dtype=np.int64)
        square = np.triu(square) if call.is_mirrored else np.tril(square) if call.is_causal else square
        for segment in range(call.segments):
            query, key = (rows.start + segment * rows.segment_step for rows in (call.query, call.key))
            assert min(query, key) >= 0
            found[query : query + call.query.count, key : key + call.key.count] += square
    return found


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", WINDOWS[:9], ids=str)
def test_chunks_of_great_lengths_are_counted_and_are_the_same(
    pattern: Pattern, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [(150, 150, 0, 0), (149, 151, 2, 0), (90, 150, 30, 0), (150, 60, 0, 40), (150, 100, 10, 30), (7, 7, 0, 0)]
    for q_len, kv_len, q_offset, kv_offset in lengths:
        geometry = Geometry(
            q_len=q_len, kv_len=kv_len, num_heads=1, num_kv_heads=1, is_causal=is_causal,
            q_offset=q_offset, kv_offset=kv_offset,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            expected = counts(calls_of(pattern, geometry), geometry)
            patch.setattr(band_squares, "_MOST_LISTED", 2 * band_squares._AT_AN_END)
            np.testing.assert_array_equal(counts(calls_of(pattern, geometry), geometry), expected)
            patch.setattr(band_squares, "MOST_STACKED", 3)
            np.testing.assert_array_equal(counts(calls_of(pattern, geometry), geometry), expected)


def test_no_memory_goes_by_the_length() -> None:
    attention = build_attention(pattern=Local(64), num_heads=1, head_dim=8, device="cpu")
    tracemalloc.start()
    try:
        attention.prepare(10**10)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 20 << 20
    assert attention._engine._program(10**10, 10**10, 0, 0, torch.device("cpu")).pairs == 129 * 10**10 - 64 * 65


def test_a_step_of_decoding_is_one_rectangle() -> None:
    for pattern in (Local((15, 0)), Local((3, 4)), Local((99, 0))):
        (call,) = calls_of(pattern, Geometry(q_len=1, kv_len=64, num_heads=2, num_kv_heads=2, is_causal=True))
        assert (call.query.count, call.segments, call.is_causal) == (1, 1, False)


def test_no_launch_stacks_more_than_a_card_takes() -> None:
    counts = [call.segments for call in calls_of(Local((1, 0)), Geometry.self_attention(300_001, is_causal=True))]
    assert max(counts) == MOST_STACKED
    assert sum(counts) == 150_001 + 150_000  # a chunk is two queries, and the last one
    call = calls_of(Local((1, 0)), Geometry.self_attention(4000, is_causal=True))[0]
    assert call.segments == 2000
    for batch, launches in ((32, 1), (33, 33)):
        x = torch.empty(batch, 4000, 1, 1)
        slabs = slabs_of(call, (x,), (x,))
        assert len(slabs) == launches
        assert sum(slab.size for slab in slabs) == batch * 2000


def test_squares_that_cover_everything_come_first() -> None:
    whole, ragged = (Geometry.self_attention(n, 2, is_causal=True) for n in (64, 67))
    cases: list[tuple[Pattern, Geometry, int]] = [
        (Local((15, 0)), whole, 1),
        (Local((15, 0)), ragged, 2),  # those of the last, shorter chunk are another call
        (Local((15, 0)) | Global(2), ragged, 2),
        (Full() + Local((15, 0)), ragged, 1),
        (Local((15, 3)), Geometry.self_attention(64, 2), 0),
        (Global(2), whole, 0),
        (Local((0, 70)), Geometry.self_attention(64, 2), 1),  # one mirrored square
    ]
    for pattern, geometry, cover in cases:
        found = dense_form(pattern, geometry, windows=False)
        assert found is not None
        assert found.schedule.cover == cover
        assert not found.schedule.is_whole
    full = dense_form(Local((70, 0)), whole, windows=False)
    assert full is not None
    assert full.schedule.is_whole


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", [*BANDED, *WINDOWS], ids=str)
def test_a_kernel_without_windows_computes_the_pattern(pattern: Pattern, is_causal: bool) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 2, "is_causal": is_causal}
    for geometry in (
        Geometry(q_len=67, kv_len=67, **heads),  # type: ignore[arg-type]
        Geometry(q_len=21, kv_len=67, **heads),  # type: ignore[arg-type]
        Geometry(q_len=1, kv_len=67, **heads),  # type: ignore[arg-type]
        Geometry(q_len=30, kv_len=25, q_offset=11, kv_offset=3, **heads),  # type: ignore[arg-type]
        Geometry(q_len=40, kv_len=6, q_offset=0, kv_offset=20, **heads),  # type: ignore[arg-type]
    ):
        check_emulated(ExactSquares(), geometry, pattern, head_dim=8)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", WINDOWS, ids=str)
def test_it_is_exact_in_float64(pattern: Pattern, is_causal: bool) -> None:
    fields = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "is_causal": is_causal, "dtype": "float64"}
    geometry = Geometry(q_len=83, kv_len=83, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    for batch, checkpointing in ((1, False), (3, True)):
        attention = build_attention(pattern=pattern, activation_checkpointing=checkpointing, backend="sdpa", **fields)  # type: ignore[arg-type]
        tensors = inputs(geometry, batch=batch, head_dim=12, dtype=torch.float64)
        for through_lse in (False, True):
            expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
            actual = ours(attention, tensors, geometry, through_lse=through_lse)
            for name, a, e in zip(NAMES, actual, expected, strict=True):
                assert error(a, e) < 1e-12, (name, error(a, e))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_half_precision_and_negative_scales(dtype: str) -> None:
    geometry, pattern = Geometry.self_attention(90, 2), Local((20, 9)) | Global(3)
    attention = build_attention(pattern=pattern, num_heads=2, head_dim=8, dtype=dtype, scale=-0.3, backend="sdpa")
    tensors = inputs(geometry, batch=2, head_dim=8, dtype=getattr(torch, dtype))
    turned = [(tensors[0].detach().double() * -0.3 * math.sqrt(8)).requires_grad_(), *tensors[1:]]
    expected = oracle(pattern, turned, geometry, through_lse=True)
    expected[2] *= -0.3 * math.sqrt(8)
    for name, a, e in zip(NAMES, ours(attention, tensors, geometry, through_lse=True), expected, strict=True):
        assert error(a, e) < (1e-5 if dtype == "float32" else 2e-2), (name, error(a, e))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", WINDOWS, ids=str)
def test_ranks_compute_their_own_keys_so(pattern: Pattern, is_causal: bool) -> None:
    shards = Shards(24, 3, 4, 2, is_causal)
    for hops in (False, True):
        assert worst(pattern, shards, batch=2, through_lse=True, dense=ExactSquares(), hops=hops) < 1e-12


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 40_000, 1 << 20])
@pytest.mark.parametrize("seq_len", [64, 61])
def test_rows_are_copied_a_few_chunks_at_a_time(seq_len: int, workspace_bytes: int, batch: int) -> None:
    geometry, pattern = Geometry.self_attention(seq_len, 2, is_causal=True), Local((7, 0))
    found = dense_form(pattern, geometry, windows=False)
    assert found is not None
    kernel, tensors = ExactSquares(), inputs(geometry, batch=batch, head_dim=8, dtype=torch.float64)
    composer = Composer(kernel, 1 / math.sqrt(8), False, workspace_bytes)
    query, key, value = (x.detach() for x in tensors)
    out, lse = composer.forward(query, key, value, found.schedule)
    each = 7 * 2 * 8 * 8  # bytes of a chunk of a tensor
    copied = [size for size, rows in zip(kernel.sizes, kernel.rows, strict=True) if rows == 7]
    assert sum(copied) == batch * (seq_len // 8 - 1)  # the chunk of the end of 61 is shorter
    assert max(copied) <= max(1, workspace_bytes // (6 * each))
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    kernel.sizes.clear()
    kernel.rows.clear()
    grads = composer.backward(dout, query, key, value, out, lse, found.schedule)
    copied = [size for size, rows in zip(kernel.sizes, kernel.rows, strict=True) if rows == 7]
    assert max(copied) <= max(1, workspace_bytes // (10 * each))
    expected = oracle(pattern, tensors, geometry, through_lse=False)
    for name, a, e in zip(NAMES, (out, lse, *grads), expected, strict=True):
        assert error(a, e) < 1e-12, name


def test_the_workspace_is_that_of_the_configuration() -> None:
    config = AttentionConfig(num_heads=2, head_dim=8, limits=Limits(workspace_bytes=12345))
    assert Composers.of(CpuFlash(), 1.0, config).own.workspace_bytes == 12345


def test_a_mirrored_square_is_the_other_triangle() -> None:
    query, key, value = (torch.randn(2, 5, 2, 4, dtype=torch.float64) for _ in range(3))
    kernel = Mirrored(ExactSquares())
    piece = DensePiece(is_causal=True, scale=0.5)
    out, lse = kernel.forward(query, key, value, piece)
    scores = 0.5 * torch.einsum("bshd,bthd->bhst", query, key)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).tril(-1), -math.inf)
    assert torch.allclose(lse, scores.logsumexp(-1))
    assert torch.allclose(out, torch.einsum("bhst,bthd->bshd", scores.softmax(-1), value))
    assert kernel.name == ExactSquares().name


def test_it_compiles_whole() -> None:
    torch.compiler.reset()
    attention = build_attention(pattern=Local((9, 4)) | Global(3), num_heads=2, head_dim=8, backend="sdpa")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for length in (50, 61):
        tensors = inputs(Geometry.self_attention(length, 2), batch=2, head_dim=8, dtype=torch.float32)
        expected = torch.autograd.grad(attention(*tensors).sin().sum(), tensors)
        actual = torch.autograd.grad(compiled(*tensors).sin().sum(), tensors)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


def test_no_table_is_made_on_a_processor() -> None:
    attention = build_attention(pattern=Local((9, 4)) | Global(3), num_heads=2, head_dim=8, backend="sdpa")
    attention.prepare(50)
    program = attention._engine.programs.get((50, 50, 0, 0, torch.device("cpu"), False))
    assert program is not None
    assert program.blocks is None
    assert program.layout.blocks is None
