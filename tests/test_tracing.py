"""Ranges: a trace shows plan, branches and blocks by name, and costs nothing where nobody traces."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dilated_attention import Attention, Dilated, Full, Global, Local, Pattern, Random, Strided, build_attention
from dilated_attention.core import tracing

LONGNET = Dilated((64, 128), (1, 2))


def names(attention: Attention, *, compiled: bool = False) -> Counter[str]:
    """How often each of our ranges stands in the trace of a forward and a backward pass."""
    inputs = [torch.randn(1, 256, 2, 8, requires_grad=True) for _ in range(3)]
    run = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
    run(*inputs).sum().backward()  # lowered, and compiled
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        run(*inputs).sum().backward()
    ours = ("dilated_attention ", "branch", "band", "blocks", "ring", "keys")
    found = {event.key: event.count for event in trace.key_averages() if event.key.startswith(ours)}
    return Counter(found)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_trace_reads_like_the_table(compiled: bool) -> None:
    attention = build_attention(pattern=LONGNET, num_heads=2, head_dim=8)
    found = names(attention, compiled=compiled)
    plan = attention.plan.digest
    assert plan in attention.plan.explain()
    assert found == {
        f"dilated_attention sdpa forward (plan {plan})": 1,
        f"dilated_attention sdpa backward (plan {plan})": 1,
        "branch w=64 r=1": 2,
        "branch w=128 r=2": 2,
    }


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        (Full(), {}),  # a single dense call is its pass
        (Strided(3), {"branch w=all r=3": 6}),  # a call each for the three remainders
        (
            Local(9),
            {
                "band 1 squares": 2,
                "band 1 mirrored squares": 6,  # of the first chunk, those between, and the last
                "band 1 mirrored edge 1": 2,
                "band 1 mirrored edge 2": 2,
            },
        ),
        (Random(1, 16), {"blocks of 16": 2}),
        (LONGNET | Global(3), {"branch w=64 r=1": 2, "branch w=128 r=2": 2, "blocks of 128": 2}),
    ],
)
def test_parts_have_their_names(pattern: Pattern, parts: dict[str, int]) -> None:
    found = names(build_attention(pattern=pattern, num_heads=2, head_dim=8))
    assert {name: count for name, count in found.items() if not name.startswith("dilated_attention ")} == parts


def test_lowering_and_steps_have_ranges() -> None:
    attention = build_attention(pattern=LONGNET, num_heads=2, head_dim=8, is_causal=True)
    cache, plan = attention.make_cache(1), attention.plan.digest
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        for length in (30, 1):
            query, key, value = torch.randn(3, 1, length, 2, 8)
            attention.step(query, key, value, cache)
    found = {event.key for event in trace.key_averages()}
    assert found >= {f"dilated_attention sdpa {what} (plan {plan})" for what in ("lower", "forward", "step")}


def test_nothing_is_recorded_where_nobody_traces() -> None:
    assert tracing.span("x") is tracing.span("y")
    with torch.autograd.profiler.profile():
        assert isinstance(tracing.span("x"), torch.autograd.profiler.record_function)
    assert tracing.span("x") is tracing.span("y")
