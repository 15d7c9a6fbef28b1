"""Dilated attention against loops written from its definition, and its messages for bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Pattern
from dilated_attention.core.reference import multiplicity
from dilated_attention.patterns.dilated import Dilated

from . import strategies


def offset_of(pattern: Dilated, branch: int, head: int, geometry: Geometry) -> int | None:
    """The definition's offset of a head in a branch, None where the head does not use the branch."""
    rate, count = pattern.dilation_rates[branch], len(pattern.segment_lengths)
    if pattern.heads == "split":
        sizes = [geometry.num_heads // count + (1 if i < geometry.num_heads % count else 0) for i in range(count)]
        first = sum(sizes[:branch])
        return branch % rate if first <= head < first + sizes[branch] else None
    number, total = head, geometry.num_heads
    if pattern.offsets_by == "kv_head":
        number, total = head // (geometry.num_heads // geometry.num_kv_heads), geometry.num_kv_heads
    return number % rate if pattern.offsets == "interleaved" else number // math.ceil(total / rate)


@settings(max_examples=60, deadline=None)
@given(strategies.dilated(), strategies.geometries(max_len=20))
def test_it_counts_the_branches_that_keep_both_positions(pattern: Dilated, geometry: Geometry) -> None:
    counts = multiplicity(pattern, geometry)
    for h in range(geometry.num_heads):
        offsets = [offset_of(pattern, i, h, geometry) for i in range(len(pattern.segment_lengths))]
        for i in range(geometry.q_len):
            for j in range(geometry.kv_len):
                p, q, expected = i + geometry.q_offset, j + geometry.kv_offset, 0
                for w, r, offset in zip(pattern.segment_lengths, pattern.dilation_rates, offsets, strict=True):
                    if offset is None or math.floor(p / w) != math.floor(q / w):
                        continue
                    p_place, q_place = p - math.floor(p / w) * w, q - math.floor(q / w) * w
                    expected += p_place % r == offset and q_place % r == offset
                if geometry.is_causal and q > p:
                    expected = 0
                assert counts[h, i, j] == expected


def test_longnets_figure_by_hand() -> None:
    """Eight positions, w = 4 and r = 2: head 0 keeps 0, 2 | 4, 6 and head 1 keeps 1, 3 | 5, 7."""
    counts = multiplicity(Dilated((4,), (2,)), Geometry.self_attention(8, 2))
    kept = {(0, 0), (0, 2), (2, 0), (2, 2), (4, 4), (4, 6), (6, 4), (6, 6)}
    assert {(int(p), int(q)) for p, q in zip(*np.nonzero(counts[0].numpy()), strict=True)} == kept
    shifted = {(p + 1, q + 1) for p, q in kept}
    assert {(int(p), int(q)) for p, q in zip(*np.nonzero(counts[1].numpy()), strict=True)} == shifted


def test_offsets_of_both_schools() -> None:
    geometry = Geometry.self_attention(8, 6)
    assert Dilated((8,), (4,)).branches(geometry)[0].offsets == (0, 1, 2, 3, 0, 1)
    assert Dilated((8,), (4,), offsets="blocked").branches(geometry)[0].offsets == (0, 0, 1, 1, 2, 2)
    shared = Geometry(q_len=8, kv_len=8, num_heads=6, num_kv_heads=3, is_causal=False)
    assert Dilated((8,), (4,), offsets_by="kv_head").branches(shared)[0].offsets == (0, 0, 1, 1, 2, 2)
    blocked = Dilated((8,), (2,), offsets="blocked", offsets_by="kv_head")
    assert blocked.branches(shared)[0].offsets == (0, 0, 0, 0, 1, 1)


def test_split_deals_every_head_out() -> None:
    branches = Dilated((4, 8, 16, 32, 64), (1, 2, 4, 8, 16), heads="split").branches(Geometry.self_attention(64, 12))
    assert [[h for h, o in enumerate(b.offsets) if o is not None] for b in branches] == [
        [0, 1, 2], [3, 4, 5], [6, 7], [8, 9], [10, 11],
    ]  # fmt: skip
    assert [{o for o in b.offsets if o is not None} for b in branches] == [{0}, {1}, {2}, {3}, {4}]


@settings(max_examples=60, deadline=None)
@given(strategies.dilated(), strategies.geometries(max_len=30))
def test_heads_of_a_group_are_alike(pattern: Dilated, geometry: Geometry) -> None:
    groups, counts = pattern.head_groups(geometry.num_heads, geometry.num_kv_heads), multiplicity(pattern, geometry)
    assert sorted(set(groups)) == list(range(max(groups) + 1))
    for h, group in enumerate(groups):
        assert counts[h].equal(counts[groups.index(group)])


@settings(max_examples=60, deadline=None)
@given(strategies.patterns(), strategies.geometries(max_len=40), st.sampled_from((3, 8)))
def test_heads_of_a_signature_group_have_the_same_signatures(
    pattern: Pattern, geometry: Geometry, block_size: int
) -> None:
    low = np.arange(0, 40, dtype=np.int64)
    query, key = (grid.ravel() for grid in np.meshgrid(low, low, indexing="ij"))
    groups = pattern.signature_groups(geometry.num_heads, geometry.num_kv_heads)
    assert len(groups) == geometry.num_heads
    for head, group in enumerate(groups):
        expected = pattern.block_signature(query, key, block_size, groups.index(group), geometry)
        np.testing.assert_array_equal(pattern.block_signature(query, key, block_size, head, geometry), expected)


def test_heads_share_signatures_whatever_their_offsets() -> None:
    assert Dilated((8, 16), (2, 4)).signature_groups(6, 6) == (0,) * 6
    assert Dilated((8, 16), (1, 2), heads="split").signature_groups(6, 6) == (0, 0, 0, 1, 1, 1)


def test_heads_share_tables_where_offsets_repeat() -> None:
    assert Dilated((8, 16), (2, 4)).head_groups(8, 8) == (0, 1, 2, 3, 0, 1, 2, 3)
    assert Dilated((8,), (1,)).head_groups(3, 1) == (0, 0, 0)
    assert Dilated((8, 16), (2, 4), offsets_by="kv_head").head_groups(8, 4) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert Dilated((8, 16), (2, 2), offsets_by="kv_head").head_groups(8, 4) == (0, 0, 1, 1, 0, 0, 1, 1)


def test_a_length_beyond_the_sequence_is_one_segment() -> None:
    geometry = Geometry.self_attention(30, 4)
    assert multiplicity(Dilated((1000,), (3,)), geometry).equal(multiplicity(Dilated((30,), (3,)), geometry))


def test_a_rate_beyond_the_segment_leaves_heads_without_keys() -> None:
    counts = multiplicity(Dilated((2,), (4,)), Geometry.self_attention(8, 4))
    assert counts.sum(dim=(1, 2)).tolist() == [4, 4, 0, 0]
    assert lower(Dilated((2,), (4,)), Geometry.self_attention(8, 4)).pairs == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dilated((), ()), "Dilated.segment_lengths is empty; it needs one value per branch"),
        (lambda: Dilated((4,), ()), "Dilated.dilation_rates is empty"),
        (lambda: Dilated((4, 8), (1,)), "got 2 segment_lengths (4, 8) and 1 dilation_rates (1,)"),
        (lambda: Dilated((4, 0), (1, 2)), "Dilated.segment_lengths[1] must be at least 1, got 0"),
        (lambda: Dilated((4,), (-2,)), "Dilated.dilation_rates[0] must be at least 1, got -2"),
        (lambda: Dilated((4.0,), (1,)), "Dilated.segment_lengths[0] must be an integer, got 4.0 (float)"),  # type: ignore[arg-type]
        (lambda: Dilated((True,), (1,)), "Dilated.segment_lengths[0] must be an integer, got True (bool)"),
        (lambda: Dilated(4, (1,)), "takes sequences of integers, got 4; write (4,) for one branch"),  # type: ignore[arg-type]
        (lambda: Dilated(np.array(4), (1,)), "takes sequences of integers, got array(4); write (1024,) for one branch"),
        (
            lambda: Dilated({4, 8}, (1, 2)),
            "integers, a branch a place, got {8, 4}, which has no order",
        ),
        (lambda: Dilated((4,), frozenset({1})), "got frozenset({1}), which has no order"),
        (lambda: Dilated("48", (1, 2)), "takes sequences of integers, got '48'; write (1024,) for one branch"),  # type: ignore[arg-type]
        (
            lambda: Dilated((4, 1 << 41), (1, 2)),
            "Dilated.segment_lengths[1] must be at most 1,099,511,627,776, got 2,199,",
        ),
        (lambda: Dilated((4,), (10**30,)), "Dilated.dilation_rates[0] must be at most 1,099,511,627,776"),
        (lambda: Dilated((4,), (1,), offsets="interleave"), "did you mean 'interleaved'?"),
        (lambda: Dilated((4,), (1,), heads="some"), "Dilated.heads must be one of all, split; got 'some'"),
        (lambda: Dilated((4,), (1,), offsets_by="head"), "Dilated.offsets_by must be one of query_head, kv_head"),
        (lambda: Dilated((4,), (1,), heads="split", offsets="blocked"), "not from offsets='blocked'"),
        (lambda: Dilated((4,), (1,), heads="split", offsets_by="kv_head"), "not from offsets_by='kv_head'"),
        (lambda: lower(Dilated((4, 8), (1, 2), heads="split"), Geometry.self_attention(8, 1)), "got num_heads=1"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


@settings(max_examples=30, deadline=None)
@given(strategies.dilated())
def test_its_mapping_makes_it_again(pattern: Dilated) -> None:
    fields = pattern.to_dict()
    assert fields.pop("kind") == "dilated"
    assert Dilated(**fields) == pattern  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "meant"), [("segment_length", "segment_lengths"), ("dilated_ratio", "dilation_rates")]
)
def test_torchscale_names_are_answered_with_ours(name: str, meant: str) -> None:
    fields: dict[str, Any] = {"segment_lengths": (4,), "dilation_rates": (1,), name: (4,)}
    with pytest.raises(ConfigError, match=f"no parameter '{name}' .did you mean '{meant}'"):
        Dilated(**fields)
