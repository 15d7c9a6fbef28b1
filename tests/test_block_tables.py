"""What the fused kernels read of tables of blocks: masks as bits, each weight by itself, and where documents end."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dilated_attention import Global, Local, Pattern, Random
from dilated_attention.backends.fused.block_tables import BlockTables, Planes, known_blocks
from dilated_attention.backends.fused.packed_blocks import packed_blocks
from dilated_attention.core.counting import branch_pairs, packing_pairs
from dilated_attention.core.documents import Document, Packing
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.layout import BlockLayout
from dilated_attention.core.lowering import lower
from dilated_attention.core.pattern import Branch

from .kernel_kit import build, check, on_card
from .support import error

CPU = torch.device("cpu")


def blocks_of(pattern: Pattern, length: int, *, is_causal: bool = True) -> BlockLayout:
    layout = lower(pattern, Geometry.self_attention(length, 2, is_causal=is_causal), block_size=16)
    assert layout.blocks is not None
    return layout.blocks


def multiplicities(pattern: Pattern, length: int, *, is_causal: bool) -> list[NDArray[np.int64]]:
    """Of each head, queries by keys."""
    geometry, place = Geometry.self_attention(length, 2, is_causal=is_causal), np.arange(length)
    found = (pattern.multiplicity(place[:, None], place, np.array(head), geometry) for head in range(2))
    whole = (np.broadcast_to(of, (length, length)) for of in found)
    return [np.tril(of) if is_causal else of for of in whole]


def unpacked(bits: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """(..., b) of (..., b / 32): the pairs of a line."""
    places = bits[..., :, None].astype(np.int64) >> np.arange(32) & 1
    return places.reshape(*bits.shape[:-1], -1)[..., :size]


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 30), size=st.sampled_from([16, 32, 64, 128]), most=st.integers(1, 3))
def test_planes_are_the_mask(seed: int, size: int, most: int) -> None:
    masks = np.random.default_rng(seed).integers(0, most + 1, (3, size, size)).astype(np.uint8)
    masks[1] = most * (masks[1] > 0)
    planes = Planes.of(masks)
    assert planes.count[1] == 1
    for i, mask in enumerate(masks):
        which = slice(planes.first[i], planes.first[i] + planes.count[i])
        weights = planes.weights[which][:, None, None]
        by_rows, by_columns = (unpacked(planes.bits[which, side], size) for side in (0, 1))
        assert np.array_equal((weights * by_rows).sum(0), mask)
        assert np.array_equal((weights * by_columns).sum(0), mask.T)


def counts_of(
    tables: BlockTables, length: int, heads: Sequence[int], ends: NDArray[np.int64] | None
) -> list[NDArray[np.int64]]:
    """Multiplicities of each head over whole blocks, rows by columns, as a kernel would read them."""
    _, starts, cols, biases, mask_ids, bits = (x.numpy() for x in tables.tensors)
    head_table, size, rows = tables.tensors[0].numpy(), tables.block_size, tables.block_rows
    found = []
    for head in heads:
        counts = np.zeros((rows * size, -(-length // size) * size), dtype=np.int64)
        for row in range(rows):
            at = head_table[head] * rows + row
            begin, end = (
                (starts[2 * at], starts[2 * at + 2]) if ends is None else (starts[at], ends[head_table[head], row])
            )
            for entry in range(begin, end):
                met = np.ones((size, size), dtype=np.int64)
                if mask_ids[entry] >= 0:
                    met = unpacked(bits[mask_ids[entry], 1 if ends is not None else 0], size)
                place = slice(row * size, row * size + size), slice(cols[entry] * size, cols[entry] * size + size)
                counts[place] += met * round(2.0 ** float(biases[entry]))
        found.append(counts)
    return found


PATTERNS = [
    Random(2, 16, seed=3),
    Local((20, 0)) | Global(3),
    Local((20, 0)) + Local((40, 0)) + Random(1, 16),
    Local(9) | Random(1, 16),
]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tables_have_every_pair_as_often_as_it_counts(pattern: Pattern, is_causal: bool) -> None:
    blocks = blocks_of(pattern, 90, is_causal=is_causal)
    expected = multiplicities(pattern, 90, is_causal=is_causal)
    found = counts_of(BlockTables.of(blocks, CPU, transposed=False), 90, range(2), None)
    for mask, counts in zip(expected, found, strict=True):
        assert np.array_equal(counts[:90, :90], mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_keys_of_documents_are_seen_from_their_own_queries(pattern: Pattern) -> None:
    """Of a table that is longer, each list of queries ends where the document does, but for the last block's rest."""
    blocks = blocks_of(pattern, 90)
    lengths = (1, 16, 17, 32, 61, 90)
    starts = np.cumsum([0, *lengths])
    documents = tuple(Document(0, int(at), n, int(at), n) for at, n in zip(starts, lengths, strict=False))
    packed = packed_blocks(blocks, Packing(documents, 1, int(starts[-1]), int(starts[-1])), CPU, apart=False)
    (ends, places), columns = packed.by_columns.packed or (None, None), packed.by_columns
    assert ends is not None
    assert places is not None
    assert packed.nbytes > 0
    expected = multiplicities(pattern, 90, is_causal=True)
    for document in documents:
        own = (places[:, 1] == document.q_start).nonzero()[:, 0]
        own = own[places[own, 2].argsort()]
        assert places[own, 2].tolist() == list(range(-(-document.q_len // 16)))
        assert set(places[own, 3].tolist()) == {document.q_len}
        whole = np.tile(ends.numpy()[:, :1] * 0, (1, columns.block_rows)) + columns.tensors[1].numpy()[
            np.arange(ends.shape[0])[:, None] * columns.block_rows + np.arange(columns.block_rows)
        ]  # fmt: skip
        whole[:, : len(own)] = ends[:, own].numpy()
        for mask, counts in zip(expected, counts_of(columns, 90, range(2), whole), strict=True):
            n = document.q_len
            assert np.array_equal(counts[:n, :n], mask[:n, :n].T)
            assert not counts[: len(own) * 16, len(own) * 16 :].any()


def test_rows_that_everyone_sees_come_first() -> None:
    blocks = blocks_of(Local((20, 0)) | Global(20), 900)
    assert [known_blocks(blocks, CPU, transposed=side).leading for side in (False, True)] == [0, 2]
    assert known_blocks(blocks_of(Local((20, 0)), 900), CPU, transposed=True).leading == 0
    everyone = blocks_of(Local(20) | Global(20), 900, is_causal=False)
    assert [known_blocks(everyone, CPU, transposed=side).leading for side in (False, True)] == [2, 2]
    documents = tuple(Document(0, at, 100, at, 100) for at in (0, 200, 400))
    packed = packed_blocks(blocks, Packing(documents, 1, 900, 900), CPU, apart=False)
    assert (packed.by_rows.leading, packed.by_columns.leading) == (0, 6)
    assert packed.by_columns.packed is not None
    assert packed.by_columns.packed[1][:6, 2].tolist() == [0, 1] * 3


def test_tables_are_made_once_and_go_with_their_layout() -> None:
    blocks = blocks_of(PATTERNS[0], 90)
    assert known_blocks(blocks, CPU, transposed=True) is known_blocks(blocks, CPU, transposed=True)
    assert known_blocks(blocks, CPU, transposed=True) is not known_blocks(blocks, CPU, transposed=True, in_order=True)
    kept = weakref.ref(known_blocks(blocks, CPU, transposed=True))
    del blocks
    gc.collect()
    assert kept() is None


@settings(deadline=None)
@given(
    width=st.none() | st.integers(1, 70),
    stride=st.integers(1, 9),
    offsets=st.lists(st.none() | st.integers(0, 12), min_size=1, max_size=6),
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=5),
    is_causal=st.booleans(),
)
def test_pairs_of_documents(
    width: int | None, stride: int, offsets: list[int | None], lengths: list[tuple[int, int]], is_causal: bool
) -> None:
    """Some with more keys than queries."""
    branch, heads = Branch(width, stride, tuple(offsets), 2), len(offsets)
    documents = tuple(Document(i, 0, q_len, 0, q_len + more) for i, (q_len, more) in enumerate(lengths))
    each = (
        branch_pairs(
            branch,
            Geometry(q_len=d.q_len, kv_len=d.kv_len, num_heads=heads, num_kv_heads=heads, is_causal=is_causal),
        )
        for d in documents
    )
    packing = Packing(documents, len(documents), 60, 120)
    assert packing_pairs([branch, branch], packing, is_causal=is_causal) == 2 * sum(each)
    assert packing.longest == max(q_len + more for q_len, more in lengths)


def test_a_packing_that_covers_its_tensors() -> None:
    documents = [Document(0, at, 5, at, 5) for at in (0, 5, 10)]
    for count, length in itertools.product((2, 3), (10, 15)):
        assert Packing(tuple(documents[:count]), 1, length, length).covers is (5 * count == length)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [Random(2, 2048), Random(2, 256) | Local(30)], ids=str)
def test_blocks_longer_than_a_call(pattern: Pattern) -> None:
    """They are cut to a power of two, for a sequence alone and for documents."""
    for length in (100, 200, 517):
        geometry = Geometry.self_attention(length, 4, is_causal=True)
        attention = build("triton", pattern, geometry, "bfloat16", 64)
        check(attention, geometry)
        query, key, value = (x.detach() for x in on_card(geometry, "bfloat16", 64)[:3])
        packed = [torch.cat([x[:1], x[:1, : length // 2]], 1) for x in (query, key, value)]
        ends = torch.tensor([0, length, length + length // 2], device="cuda")
        out = attention(*packed, cu_seqlens=ends)
        for begin, end in itertools.pairwise(ends.tolist()):
            alone = attention(*(x[:, begin:end] for x in packed))
            assert error(out[:, begin:end], alone.double()) < 5e-3
