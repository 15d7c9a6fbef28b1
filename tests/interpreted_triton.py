"""The fused kernels under Triton's interpreter on the CPU; `test_backend_triton` runs this file."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from dilated_attention import AttentionConfig, ConfigError, Dilated, Full, Global, Learned, Local, Pattern, Random
from dilated_attention.backends.fused import addressing, gradient_kernels, launches
from dilated_attention.backends.fused.kernel import FusedKernel, _prepare_rows
from dilated_attention.backends.fused.runs import DeviceTables, Runs
from dilated_attention.backends.fused.tiles import Tile, Tiles, TileSizes
from dilated_attention.backends.fused.walks import make_tables
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import CALL_AXES, LayoutPiece
from dilated_attention.core.lowering import lower
from dilated_attention.core.ops import attend, intern
from dilated_attention.core.pattern import Branch
from dilated_attention.exchange import plan
from dilated_attention.exchange.shards import Shards

from .learned_kit import masked_oracle, seen_pairs
from .ring_simulation import worst
from .support import NAMES, error, inputs, oracle, with_gradients

LONGNET = Dilated(segment_lengths=(8, 16), dilation_rates=(1, 2))


NEVER = 1 << 30


def check_interpreted(
    pattern: Pattern,
    geometry: Geometry,
    head_dim: int = 16,
    *,
    bound_from: int = NEVER,
    factor: float = 1.0,
    **fields: Any,
) -> None:
    """Out, lse and all gradients, through lse too, in float32 against the oracle.

    `bound_from` as `FusedKernel` takes it; the queries are multiplied by `factor`.
    """
    config = AttentionConfig(
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=head_dim,
        pattern=pattern,
        is_causal=geometry.is_causal,
        **fields,
    )
    tile = Tile(16, 16, 4, 1)
    name = f"interpreted, bounded from {bound_from}"
    fused = FusedKernel(name, TileSizes.alike(Tiles.alike(tile)), bound_from)
    engine = intern(Engine(config, pattern, fused, takes_layout=True, has_dlse=True, call_axes=frozenset(CALL_AXES)))
    tensors = inputs(geometry, batch=1, head_dim=head_dim, dtype=torch.float32)
    tensors = [tensors[0].detach().mul(factor).requires_grad_(), *tensors[1:]]
    query, key, value = tensors
    out, lse = attend(
        query,
        key,
        value,
        engine,
        q_offset=geometry.q_offset,
        kv_offset=geometry.kv_offset,
        seed=None,
        tables=None,
        recompute=False,
    )
    actual = with_gradients(out, lse, tensors, through_lse=True)
    size = engine.scale * head_dim**0.5  # the oracle has the default scale
    expected = oracle(pattern, [size * tensors[0].double(), *tensors[1:]], geometry, through_lse=True)
    expected[2] = size * expected[2]
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e) < 1e-5, (name, error(a, e))


def test_launches_are_named_and_their_tables_counted() -> None:
    layout = lower(LONGNET | Local(9), Geometry.self_attention(24, 2))
    assert layout.blocks is not None
    tile, cpu = Tile(16, 16, 4, 1), torch.device("cpu")
    kernel = FusedKernel("interpreted", TileSizes.alike(Tiles.alike(tile)))
    branches, blocks = kernel.parts(layout, cpu)
    assert (branches.name, blocks.name) == ("branch w=8 r=1, branch w=16 r=2", "blocks of 128")
    assert kernel.prepare(layout, cpu) == branches.nbytes + blocks.nbytes > 0


def test_levels_of_rows_have_all_their_bits() -> None:
    """Three bfloat16 each for what is taken off scores and dp; finite ones of rows without keys."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn((300, 2), generator=generator) * 10.0 ** torch.randint(-3, 4, (300, 2), generator=generator)
    numbers[7, 0], numbers[8, 0], numbers[9, 1] = math.inf, math.nan, math.nan
    stats, levels = numbers.view(torch.int64).squeeze(-1), torch.full((300, 16), 7, dtype=torch.bfloat16)
    gradient_kernels.level_rows[(2,)](stats, levels, 300, 0.3, BLOCK_M=256)
    found = torch.stack([levels[:, :3].double().sum(1), levels[:, 3:6].double().sum(1)], 1)
    expected = -numbers.double() / torch.tensor([0.3, 1.0])
    expected[7, 0] = -1e30
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.allclose(found, expected, rtol=3e-7, atol=0, equal_nan=True)
    assert not levels[:, 6:].any()


@pytest.mark.parametrize("through_lse", [True, False])
def test_rows_are_prepared_in_levels_as_in_pairs(through_lse: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn((2, 70, 3, 64), generator=generator)
    dout, out = wide[..., :24], torch.randn((2, 70, 3, 24), generator=generator)
    lse, dlse = (torch.randn((2, 3, 70), generator=generator) for _ in range(2))
    lse[1, 2, 69] = -math.inf
    kernel = FusedKernel("interpreted", TileSizes.alike(Tiles.alike(Tile(16, 16, 4, 1))))
    pairs = kernel.row_sums(dout, out, lse, dlse if through_lse else None)
    expected, levels = (torch.full((2, 3, 70, 16), 7, dtype=torch.bfloat16) for _ in range(2))
    gradient_kernels.level_rows[(2,)](pairs, expected, 420, 0.3, BLOCK_M=256)
    sums = torch.full((2, 70, 3, 24), math.nan)
    _prepare_rows(dout, out, lse, dlse if through_lse else None, levels, sums, 0.3)
    assert torch.equal(levels, expected)
    assert torch.equal(sums, torch.zeros_like(sums))


@triton.jit
def _tell_places(places: Any, num_heads: Any, leading: Any) -> None:
    tile, head = addressing.tile_and_head_of_blocks(num_heads, leading)
    tl.store(places + 2 * tl.program_id(0), tile)
    tl.store(places + 2 * tl.program_id(0) + 1, head)


@pytest.mark.parametrize("leading", [0, 2, 5])
def test_leading_tiles_of_all_heads_come_first(leading: int) -> None:
    places = torch.zeros((15, 2), dtype=torch.int32)
    _tell_places[(15,)](places, 3, leading)
    expected = [(tile, head) for head in range(3) for tile in range(leading)]
    expected += [(tile, head) for head in range(3) for tile in range(leading, 5)]
    assert [tuple(place) for place in places.tolist()] == expected


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_runs_tell_of_each_part_what_it_meets(parts: int) -> None:
    """As tiles of its rows alone would, were they listed by themselves."""
    layout = lower(Dilated((8, 24), (1, 2)), Geometry.self_attention(70, 2, is_causal=True))
    tables = DeviceTables.of(
        make_tables(layout.branches, is_causal=True, transposed=False, span=70, merge_from=1), torch.device("cpu")
    )
    tile = Tile(8 * parts, 4, 4, 1, parts=parts)
    whole, alone = (Runs.of(tables, x, (0, 70), (0, 70)) for x in (tile, Tile(8, 4, 4, 1)))
    period, kinds = tables.host.period, len(tables.host.counts)
    listed = 0
    for kind, block, slot in itertools.product(range(kinds), range(whole.blocks), range(period)):
        index = parts * int(tables.host.slot_index[kind, slot])  # of the part's tile among those of its group
        first = slot - int(tables.host.slot_index[kind, slot])
        size = int(tables.host.group_size[kind, tables.host.slot_group[kind, slot]])
        runs = whole.runs[kind, block, int(whole.start[kind, slot]) :]
        totals = whole.totals[kind, block, slot].tolist()
        at = [0] * parts
        steps, number = 0, 0
        while steps < totals[0]:
            count, full = runs[number, 2:4].tolist()
            of_parts = runs[number, 4:].reshape(parts, 2)
            assert of_parts[:, 0].max() == count
            assert of_parts[:, 1].min() == full
            for part in range(parts):
                other = parts * block + (index + part) // size, first + (index + part) % size
                if of_parts[part, 0] > 0:
                    expected = alone.runs[kind, other[0], int(alone.start[kind, other[1]]) + at[part]]
                    assert runs[number, :2].tolist() + of_parts[part].tolist() == expected.tolist()
                    at[part] += 1
            steps += -(-count // tile.columns)
            number += 1
            listed += 1
        own = [
            int(alone.totals[kind, block_alone, slot_alone, 0])
            for block_alone, slot_alone in (
                (parts * block + (index + part) // size, first + (index + part) % size) for part in range(parts)
            )
            if block_alone < alone.blocks
        ]
        assert totals[1 : 1 + len(own)] == own
    assert listed > 10


def test_longnet(monkeypatch: pytest.MonkeyPatch) -> None:
    def tables(
        branches: tuple[Branch, ...],
        causal: bool,
        transposed: bool,
        span: int,
        on: torch.device,
        apart: tuple[int, ...],
    ) -> DeviceTables:
        """Short segments, weighted all the same."""
        assert not apart
        made = make_tables(branches, is_causal=causal, transposed=transposed, span=span, merge_from=1)
        return DeviceTables.of(made, on)

    monkeypatch.setattr(launches, "known_tables", tables)
    check_interpreted(LONGNET, Geometry.self_attention(19, 2, is_causal=True))
    # Not causal; the inner two do not nest, the outer two do.
    check_interpreted(Dilated((5, 8, 16), (1, 2, 2)), Geometry.self_attention(19, 1))


@pytest.mark.parametrize("is_causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_rates_that_do_not_divide_and_grouped_heads(is_causal: bool) -> None:
    geometry = Geometry(q_len=14, kv_len=14, num_heads=2, num_kv_heads=1, is_causal=is_causal)
    check_interpreted(Dilated((7, 12), (2, 3)), geometry, head_dim=24)


def test_more_classes_than_rows_of_a_tile() -> None:
    """As of a branch over all of a long sequence, of whose classes few rows are."""
    check_interpreted(Dilated((20, 60), (1, 18)), Geometry.self_attention(38, 1, is_causal=True), bound_from=0)


@pytest.mark.parametrize("is_causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_rows_of_a_rare_branch_are_looked_at_by_themselves(is_causal: bool) -> None:
    pattern, geometry = Dilated((8, 16, 80), (1, 2, 16)), Geometry.self_attention(75, 1, is_causal=is_causal)
    for transposed in (False, True):
        branches = lower(pattern, geometry).branches
        tables = make_tables(branches, is_causal=is_causal, transposed=transposed, span=75)
        assert 16 in tables.walks[..., 5]  # the rate of rows that a walk is for
        assert tables.period < 16
    check_interpreted(pattern, geometry, bound_from=0)


def test_offsets_lengths_and_rows_without_keys() -> None:
    pattern = Dilated((8, 12), (1, 3))
    later = Geometry(q_len=20, kv_len=15, num_heads=2, num_kv_heads=1, is_causal=True, q_offset=9, kv_offset=21)
    check_interpreted(pattern, later)
    before = Geometry(q_len=20, kv_len=8, num_heads=1, num_kv_heads=1, is_causal=True)
    assert before.q_offset < 0
    check_interpreted(pattern, before)


@pytest.mark.parametrize("pattern", [Full(), Random(blocks_per_row=2, block_size=16, seed=3)], ids=repr)
@pytest.mark.parametrize("is_causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_negative_scale(pattern: Pattern, is_causal: bool) -> None:
    """Where a mask hides pairs too; of blocks, the causal ones at the diagonal have one."""
    check_interpreted(pattern, Geometry.self_attention(21, 1, is_causal=is_causal), scale=-0.7)


def test_merging_takes_the_sign_of_the_scale() -> None:
    geometry = Geometry.self_attention(21, 1)
    layout = lower(Random(blocks_per_row=2, block_size=16, seed=3), geometry)
    tile = Tile(16, 16, 4, 1)
    kernel = FusedKernel("interpreted", TileSizes.alike(Tiles.alike(tile)))
    query, key, value = (x.detach() for x in inputs(geometry, batch=1, head_dim=16, dtype=torch.float32))
    expected = kernel.forward(query, key, value, LayoutPiece(layout=layout, scale=-0.25))
    merged = torch.zeros_like(query), torch.full((1, 1, 21), float("-inf"))
    kernel.merge(*merged, query, key, value, LayoutPiece(layout=layout, scale=-0.25))
    for found, want in zip(merged, expected, strict=True):
        assert error(found, want) < 1e-6


def test_positions_beyond_its_arithmetic_are_an_error() -> None:
    far = 1 << 29
    geometry = Geometry(q_len=4, kv_len=4, num_heads=1, num_kv_heads=1, is_causal=False, q_offset=far, kv_offset=far)
    with pytest.raises(ConfigError, match="takes positions below 536,870,912"):
        check_interpreted(LONGNET, geometry)


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_a_bound_in_place_of_the_running_maximum(factor: float) -> None:
    """Queries eight times as large are past it and take the other path, in some tiles or in all."""
    causal = Geometry(q_len=18, kv_len=15, num_heads=1, num_kv_heads=1, is_causal=True)  # some rows without keys
    check_interpreted(Dilated((8, 16), (1, 2)), causal, bound_from=0, factor=factor)


@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks(is_causal: bool) -> None:
    geometry = Geometry(q_len=45, kv_len=45, num_heads=2, num_kv_heads=1, is_causal=is_causal)
    check_interpreted(Random(blocks_per_row=2, block_size=16, seed=3), geometry)


def test_blocks_with_masks_beside_branches() -> None:
    pattern = Dilated((8, 16), (1, 2)) + (Local(window_size=9) | Global(tokens=3))
    check_interpreted(pattern, Geometry(q_len=21, kv_len=37, num_heads=1, num_kv_heads=1, is_causal=True))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(q_len=53, kv_len=53, num_heads=2, num_kv_heads=1, is_causal=True),
        Geometry(q_len=64, kv_len=48, num_heads=1, num_kv_heads=1, is_causal=False),
        pytest.param(
            Geometry(q_len=37, kv_len=60, num_heads=2, num_kv_heads=2, is_causal=False), marks=pytest.mark.slow
        ),
        Geometry(q_len=40, kv_len=119, num_heads=1, num_kv_heads=1, is_causal=True, q_offset=75, kv_offset=4),
        Geometry(q_len=48, kv_len=32, num_heads=1, num_kv_heads=1, is_causal=True),  # rows without keys
    ],
    ids=str,
)
def test_blocks_that_a_gate_names(geometry: Geometry) -> None:
    """Other ones in each of two batch rows, if there are more than a row keeps."""
    pattern = Learned(block_size=16, blocks_per_row=2)
    tensors = inputs(geometry, batch=2, head_dim=16, dtype=torch.float32)
    config = AttentionConfig(
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=16,
        pattern=pattern,
        is_causal=geometry.is_causal,
    )
    query, key, value = tensors
    at, from_ = geometry.q_offset, geometry.kv_offset
    named: torch.Tensor = pattern.make_gate(config)(query, key, q_offset=at, kv_offset=from_)
    assert torch.equal(named[0], named[1]) == (geometry.kv_len == 32)  # which are all there are
    fused = FusedKernel("interpreted, named", TileSizes.alike(Tiles.alike(Tile(16, 16, 4, 1))), NEVER)
    engine = intern(Engine(config, pattern, fused, takes_layout=True, has_dlse=True, call_axes=frozenset(CALL_AXES)))
    out, lse = attend(query, key, value, engine, q_offset=at, kv_offset=from_, seed=None, tables=named, recompute=False)
    actual = with_gradients(out, lse, tensors, through_lse=True)
    expected = masked_oracle(seen_pairs(named, geometry, 16), tensors, engine.scale)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert error(a, e) < 1e-5, (name, error(a, e))


@pytest.mark.parametrize(
    ("pattern", "is_causal", "rows_a_copy", "num_heads"),
    [
        pytest.param(Dilated((8, 34), (1, 2)), True, 32, 2, marks=pytest.mark.slow),
        (Random(blocks_per_row=2, block_size=16, seed=3), False, 1, 2),
        (Dilated((8, 34), (1, 2)) + Random(blocks_per_row=1, block_size=16, seed=3), True, 32, 1),
    ],
    ids=repr,
)
def test_a_rank_computes_its_own_keys_and_received_blocks(
    pattern: Pattern, is_causal: bool, rows_a_copy: int, num_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, a segment across both; merged with what they receive, it is the whole sequence's attention."""
    monkeypatch.setattr(plan, "ROWS_A_COPY", rows_a_copy)
    tile = Tile(16, 16, 4, 1)
    kernel = FusedKernel("interpreted", TileSizes.alike(Tiles.alike(tile)), NEVER)
    shards = Shards(17, 2, num_heads, 1, is_causal)
    found = worst(pattern, shards, kernel=kernel, takes_staged=True, through_lse=True, dtype=torch.float32, head_dim=16)
    assert found < 1e-5
