"""What `torch.set_default_device` says concerns no tensor of ours: all stand where the inputs or the host need them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dilated_attention import Dilated, Full, Learned, Local, Pattern, Random, build_attention, reference

PATTERNS = [Full(), Dilated((8, 16), (1, 2)) | Local(3), Random(block_size=8, blocks_per_row=2), Learned(2, 8)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_another_default_device_changes_nothing(pattern: Pattern, dropout: float) -> None:
    if dropout and isinstance(pattern, Learned):
        return  # no backend has both
    attention = build_attention(
        pattern=pattern, num_heads=2, head_dim=8, is_causal=True, dropout_p=dropout, device="cpu"
    )
    query, key, value = torch.randn(3, 2, 30, 2, 8, requires_grad=True)
    calls: list[dict[str, Any]] = [{}, {"key_padding_mask": torch.arange(30) >= torch.tensor([[30], [21]])}]
    found = []
    for device in ("cpu", "meta"):  # which refuses whatever computes with it and something else
        torch.manual_seed(0)
        with torch.device(device):
            results = [attention(query, key, value, **call, return_lse=True) for call in calls]
            gradients = torch.autograd.grad([out for out, _ in results], (query, key, value), [query, key])
            received = attention.received(query, key, results[0][1])
        found.append([*(x for pair in results for x in pair), *gradients, received])
        attention._engine.programs = type(attention._engine.programs)(1 << 20)  # lowered again
    for a, e in zip(*found, strict=True):
        assert torch.equal(a, e)


def test_the_oracle_too() -> None:
    query, key, value = torch.randn(3, 2, 30, 2, 8)
    call: dict[str, Any] = {"pattern": Local(3), "key_padding_mask": torch.arange(30) >= torch.tensor([[30], [21]])}
    expected = reference.attention(query, key, value, **call)
    with torch.device("meta"):
        found = reference.attention(query, key, value, **call)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_cpu_is_the_same_with_an_index() -> None:
    attention = build_attention(pattern=Random(2, 4), num_heads=4, head_dim=8, device="cpu:0")
    attention.prepare(9)
    attention(*torch.zeros(3, 1, 9, 4, 8))
    assert (attention.counters().layouts.misses, attention.counters().layouts.hits) == (1, 1)
