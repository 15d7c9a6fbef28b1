"""Dropout in the fused kernels under Triton's interpreter on the CPU; `test_backend_triton` runs this file."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dilated_attention import (
    Attention,
    AttentionConfig,
    Dilated,
    Full,
    Global,
    Learned,
    Local,
    Pattern,
    Random,
    Strided,
    Sum,
)
from dilated_attention.backends.fused.draws import occurrences_of
from dilated_attention.backends.fused.drop_kernels import draw_words
from dilated_attention.backends.fused.kernel import FusedKernel
from dilated_attention.backends.fused.tiles import Tile, Tiles, TileSizes
from dilated_attention.core import reference
from dilated_attention.core.document_ops import attend_documents
from dilated_attention.core.engine import Engine
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import CALL_AXES
from dilated_attention.core.lowering import split
from dilated_attention.core.ops import attend, intern

from .dropout_kit import HEADS, KV_HEADS, TOKENS, check_counted, check_draws, drawn
from .learned_kit import seen_pairs

DROPPED = 77 / 256  # of 0.3
BOUNDS = {"of_weights": 1e-3, "of_results": 1e-5}


class Interpreted:
    """The calls of an `Attention` over the fused kernels on a CPU: of documents with `ends`, or of `tables`, if any."""

    def __init__(
        self,
        pattern: Pattern,
        *,
        is_causal: bool,
        tile: int = 16,
        bound_from: int = 1 << 30,
        ends: Tensor | None = None,
        tables: Tensor | None = None,
        dropout_p: float = 0.3,
    ) -> None:
        given: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": TOKENS}
        self.config = AttentionConfig(pattern=pattern, device="cpu", is_causal=is_causal, dropout_p=dropout_p, **given)
        self.ends, self.tables = ends, tables
        tiles = TileSizes.alike(Tiles.alike(Tile(tile, tile, 4, 1)))
        kernel = FusedKernel(f"interpreted, {tile}, {bound_from}", tiles, bound_from, dropping=tiles)
        axes = frozenset(CALL_AXES)
        self.engine = intern(Engine(self.config, pattern, kernel, takes_layout=True, has_dlse=True, call_axes=axes))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool = False) -> Any:
        seed = torch.randint(1 << 62, ())
        if self.ends is not None:
            rest: dict[str, Any] = {"key_padding_mask": None, "cu_seqlens": self.ends, "gate": None, "recompute": False}
            found = attend_documents(query, key, value, self.engine, seed=seed, **rest)
        else:
            rest = {"q_offset": 0, "kv_offset": 0, "tables": self.tables, "recompute": False}
            found = attend(query, key, value, self.engine, seed=seed, **rest)
        return found if return_lse else found[0]


@pytest.mark.parametrize(
    ("pattern", "is_causal", "given"),
    [
        (Dilated((8, 16, 40), (1, 2, 4)), False, {"bound_from": 0}),
        pytest.param(Dilated((8, 12), (1, 3)) + Full() + Full(), True, {"tile": 32}, marks=pytest.mark.slow),
        (Random(2, 16, seed=3), True, {}),
        pytest.param(Local(5) + Local(9), False, {"tile": 64}, marks=pytest.mark.slow),
        pytest.param(Dilated((8, 16), (1, 2)) + Global(2), False, {"tile": 64}, marks=pytest.mark.slow),
        pytest.param(Strided(2) + Strided(2), True, {"tile": 64}, marks=pytest.mark.slow),
    ],
    ids=["bounded", "equal branches", "blocks", "weights", "both", "strides"],
)
def test_it_drops_exactly(pattern: Pattern, is_causal: bool, given: dict[str, Any]) -> None:
    attention = Interpreted(pattern, is_causal=is_causal, **given)
    check_draws(cast("Attention", attention), pattern, DROPPED, batch=1, **BOUNDS)


@pytest.mark.parametrize(
    ("pattern", "is_causal"),
    [
        (Dilated((8, 16), (1, 2)), True),
        pytest.param(Random(2, 16, seed=3) + Local((9, 0)), True, marks=pytest.mark.slow),
        pytest.param(Local(5) + Local(9), False, marks=pytest.mark.slow),
    ],
    ids=["branches", "blocks", "bands"],
)
def test_documents_of_one_launch_drop_each_for_itself(pattern: Pattern, is_causal: bool) -> None:
    ends = torch.tensor([0, 17, 40])
    counts = torch.zeros(HEADS, TOKENS, TOKENS, dtype=torch.float64)
    for start, end in ((0, 17), (17, 40)):
        geometry = Geometry.self_attention(end - start, HEADS, is_causal=is_causal)
        counts[:, start:end, start:end] = torch.as_tensor(reference.multiplicity(pattern, geometry))
    attention = Interpreted(pattern, is_causal=is_causal, ends=ends, tile=64)
    check_counted(attention, counts, DROPPED, dtype=torch.float32, batch=1, **BOUNDS)


def test_blocks_that_a_gate_names_are_dropped() -> None:
    pattern = Learned(block_size=16, blocks_per_row=2)
    tables = torch.tensor([[[[0, -1], [1, 0], [2, other]] for other in (0, 1, 1, 0)]])
    geometry = Geometry(q_len=TOKENS, kv_len=TOKENS, num_heads=HEADS, num_kv_heads=KV_HEADS, is_causal=True)
    attention = Interpreted(pattern, is_causal=True, tables=tables)
    counts = seen_pairs(tables, geometry, 16).double()
    check_counted(attention, counts, DROPPED, dtype=torch.float32, batch=1, **BOUNDS)


def test_words_of_a_seed_in_memory() -> None:
    """As random as those of one that the host knows, and others for every seed."""
    found = []
    for seed in (5, 6, 5 + (1 << 40), 5):
        draws = torch.zeros(64 + 32 * 24, dtype=torch.int8)
        numbers = (8, 8, 16, 24, 0, 0)  # two occurrences of eight keys, and eight queries
        draw_words[(1,)](draws, torch.tensor(seed), *numbers, 7_001, -50_021, 900_001, -4, BLOCK_M=32, SEEDED=True)
        found.append(draws)
    assert torch.equal(found[0], found[3])
    words = torch.stack([draws[64:].view(24, 32).int() for draws in found[:3]])
    assert len({tuple(row) for row in words.flatten(0, 1).tolist()}) == 72
    heads = {int(draws[:40].view(torch.int64)[4]) for draws in found}
    assert len(heads) == 3
    first, second = words[:, :8, :16] % 2, words[:, 8:16, :16] % 2
    assert torch.equal(first, second)  # of which the second occurrence has odd multiples


@pytest.mark.parametrize(
    ("pattern", "batch", "times"),
    [
        pytest.param(Full(), 32, 1, marks=pytest.mark.slow),
        pytest.param(Sum((Full(),) * 64), 1, 64, marks=pytest.mark.slow),
        (Sum((Full(),) * 16), 1, 16),
    ],
    ids=["heads and batch rows", "occurrences", "fewer occurrences"],
)
def test_what_is_rarely_dropped_is_drawn_independently(pattern: Pattern, batch: int, times: int) -> None:
    """A pair's 64 to 256 draws at 1 / 256: how many of them drop it varies as a binomial number does."""
    query, key = (torch.zeros(batch, TOKENS, heads, TOKENS) for heads in (HEADS, KV_HEADS))
    names = torch.eye(TOKENS)[None, :, None].expand(key.shape)
    out = drawn(Interpreted(pattern, is_causal=False, tile=64, dropout_p=1 / 256), query, key, names, seed=3)
    dropped = times * (1 - out * TOKENS * 255 / 256)  # of the occurrences of each query, head and key
    assert (dropped - dropped.round()).abs().max() < 0.01
    of_pairs, draws = dropped.sum((0, 2)), batch * HEADS * times
    assert abs(float(of_pairs.mean()) * 256 / draws - 1) < 0.1
    variance = float((of_pairs - draws / 256).square().mean()) / (draws / 256 * 255 / 256)
    assert abs(variance - 1) < 0.2, variance


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (Strided(64) + Strided(32) + Full(), 3),
        (Dilated((8, 16, 32), (2, 4, 4), offsets="blocked") + Strided(3), 4),
        (Dilated((7, 12, 30), (3, 4, 7), heads="split") + Dilated((6, 9), (2, 3)), 3),
    ],
    ids=["strides", "classes", "heads"],
)
def test_no_more_occurrences_have_numbers_than_some_pair_may_have(pattern: Pattern, most: int) -> None:
    geometry = Geometry.self_attention(TOKENS, HEADS, is_causal=False)
    branches, _ = split(pattern, geometry)
    numbers = occurrences_of(branches)
    assert max(numbers) + 1 == most
    place = torch.arange(TOKENS)
    for number in set(numbers):
        counts = torch.zeros(HEADS, TOKENS, TOKENS)
        for branch in (b for b, own in zip(branches, numbers, strict=True) if own == number):
            segment = place // (branch.segment_length or TOKENS)
            inside = place - segment * (branch.segment_length or TOKENS)
            for head, offset in enumerate(branch.offsets):
                kept = torch.zeros_like(place) if offset is None else inside % branch.stride == offset
                counts[head] += kept & kept[:, None] & (segment == segment[:, None])
        assert counts.max() == 1
