"""The mathematics of a sharded sequence without processes: every rank's plan computed in turn, against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention import ConfigError, Dilated, Full, Global, Local, Pattern, Random, Strided
from dilated_attention.backends.aten import CpuFlash
from dilated_attention.backends.reference import ReferenceKernel
from dilated_attention.bench.oracle import truth
from dilated_attention.bench.timing import difference
from dilated_attention.core import reference
from dilated_attention.core.composer import Composer
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.merging import delta_of
from dilated_attention.exchange import pieces
from dilated_attention.exchange import plan as planning
from dilated_attention.exchange.compute import Compute, RankProgram
from dilated_attention.exchange.pieces import Merged, WholeRows
from dilated_attention.exchange.plan import plan_rank, row_codes, rows_of
from dilated_attention.exchange.progressions import BranchRows
from dilated_attention.exchange.rows import most_rows, survey
from dilated_attention.exchange.shards import Shards, shard_length
from dilated_attention.registry.conformance.simulation import simulate

from .ring_simulation import worst
from .strategies import patterns

LONGNET = Dilated((8, 16, 32, 96), (1, 2, 4, 8))


PATTERNS = [
    Full(),
    LONGNET,
    Dilated((7, 19, 50), (1, 3, 5)),
    Dilated((8, 96), (1, 6), heads="split"),
    Dilated((16, 64), (2, 4), offsets="blocked", offsets_by="kv_head"),
    Strided(5),
    Local(9) | Global(3),
    Random(2, 8),
    Random(2, 7) + LONGNET,
    Dilated((24,), (2,)) | Local(20),
]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_rank_computes_its_shard_exactly(pattern: Pattern, is_causal: bool) -> None:
    for size, batch, kv_heads in ((1, 1, 4), (2, 2, 2), (3, 1, 4), (4, 2, 2)):
        shards = Shards(96 // size, size, 4, kv_heads, is_causal)
        assert worst(pattern, shards, batch=batch, through_lse=batch == 2) < 1e-12


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_kernel_for_whole_layouts_computes_a_ranks_own_keys(pattern: Pattern, is_causal: bool) -> None:
    kernel = ReferenceKernel(1 << 20)
    for size, batch, kv_heads in ((2, 2, 2), (3, 1, 4)):
        shards = Shards(96 // size, size, 4, kv_heads, is_causal)
        assert worst(pattern, shards, batch=batch, through_lse=batch == 2, kernel=kernel) < 1e-12


@pytest.mark.parametrize(("is_causal", "kv_heads"), [(True, 4), (False, 2)])
def test_rows_of_blocks_share_copies_of_a_column_that_many_list(
    is_causal: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pattern in (Random(6, 4), Random(4, 3) + LONGNET):
        shards = Shards(32, 3, 4, kv_heads, is_causal)
        kept = plan_rank(pattern, shards, 2)
        monkeypatch.setattr(planning, "ROWS_A_COPY", 2)
        found = plan_rank(pattern, shards, 2)
        assert np.array_equal(found.received, kept.received)
        for part, whole in zip(found.blocks, kept.blocks, strict=True):
            assert np.array_equal(np.unique(part.source), np.unique(whole.source))
            assert np.unique(part.target).size == part.target.size
            assert part.layout.pairs == whole.layout.pairs
            for table, pointers in enumerate(part.layout.row_ptr):
                listed = part.layout.cols[pointers[0] : pointers[-1]]
                assert np.bincount(listed).max() <= 2, table
            assert sorted(np.concatenate([places.ravel() for _, places in part.homes])) == sorted(part.target)
        assert any(part.source.size > whole.source.size for part, whole in zip(found.blocks, kept.blocks, strict=True))
        assert worst(pattern, shards, through_lse=True) < 1e-12
        assert worst(pattern, shards, kernel=ReferenceKernel(1 << 20), batch=2) < 1e-12
        monkeypatch.undo()


def merged_of(dtype: torch.dtype) -> Merged:
    """Of two rows of one head."""
    rows = torch.ones(1, 2, 1, 4, dtype=dtype)
    return Merged(WholeRows(rows, None, rows, rows, torch.zeros(1, 1, 2)))


def test_sums_are_float32_and_a_single_result_is_taken_as_it_is() -> None:
    one, small = (torch.full((1, 2, 1, 4), x, dtype=torch.bfloat16) for x in (1.0, 2.0**-9))
    single = merged_of(torch.bfloat16)
    single.add(one)
    assert single.dq() is one
    both = merged_of(torch.bfloat16)
    for part in (one.clone(), small, small):
        both.add(part)
    assert torch.equal(both.sums(), torch.full((1, 2, 1, 4), 1 + 2.0**-8))  # 1 in bfloat16
    assert torch.equal(merged_of(torch.float32).dq(), torch.zeros(1, 2, 1, 4))


def test_delta_is_computed_for_tables_of_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*rows: Tensor) -> Tensor:
        made.append(1)
        return delta_of(*rows)

    monkeypatch.setattr(pieces, "delta_of", counted)
    shards = Shards(32, 3, 4, 2, True)
    assert worst(LONGNET, shards) < 1e-12
    assert made == []
    assert worst(Local(9) | Global(3), shards) < 1e-12
    assert len(made) == 2  # of the ranks that receive keys: their own take no table


@given(pattern=patterns(), size=st.integers(1, 5), length=st.integers(1, 14), is_causal=st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_pattern_any_cut(pattern: Pattern, size: int, length: int, is_causal: bool) -> None:
    assert worst(pattern, Shards(length, size, 4, 2, is_causal)) < 1e-12


def named(pattern: Pattern, shards: Shards, rank: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Codes of the rows of other ranks that the queries of `rank` count, from the dense multiplicity."""
    n, h = shards.seq_len, shards.num_heads
    geometry = Geometry(q_len=n, kv_len=n, num_heads=h, num_kv_heads=shards.num_kv_heads, is_causal=shards.is_causal)
    counts = reference.multiplicity(pattern, geometry)[:, rank * shards.length : (rank + 1) * shards.length]
    seen = counts.sum(1).view(shards.num_kv_heads, shards.group_size, n).sum(1) > 0
    seen[:, rank * shards.length : (rank + 1) * shards.length] = False
    head, position = np.nonzero(seen.numpy())
    return np.sort(row_codes(head, position, shards))


@given(length=st.integers(1, 20), size=st.integers(1, 5), is_causal=st.booleans(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_dilated_patterns_move_each_named_row_once_and_no_other(
    length: int, size: int, is_causal: bool, data: st.DataObject
) -> None:
    from .strategies import dilated

    pattern = data.draw(st.one_of(dilated(), st.builds(Strided, st.integers(1, 9)), st.just(Full())))
    shards = Shards(length, size, 4, 2, is_causal)
    plans = [plan_rank(pattern, shards, rank) for rank in range(size)]
    for rank, plan in enumerate(plans):
        assert np.array_equal(plan.received, named(pattern, shards, rank))
        for owner in range(size):
            assert plans[owner].sent[rank].size == plan.receive_counts[owner]


@given(pattern=patterns(), size=st.integers(1, 5), length=st.integers(1, 14), is_causal=st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_a_rank_sends_is_what_the_others_plan_to_receive(
    pattern: Pattern, size: int, length: int, is_causal: bool
) -> None:
    """However it came to know: by their queries against its own keys, or by what their whole tables name."""
    shards = Shards(length, size, 4, 2, is_causal)
    plans = [plan_rank(pattern, shards, rank) for rank in range(size)]
    for rank, plan in enumerate(plans):
        found = survey(pattern, shards, rank)
        assert most_rows(pattern, shards) >= found.most == max(other.received.size for other in plans)
        assert (found.sent is None) == (BranchRows.of(pattern, shards) is not None)
        for ways in (plan.sent, found.sent or plan.sent):
            assert all(
                np.array_equal(rows, rows_of(other.received, shards, rank))
                for rows, other in zip(ways, plans, strict=True)
            )


def test_a_shard_may_hold_the_end_of_one_segment_and_the_beginning_of_another() -> None:
    for is_causal, most in ((False, 4 * 12), (True, 4 * 8)):
        shards, pattern = Shards(8, 3, 4, 4, is_causal), Dilated((10,), (1,))
        assert survey(pattern, shards, 0).most == most <= most_rows(pattern, shards)


def test_a_length_that_cannot_be_cut_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"1,000 tokens cannot be cut into 3 equal shards.*999 and 1,002"):
        shard_length(1000, 3)
    assert shard_length(999, 3) == 333


def test_half_precision_is_rounded_once_a_piece_and_not_once_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, shards = Dilated((8, 16, 24, 48, 96), (2,) * 5), Shards(48, 2, 2, 2, True)  # one branch reaches across
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 96, 2, 16, generator=generator).bfloat16() for _ in range(4)]
    expected = truth(inputs, pattern, is_causal=True)[1]
    compute = Compute(Composer(CpuFlash(), 0.25, False), torch.device("cpu"), torch.bfloat16, 1 << 20)

    def off() -> float:
        return difference(simulate(pattern, shards, compute, inputs[:3], dout=inputs[3])[2], expected)

    found = off()
    monkeypatch.setattr(RankProgram, "once", False)  # sums in float32 throughout
    assert found < 1.05 * off()
