"""Random: who is drawn, how evenly, the same everywhere, and what it costs at a million tokens."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dilated_attention import presets
from dilated_attention.core import reference
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.patterns import _reservoir
from dilated_attention.patterns._reservoir import draw_rows
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.registry.build import build_attention
from dilated_attention.registry.patterns import resolve_pattern

from . import strategies

MASK = (1 << 64) - 1
DIGEST = 3837386823
GOLDEN = ([16, 72, 75, 99], [14, 42, 44, 50])


def splitmix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def drawn(seed: int, head: int, row: int, allowed: int, take: int) -> set[int]:
    """The draw in unbounded Python integers."""
    step = 0x9E3779B97F4A7C15
    state = splitmix(splitmix(splitmix(seed + step & MASK) ^ head) ^ row)
    population = [c for c in range(allowed) if c != row]
    chosen: set[int] = set()
    for j in range(len(population) - (take - 1), len(population)):
        while True:
            state = state + step & MASK
            product = (splitmix(state) >> 32) * (j + 1)
            if product % (1 << 32) >= (1 << 32) % (j + 1):
                break
        t = product >> 32
        chosen.add(population[j] if population[t] in chosen else population[t])
    return chosen | {row}


def blocks_of(pattern: Random, geometry: Geometry) -> NDArray[np.bool_]:
    """(H, rows, cols): the key blocks that each row of blocks sees, from the multiplicity of one position in each."""
    rows = np.arange(0, geometry.q_len, pattern.block_size, dtype=np.int64)
    heads = np.arange(geometry.num_heads, dtype=np.int64)[:, None, None]
    counts = pattern.multiplicity(rows[None, :, None], rows[None, None, :], heads, geometry)
    return counts.astype(bool)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**64 - 1), st.booleans())
def test_every_row_draws_exactly_its_number_of_blocks(k: int, rows: int, seed: int, is_causal: bool) -> None:
    geometry = Geometry.self_attention(4 * rows - 1, 2, is_causal=is_causal)
    blocks = blocks_of(Random(k, block_size=4, seed=seed), geometry)
    for h in range(2):
        for row in range(rows):
            allowed = row + 1 if is_causal else rows
            expected = drawn(seed, h, row, allowed, min(k, allowed))
            assert set(np.flatnonzero(blocks[h, row]).tolist()) == expected
            assert len(expected) == min(k, allowed)


def test_the_draw_never_changes() -> None:
    digest = 0
    for seed, pattern in enumerate((Random(8), Random(64, 16), Random(density=0.3, block_size=32))):
        for is_causal in (True, False):
            geometry = Geometry.self_attention(1 << 14, 2, is_causal=is_causal)
            lowered = lower(attrs.evolve(pattern, seed=seed << 62), geometry).blocks
            assert lowered is not None
            digest = zlib.crc32(lowered.cols.tobytes(), digest)
    assert digest == DIGEST
    blocks = blocks_of(Random(4, block_size=2, seed=7), Geometry.self_attention(200, 2, is_causal=True))
    assert np.flatnonzero(blocks[0, 99]).tolist() == GOLDEN[0]
    assert np.flatnonzero(blocks[1, 50]).tolist() == GOLDEN[1]


@settings(max_examples=60, deadline=None)
@given(strategies.geometries(max_len=60), st.integers(1, 5), st.integers(1, 12), st.integers(0, 5))
def test_positions_of_a_block_are_alike_and_the_own_block_is_seen(
    geometry: Geometry, k: int, block_size: int, seed: int
) -> None:
    pattern = Random(k, block_size, seed)
    counts = reference.multiplicity(pattern, attrs.evolve(geometry, is_causal=False)).numpy()
    q_blocks = (np.arange(geometry.q_len) + geometry.q_offset) // block_size
    k_blocks = (np.arange(geometry.kv_len) + geometry.kv_offset) // block_size
    for row in np.unique(q_blocks):
        for col in np.unique(k_blocks):
            tile = counts[:, q_blocks == row][:, :, k_blocks == col]
            assert (tile == tile[:, :1, :1]).all()
            assert row != col or tile.all()


def test_a_causal_row_stays_what_it_is_while_the_sequence_grows() -> None:
    pattern = Random(3, block_size=4)
    long = reference.multiplicity(pattern, Geometry.self_attention(100, 3, is_causal=True))
    short = reference.multiplicity(pattern, Geometry.self_attention(37, 3, is_causal=True))
    assert torch.equal(long[:, :37, :37], short)
    one = Geometry(q_len=1, kv_len=64, num_heads=3, num_kv_heads=3, is_causal=True)
    assert torch.equal(reference.multiplicity(pattern, one)[:, 0], long[:, 63, :64])


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_have_numbers_of_32_bits(is_causal: bool) -> None:
    pattern = Random(2, 16)
    for offset in (1 << 36, 1 << 40, -(1 << 40)):
        geometry = Geometry(
            q_len=32, kv_len=32, num_heads=1, num_kv_heads=1, is_causal=is_causal, q_offset=offset, kv_offset=offset
        )
        positions = np.arange(offset, offset + 32)
        for draw in (
            lambda geometry=geometry: lower(pattern, geometry),
            lambda geometry=geometry, at=positions: pattern.multiplicity(at[:, None], at, np.array(0), geometry),
        ):
            with pytest.raises(ConfigError, match="positions beyond 34,359,738,352 in blocks of 16; take"):
                draw()
    layout = lower(Random(1, 512), attrs.evolve(geometry, q_offset=1 << 36, kv_offset=1 << 36))
    assert layout.pairs == (32 * 33 // 2 if is_causal else 32 * 32)


@pytest.mark.parametrize("is_causal", [False, True])
def test_density_is_rounded_up_in_decimals(is_causal: bool) -> None:
    geometry = Geometry.self_attention(30, 2, is_causal=is_causal)
    for density, per_row in ((0.1, lambda n: -(-n // 10)), (0.001, lambda n: 1), (1.0, lambda n: n), (1, lambda n: n)):
        blocks = blocks_of(Random(block_size=1, density=density), geometry)
        allowed = np.arange(1, 31) if is_causal else np.full(30, 30)
        assert blocks.sum(-1).tolist() == [[per_row(int(n)) for n in allowed]] * 2


def critical(freedom: int, z: float) -> float:
    """The chi-square value that is exceeded with the probability of a normal value above z (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def test_blocks_are_drawn_uniformly() -> None:
    """Chi-square over the blocks for 1000 seeds: p < 0.01 about as often as chance has it, and p > 0.01 together."""
    rows, take, heads = 64, 9, 32
    of_row, of_head = np.tile(np.arange(rows), heads), np.repeat(np.arange(heads), rows)
    row_ptr = np.arange(rows * heads + 1) * take
    cols = np.empty(row_ptr[-1], dtype=np.int32)
    # A column is open to all rows but its own: its count has the variance rows * heads * p * (1 - p), and the counts
    # add up to a constant.
    p = (take - 1) / (rows - 1)
    statistics = []
    for seed in range(1000):
        draw_rows(np.uint64(seed), of_head, of_row, np.full(of_row.size, rows), row_ptr, cols)
        counts = np.bincount(cols, minlength=rows) - heads
        statistics.append(((counts - heads * (take - 1)) ** 2).sum() / (rows * heads * p * (1 - p)))
    above = sum(value > critical(rows - 1, 2.3263) for value in statistics)
    assert above <= 20  # of 1000; chance gives 10, and more than 20 about once in a thousand
    assert critical(1000 * (rows - 1), -2.3263) < sum(statistics) < critical(1000 * (rows - 1), 2.3263)


def test_every_subset_is_equally_likely() -> None:
    """Row 6 of seven blocks, causal: 3 of 6 others, 20 subsets."""
    subsets: dict[tuple[int, ...], int] = {}
    heads = np.arange(1000, dtype=np.int64)[:, None, None]
    row, cols = np.full((1, 1, 1), 6), np.arange(6)[None, None]
    geometry = Geometry.self_attention(7, 1000, is_causal=True)
    for seed in range(40):
        counts = Random(4, block_size=1, seed=seed).multiplicity(row, cols, heads, geometry)
        for found in counts[:, 0]:
            key = tuple(np.flatnonzero(found).tolist())
            subsets[key] = subsets.get(key, 0) + 1
    assert len(subsets) == 20
    assert all(len(subset) == 3 for subset in subsets)
    statistic = sum((count - 2000) ** 2 / 2000 for count in subsets.values())
    assert critical(19, -2.3263) < statistic < critical(19, 2.3263)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Random(), "either blocks_per_row or density, got blocks_per_row=None and density=None"),
        (lambda: Random(3, density=0.5), "got blocks_per_row=3 and density=0.5"),
        (lambda: Random(0), "Random.blocks_per_row must be at least 1, got 0"),
        (lambda: Random(2, block_size=0), "Random.block_size must be at least 1, got 0"),
        (lambda: Random(2, block_size=1 << 17), "Random.block_size must be at most 65,536, got 131,072"),
        (lambda: Random(10**30), "Random.blocks_per_row must be at most 1,099,511,627,776"),
        (lambda: Random(2, seed=-1), "Random.seed must be at least 0, got -1"),
        (lambda: Random(2, seed=1 << 64), "Random.seed must be below 2**64"),
        (lambda: Random(density=0.0), "must be a number above 0 and at most 1, got 0.0"),
        (lambda: Random(density=1.5), "must be a number above 0 and at most 1, got 1.5"),
        (lambda: Random(density=math.nan), "must be a number above 0 and at most 1, got nan"),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (Random(density=0.001, block_size=8), 100),
        (Random(density=1.0, block_size=8), 100),
        (Random(50, block_size=8), 100),
        (Random(2, block_size=128), 60),
        (Random(3, block_size=16), 97),
        (Random(2, block_size=16) | Local(5) | Global(2), 97),
    ],
)
def test_extremes_agree_with_the_oracle(pattern: Random, length: int, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, 4, 12), (2, length, 2, 12), (2, length, 2, 12))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    attention = build_attention(pattern=pattern, like=q, num_kv_heads=2, is_causal=is_causal, backend="sdpa")
    actual = attention(q, k, v, return_lse=True)
    expected = reference.attention(q, k, v, pattern=pattern, is_causal=is_causal)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-10, atol=1e-12)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    grads = [torch.autograd.grad(results, (q, k, v), upstream) for results in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-11)


def test_a_million_tokens_lower_to_what_was_drawn() -> None:
    geometry = Geometry.self_attention(1 << 20, 16, is_causal=True)
    lower(Random(8), Geometry.self_attention(256, 1))  # compiles
    begin = time.perf_counter()
    tracemalloc.start()
    blocks = lower(Random(8), geometry).blocks
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - begin < 20
    assert peak < 300 << 20
    assert blocks is not None
    assert blocks.masks.shape[0] == 1  # the diagonal
    sizes = np.diff(blocks.row_ptr, axis=1)
    assert (sizes == np.minimum(8, np.arange(8192) + 1)).all()
    rows = np.tile(np.repeat(np.arange(8192), sizes[0]), 16)
    assert (blocks.cols <= rows).all()
    with pytest.raises(ConfigError, match="allowed are"):
        lower(Random(8), geometry, limit_bytes=1 << 20)


def test_all_heads_are_counted_before_the_first_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.self_attention(1 << 20, 16, is_causal=True)
    needed = lower(Random(2), geometry).blocks
    assert needed is not None
    nbytes = 12 * needed.cols.size
    assert lower(Random(2), geometry, limit_bytes=nbytes + (1 << 15)).nbytes > nbytes  # and the diagonal's mask
    monkeypatch.setattr(Random, "_draw", None)
    with pytest.raises(ConfigError, match=f"needs {nbytes:,} bytes for .* allowed are {nbytes - 1:,};"):
        lower(Random(2), geometry, limit_bytes=nbytes - 1)


def test_heads_are_not_counted_at_once_where_draws_can_lie_elsewhere() -> None:
    whole = Geometry.self_attention(4096, 8)
    part = attrs.evolve(whole, kv_len=512)  # of whose draws an eighth remains
    pattern, limit = Random(4, block_size=64), 2 * 12 * 4 * 64
    assert lower(pattern, part, limit_bytes=limit).nbytes
    with pytest.raises(ConfigError, match="needs 24,576 bytes"):
        lower(pattern, whole, limit_bytes=limit)


@pytest.mark.slow
def test_drawing_is_fast() -> None:
    """1M tokens, 16 heads, 8 blocks a row: under a second, and 20 times faster than a torch.randperm a row."""
    rows = np.tile(np.arange(8192, dtype=np.int64), 16)
    heads = np.repeat(np.arange(16, dtype=np.int64), 8192)
    row_ptr = np.concatenate([[0], np.cumsum(np.minimum(8, rows + 1))])
    cols = np.empty(row_ptr[-1], dtype=np.int32)
    draw_rows(np.uint64(0), heads[:2], rows[:2], rows[:2] + 1, row_ptr[:3], cols)
    begin = time.perf_counter()
    draw_rows(np.uint64(0), heads, rows, rows + 1, row_ptr, cols)
    ours = time.perf_counter() - begin
    begin = time.perf_counter()
    for row in range(0, 8192, 64):
        torch.randperm(row + 1)[:8].sort()
    theirs = (time.perf_counter() - begin) * 64 * 16
    print(f"drawing 131,072 rows: {ours * 1e3:.1f} ms; torch.randperm a row: {theirs * 1e3:.0f} ms")  # noqa: T201
    assert ours < 1
    assert theirs / ours > 20


def test_presets_are_the_algebra() -> None:
    assert presets.longformer(window_size=6, global_tokens=2) == Local(3) | Global(2)
    bigbird = presets.bigbird(block_size=4, window_blocks=3, global_blocks=1, random_blocks=2, seed=5)
    assert bigbird == Local(4) | Global(4) | Random(3, 4, 5)
    with pytest.raises(ConfigError, match="window_blocks must be odd"):
        presets.bigbird(window_blocks=2)
    with pytest.raises(ConfigError, match="block_size must be at least 1, got 0"):
        presets.bigbird(block_size=0)
    with pytest.raises(ConfigError, match=r"unknown pattern 'bigbird' \(bigbird in dilated_attention\.presets makes"):
        resolve_pattern({"kind": "bigbird"})
    with pytest.raises(ConfigError, match="window_size must be even"):
        presets.longformer(window_size=5)


def test_a_machine_where_nothing_can_be_written_draws_too(tmp_path: Path) -> None:
    """In a copy of the module, beside which no folder can be, with a home that is a file."""
    module = tmp_path / "reservoir.py"
    shutil.copy(_reservoir.__file__, module)
    (tmp_path / "__pycache__").touch()
    code = (
        "import numpy as np, reservoir\n"
        "cols, one = np.empty(2, np.int32), np.array([1])\n"
        "reservoir.draw_rows(np.uint64(0), 0 * one, one, 2 * one, np.array([0, 2]), cols)\n"
        "print(cols)\n"
    )
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME"), str(module))
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env=os.environ | places, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[0 1]\n", "")
