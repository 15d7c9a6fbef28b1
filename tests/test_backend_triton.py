"""The backend `triton`: its walks against the patterns' own counts, and its kernels on a CPU and on the card."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention import Dilated, Full, Global, Learned, Local, Pattern, Random, Strided, build_attention, explain
from dilated_attention.backends.fused import walks
from dilated_attention.backends.fused.launches import known_tables
from dilated_attention.backends.fused.walks import MAX_PERIOD, Mode, Tables, make_tables, roomy_span
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Branch
from dilated_attention.registry.specs import Device

from .kernel_kit import build, check, check_graph, codes, on_card, run_interpreted, verdict
from .strategies import dilated
from .support import NAMES, error, ours

LONGNET = Dilated(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4))
WINDOW = Local(window_size=70)
PATTERNS: list[Pattern] = [
    LONGNET,
    Full(),
    Strided(stride=3),
    Dilated(segment_lengths=(7, 24, 10), dilation_rates=(2, 3, 4)),
    Dilated(segment_lengths=(8, 20, 64, 128), dilation_rates=(1, 2, 4, 8)),  # only the outer ones nest
    Dilated(segment_lengths=(50, 60, 71), dilation_rates=(3, 7, 11)),  # more classes than groups, all in one segment
    Dilated(segment_lengths=(8, 16), dilation_rates=(2, 4), heads="split"),
    Dilated(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), offsets="blocked"),
    LONGNET + Dilated(segment_lengths=(8,), dilation_rates=(1,)) + Full(),
]


def counted(tables: Tables, rows: range, columns: range, head: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How often each row of a head walks over each column."""
    kind = tables.head_kind[head]
    found = np.zeros((len(rows), len(columns)), dtype=np.int64)
    column = np.arange(columns.start, columns.stop)
    for place, p in enumerate(rows):
        at = list(tables.residues[kind]).index(p % tables.period)
        group = tables.slot_group[kind, at]
        assert tables.group_start[kind, group] + tables.slot_index[kind, at] == at
        for index in range(tables.counts[kind, group]):
            length, stride, residue, mode, inner, row_rate = map(int, tables.walks[kind, group, index, :6])
            start = p // length * length if length else min(columns.start, 0)
            end = start + length if length else columns.stop
            if row_rate and (p - start) % row_rate != residue:
                continue
            seen = (column >= start) & (column < end) & ((column - residue - (start if row_rate else 0)) % stride == 0)
            inner_start = p // inner * inner
            seen &= {
                Mode.ALL: column >= start,
                Mode.UP_TO_ROW: column <= p,
                Mode.FROM_ROW: column >= p,
                Mode.BEFORE_INNER: column < inner_start,
                Mode.AFTER_INNER: column >= inner_start + inner,
            }[Mode(mode)]
            found[place] += seen * round(2 ** float(tables.bias[kind, group, index]))
    return found


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(dilated(), st.sampled_from(PATTERNS)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 1 << 30]),
    st.sampled_from([1, 4, 128]),
    st.booleans(),
)
def test_the_walks_count_every_pair_as_often_as_the_pattern_does(
    pattern: Pattern, is_causal: bool, transposed: bool, merge_from: int, rows: int, roomy: bool
) -> None:
    length, heads = 41, 6
    geometry = Geometry.self_attention(length, heads, is_causal=is_causal)
    branches = lower(pattern, geometry).branches
    with pytest.MonkeyPatch.context() as patched:  # tiles so small that which rates go by classes varies
        patched.setattr(walks, "_ROWS", rows)
        patched.setattr(walks, "_COLUMNS", 1)
        span = roomy_span(branches, length) if roomy else length
        tables = make_tables(branches, is_causal=is_causal, transposed=transposed, span=span, merge_from=merge_from)
    assert tables.period <= MAX_PERIOD
    place = np.arange(length)
    for head in range(heads):
        expected = pattern.multiplicity(place[:, None], place[None, :], np.array(head), geometry)
        if is_causal:
            expected = expected * (place[None, :] <= place[:, None])
        actual = counted(tables, range(length), range(length), head)
        assert np.array_equal(actual.T if transposed else actual, expected)


def test_lengths_that_are_about_the_same_share_their_tables() -> None:
    branches = Branch(256, 1, (0,)), Branch(1000, 3, (0,)), Branch(None, 64, (0,))
    spans = [roomy_span(branches, length) for length in range(1, 3000)]
    assert all(length <= span <= length + length // 8 + 1 for length, span in enumerate(spans, start=1))
    assert len(set(spans)) < 100
    for end in (256, 1000):  # what one segment holds, one segment still holds
        assert max(spans[:end]) == end
    assert roomy_span(branches, 131_072) == 131_072
    made = [known_tables(branches, True, False, roomy_span(branches, n), torch.device("cpu")) for n in (701, 704, 705)]
    assert made[0] is made[1]
    assert made[0] is not made[2]


@settings(max_examples=40, deadline=None)
@given(dilated(), st.booleans(), st.booleans())
def test_the_walks_count_positions_before_0(pattern: Pattern, is_causal: bool, transposed: bool) -> None:
    rows, columns, heads = range(-23, 7), range(30), 4
    if transposed:
        rows, columns = columns, rows
    geometry = Geometry(q_len=30, kv_len=30, num_heads=heads, num_kv_heads=heads, is_causal=is_causal, q_offset=-23)
    tables = make_tables(lower(pattern, geometry).branches, is_causal=is_causal, transposed=transposed, span=0)
    row, column = np.array(rows)[:, None], np.array(columns)[None, :]
    query, key = (column, row) if transposed else (row, column)
    for head in range(heads):
        expected = pattern.multiplicity(query, key, np.array(head), geometry)
        expected = expected * (key <= query) if is_causal else expected
        assert np.array_equal(counted(tables, rows, columns, head), expected)


@settings(max_examples=60, deadline=None)
@given(dilated(), st.booleans(), st.sampled_from([4, 16]), st.booleans())
def test_there_is_a_place_for_every_run_of_a_tile(pattern: Pattern, transposed: bool, rows: int, spans: bool) -> None:
    """A kernel writes them without looking where the places end."""
    length, heads = 150, 4
    branches = lower(pattern, Geometry.self_attention(length, heads)).branches
    tables = make_tables(branches, is_causal=True, transposed=transposed, span=length if spans else 0)
    start, places = tables.places_of_runs(rows, length)
    kinds, period = start.shape
    ends = np.concatenate([start[:, 1:], np.full((kinds, 1), places)], axis=1)
    for kind in range(kinds):
        for slot in range(period):
            group = tables.slot_group[kind, slot]
            size, first_residue = int(tables.group_size[kind, group]), int(tables.group_start[kind, group])
            element = tables.slot_index[kind, slot] * rows + np.arange(rows)
            residue = tables.residues[kind, first_residue + element % size]
            for block in range(-(-length // (rows * period))):
                position = block * rows * period + element // size * period + residue
                position = position[position < length]
                if not position.size:
                    continue
                found = 0
                for walk in tables.walks[kind, group, : tables.counts[kind, group]]:
                    segment = int(walk[0])
                    found += 1 if segment == 0 else int(position[-1] // segment - position[0] // segment) + 1
                assert found <= ends[kind, slot] - start[kind, slot]


def test_a_column_of_several_branches_is_met_once() -> None:
    geometry = Geometry.self_attention(4096, 4)
    pattern = Dilated(segment_lengths=(512, 1024, 2048), dilation_rates=(1, 2, 4))
    tables = make_tables(lower(pattern, geometry).branches, is_causal=True, transposed=False, span=4096)
    position = 2044 + 4  # of all three branches for head 0
    met = counted(tables, range(position, position + 1), range(4096), 0)[0]
    walks = tables.counts[tables.head_kind[0], tables.slot_group[0, list(tables.residues[0]).index(position % 4)]]
    assert walks > 3
    assert met.max() == 3
    assert tables.bias.max() == pytest.approx(np.log2(3))


def test_a_rare_branch_makes_no_tile_walk_whole_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of LongNet with a branch over everything, as over a ring: what tiles meet is the least of all ways to group."""
    length, tile = 4096, 32
    monkeypatch.setattr(walks, "_ROWS", tile)
    monkeypatch.setattr(walks, "_COLUMNS", 1)
    pattern = Dilated(segment_lengths=(128, 256, 512, length), dilation_rates=(1, 2, 4, length // 128))
    branches = lower(pattern, Geometry.self_attention(length, 1, is_causal=True)).branches

    def columns_met(tables: Tables) -> int:
        met = 0
        residues, period = tables.residues[0], tables.period
        for start in range(0, length, tile * period):
            for group in range(tables.counts.shape[1]):
                first, size = int(tables.group_start[0, group]), int(tables.group_size[0, group])
                rows = start + np.arange(tile * period)
                rows = rows[np.isin(rows % period, residues[first : first + size])]
                for some in np.array_split(rows, size):
                    counts = np.stack([counted(tables, range(p, p + 1), range(length), 0)[0] for p in some])
                    met += int((counts > 0).any(0).sum())
        return met

    def tables_of(rates: tuple[Branch, ...]) -> Tables:
        return make_tables(rates, is_causal=True, transposed=False, span=length)

    best = columns_met(tables_of(branches))
    assert tables_of(branches).period == 4
    best_of = walks._Planner.best
    for rate in (1, 2, length // 128):
        monkeypatch.setattr(
            walks._Planner,
            "best",
            lambda *args, rate=rate, **rest: attrs.evolve(best_of(*args, **rest), most_rate=rate),
        )
        assert columns_met(tables_of(branches)) > best


def test_a_rate_of_any_size_has_tables() -> None:
    """Rows of a branch over 134 million positions are looked at by themselves."""
    length = 1 << 27
    branches = lower(Dilated((2048, length), (1, length // 2048)), Geometry.self_attention(length, 2)).branches
    tables = make_tables(branches, is_causal=True, transposed=False, span=length)
    assert tables.period == 1
    with pytest.raises(ValueError, match="5000, allowed are 4096"):
        make_tables((Branch(None, 5000, (0,)),), is_causal=True, transposed=False, span=0)


def test_a_kernel_that_is_compiled_for_one_length_serves_others() -> None:
    """Only what memory accesses and heads depend on is compiled for."""
    from dilated_attention.backends.fused import (
        block_gradient_kernels,
        block_kernels,
        gradient_kernels,
        kernels,
        run_kernels,
    )

    compiled_for = {f"stride_{x}{axis}" for x in "qkvgo" for axis in "bsh"} | {"num_heads", "group_heads"}
    compiled_for |= {"stride_b", "stride_s", "stride_h", "scale", "grad_scale"}
    for kernel in (
        kernels.attend,
        kernels.largest_rows,
        gradient_kernels.prepare_rows,
        gradient_kernels.level_rows,
        gradient_kernels.gradients_of_queries,
        gradient_kernels.gradients_of_keys,
        block_kernels.attend_blocks,
        block_gradient_kernels.block_gradients_of_queries,
        block_gradient_kernels.block_gradients_of_keys,
        run_kernels.list_runs,
    ):
        tables = {
            *("head_kind", "slot_group", "slot_index", "group_size", "group_start", "residues", "walks", "counts"),
            *("biases", "run_start", "runs", "totals", "head_table", "starts", "cols", "mask_ids", "masks"),
            *("documents", "ends", "draws"),
        }
        params: Any = kernel.params
        free = {p.name for p in params if not p.is_constexpr and not p.do_not_specialize}
        assert {name for name in free if not name.endswith("_ptr")} <= compiled_for | tables


@pytest.mark.parametrize("file", ["interpreted_triton.py", "interpreted_documents.py", "interpreted_dropout.py"])
def test_its_kernels_interpreted_on_a_cpu(file: str) -> None:
    run_interpreted(file)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["interpreted_triton.py", "interpreted_documents.py", "interpreted_dropout.py"])
def test_further_cases_interpreted_on_a_cpu(file: str) -> None:
    run_interpreted(file, is_slow=True)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"pattern": Random(blocks_per_row=2, block_size=24)}, "block_sizes"),
        ({"pattern": Learned(block_size=24, blocks_per_row=2)}, "block_sizes"),
        ({"pattern": Learned(block_size=8, blocks_per_row=2)}, "block_sizes"),
        ({"pattern": Strided(stride=4099)}, "dilation_rates"),
        ({"dtype": "float64"}, "dtypes"),
        ({"head_dim": 20}, "head_dims"),
        ({"device": Device(type="cuda", arch="sm_80", torch_name="cuda:0")}, "arch"),
        ({"device": Device(type="cpu", arch="x86_64", torch_name="cpu")}, "device_types"),
    ],
)
def test_what_it_does_not_take_is_refused(fields: dict[str, Any], code: str) -> None:
    assert codes(verdict("triton", **fields)) == {code}


def test_listing_it_imports_nothing_of_it() -> None:
    from .distributions import run

    code = (
        "import sys; from dilated_attention.registry.discovery import default_registry\n"
        "print('triton' in default_registry().backends, [m for m in sys.modules if m.startswith(('torch', 'triton'))])"
    )
    assert run(None, "-c", code).stdout.split(maxsplit=1) == ["True", "[]\n"]


def test_on_a_cpu_it_is_refused() -> None:
    (row,) = [row for row in explain(num_heads=8, head_dim=64, device="cpu").rows if row.name == "triton"]
    assert [refusal.code for refusal in row.refusals] == ["device_types"]


# On the card.

CARD = [
    Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4)),
    Dilated(segment_lengths=(100, 230, 500), dilation_rates=(3, 5, 2)),
    Dilated(segment_lengths=(64, 256), dilation_rates=(2, 4), heads="split"),
    Full(),
    Strided(stride=3),
    Random(blocks_per_row=2, block_size=32, seed=7),
    Local(window_size=70) | Global(tokens=3),
    Dilated(segment_lengths=(64, 128), dilation_rates=(1, 2)) + Local(window_size=30),
]


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", CARD, ids=str)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bfloat16", 64), ("float16", 48), ("bfloat16", 128), ("bfloat16", 256), ("bfloat16", 16), ("float32", 40)],
)
def test_it_agrees_with_the_oracle(dtype: str, head_dim: int, pattern: Pattern, is_causal: bool) -> None:
    geometry = Geometry(q_len=517, kv_len=517, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    check(build("triton", pattern, geometry, dtype, head_dim), geometry)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 4.0, 30.0])
def test_scores_with_and_without_a_bound(factor: float) -> None:
    """Enough pairs a key for the bound to be taken; queries four times as large meet it in some tiles, then in none."""
    geometry = Geometry.self_attention(2048, 2, is_causal=False)
    pattern = Dilated(segment_lengths=(1024, 2048), dilation_rates=(1, 2))
    check(build("triton", pattern, geometry, "bfloat16", 64), geometry, factor=factor)


@pytest.mark.gpu
def test_offsets_and_unequal_lengths() -> None:
    geometry = Geometry(q_len=300, kv_len=700, num_heads=4, num_kv_heads=4, is_causal=True, q_offset=520, kv_offset=64)
    check(build("triton", CARD[0], geometry, "bfloat16", 64), geometry)


@pytest.mark.gpu
def test_the_same_bits_on_every_run_and_strided_inputs() -> None:
    geometry = Geometry.self_attention(2000, 4, is_causal=True)
    attention = build("triton", CARD[0], geometry, "bfloat16", 64, deterministic=True)
    tensors = on_card(geometry, "bfloat16", 64)
    first = ours(attention, tensors, geometry, through_lse=True)
    packed = torch.stack([x.detach() for x in tensors], dim=2)
    views = [packed[:, :, i].requires_grad_() for i in range(3)]
    again = ours(attention, views, geometry, through_lse=True)
    for name, a, b in zip(NAMES, first, again, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are made on another stream
def test_it_replays_in_a_graph_and_compiles() -> None:
    geometry = Geometry.self_attention(1024, 4, is_causal=True)
    attention = build("triton", CARD[0], geometry, "bfloat16", 64)
    check_graph(attention, geometry)
    compiled = torch.compile(attention, fullgraph=True)
    tensors = on_card(geometry, "bfloat16", 64)
    assert torch.equal(compiled(*tensors), attention(*tensors))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are made on another stream
@pytest.mark.parametrize(("block_size", "head_dim"), [(128, 64), (128, 128), (64, 64), (16, 256)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_that_a_gate_names(block_size: int, head_dim: int, is_causal: bool) -> None:
    """As core's own product, and again from a CUDA graph, other keys and all."""
    fields: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": head_dim, "is_causal": is_causal}
    fields |= {"pattern": Learned(block_size=block_size, blocks_per_row=3), "dtype": "bfloat16", "device": "cuda"}
    fused, plain = (build_attention(**fields, backend=backend) for backend in ("triton", "sdpa"))
    assert plain.gate is not None
    assert fused.gate is not None
    fused.gate.load_state_dict(plain.gate.state_dict())
    geometry = Geometry(q_len=1000, kv_len=1000, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    tensors = on_card(geometry, "bfloat16", head_dim)
    through_lse = head_dim <= 64  # what `sdpa` has a kernel for
    found, expected = (ours(attention, tensors, geometry, through_lse=through_lse) for attention in (fused, plain))
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert error(a, e) < 1e-2, (name, error(a, e))
    check_graph(fused, geometry)


def picked(pattern: Pattern, **fields: Any) -> str:
    """What `auto` would take, were FlashAttention-3 and -4 not installed."""
    request: dict[str, Any] = {"num_heads": 4, "head_dim": 64, "dtype": "bfloat16", "device": "cuda"}
    rows = build_attention(pattern=pattern, **request | fields).plan.rows
    able = [row.name for row in rows if row.status in ("chosen", "usable")]
    return next(name for name in able if name not in ("fa3", "fa4"))


@pytest.mark.gpu
def test_auto_takes_it_for_several_branches_and_not_for_dense_attention() -> None:
    assert picked(CARD[0]) == "triton"
    assert picked(Local(window_size=64)) == "triton"
    assert picked(Full()) != "triton"
    assert picked(Full(), varlen=True) == "triton"
    assert picked(CARD[0], dtype="float32") != "triton"
    assert picked(WINDOW, head_dim=256) == "triton"
    assert picked(WINDOW, dtype="float32") == "sdpa"
    odd = Random(blocks_per_row=2, block_size=96)  # which no tile divides
    assert picked(odd, seq_len=1024) == picked(odd) == "flex"
