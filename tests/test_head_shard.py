"""Heads of a model over several ranks: each rank's are what they are in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention import (
    AttentionConfig,
    Dilated,
    Full,
    Global,
    HeadShard,
    Learned,
    Local,
    Pattern,
    PatternStore,
    Random,
    Strided,
    build_attention,
    explain,
    resolve_pattern,
)
from dilated_attention.core.bands import bands_of
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.core.program import keeps_prefixes
from dilated_attention.core.reference import multiplicity
from dilated_attention.errors import ConfigError

from . import strategies
from .support import NAMES, error, inputs, oracle, ours

HEADS = 8
LONGNET = Dilated((16, 32, 64), (1, 2, 16))  # eight heads have eight offsets at the last rate
PATTERNS: list[Pattern] = [
    LONGNET,
    Dilated((16, 32), (2, 8), offsets="blocked"),
    Dilated((16, 32, 48), (1, 2, 3), heads="split"),
    Dilated((16, 64), (1, 4), offsets_by="kv_head"),
    Random(2, 16),
    Local(5) | Dilated((32,), (8,)),
    Random(2, 8) + Dilated((32,), (8,)),
    Global(3) | Random(2, 8),
    Local(9),
]


def shards(pattern: Pattern, kv_heads: int, ranks: int) -> list[HeadShard]:
    own = HEADS // ranks
    return [
        HeadShard(pattern, first_head=rank * own, total_heads=HEADS, total_kv_heads=kv_heads) for rank in range(ranks)
    ]


@pytest.mark.parametrize("backend", ["sdpa", *(pytest.param(b, marks=pytest.mark.slow) for b in ("math", "reference"))])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_rank_computes_its_heads_of_the_whole_model(pattern: Pattern, backend: str) -> None:
    """Four ranks and two key-value heads: each of these is on two ranks, which hold a copy of it."""
    for kv_heads, ranks, own_kv in ((8, 2, 4), (4, 2, 2), (2, 4, 1)):
        geometry = Geometry(q_len=100, kv_len=100, num_heads=HEADS, num_kv_heads=kv_heads, is_causal=True)
        tensors = inputs(geometry, batch=2, head_dim=16, dtype=torch.float32)
        out, lse, dq, _, _ = oracle(pattern, tensors, geometry, through_lse=False)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for rank, shard in enumerate(shards(pattern, kv_heads, ranks)):
            own = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
            first_kv = own.start * kv_heads // HEADS
            fields: dict[str, Any] = {"num_heads": HEADS // ranks, "num_kv_heads": own_kv, "head_dim": 16}
            attention = build_attention(pattern=shard, is_causal=True, backend=backend, **fields)
            mine = [tensors[0][:, :, own], *(x[:, :, first_kv : first_kv + own_kv] for x in tensors[1:])]
            mine = [x.detach().clone().requires_grad_() for x in mine]
            found, found_lse = attention(*mine, return_lse=True)
            (found_dq,) = torch.autograd.grad(found, mine[:1], dout[:, :, own].float())
            assert error(found, out[:, :, own]) < 1e-5
            assert error(found_lse, lse[:, own]) < 1e-5
            assert error(found_dq, dq[:, :, own]) < 1e-5


@settings(max_examples=40, deadline=None)
@given(st.data(), strategies.patterns(), strategies.geometries(max_len=24))
def test_pairs_and_layouts_are_a_slice_of_the_whole_models(data: st.DataObject, pattern: Pattern, g: Geometry) -> None:
    whole = attrs.evolve(g, num_heads=2 * g.num_heads, num_kv_heads=2 * g.num_kv_heads)
    first = data.draw(st.sampled_from((0, g.num_heads)))
    try:
        pattern.validate(whole.num_heads, whole.num_kv_heads)
    except ConfigError:  # a shard inside it is of fewer heads
        return
    shard = HeadShard(pattern, first_head=first, total_heads=whole.num_heads, total_kv_heads=whole.num_kv_heads)
    expected = multiplicity(pattern, whole)[first : first + g.num_heads]
    np.testing.assert_array_equal(multiplicity(shard, g), expected)
    assert lower(shard, g).pairs == expected.sum()
    assert lower(shard, g).distinct_pairs == (expected > 0).sum()
    assert keeps_prefixes(shard) == keeps_prefixes(pattern)
    assert resolve_pattern(shard.to_dict()) == shard
    assert shard.max_multiplicity == pattern.max_multiplicity


@pytest.mark.parametrize("pattern", [Full(), Local(9), Strided(3), Global(4), Local(9) | Global(4)], ids=str)
def test_patterns_that_treat_heads_alike_stay_what_they_are(pattern: Pattern) -> None:
    """So they keep their bands and branches, and with them the kernels for these."""
    (shard, _) = shards(pattern, 8, 2)
    assert shard.unwrap() == pattern
    assert bands_of(shard) == bands_of(pattern)
    geometry = Geometry.self_attention(100, 4, is_causal=True)
    assert lower(shard, geometry).pairs == lower(pattern, geometry).pairs


def test_shards_of_shards_and_of_stored_patterns(tmp_path: Path) -> None:
    geometry = Geometry.self_attention(64, 2, is_causal=True)
    half = HeadShard(LONGNET, first_head=4, total_heads=8)
    quarter = HeadShard(half, first_head=2, total_heads=4)
    expected = HeadShard(LONGNET, first_head=6, total_heads=8)
    np.testing.assert_array_equal(multiplicity(quarter, geometry), multiplicity(expected, geometry))
    store = PatternStore(tmp_path)
    store.save("drawn", Random(2, 8), seq_len=64, num_heads=8, is_causal=True)
    of_stored = HeadShard(store.load("drawn"), first_head=6, total_heads=8)
    of_drawn = HeadShard(Random(2, 8), first_head=6, total_heads=8)
    np.testing.assert_array_equal(multiplicity(of_stored, geometry), multiplicity(of_drawn, geometry))
    store.save("own", expected, seq_len=64, num_heads=2, is_causal=True)
    assert store.verify("own").form == "parameters"
    assert store.load("own") == expected
    store.save("blocks", of_drawn, seq_len=64, num_heads=2, is_causal=True)
    assert store.verify("blocks").form == "blocks"
    np.testing.assert_array_equal(multiplicity(store.load("blocks"), geometry), multiplicity(of_drawn, geometry))


@pytest.mark.parametrize("pattern", [LONGNET, Local((7, 0)) | Dilated((32,), (8,)), Random(2, 8)], ids=str)
def test_a_cache_keeps_what_its_heads_reach(pattern: Pattern) -> None:
    shard = HeadShard(pattern, first_head=4, total_heads=8)
    attention = build_attention(pattern=shard, num_heads=4, head_dim=8, is_causal=True, requires_grad=False)
    q, k, v = torch.randn(3, 1, 80, 4, 8).unbind()
    cache = attention.make_cache(1, 80)
    steps = [attention.step(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], cache) for i in range(80)]
    torch.testing.assert_close(torch.cat(steps, 1), attention(q, k, v))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"first_head": 8, "total_heads": 8}, ["first_head must be below total_heads", "8", "from 0"]),
        ({"first_head": -1, "total_heads": 8}, ["first_head"]),
        ({"first_head": 0, "total_heads": 8, "total_kv_heads": 3}, ["multiple of total_kv_heads", "8 and 3"]),
        ({"of": Learned(2, 8), "first_head": 0, "total_heads": 8}, ["learned", "as it is"]),
        ({"of": 3, "first_head": 0, "total_heads": 8}, ["of a pattern", "3"]),
        ({"first": 0, "total_heads": 8}, ["'first'", "first_head"]),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        HeadShard(**{"of": LONGNET, **arguments})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("shard", "fields", "words"),
    [
        (HeadShard(LONGNET, first_head=6, total_heads=8), {"num_heads": 4}, ["2 from head 6", "num_heads=4"]),
        (
            HeadShard(LONGNET, first_head=4, total_heads=8),
            {"num_heads": 4, "num_kv_heads": 2},
            ["heads 4 to 5 share", "total_kv_heads=8"],
        ),
        (HeadShard(Dilated((8,) * 9, (1,) * 9, heads="split"), first_head=0, total_heads=8), {"num_heads": 2}, ["9"]),
    ],
)
def test_heads_that_do_not_fit(shard: HeadShard, fields: dict[str, Any], words: list[str]) -> None:
    for make in (AttentionConfig, build_attention):
        with pytest.raises(ConfigError) as caught:
            make(pattern=shard, head_dim=8, **fields)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_it_is_named_in_files_and_plans() -> None:
    mapping = {"kind": "head_shard", "of": LONGNET.to_dict(), "first_head": 4, "total_heads": 8}
    plan = explain(num_heads=4, head_dim=8, pattern=mapping)
    assert "dilated (from head 4 of 8)" in plan.explain()
    assert plan.config["pattern"] == mapping
    for wrong, words in (
        ({**mapping, "first": 1}, "first_head"),
        ({k: v for k, v in mapping.items() if k != "of"}, "needs of"),
        ({**mapping, "of": {"kind": "dilate"}}, "'dilated'"),
        ({**mapping, "of": [LONGNET.to_dict()]}, "mapping with 'kind'"),
        ({**mapping, "total_heads": "8"}, "total_heads"),
    ):
        with pytest.raises(ConfigError, match=words):
            explain(num_heads=4, head_dim=8, pattern=wrong)


def test_through_gradients_of_the_lse() -> None:
    geometry = Geometry.self_attention(70, 4, is_causal=True)
    shard = HeadShard(LONGNET, first_head=4, total_heads=8)
    tensors = inputs(geometry, batch=1, head_dim=8, dtype=torch.float32)
    attention = build_attention(pattern=shard, num_heads=4, head_dim=8, is_causal=True)
    expected = oracle(shard, tensors, geometry, through_lse=True)
    for name, a, e in zip(NAMES, ours(attention, tensors, geometry, through_lse=True), expected, strict=True):
        assert error(a, e) < 1e-5, name
