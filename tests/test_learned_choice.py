"""Which blocks a gate keeps, from the definition: those that the diagonal cuts, then the best of those before it."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import example, given, settings
from torch import Tensor

from dilated_attention import Learned
from dilated_attention.core.geometry import Geometry

from . import strategies
from .learned_kit import build, learned
from .support import error, inputs


def chosen(scores: list[float], row: int, pattern: Learned, geometry: Geometry) -> set[int]:
    """The key blocks of a row of blocks, by one score for each key block."""
    size, shift = pattern.block_size, geometry.q_offset - geometry.kv_offset
    blocks = range(math.ceil(geometry.kv_len / size))
    past, seen = list(blocks), list(blocks)
    if geometry.is_causal:
        first, last = row * size + shift, min((row + 1) * size, geometry.q_len) - 1 + shift
        past = [block for block in blocks if min((block + 1) * size, geometry.kv_len) <= first]
        seen = [block for block in blocks if block * size <= last]
    cut = [block for block in seen if block not in past]
    best = sorted(past, key=lambda block: -scores[block])
    return {*cut, *best[: max(0, int(pattern.take(torch.tensor(len(seen)))) - len(cut))]}


CUT_TWICE = Geometry(q_len=16, kv_len=35, num_heads=4, num_kv_heads=2, is_causal=True)
BEYOND_THE_KEYS = Geometry(q_len=9, kv_len=21, num_heads=4, num_kv_heads=2, is_causal=True, q_offset=23)


@given(learned(), strategies.geometries())
@example(Learned(1, 8), CUT_TWICE)
@example(Learned(1, 8), BEYOND_THE_KEYS)
@settings(max_examples=100, deadline=None)
def test_a_row_keeps_what_the_diagonal_cuts_and_the_best_before_it(pattern: Learned, geometry: Geometry) -> None:
    if not geometry.q_len or not geometry.kv_len:
        return
    gate: Any = build(pattern, geometry).gate
    query, key, _ = inputs(geometry, batch=2, head_dim=8, dtype=torch.float32)
    with torch.no_grad():
        scores: Tensor = gate._scores(query, key, geometry.q_offset - geometry.kv_offset)
    tables = gate(query, key, q_offset=geometry.q_offset, kv_offset=geometry.kv_offset)
    assert tables.shape[:3] == scores.shape[:3]
    for listed, of_head in zip(tables.flatten(0, 1).tolist(), scores.flatten(0, 1).tolist(), strict=True):
        for row, (blocks, row_scores) in enumerate(zip(listed, of_head, strict=True)):
            kept = [block for block in blocks if block >= 0]
            assert len(kept) == len(set(kept))
            assert set(kept) == chosen(row_scores, row, pattern, geometry), row


def test_a_key_that_is_no_number_stays_in_its_block() -> None:
    """The block's score is none either, and the last to be chosen."""
    geometry = Geometry.self_attention(64, 4, is_causal=True)
    attention = build(Learned(1, 8), geometry)
    query, key, value = (x.detach() for x in inputs(geometry, batch=2, head_dim=8, dtype=torch.float32))
    expected = attention(query, key, value)
    key[:, 11] = math.nan
    actual = attention(query, key, value)
    assert error(actual[:, :8], expected[:, :8]) < 1e-6
    assert error(actual[:, 16:], expected[:, 16:]) < 1e-6
    assert actual[:, 11:16].isnan().all()
