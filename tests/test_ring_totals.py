"""What all ranks of a ring exchange and compute, counted at once, against every rank's own plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dilated_attention import ConfigError, Dilated, Full, Global, Limits, Local, Pattern, Random, Strided, preflight
from dilated_attention.core.blocking import lower_blocks
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.layout import Layout
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Branch
from dilated_attention.exchange import alike, census, owners
from dilated_attention.exchange import tables as exchange_tables
from dilated_attention.exchange.plan import plan_rank, received_rows
from dilated_attention.exchange.preflight import Preflight
from dilated_attention.exchange.shards import Shards
from dilated_attention.patterns._stored_blocks import FrozenBlocks

from .strategies import patterns

if TYPE_CHECKING:
    from dilated_attention.core.pattern import IntArray


def costs_of(pattern: Pattern, shards: Shards, limits: Limits | None = None) -> Preflight:
    """The pre-flight, a row being one byte and a pair one operation, but for the constants of head_dim 1."""
    return preflight(
        pattern=pattern, num_heads=shards.num_heads, num_kv_heads=shards.num_kv_heads, head_dim=1, dtype="float32",
        is_causal=shards.is_causal, seq_len=shards.seq_len, ranks=shards.size, limits=limits or Limits(),
    )  # fmt: skip


def assert_as_planned(pattern: Pattern, shards: Shards) -> None:
    """The pre-flight says what all ranks name, each looked at by itself; as they name it, it is sent and received."""
    totals = costs_of(pattern, shards).totals
    owners = [
        received_rows(pattern, shards, rank) // (shards.length * shards.num_kv_heads) for rank in range(shards.size)
    ]
    moved = np.stack([np.bincount(owner, minlength=shards.size) for owner in owners])  # to each rank, from each
    received, sent = moved.sum(1), moved.sum(0)
    pairs = [lower(pattern, shards.geometry(rank, 0, shards.seq_len)).pairs for rank in range(shards.size)]
    assert totals.forward_received.tolist() == (8 * received).tolist()
    assert totals.forward_sent.tolist() == (8 * sent).tolist()
    assert totals.backward_received.tolist() == totals.forward_sent.tolist()
    assert totals.flops.tolist() == [4 * count for count in pairs]
    tensors = 4 * shards.length * (6 * shards.num_heads + 4 * shards.num_kv_heads)  # q, out, dout, dq, two sums; k, v
    assert totals.peak_bytes.tolist() == (tensors + 32 * received + 8 * sent).tolist()


@given(
    pattern=patterns(),
    size=st.integers(1, 9),
    length=st.integers(1, 20),
    heads=st.sampled_from(((4, 4), (4, 2), (6, 1))),
    is_causal=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_totals_equal_the_plans_lists(
    pattern: Pattern, size: int, length: int, heads: tuple[int, int], is_causal: bool
) -> None:
    assert_as_planned(pattern, Shards(length, size, *heads, is_causal))


@pytest.mark.parametrize(
    "pattern",
    [
        Dilated((8, 16, 32, 10_000), (1, 2, 4, 16)),
        Dilated((12, 40, 10_000), (2, 5, 3), offsets="blocked"),
        Dilated((32, 64), (2, 4), offsets="blocked"),  # heads whose branches meet, and others whose do not
        Dilated((30, 42), (4, 9), heads="split") + Dilated((8,), (2,)),
        Dilated((16, 64, 256), (1, 4, 16), offsets_by="kv_head"),
        Dilated((7, 19, 50), (1, 3, 5)) + Strided(6),
        Dilated((10_000, 10_000, 10_000), (2**31 - 1, 2**31 + 11, 2**31 + 14)),
    ],
    ids=repr,
)
def test_branches_are_counted_exactly_in_pieces_of_any_size(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    for shards in (Shards(24, 7, 8, 2, False), Shards(5, 18, 4, 4, True), Shards(1, 24, 4, 1, False),
                   Shards(50, 5, 4, 2, True)):  # fmt: skip
        assert_as_planned(pattern, shards)
        whole = costs_of(pattern, shards)
        monkeypatch.setattr(census, "_NUMBERS_AT_ONCE", 9)
        monkeypatch.setattr(owners, "_SHARDS_AT_ONCE", 3)
        assert costs_of(pattern, shards) == whole
        monkeypatch.undo()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("pattern", "classes"),
    [
        (Local(70) | Global(5), True),
        (Local((150, 20)) + Global(130), True),
        (Local(40) + Dilated((32, 64), (1, 4)), True),
        (Local(90) | Dilated((48,), (2,)) | Global(3), True),
        (Random(2, 32) | Local(9), False),
        (Local(5) + Dilated((96, 100_000), (3, 40)), False),
    ],
    ids=repr,
)
def test_ranks_that_are_alike_are_lowered_once(pattern: Pattern, classes: bool, is_causal: bool) -> None:
    for length, size, heads in ((128, 12, (2, 2)), (50, 20, (4, 2)), (300, 6, (2, 1))):
        shards = Shards(length, size, *heads, is_causal)
        kinds = alike._kinds(pattern, shards)
        ranks = [[rank] for rank in kinds.alone.tolist()] + [some.tolist() for some in kinds.alike]
        assert sorted(rank for some in ranks for rank in some) == list(range(size))
        if length == 128:
            assert (max(map(len, ranks)) > 2) == classes
        assert_as_planned(pattern, shards)


@given(pattern=patterns(), is_causal=st.booleans())
@example(pattern=Local(9) | Global(3), is_causal=True)
@example(pattern=Dilated((4, 6), (1, 2)) + (Global(5) | Local((2, 7))), is_causal=False)
@settings(max_examples=60, deadline=None)
def test_patterns_repeat_themselves_as_they_say(pattern: Pattern, is_causal: bool) -> None:
    repeats = pattern.repeats()
    if repeats is None or repeats.period > 200:
        return
    count, heads = 2 * repeats.period + 60, 4
    geometry = Geometry.self_attention(repeats.start + count, heads, is_causal=is_causal)
    query = np.arange(repeats.start, repeats.start + count - repeats.period)[:, None]
    key = np.arange(repeats.start + count - repeats.period)
    is_fixed, far = key < repeats.fixed, (key < query - repeats.left) | (key > query + repeats.right)
    for head in range(heads):
        now, then = (
            pattern.multiplicity(query + step, np.where(is_fixed, key, key + step), np.array(head), geometry)
            for step in (0, repeats.period)
        )
        assert np.array_equal(now, then)
        assert not now[far & ~is_fixed].any()


def tables() -> st.SearchStrategy[Pattern]:
    """Patterns that are lowered to tables, and most of them to branches too."""
    drawn = st.one_of(
        st.builds(Random, st.integers(1, 3), st.sampled_from((4, 8, 12)), st.integers(0, 3)),
        st.builds(Random, block_size=st.sampled_from((4, 8)), density=st.sampled_from((0.1, 0.5))),
        st.builds(Local, st.tuples(st.integers(0, 12), st.integers(0, 12))),
    )
    other = st.one_of(
        st.just(Dilated((6, 1 << 40), (1, 5))), st.just(Dilated((25, 35), (3, 6), heads="split")),
        st.just(Dilated((16, 48, 96), (1, 4, 6), offsets="blocked")), st.builds(Strided, st.integers(2, 9)),
        st.builds(Global, st.integers(1, 9)),
    )  # fmt: skip
    return st.builds(
        lambda a, b, is_sum: (a + b if is_sum else a | b) if b else a, drawn, st.none() | other, st.booleans()
    )


@given(
    pattern=tables(),
    size=st.integers(1, 7),
    length=st.sampled_from((1, 2, 3, 4, 6, 8, 10, 12, 16, 24)),
    heads=st.sampled_from(((4, 4), (4, 2), (4, 1))),
    is_causal=st.booleans(),
    is_stored=st.booleans(),
    bytes_at_once=st.sampled_from((1 << 26, 4000, 1)),
)
@example(  # segments of other residues in each shard
    pattern=Random(3, 4) + Dilated((25, 35), (3, 6)),
    size=7,
    length=8,
    heads=(4, 2),
    is_causal=False,
    is_stored=False,
    bytes_at_once=1 << 26,
)
@settings(max_examples=50, deadline=None)
def test_tables_of_many_ranks_hold_those_of_each(
    pattern: Pattern, size: int, length: int, heads: tuple[int, int], is_causal: bool, is_stored: bool,
    bytes_at_once: int,
) -> None:  # fmt: skip
    shards = Shards(length, size, *heads, is_causal)
    if is_stored:
        whole = lower_blocks(pattern, Geometry.self_attention(shards.seq_len, shards.num_heads, is_causal=is_causal))
        pattern = FrozenBlocks(table=whole, generator=pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_tables, "_BYTES_AT_ONCE", bytes_at_once)
        assert_as_planned(pattern, shards)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (64, 1),  # whole blocks
        (48, 1),  # whole blocks in one shard, and one that two share
        (8, 1),  # shards within a block
        (33, 3 * 12 - 2),  # blocks that end anywhere: before, at and after each shard
    ],
)
def test_ranks_share_a_table_where_blocks_or_parts_of_them_end_with_shards(
    length: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[Geometry] = []

    def counting(pattern: Pattern, geometry: Geometry, **options: int | None) -> Layout:
        lowered.append(geometry)
        return lower(pattern, geometry, **options)

    monkeypatch.setattr(exchange_tables, "lower", counting)
    costs_of(Random(3, 32) | Local(5), Shards(length, 12, 2, 1, is_causal=False))
    assert len(lowered) == expected


@pytest.mark.parametrize("length", [64, 48, 8, 33])
def test_what_many_ranks_share_is_refused_where_the_table_of_one_is(length: int) -> None:
    pattern, shards = Random(3, 32) | Local(5), Shards(length, 6, 2, 1, is_causal=False)

    def fits(limit: int, plan: Callable[[int], object]) -> bool:
        try:
            plan(limit)
        except ConfigError:
            return False
        return True

    def planned(limit: int) -> None:
        for rank in range(shards.size):
            plan_rank(pattern, shards, rank, limit_bytes=limit, sent=())  # of tables that the others list too

    def counted(limit: int) -> Preflight:
        return costs_of(pattern, shards, Limits(layout_bytes=limit))

    least = bisect_left(range(1, 1 << 20), True, key=lambda limit: fits(limit, planned)) + 1
    assert 1000 < least < 1 << 20
    assert counted(least) == costs_of(pattern, shards)
    with pytest.raises(ConfigError, match=r"raise Limits\.layout_bytes"):
        counted(least - 1)


def test_a_head_may_have_no_part_in_any_branch() -> None:
    @attrs.frozen
    class Halved(Pattern):
        kind = "halved"

        def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
            shape = np.broadcast_shapes(query.shape, key.shape, head.shape)
            return np.broadcast_to(head == 0, shape).astype(np.int64)

        def branches(self, geometry: Geometry) -> tuple[Branch, ...]:
            return (
                Branch(None, 1, (0, *[None] * (geometry.num_heads - 1))),
                Branch(4, 1, (None,) * geometry.num_heads),
            )

    assert_as_planned(Halved(), Shards(6, 4, 2, 2, is_causal=False))


def test_numbers_beyond_64_bits_are_exact() -> None:
    tokens = 1 << 30
    costs = preflight(
        pattern=Full(), num_heads=32, head_dim=128, is_causal=False, seq_len=tokens, ranks=2, batch=1 << 30,
        dtype="float64", limits=Limits(exchange_buffer_bytes=1 << 80),
    )  # fmt: skip
    half = (1 << 30) * (tokens // 2) * 32 * 128  # numbers of one tensor on one rank
    (first, second) = costs.loads
    assert first.flops == second.flops == 4 * half * tokens
    assert first.forward_received == first.backward_sent == 2 * half * 8
    inputs_and_sums = 8 * half * 8 + 2 * (half // 128) * 8
    assert first.peak_bytes == inputs_and_sums + (2 + 1 + 2) * 2 * half * 8
    assert costs.imbalance == 1
    assert costs.mode == "selective"


def test_loads_are_the_same_as_objects_and_as_plain_values() -> None:
    costs = costs_of(Local(5) | Global(2), Shards(8, 20, 2, 2, is_causal=True))
    data = costs.to_dict()
    assert data["loads"] == [attrs.asdict(load) for load in costs.loads]
    assert {name: data[name] for name in ("ranks", "mode", "imbalance")} == {
        "ranks": 20, "mode": "selective", "imbalance": costs.imbalance,
    }  # fmt: skip
    assert costs == costs_of(Local(5) | Global(2), Shards(8, 20, 2, 2, is_causal=True))
    assert costs != costs_of(Local(4) | Global(2), Shards(8, 20, 2, 2, is_causal=True))
    assert hash(costs.totals) == hash(costs_of(Local(5) | Global(2), Shards(8, 20, 2, 2, is_causal=True)).totals)
