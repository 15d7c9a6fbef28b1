"""The lowered layout, expanded to dense counts again, is the multiplicity that the oracle uses."""

from __future__ import annotations

import tracemalloc

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention.core.blocking import lower_blocks
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.layout import Layout
from dilated_attention.core.lowering import layout_kinds, lower, split
from dilated_attention.core.pattern import Branch, Full, KeySpans, Pattern, Sum, Union
from dilated_attention.core.reference import multiplicity
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.patterns.strided import Strided

from . import strategies
from .dense_tables import Dense, dense_blocks


def dense_branch(branch: Branch, geometry: Geometry) -> Dense:
    """A branch pair by pair, from its docstring."""
    counts = np.zeros((geometry.num_heads, geometry.q_len, geometry.kv_len), dtype=np.int64)
    w, r = branch.segment_length, branch.stride
    for h, offset in enumerate(branch.offsets):
        if offset is None:
            continue
        for i in range(geometry.q_len):
            p = i + geometry.q_offset
            for j in range(geometry.kv_len):
                q = j + geometry.kv_offset
                together = w is None or p // w == q // w
                p_place, q_place = (p, q) if w is None else (p % w, q % w)
                kept = p_place % r == offset and q_place % r == offset
                if together and kept and (q <= p or not geometry.is_causal):
                    counts[h, i, j] = branch.weight
    return counts


def dense(layout: Layout) -> Dense:
    geometry = layout.geometry
    counts = np.zeros((geometry.num_heads, geometry.q_len, geometry.kv_len), dtype=np.int64)
    for branch in layout.branches:
        counts += dense_branch(branch, geometry)
    return counts if layout.blocks is None else counts + dense_blocks(layout.blocks)


@settings(max_examples=150, deadline=None)
@given(strategies.patterns(), strategies.geometries(max_len=28), st.sampled_from((1, 3, 4, 8, 16, 64)))
def test_a_layout_expands_to_the_oracles_counts(pattern: Pattern, geometry: Geometry, block_size: int) -> None:
    layout = lower(pattern, geometry, block_size=block_size)
    np.testing.assert_array_equal(dense(layout), multiplicity(pattern, geometry).numpy())
    assert layout.kinds == layout_kinds(pattern, geometry)


@settings(max_examples=150, deadline=None)
@given(strategies.patterns(), strategies.geometries(max_len=60), st.sampled_from((2, 5, 8, 16)))
def test_blocks_alone_expand_to_the_oracles_counts(pattern: Pattern, geometry: Geometry, block_size: int) -> None:
    blocks = lower_blocks(pattern, geometry, block_size=block_size)
    np.testing.assert_array_equal(dense_blocks(blocks), multiplicity(pattern, geometry).numpy())


class Noisy(Pattern):
    """A third party's pattern that says nothing about itself but its multiplicity."""

    kind = "noisy"

    def multiplicity(self, query: Dense, key: Dense, head: Dense, geometry: Geometry) -> Dense:
        return (query * 7 + key * 5 + head * 3) % 11 // 4

    @property
    def max_multiplicity(self) -> int:
        return 2


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("other", [Full(), Local(3), Dilated((8, 16), (1, 2))])
def test_a_pattern_that_claims_nothing_lowers_exactly(other: Pattern, is_causal: bool) -> None:
    geometry = Geometry(q_len=21, kv_len=30, num_heads=4, num_kv_heads=2, is_causal=is_causal, q_offset=-4, kv_offset=3)
    for pattern in (Noisy(), Noisy() | other, Noisy() + other, other | Noisy()):
        layout = lower(pattern, geometry, block_size=8)
        np.testing.assert_array_equal(dense(layout), multiplicity(pattern, geometry).numpy())


class Twice(Noisy):
    """Constant, without saying so."""

    def multiplicity(self, query: Dense, key: Dense, head: Dense, geometry: Geometry) -> Dense:
        return 2 + 0 * (query + key + head)


def test_blocks_that_turn_out_constant_are_full_even_where_the_queries_end() -> None:
    blocks = lower_blocks(
        Twice(), Geometry(q_len=20, kv_len=32, num_heads=2, num_kv_heads=2, is_causal=False), block_size=16
    )
    assert blocks.masks.shape == (0, 16, 16)
    assert blocks.weights.tolist() == [2] * 8


def test_equal_branches_merge_into_weights() -> None:
    geometry = Geometry.self_attention(32, 2)
    pattern = Dilated((8, 8), (2, 2)) + Dilated((8,), (2,)) + Full() + Full()
    assert lower(pattern, geometry).branches == (Branch(8, 2, (0, 1), 3), Branch(None, 1, (0, 0), 2))


def test_a_union_with_full_is_full() -> None:
    geometry = Geometry.self_attention(32, 2)
    for pattern in (Local(3) | Full(), Full() | (Local(2) | Global(4)), Union((Full(),))):
        layout = lower(pattern, geometry)
        assert layout.kinds == {"branch"}
        assert layout.branches == (Branch(None, 1, (0, 0)),)
    assert lower(Full() | Dilated((8, 8), (1, 1)), geometry).kinds == {"branch", "block"}
    assert lower(Local(3) | Local(3), geometry).digest == lower(Local(3), geometry).digest


def test_translation_makes_few_masks() -> None:
    layout = lower(Local(200), Geometry.self_attention(1 << 14, 8, is_causal=True)).blocks
    assert layout is not None
    assert layout.row_ptr.shape == (1, 129)
    assert layout.masks.shape[0] == 3  # the diagonal and the two blocks that the window's edge crosses


def test_a_layout_beyond_the_limit_is_refused_with_both_numbers() -> None:
    geometry = Geometry.self_attention(1 << 20, 2)
    with pytest.raises(
        ConfigError, match=r"805,306,368 bytes for 67,108,864 blocks of 128, allowed are 1,048,576; raise"
    ):
        lower(Noisy(), geometry, limit_bytes=1 << 20)
    with pytest.raises(
        ConfigError, match=r"of 1,048,576 queries needs more than 65,536 bytes .* allowed are 100; raise"
    ):
        lower(Noisy(), geometry, limit_bytes=100)
    with pytest.raises(ConfigError, match=r"needs at least [\d,]+ bytes, allowed are 20,000"):
        lower(Noisy(), Geometry.self_attention(512, 2), limit_bytes=20_000)
    assert lower(Local(3), Geometry.self_attention(512, 2), limit_bytes=100_000).nbytes <= 100_000
    long = 10**15  # not even the numbers of its blocks find room
    for geometry, what in (
        (Geometry.self_attention(long, 2), "queries"),
        (Geometry(q_len=1, kv_len=long, num_heads=2, num_kv_heads=2, is_causal=True, q_offset=long - 1), "keys"),
    ):
        said = rf"of 1,000,000,000,000,000 {what} needs more than 62,500,000,000,000 bytes in blocks of 128, allowed"
        with pytest.raises(ConfigError, match=said):
            lower(Local(3), geometry, limit_bytes=2_000_000_000)


def test_more_than_255_occurrences_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 255 times, this pattern does so 300 times"):
        lower(Sum((Local(3),) * 300), Geometry.self_attention(40))


class Often(Pattern):
    """Counts every pair more often than any mask or int32 holds, and says so."""

    kind = "often"

    def multiplicity(self, query: Dense, key: Dense, head: Dense, geometry: Geometry) -> Dense:
        return self.max_multiplicity + 0 * (query + key + head)

    @property
    def max_multiplicity(self) -> int:
        return (1 << 32) + 1

    def key_spans(self, query_low: Dense, query_high: Dense, head: int, geometry: Geometry) -> KeySpans:
        spans = Full().key_spans(query_low, query_high, head, geometry)
        return attrs.evolve(spans, multiplicity=self.max_multiplicity)


@pytest.mark.parametrize(("length", "is_causal"), [(16, False), (16, True), (3, False)])
def test_constant_blocks_that_count_too_often_are_refused(length: int, is_causal: bool) -> None:
    """Whole ones, which would wrap around to once, and those that the diagonal or an end cuts."""
    geometry = Geometry.self_attention(length, is_causal=is_causal)
    with pytest.raises(ConfigError, match="at most 255 times, this pattern does so 4294967297 times"):
        lower(Often(), geometry, block_size=8)


def test_block_size_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="block_size must be at least 1, got 0"):
        lower(Local(3), Geometry.self_attention(40), block_size=0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", [Random(2, 3000), Random(2, 1 << 16) | Local(3), Random(2, 300) + Full()], ids=str)
def test_blocks_longer_than_a_call_cost_what_its_tokens_do(pattern: Pattern, is_causal: bool) -> None:
    for length, size in ((100, 128), (200, 256), (299, 512)):
        geometry = Geometry.self_attention(length, 2, is_causal=is_causal)
        layout = lower(pattern, geometry)
        assert layout.blocks is not None
        assert layout.blocks.block_size == min(size, pattern.block_size or size)
        np.testing.assert_array_equal(dense_blocks(layout.blocks), multiplicity_of_blocks(pattern, geometry))
    part = attrs.evolve(Geometry.self_attention(100, 2, is_causal=is_causal), whole_len=1000)
    assert lower_blocks(Random(2, 300), part).block_size == 300


def multiplicity_of_blocks(pattern: Pattern, geometry: Geometry) -> Dense:
    """Of what is lowered to blocks: all but branches."""
    branches, _ = split(pattern, geometry)
    counts: Dense = (multiplicity(pattern, geometry) - len(branches) * multiplicity(Full(), geometry)).numpy()
    return counts


def test_a_mask_that_is_larger_than_all_may_be_is_never_made() -> None:
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"a mask of a block of 65536 takes 4,294,967,296 bytes, allowed are 268,435"):
        lower(Random(2, 1 << 16) | Local(3), Geometry.self_attention(40_000), limit_bytes=1 << 28)
    with pytest.raises(ConfigError, match="a mask of a block of 65536 takes"):
        lower(Random(2, 1 << 16), Geometry.self_attention(40_000, is_causal=True), limit_bytes=1 << 28)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


LONGNET = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))


@pytest.mark.parametrize(
    ("pattern", "num_heads"),
    [(Local(256), 16), (Global(128), 16), (Strided(1 << 14), 16), (Local(256) | Global(128), 16), (LONGNET, 1)],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_million_tokens_cost_what_they_keep(pattern: Pattern, num_heads: int, is_causal: bool) -> None:
    geometry = Geometry.self_attention(1 << 20, num_heads, is_causal=is_causal)
    tracemalloc.start()
    blocks = lower_blocks(pattern, geometry)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert blocks.masks.shape[0] < 20
    assert peak < 150 * blocks.cols.size + (150 << 20)  # some int64 columns a block, and the step of evaluation
    listed = {"Local": 7 * 8192, "Global": 4 * 8192, "Strided": 65 * 3 * 8192, "Union": 9 * 8192, "Dilated": 256 * 8192}
    assert blocks.cols.size <= listed[type(pattern).__name__]
