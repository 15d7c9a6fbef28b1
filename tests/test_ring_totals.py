"""What all ranks of a ring exchange and compute, counted at once, against every rank's own plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dilated_attention import Dilated, Full, Global, Limits, Local, Pattern, Random, Strided, preflight
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Branch
from dilated_attention.exchange import alike, census, owners
from dilated_attention.exchange.plan import plan_rank
from dilated_attention.exchange.preflight import Preflight
from dilated_attention.exchange.rows import survey
from dilated_attention.exchange.shards import Shards

from .strategies import patterns

if TYPE_CHECKING:
    from dilated_attention.core.pattern import IntArray


def costs_of(pattern: Pattern, shards: Shards) -> Preflight:
    """The pre-flight, a row being one byte and a pair one operation, but for the constants of head_dim 1."""
    return preflight(
        pattern=pattern, num_heads=shards.num_heads, num_kv_heads=shards.num_kv_heads, head_dim=1, dtype="float32",
        is_causal=shards.is_causal, seq_len=shards.seq_len, ranks=shards.size,
    )  # fmt: skip


def assert_as_planned(pattern: Pattern, shards: Shards) -> None:
    """The pre-flight says what the plans of all ranks list, each planned by itself."""
    totals = costs_of(pattern, shards).totals
    plans = [plan_rank(pattern, shards, rank) for rank in range(shards.size)]
    whole = [lower(pattern, shards.geometry(rank, 0, shards.seq_len)) for rank in range(shards.size)]
    assert totals.forward_received.tolist() == [8 * plan.received.size for plan in plans]
    assert totals.forward_sent.tolist() == [8 * sum(rows.size for rows in plan.sent) for plan in plans]
    assert totals.backward_received.tolist() == totals.forward_sent.tolist()
    assert totals.flops.tolist() == [4 * layout.pairs for layout in whole]
    assert survey(pattern, shards, 0).most == max(plan.received.size for plan in plans)


@given(
    pattern=patterns(),
    size=st.integers(1, 9),
    length=st.integers(1, 20),
    heads=st.sampled_from(((4, 4), (4, 2), (6, 1))),
    is_causal=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_totals_equal_the_plans_lists(
    pattern: Pattern, size: int, length: int, heads: tuple[int, int], is_causal: bool
) -> None:
    assert_as_planned(pattern, Shards(length, size, *heads, is_causal))


@pytest.mark.parametrize("is_causal", [True, False])
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
def test_branches_are_counted_exactly_in_pieces_of_any_size(
    pattern: Pattern, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length, size, heads in ((16, 12, (8, 8)), (24, 7, (8, 2)), (5, 30, (4, 4)), (1, 40, (4, 1)), (50, 5, (4, 2))):
        shards = Shards(length, size, *heads, is_causal)
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
    for length, size, heads in ((128, 12, (2, 2)), (96, 16, (4, 2)), (50, 26, (2, 1)), (300, 6, (2, 1))):
        shards = Shards(length, size, *heads, is_causal)
        ranks = [some.tolist() for some, _ in alike._alike(pattern, shards)]
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
