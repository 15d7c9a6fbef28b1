"""Numbers of pairs, digests and densities, against counting on dense multiplicities."""

from __future__ import annotations

import time

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention import explain
from dilated_attention.core.counting import allowed_pairs
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Full, Pattern
from dilated_attention.core.reference import multiplicity
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.strided import Strided

from . import strategies


def check(pattern: Pattern, geometry: Geometry, block_size: int | None = None) -> None:
    counts = multiplicity(pattern, geometry)
    layout = lower(pattern, geometry, block_size=block_size)
    allowed = int(multiplicity(Full(), geometry).sum())
    distinct = int((counts > 0).sum())
    assert (layout.pairs, layout.distinct_pairs) == (int(counts.sum()), distinct)
    assert allowed_pairs(geometry) == allowed
    assert layout.density == (distinct / allowed if allowed else 0.0)
    same = (geometry.q_len, geometry.q_offset) == (geometry.kv_len, geometry.kv_offset)
    keyless = int((counts.sum(-1) == 0).sum()) if same and layout.blocks is None else None
    assert layout.keyless_queries == keyless


@settings(max_examples=150, deadline=None)
@given(strategies.patterns(), strategies.geometries(max_len=80), st.sampled_from((3, 8, 16, None)))
def test_pairs_are_those_of_the_oracle(pattern: Pattern, geometry: Geometry, block_size: int | None) -> None:
    check(pattern, geometry, block_size)


@settings(max_examples=150, deadline=None)
@given(strategies.dilated(), strategies.geometries(max_len=150))
def test_overlapping_branches_are_counted_once(pattern: Dilated, geometry: Geometry) -> None:
    check(pattern + pattern, geometry)


@settings(max_examples=100, deadline=None)
@given(strategies.dilated(), st.integers(0, 150), st.booleans())
def test_queries_without_keys_are_counted(pattern: Dilated, length: int, is_causal: bool) -> None:
    check(pattern, Geometry.self_attention(length, 4, is_causal=is_causal))


def test_lengths_and_rates_that_were_taken_for_each_other_show() -> None:
    geometry = Geometry.self_attention(8192, 4)
    assert lower(Dilated((2048, 4096), (1, 2)), geometry).keyless_queries == 0
    # Of 4 heads the first keeps every segment of 1, the second every other position, and the others none.
    assert lower(Dilated((1, 2), (2048, 4096)), geometry).keyless_queries == 4096 + 2 * 8192
    assert lower(Local(3), geometry).keyless_queries is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_many_nested_branches_do_not_cost_two_to_their_number(is_causal: bool) -> None:
    lengths, rates = tuple(4 << i for i in range(14)), tuple(1 << i for i in range(14))
    geometry = Geometry.self_attention(300, 2, is_causal=is_causal)
    begin = time.perf_counter()
    check(Dilated(lengths, rates) + Full() + Strided(16), geometry)
    assert time.perf_counter() - begin < 10


def test_branches_of_one_stride_are_known_to_be_disjoint() -> None:
    geometry = Geometry.self_attention(4096, 2, is_causal=True)
    begin = time.perf_counter()
    layout = lower(Strided(500), geometry)
    of_class = [-(-(4096 - offset) // 500) for offset in range(500)]
    pairs = 2 * sum(n * (n + 1) // 2 for n in of_class)
    assert (layout.pairs, layout.distinct_pairs, layout.keyless_queries) == (pairs, pairs, 0)
    check(Strided(70) + Dilated((8,), (2,)), Geometry.self_attention(150, 2, is_causal=True))
    check(Strided(70) | Local(3), Geometry.self_attention(300, 2))
    assert time.perf_counter() - begin < 10


def test_what_would_take_long_to_count_is_not_told() -> None:
    """Two to the number of branches that do not nest."""
    pattern = Dilated(tuple(range(10, 70, 3)), (2,) * 20)
    begin = time.perf_counter()
    plan = explain(pattern=pattern, num_heads=2, head_dim=8, seq_len=4096)
    assert time.perf_counter() - begin < 15
    assert (plan.layout.distinct_pairs, plan.layout.density, plan.layout.keyless_queries) == (None, None, None)
    assert plan.layout.pairs == lower(pattern, Geometry.self_attention(4096, 2)).pairs
    (line,) = [line for line in plan.explain().splitlines() if line.startswith("  layout")]
    assert "FLOP forward, " in line
    assert "distinct" not in line
    assert "%" not in line


def test_more_segments_than_memory_holds_are_an_error() -> None:
    layout = lower(Dilated((16,), (1,)), Geometry.self_attention(10**10))
    with pytest.raises(ConfigError, match=r"10,000,000,000 queries lie in 625,000,000 segments of 16, but at most"):
        assert layout.pairs


@pytest.mark.parametrize(
    ("is_causal", "pairs", "distinct"), [(False, 8321499136, 6308233216), (True, 4162781184, 3155165184)]
)
def test_longnet_at_128k_is_76_percent_distinct(is_causal: bool, pairs: int, distinct: int) -> None:
    pattern = Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
    layout = lower(pattern, Geometry.self_attention(1 << 17, 16, is_causal=is_causal))
    assert (layout.pairs, layout.distinct_pairs) == (pairs, distinct)
    if not is_causal:
        segments = ((1 << 17) // (2048 << i) * 2048**2 * 16 for i in range(5))
        assert pairs == sum(segments)


def test_digest_tells_contents_apart_and_nothing_else() -> None:
    plain = Geometry.self_attention(64, 2)

    def digest(pattern: Pattern, geometry: Geometry = plain) -> str:
        return lower(pattern, geometry, block_size=16).digest

    assert digest(Local(3)) == digest(Local((3, 3)))
    assert digest(Dilated((8,), (2,))) == digest(Dilated([8], [2]))
    others = [Local(4), Local(3) + Local(3), Global(3), Full(), Dilated((8,), (2,)), Dilated((8,), (1,)), Strided(2)]
    assert len({digest(p) for p in (Local(3), *others)}) == 1 + len(others)
    changed = [
        attrs.evolve(plain, is_causal=True),
        attrs.evolve(plain, q_offset=1),
        attrs.evolve(plain, kv_len=63),
        attrs.evolve(plain, num_kv_heads=1),
    ]
    assert len({digest(Full(), geometry) for geometry in (plain, *changed)}) == 1 + len(changed)


def test_bytes_are_those_of_the_arrays() -> None:
    layout = lower(Local(3), Geometry.self_attention(64, 2), block_size=16)
    assert layout.blocks is not None
    arrays = [value for value in attrs.asdict(layout.blocks, recurse=False).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 6
    assert layout.blocks.nbytes == sum(array.nbytes for array in arrays) < layout.nbytes
    assert lower(Full(), Geometry.self_attention(64, 2)).nbytes > 0
