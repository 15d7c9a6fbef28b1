"""Local, Global and Strided against loops written from their definitions; the manifest; light imports."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention import Dilated, Full, Random, build_attention
from dilated_attention.core.errors import ConfigError
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.layout import BlockGrid
from dilated_attention.core.pattern import Pattern, Union
from dilated_attention.core.reference import multiplicity
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.manifest import dilated_attention_patterns
from dilated_attention.patterns.strided import Strided

from . import strategies
from .support import error, inputs, oracle


def agrees(pattern: Pattern, geometry: Geometry, sees: Callable[[int, int], bool]) -> None:
    counts = multiplicity(pattern, geometry)
    for i in range(geometry.q_len):
        for j in range(geometry.kv_len):
            p, q = i + geometry.q_offset, j + geometry.kv_offset
            allowed = not geometry.is_causal or q <= p
            assert (counts[:, i, j] == int(sees(p, q) and allowed)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), strategies.geometries(max_len=20))
def test_local_sees_its_window(left: int, right: int, geometry: Geometry) -> None:
    agrees(Local((left, right)), geometry, lambda p, q: p - left <= q <= p + right)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 15), strategies.geometries(max_len=20))
def test_global_tokens_see_and_are_seen(tokens: int, geometry: Geometry) -> None:
    first = range(tokens)
    agrees(Global(tokens), geometry, lambda p, q: p in first or q in first)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 15), strategies.geometries(max_len=20))
def test_strided_sees_multiples_of_its_stride(stride: int, geometry: Geometry) -> None:
    agrees(Strided(stride), geometry, lambda p, q: (p - q) % stride == 0)


def test_one_number_is_both_sides_of_a_window() -> None:
    assert Local(3) == Local((3, 3)) == Local([3, 3])
    assert Local(3).window_size == (3, 3)


def test_a_sliding_window_counts_the_query_itself() -> None:
    assert Local.from_sliding_window(4) == Local((3, 0))
    counts = multiplicity(Local.from_sliding_window(4), Geometry.self_attention(10, 1, is_causal=True))
    assert counts.sum(-1)[0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]


def clipped(low: np.int64, high: np.int64, geometry: Geometry) -> tuple[int, int]:
    """A span of positions as a slice of key indices."""
    begin = min(max(int(low) - geometry.kv_offset, 0), geometry.kv_len)
    return begin, min(max(int(high) - geometry.kv_offset, begin), geometry.kv_len)


@settings(max_examples=100, deadline=None)
@given(strategies.generators(), strategies.geometries(max_len=40), st.integers(1, 20))
def test_spans_hold_every_key_and_signatures_tell_the_truth(
    pattern: Pattern, geometry: Geometry, block_size: int
) -> None:
    """Without causality, which lowering adds."""
    geometry = attrs.evolve(geometry, is_causal=False)
    grid = BlockGrid.of(geometry, block_size)
    high = np.minimum(grid.query_low + block_size, geometry.q_offset + geometry.q_len) - 1
    head = geometry.num_heads - 1
    counts = multiplicity(pattern, geometry)[head].numpy()
    spans = pattern.key_spans(grid.query_low, high, head, geometry)
    assert spans.low.shape == spans.high.shape == spans.inner_low.shape == spans.inner_high.shape
    for i in range(grid.query_low.size):
        rows, named = counts[i * block_size : (i + 1) * block_size], np.zeros(geometry.kv_len, dtype=bool)
        for s in range(spans.low.shape[1]):
            begin, end = clipped(spans.low[i, s], spans.high[i, s], geometry)
            assert not named[begin:end].any(), "spans of a block overlap"
            named[begin:end] = True
            begin, end = clipped(spans.inner_low[i, s], spans.inner_high[i, s], geometry)
            assert (rows[:, begin:end] == spans.multiplicity).all()
        assert not rows[:, ~named].any(), "a key outside the spans"
    query_low, key_low = (x.ravel() for x in np.meshgrid(grid.query_low, grid.key_low, indexing="ij"))
    kinds: dict[bytes, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
    place = np.arange(block_size)
    signature = pattern.block_signature(query_low, key_low, block_size, head, geometry)
    for e in range(query_low.size):
        query, key = query_low[e] + place[:, None], key_low[e] + place
        block = pattern.multiplicity(query, key, np.array(head), geometry)
        assert np.array_equal(kinds.setdefault(signature[e].tobytes(), block), block), "equal signatures, other blocks"


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_largest_numbers_are_what_a_sequence_makes_of_them(is_causal: bool) -> None:
    geometry = Geometry(q_len=50, kv_len=50, num_heads=2, num_kv_heads=2, is_causal=is_causal)
    tensors = inputs(geometry, batch=1, head_dim=8, dtype=torch.float64)
    full = oracle(Full(), tensors, geometry, through_lse=False)
    for pattern in (Local(1 << 40), Global(1 << 40), Dilated((1 << 40,), (1,)), Random(1 << 40), Local((1 << 40, 50))):
        attention = build_attention(
            pattern=pattern, num_heads=2, head_dim=8, is_causal=is_causal, dtype="float64", backend="sdpa"
        )
        assert error(attention(*tensors), full[0]) < 1e-12, str(pattern)
    pattern = Dilated((1 << 40,), (1 << 40,))
    alone = build_attention(pattern=pattern, num_heads=2, head_dim=8, dtype="float64", backend="sdpa")
    assert error(alone(*tensors)[:, 0, 0], tensors[2][:, 0, 0].double()) < 1e-12  # the one row of its kind


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Local(-1), "Local.window_size (left) must be at least 0, got -1; unbounded attention is Full()"),
        (lambda: Local((2, -1)), "Local.window_size (right) must be at least 0, got -1"),
        (
            lambda: Local((0, sys.maxsize)),
            "Local.window_size (right) must be at most 1,099,511,627,776, got 9,223,372,036,854,775,807; unbounded",
        ),
        (lambda: Global(10**30), "Global.tokens must be at most 1,099,511,627,776"),
        (lambda: Strided(1 << 17), "Strided.stride must be at most 65,536, got 131,072"),
        (lambda: Local((1, 2, 3)), "must be an integer or (left, right), got (1, 2, 3)"),
        (lambda: Local(2.5), "Local.window_size (left) must be an integer, got 2.5 (float)"),  # type: ignore[arg-type]
        (lambda: Local("3"), "must be an integer, got '3' (str)"),  # type: ignore[arg-type]
        (lambda: Local.from_sliding_window(0), "sliding_window must be at least 1, got 0"),
        (lambda: Global(0), "Global.tokens must be at least 1, got 0"),
        (lambda: Global(True), "Global.tokens must be an integer, got True (bool)"),
        (lambda: Strided(0), "Strided.stride must be at least 1, got 0"),
        (lambda: Strided(1.0), "Strided.stride must be an integer, got 1.0 (float)"),  # type: ignore[arg-type]
        (lambda: Union(()), "Union needs at least one pattern, got ()"),
        (lambda: Union((Local(1), 3)), "Union is made of patterns, got 3 (int)"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


@settings(max_examples=60, deadline=None)
@given(strategies.generators())
def test_the_manifest_makes_every_pattern_from_its_own_mapping(pattern: Pattern) -> None:
    targets = {spec.kind: spec.target for spec in dilated_attention_patterns()}
    fields = json.loads(json.dumps(pattern.to_dict()))
    module, _, name = targets[fields.pop("kind")].partition(":")
    assert getattr(importlib.import_module(module), name)(**fields) == pattern


def test_pattern_values_load_neither_torch_nor_numpy() -> None:
    specs = [spec.target.partition(":")[0] for spec in dilated_attention_patterns()]
    lines = [f"import {name}" for name in ("sys", "dilated_attention.patterns.manifest", *specs)]
    lines.append("loaded = {'torch', 'numpy', 'numba'} & set(sys.modules)")
    lines.append("sys.exit(f'loaded {loaded}' if loaded else 0)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
