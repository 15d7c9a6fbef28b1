"""Counters: exact numbers, taken where the work is done, whoever calls and however often it is run again."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention import (
    Attention,
    ConfigError,
    Dilated,
    Full,
    Global,
    Learned,
    Limits,
    Local,
    Pattern,
    Random,
    build_attention,
    counters_of,
)
from dilated_attention.core.counters import AttentionCounters, CacheCounters, PassCounters
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower

from . import learned_kit

LONGNET = Dilated((64, 128), (1, 2))
# 256 tokens, not causal: a head has four full segments of 64, and two of 128 with every second position.
PAIRS = 4 * 64 * 64 + 2 * 64 * 64
HEADS, DIM = 4, 8


def build(pattern: Pattern = LONGNET, **fields: Any) -> Attention:
    """An attention that shares its counters with no other test's."""
    build.number += 1  # type: ignore[attr-defined]
    limits = fields.pop("limits", Limits(reference_mask_bytes=1_000_000 + build.number))  # type: ignore[attr-defined]
    return build_attention(pattern=pattern, num_heads=HEADS, head_dim=DIM, limits=limits, **fields)


build.number = 0  # type: ignore[attr-defined]


def ones(batch: int, length: int, *, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, HEADS, DIM, generator=generator, requires_grad=grad) for _ in range(3)]


def forward_flops(pattern: Pattern, length: int, *, is_causal: bool = False) -> int:
    return 4 * DIM * lower(pattern, Geometry.self_attention(length, HEADS, is_causal=is_causal)).pairs


def test_a_step_of_training_is_counted_to_the_pair() -> None:
    attention = build()
    attention(*ones(2, 256, grad=True)).sum().backward()
    counters = attention.counters()
    flops = 4 * DIM * PAIRS * HEADS * 2
    assert counters.forward == PassCounters(calls=1, tokens=512, flops=flops)
    assert counters.backward == PassCounters(calls=1, tokens=512, flops=flops * 5 // 2)
    assert (counters.plan, counters.backend) == (attention.plan.digest, "sdpa")
    assert counters.layouts.lowering_s > 0
    assert counters.to_dict()["forward"] == {
        "calls": 1, "tokens": 512, "flops": flops, "sent_bytes": 0, "received_bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize("pattern", [Full(), Local(9), Local(9) | Global(3), LONGNET + Local(5), Random(2, 16)])
def test_flops_are_those_of_the_layout(pattern: Pattern) -> None:
    attention = build(pattern, is_causal=True)
    attention(*ones(3, 100))
    assert attention.counters().forward.flops == 3 * forward_flops(pattern, 100, is_causal=True)
    assert attention.counters().backward == PassCounters()


@pytest.mark.parametrize("length", [64, 75])
@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_of_chosen_blocks_are_those_of_the_choice(length: int, is_causal: bool) -> None:
    pattern = Learned(block_size=16, blocks_per_row=3)
    geometry = Geometry.self_attention(length, 2, is_causal=is_causal)
    attention = learned_kit.build(pattern, geometry, scale=0.37 + length / 1000)
    query, key, value = torch.randn(3, 1, length, 2, 8).unbind(0)
    attention(query, key, value)
    chosen = 4 * 8 * lower(attention.gate.freeze(query, key), geometry).pairs
    counted = attention.counters().forward.flops
    # Where the gate may choose it, the short last block counts as a whole one.
    most = 0 if is_causal or length % 16 == 0 else 4 * 8 * 2 * length * (16 - length % 16)
    assert chosen <= counted <= chosen + most


def test_compiled_calls_are_counted_inside_the_graph() -> None:
    attention = build()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(*ones(1, 256, grad=True)).sum().backward()
    counters = attention.counters()
    assert (counters.forward.calls, counters.backward.calls) == (3, 3)
    assert counters.forward.flops == 3 * 4 * DIM * PAIRS * HEADS


def test_what_checkpointing_runs_again_is_counted_again() -> None:
    ours = build(activation_checkpointing=True)
    ours(*ones(1, 256, grad=True)).sum().backward()
    assert (ours.counters().forward.calls, ours.counters().backward.calls) == (2, 1)
    torchs = build()
    checkpoint(torchs, *ones(1, 256, grad=True), use_reentrant=False).sum().backward()
    assert (torchs.counters().forward.calls, torchs.counters().backward.calls) == (2, 1)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_documents_are_one_call_without_their_padding(mode: str) -> None:
    attention = build()
    run = torch.compile(attention, backend="aot_eager", fullgraph=True) if mode == "compiled" else attention
    mask = torch.arange(96) >= torch.tensor([96, 40, 7])[:, None]
    run(*ones(3, 96, grad=True), key_padding_mask=mask).sum().backward()
    counters = attention.counters()
    assert (counters.forward.calls, counters.forward.tokens) == (1, 96 + 40 + 7)
    assert counters.forward.flops == sum(forward_flops(LONGNET, length) for length in (96, 40, 7))
    assert (counters.backward.calls, counters.backward.tokens) == (1, 96 + 40 + 7)


@pytest.mark.parametrize("pattern", [LONGNET, Full()])
def test_decoding_needs_what_the_whole_sequence_needs(pattern: Pattern) -> None:
    attention = build(pattern, is_causal=True)
    (query, key, value), cache = ones(2, 150), attention.make_cache(2)
    for begin, end in ((0, 140), (140, 141), (141, 145), (145, 150)):
        attention.step(query[:, begin:end], key[:, begin:end], value[:, begin:end], cache)
    counters = attention.counters()
    assert (counters.forward.calls, counters.forward.tokens) == (4, 300)
    assert counters.forward.flops == 2 * forward_flops(pattern, 150, is_causal=True)


def test_the_cache_is_counted() -> None:
    probe = build(Local(9))
    probe(*ones(1, 160))
    room = probe.counters().layouts.nbytes  # for one of the two
    attention = build(Local(9), limits=Limits(pattern_cache_bytes=room))
    for length in (100, 100, 160, 100):
        attention(*ones(1, length))
    counters = attention.counters().layouts
    assert (counters.hits, counters.misses, counters.evictions, counters.entries) == (1, 3, 2, 1)
    assert 0 < counters.nbytes <= room
    attention.prepare(100)
    assert attention.counters().layouts.hits == 2


def test_a_layout_beyond_the_limit_is_lowered_once_all_the_same() -> None:
    attention = build(Random(2, 16), limits=Limits(pattern_cache_bytes=1))
    for _ in range(3):
        query, key, value = (x.requires_grad_() for x in ones(1, 160))
        attention(query, key, value).sum().backward()
    layouts = attention.counters().layouts
    assert (layouts.misses, layouts.evictions, layouts.entries) == (1, 0, 1)
    attention(*ones(1, 100))
    layouts = attention.counters().layouts
    assert (layouts.misses, layouts.evictions, layouts.entries) == (2, 1, 1)


def test_what_does_not_run_is_not_counted() -> None:
    attention = build(Random(2, 16), limits=Limits(layout_bytes=10))
    with pytest.raises(ConfigError, match="layout_bytes"):
        attention(*ones(1, 300))
    with pytest.raises(ConfigError, match="must be"):
        attention(*(x[..., :4] for x in ones(1, 300)))
    counters = attention.counters()
    assert (counters.forward, counters.backward) == (PassCounters(), PassCounters())
    assert (counters.layouts.misses, counters.layouts.entries) == (1, 0)


def test_threads_lose_nothing() -> None:
    attention = build(Full())
    inputs = ones(1, 4)

    def work(_: int) -> None:
        for _ in range(200):
            attention(*inputs)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    counters = attention.counters()
    assert (counters.forward.calls, counters.forward.tokens) == (3200, 12800)
    assert counters.layouts.hits + counters.layouts.misses == 3200


def test_a_models_layers_share_the_counters_of_their_plan() -> None:
    twins, other = [build(), build(Full())], build(Local(3))
    twins[1] = copy.deepcopy(twins[0])
    model = nn.ModuleList([*twins, nn.Sequential(nn.Linear(2, 2), other)])
    for attention in (*twins, other):
        attention(*ones(1, 128))
    found = counters_of(model)
    assert [(c.plan, c.forward.calls) for c in found] == [(twins[0].plan.digest, 2), (other.plan.digest, 1)]
    assert counters_of(twins[0], twins[1], other) == found
    with pytest.raises(ConfigError, match=r"counters_of takes torch modules, .* got \[Attention"):
        counters_of(twins)  # type: ignore[arg-type]
    assert {c.plan for c in counters_of()} >= {c.plan for c in found}
    digest = other.plan.digest
    del model, other, attention
    assert digest not in {c.plan for c in counters_of()}
    assert counters_of(nn.Linear(2, 2)) == ()


def test_counters_add_up_number_by_number() -> None:
    one = AttentionCounters(
        plan="a", backend="sdpa", kernel="k", forward=PassCounters(calls=1, tokens=2), layouts=CacheCounters(nbytes=5),
    )  # fmt: skip
    two = one + one
    assert (two.plan, two.forward.calls, two.forward.tokens, two.layouts.nbytes) == ("a", 2, 4, 10)
