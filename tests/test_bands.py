"""Sliding windows and global tokens as calls of dense kernels: the pairs they hold, and what is computed by them."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import windows
from dilated_attention import Dilated, Full, Global, Local, Pattern, Random, Strided, build_attention, explain
from dilated_attention.backends.aten import CpuFlash, CudaCudnnForOneLength, CudaFlash
from dilated_attention.backends.joining import joining
from dilated_attention.core import reference
from dilated_attention.core.band_calls import branches_and_bands, dense_form
from dilated_attention.core.bands import bands_of
from dilated_attention.core.composer import Composer
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import takes_windows
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Sum, Union
from dilated_attention.core.schedule import Call, Schedule
from dilated_attention.exchange.compute import Compute
from dilated_attention.exchange.pieces import ComposedPiece
from dilated_attention.exchange.shards import Shards

from .dense_math import ExactWindows
from .kernel_kit import build, check, check_emulated, emulated_engine
from .ring_simulation import worst
from .strategies import geometries

Ints = NDArray[np.int64]
WINDOW, SINKS = Local((5, 3)), Global(4)
BANDED: list[Pattern] = [
    WINDOW,
    Local((0, 0)),
    SINKS,
    WINDOW | SINKS,
    Global(9) | Local((2, 1)),
    Local((30, 0)) | Local((3, 40)),
    Local((3, 0)) | SINKS | Local((9, 2)),
    Local((3, 0)) | SINKS | Local((1, 6)) | Local((2, 5)),
    WINDOW | WINDOW,
    WINDOW + SINKS + Local((9, 0)),
    Dilated((8, 16), (1, 2)) + Local((6, 0)),
    Full() + WINDOW,
    Strided(3) + (WINDOW | SINKS),
]


def dense_schedule(pattern: Pattern, geometry: Geometry, *, windows: bool = True) -> Schedule | None:
    found = dense_form(pattern, geometry, windows=windows)
    return None if found is None else found.schedule


def counts(call: Call, geometry: Geometry) -> Tensor:
    """How often a call counts each pair: (H, S, T)."""
    total = torch.zeros(geometry.num_heads, geometry.q_len, geometry.kv_len, dtype=torch.int64)
    low, high = call.distances
    row, col = torch.arange(call.query.count), torch.arange(call.key.count)
    distance = col - row[:, None]
    met = ((distance >= low) & (distance <= high)).long() * call.weight
    for segment in range(call.segments):
        for t in range(call.query.num_heads):
            rows = call.query.start + segment * call.query.segment_step + row * call.query.step
            cols = call.key.start + segment * call.key.segment_step + col * call.key.step
            group = call.query.num_heads // call.key.num_heads
            rows, cols = rows + t * call.query.head_shift, cols + t // group * call.key.head_shift
            head = call.query.head + t * call.query.head_step
            total[head, rows[:, None], cols] += met
    return total


def check_counts(found: Schedule, pattern: Pattern, geometry: Geometry) -> None:
    expected = reference.multiplicity(pattern, geometry)
    each = [counts(call, geometry) for call in found.calls]
    total = sum(each, torch.zeros_like(expected))
    assert torch.equal(total, expected)
    assert found.pairs == int(expected.sum())
    for call, pairs in zip(found.calls, each, strict=True):
        if call.is_causal:
            assert call.query.count == call.key.count
        else:
            assert not call.is_mirrored
        if call.window is not None:
            assert call.query.count <= call.key.count  # what kernels are given is what they were promised
            assert 0 <= min(call.window) <= max(call.window) <= call.key.count
            assert pairs.any(-1).sum() == call.query.count * geometry.num_heads
    names = {call.name for call in found.calls if call.name.startswith("band")}
    for name in names:  # what exchange counts on: no row is in two calls of a name
        rows = sum((p.any(-1).long() for c, p in zip(found.calls, each, strict=True) if c.name == name), 0)
        assert isinstance(rows, Tensor)
        assert rows.max() == 1
    covering = found.calls[: found.cover]
    if covering:
        assert sum(c.query.count * c.segments * c.query.num_heads for c in covering) == expected[..., 0].numel()


@pytest.mark.parametrize("windows", [True, False], ids=["windows", "squares"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", BANDED, ids=str)
def test_calls_hold_the_pairs_of_the_pattern(pattern: Pattern, is_causal: bool, windows: bool) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 2, "is_causal": is_causal}
    for q_len, kv_len in ((1, 1), (3, 3), (40, 40), (41, 41), (7, 40), (1, 23)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, **heads)  # type: ignore[arg-type]
        found = dense_schedule(pattern, geometry, windows=windows)
        assert found is not None
        check_counts(found, pattern, geometry)


banded = st.one_of(
    st.builds(Local, st.tuples(st.integers(0, 12), st.integers(0, 12))), st.builds(Global, st.integers(1, 20))
)


def composed(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    members = st.lists(inner, min_size=1, max_size=3).map(tuple)
    return st.one_of(st.builds(Union, members), st.builds(Sum, members))


@settings(max_examples=600)
@given(st.recursive(banded, composed, max_leaves=4), geometries())
def test_calls_at_any_positions_hold_the_pairs_or_there_are_none(pattern: Pattern, geometry: Geometry) -> None:
    found = dense_schedule(pattern, geometry)
    squares = dense_schedule(pattern, geometry, windows=False)
    if squares is not None:
        assert all(call.window is None for call in squares.calls)
        check_counts(squares, pattern, geometry)
    else:
        assert branches_and_bands(pattern, geometry)[1] is None
    if found is not None:
        check_counts(found, pattern, geometry)
    elif branches_and_bands(pattern, geometry)[1] is not None:  # more queries than keys, none of which sees all
        assert geometry.q_len > 1
        assert geometry.q_offset != geometry.kv_offset or geometry.q_len != geometry.kv_len


@attrs.frozen
class EveryOther(Local):
    """Sees every other key of its window alone; says nothing of bands itself."""

    def multiplicity(self, query: Ints, key: Ints, head: Ints, geometry: Geometry) -> Ints:
        in_window = super().multiplicity(query, key, head, geometry)
        return np.where((query - key) % 2 == 0, in_window, 0)


def test_what_is_no_sum_of_bands_has_none() -> None:
    twice = (WINDOW + Local(4)) | Local(5), (SINKS + Global(2)) | WINDOW  # pairs that a member counts twice
    more = WINDOW | Random(1, 16) | SINKS, WINDOW | SINKS | Global(2), SINKS | Global(9)
    for pattern in (Random(2, 16), WINDOW | Random(2, 16), EveryOther((5, 3)), *more, *twice):
        assert bands_of(pattern) is None
        assert dense_schedule(pattern, Geometry.self_attention(40)) is None
    assert dense_schedule(WINDOW | Dilated((8,), (2,)), Geometry.self_attention(40)) is None
    apart = Geometry(q_len=40, kv_len=3, num_heads=1, num_kv_heads=1, is_causal=False, q_offset=0, kv_offset=20)
    assert dense_schedule(Local((2, 2)), apart) is not None
    short = Geometry(q_len=40, kv_len=6, num_heads=1, num_kv_heads=1, is_causal=False, q_offset=0, kv_offset=20)
    assert dense_schedule(Local((2, 2)), short) is None  # more queries than keys, none sees all


def test_nested_unions_are_those_of_their_members() -> None:
    nested = Union((WINDOW, Union((WINDOW, SINKS))))
    assert set(bands_of(nested) or ()) == set(bands_of(WINDOW | SINKS) or ())
    assert bands_of(Union((Union((WINDOW, SINKS)), Union((Local(9), SINKS))))) is None


def test_the_first_call_covers_everything_where_one_can() -> None:
    geometry = Geometry.self_attention(64, 2, is_causal=True)
    inside = Local((2, 1)) | WINDOW | Local((5, 0))  # of which nothing is left
    cases: list[tuple[Pattern, int, int]] = [(WINDOW, 1, 1), (inside, 1, 1), (WINDOW | SINKS, 3, 1), (SINKS, 2, 0)]
    cases += [(Full() + WINDOW, 2, 1), (Full(), 1, 1)]
    for pattern, calls, cover in cases:
        found = dense_schedule(pattern, geometry)
        assert found is not None
        assert (len(found.calls), found.cover) == (calls, cover)
        assert found.is_whole is (calls == 1)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", BANDED, ids=str)
def test_a_kernel_that_takes_windows_computes_the_pattern(pattern: Pattern, is_causal: bool) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 2, "is_causal": is_causal}
    for geometry in (
        Geometry(q_len=67, kv_len=67, **heads),  # type: ignore[arg-type]
        Geometry(q_len=21, kv_len=67, **heads),  # type: ignore[arg-type]
        Geometry(q_len=30, kv_len=25, q_offset=11, kv_offset=3, **heads),  # type: ignore[arg-type]
    ):
        check_emulated(ExactWindows(), geometry, pattern, head_dim=8)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("pattern", BANDED, ids=str)
def test_ranks_compute_their_own_keys_so(pattern: Pattern, is_causal: bool) -> None:
    shards = Shards(24, 3, 4, 2, is_causal)
    for hops in (False, True):
        assert worst(pattern, shards, batch=2, through_lse=True, dense=ExactWindows(), hops=hops) < 1e-12


def test_a_shard_of_bands_has_no_table() -> None:
    compute = Compute(Composer(ExactWindows(), 1.0, False), torch.device("cpu"), torch.float64, 1 << 20)
    geometry = Geometry(q_len=24, kv_len=24, num_heads=2, num_kv_heads=2, is_causal=True, q_offset=24, kv_offset=24)
    piece = compute.shard(lower(WINDOW | SINKS, geometry))
    assert isinstance(piece, ComposedPiece)
    assert piece.blocks is None
    assert piece.pairs == lower(WINDOW | SINKS, geometry).pairs
    twice = compute.shard(lower(WINDOW + Local((2, 0)), geometry))
    assert isinstance(twice, ComposedPiece)
    assert twice.merges == 2  # rows are in both windows


def test_no_table_is_put_on_the_device_then() -> None:
    geometry = Geometry.self_attention(67, 2)
    engine = emulated_engine(ExactWindows(), geometry, WINDOW | SINKS, 8, takes_layout=False)
    layout = engine.prepare(67, 67, 0, 0, torch.device("cpu"))
    program = engine.programs.get((67, 67, 0, 0, torch.device("cpu"), False))
    assert program is not None
    assert program.blocks is None
    assert layout.blocks is None  # none is made
    assert program.pairs == lower(WINDOW | SINKS, geometry).pairs


@pytest.mark.parametrize("pattern", BANDED, ids=str)
def test_documents_that_are_filled_up_count_their_own_pairs(pattern: Pattern) -> None:
    causal = Geometry.self_attention(67, 2, is_causal=True)
    engine = emulated_engine(ExactWindows(), causal, pattern, 8, takes_layout=False)
    engine.prepare(67, 67, 0, 0, torch.device("cpu"))
    program = engine.programs.get((67, 67, 0, 0, torch.device("cpu"), False))
    assert program is not None
    lengths = (67, 66, 31, 1)
    alone = (lower(pattern, Geometry.self_attention(n, 2, is_causal=True)).pairs for n in lengths)
    assert program.counted(4, lengths) == (sum(lengths), sum(alone))


def test_which_kernels_take_windows() -> None:
    assert takes_windows(CudaFlash())
    assert takes_windows(CudaCudnnForOneLength())
    assert takes_windows(joining(CudaFlash()))
    assert takes_windows(joining(CudaCudnnForOneLength()))
    assert not takes_windows(CpuFlash())
    assert not takes_windows(joining(CpuFlash()))
    other = CudaCudnnForOneLength(other_lengths=CpuFlash())
    assert not takes_windows(other)


def test_global_tokens_are_dense_calls_on_any_device() -> None:
    attention = build_attention(pattern=Global(5), num_heads=2, head_dim=8)
    x = torch.randn(1, 50, 2, 8)
    out, lse = attention(x, x, x, return_lse=True)
    expected, expected_lse = reference.attention(x, x, x, pattern=Global(5))
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-5)


def test_the_benchmark_of_windows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "CASES", ((Local((5, 0)) | Global(2), 40, 2, 8, True), (Local(3), 90, 2, 8, False)))
    windows.main(["--device", "cpu", "--dtype", "float64", "--longest", "50", "reference", "sdpa", "fa3"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == f"{Local((5, 0)) | Global(2)}, 40 tokens, 2 heads of 8, causal"
    assert [row.split()[0] for row in rows] == ["reference", "sdpa", "fa3"]
    assert "differs by" in rows[1]
    assert rows[2].split()[1] == "refused"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 128, 192, 256])
@pytest.mark.parametrize("pattern", BANDED, ids=str)
def test_pytorchs_own_kernel_takes_windows_on_the_card(pattern: Pattern, head_dim: int, is_causal: bool) -> None:
    for q_len, kv_len, q_offset, dtype in (
        (517, 517, 0, "bfloat16"),
        (77, 300, 223, "float16"),
        (130, 90, 40, "float16"),
    ):
        geometry = Geometry(
            q_len=q_len, kv_len=kv_len, q_offset=q_offset, num_heads=4, num_kv_heads=2, is_causal=is_causal
        )
        attention = build("sdpa", pattern, geometry, dtype, head_dim)
        check(attention, geometry, [1e-2] * 5, through_lse=attention._engine.has_dlse)


def test_a_union_of_one_sum_is_that_sum() -> None:
    """As it is lowered: plans ask here whether a pattern is blocks alone."""
    twice = Local(3) + Local(3)
    for union in (Union((twice,)), Union((twice, twice))):
        assert bands_of(union) == bands_of(twice)
        plan = explain(pattern=union, num_heads=2, head_dim=8, backend="sdpa", device="cpu")
        assert (plan.kernel, plan.layout.kinds) == ("aten flash for CPU", ("band",))
