"""A pattern's map: cells that hold exactly the oracle's pairs."""

from __future__ import annotations

import numpy as np
import pytest

from dilated_attention.core.geometry import Geometry
from dilated_attention.core.pattern import Full, Pattern
from dilated_attention.core.reference import multiplicity
from dilated_attention.pattern_map import UNICODE, draw, even_cells
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.patterns.strided import Strided

PATTERNS = [Full(), Local(5), Local((0, 30)), Global(7), Strided(3), Dilated((64, 100), (2, 3)), Random(2, 16)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [600, 1024])
@pytest.mark.parametrize("pattern", [*PATTERNS, Local(20) | Global(3)], ids=lambda p: repr(p)[:30])
def test_cells_that_follow_blocks_hold_the_oracles_pairs(pattern: Pattern, length: int, is_causal: bool) -> None:
    geometry = Geometry.self_attention(length, 2, is_causal=is_causal)
    counted = multiplicity(pattern, geometry)[1].numpy() > 0
    shares = even_cells(pattern, geometry, 1, rows=8, cols=8, limit_bytes=1 << 30).shares()
    size = min(pattern.block_size or 128, length // 8)
    low = np.arange(0, length, size)
    cell = (low + np.minimum(length - low, size) // 2) * 8 // length
    edge = np.append(low[np.searchsorted(cell, np.arange(8))], length)
    for i in range(8):
        for j in range(8):
            inside = counted[edge[i] : edge[i + 1], edge[j] : edge[j + 1]]
            q, k = np.ogrid[edge[i] : edge[i + 1], edge[j] : edge[j + 1]]
            possible = int((k <= q).sum()) if is_causal else inside.size
            if possible:
                assert shares[i, j] == inside.sum() / possible
            else:
                assert np.isnan(shares[i, j])


@pytest.mark.parametrize("is_causal", [False, True])
def test_small_maps_are_exact(is_causal: bool) -> None:
    geometry = Geometry.self_attention(6, 1, is_causal=is_causal)
    found = even_cells(Local(1), geometry, 0, rows=22, cols=22, limit_bytes=1 << 20)
    np.testing.assert_array_equal(found.seen > 0, multiplicity(Local(1), geometry)[0].numpy() > 0)
    lines = draw(found, length=6, ink=UNICODE)
    assert lines[2] == ("│██          │" if is_causal else "│████········│")
    assert lines[3] == ("│████        │" if is_causal else "│██████······│")
