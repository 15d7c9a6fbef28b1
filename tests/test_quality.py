"""The quality report against dense counting and boolean matrix powers."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.pattern import Full, Pattern
from dilated_attention.core.reference import multiplicity
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.quality import measure

from . import strategies


@settings(max_examples=120, deadline=None)
@given(strategies.patterns(), st.integers(1, 50), st.booleans(), st.integers(1, 16))
def test_it_is_what_dense_counting_finds(pattern: Pattern, length: int, is_causal: bool, block_size: int) -> None:
    geometry = Geometry(q_len=length, kv_len=length, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    counts = multiplicity(pattern, geometry).numpy()
    found = measure(pattern, geometry, layers=3, block_size=block_size)
    allowed = 4 * (length * (length + 1) // 2 if is_causal else length**2)
    assert found.density == (counts > 0).sum() / allowed
    for spread, per in ((found.fan_out, counts.sum(2)), (found.fan_in, counts.sum(1))):
        assert (spread.least, spread.most) == (per.min(), per.max())
        assert spread.mean == pytest.approx(per.mean(), rel=1e-12)
        digits = [int(n).bit_length() for n in per.ravel()]
        assert spread.histogram == tuple(digits.count(k) for k in range(max(digits) + 1))
    assert found.empty_rows == (counts.sum(2) == 0).sum()
    blocks = -(-length // block_size)
    padded = np.zeros((4, blocks * block_size, blocks * block_size), dtype=np.int64)
    padded[:, :length, :length] = counts
    tiles = padded.reshape(4, blocks, block_size, blocks, block_size)
    work = tiles.sum(axis=(2, 3, 4))
    assert found.load_imbalance == pytest.approx(work.max() / work.mean() if work.any() else 1.0, rel=1e-12)
    assert found.idle_tiles == pytest.approx((work == 0).mean(), abs=1e-12)
    graph = tiles.any(axis=(0, 2, 4)) | np.eye(blocks, dtype=bool)
    reach, possible = np.eye(blocks, dtype=np.int64), blocks * (blocks + 1) // 2 if is_causal else blocks**2
    for layer in range(3):
        reach = ((graph @ reach) > 0).astype(np.int64)
        assert found.receptive_field[layer] == reach.sum() / possible
    full = [layer for layer, part in enumerate(found.receptive_field, 1) if part == 1.0]
    assert found.layers_to_full == (full[0] if full else None)


def test_what_it_says_of_known_patterns() -> None:
    window = measure(Local(128), Geometry.self_attention(1024, 2), layers=8)
    assert window.layers_to_full == 7
    assert window.receptive_field[0] == (3 * 8 - 2) / 64
    assert measure(Full(), Geometry.self_attention(256, 2)).layers_to_full == 1
    assert measure(Full(), Geometry.self_attention(256, 2, is_causal=True)).load_imbalance == pytest.approx(
        (128 * 192.5) / (128 * 128.5)
    )
    late = measure(Dilated((2,), (4,)), Geometry.self_attention(8, 4))
    assert late.empty_rows == 8 + 8 + 4 + 4
    assert late.fan_out.histogram == (24, 8)


def test_a_quarter_million_tokens() -> None:
    found = measure(Random(8) | Local(256), Geometry.self_attention(1 << 18, 4, is_causal=True), layers=3)
    assert found.empty_rows == 0
    assert found.receptive_field[0] < found.receptive_field[1] < found.receptive_field[2] < 1
    assert attrs.asdict(found)["fan_out"]["most"] <= 11 * 128


def test_other_geometries_are_refused() -> None:
    for geometry in (
        Geometry(q_len=3, kv_len=4, num_heads=1, num_kv_heads=1, is_causal=False),
        Geometry.self_attention(0),
    ):
        with pytest.raises(ConfigError, match="one whole sequence of at least one token"):
            measure(Full(), geometry)
    with pytest.raises(ConfigError, match="layers must be at least 1, got 0"):
        measure(Full(), Geometry.self_attention(4), layers=0)
