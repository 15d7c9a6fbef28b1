"""Modules with a learned pattern: one gate, whatever is built around it."""

from __future__ import annotations

import copy

import pytest
import torch

from dilated_attention import ConfigError
from dilated_attention.models import MultiheadAttention

from .model_kit import data
from .support import error

B, S, E, H = 2, 21, 32, 4
LEARNED = {"kind": "learned", "block_size": 4, "blocks_per_row": 2}


def test_a_learned_pattern_keeps_its_gate() -> None:
    ours = MultiheadAttention(E, H, batch_first=True, pattern=LEARNED, is_causal=True)
    assert any(name.startswith("attention.gate.") for name in ours.state_dict())
    x = data(1, S, E)
    assert ours(x, x, x)[0].shape == x.shape
    with pytest.raises(ConfigError, match=r"gate was made for is_causal=False and called with is_causal=True"):
        MultiheadAttention(E, H, batch_first=True, pattern=LEARNED)(x, x, x, is_causal=True)


def test_a_learned_pattern_has_one_gate_for_every_dtype() -> None:
    ours, seen = MultiheadAttention(E, H, batch_first=True, pattern=LEARNED, is_causal=True, dtype=torch.bfloat16), []
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}  # the gate's too, as FSDP2 wants them
    ours.attention.register_forward_pre_hook(lambda module, given: seen.append((module.gate, given[0].dtype)))
    names, expected, given = list(ours.state_dict()), {}, data(1, S, E)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        expected[dtype] = ours.to(dtype)(*[given.to(dtype)] * 3)[0]
    twin = copy.deepcopy(ours)
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-6), (torch.bfloat16, 1e-9)):
        for module in (ours, twin):
            out = module.to(dtype)(*[given.to(dtype)] * 3)[0]
            assert error(out, expected[dtype]) < bound
    assert error(expected[torch.float32], expected[torch.float64]) < 1e-5
    assert error(expected[torch.bfloat16], expected[torch.float64]) < 0.03
    assert list(ours.state_dict()) == list(twin.state_dict()) == names
    assert [gate is ours.attention.gate for gate, _ in seen] == [True] * 3 + [True, False] * 3
    assert [dtype for _, dtype in seen[:3]] == list(expected)
    for module in (ours, twin):
        built = module.attention.built_attentions()
        assert [made.gate is module.attention.gate for made in built] == [True] * 3


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_gate_learns_changes_what_is_attended_to_in_every_dtype(compiles: bool) -> None:
    ours, x = MultiheadAttention(E, H, batch_first=True, pattern=LEARNED, is_causal=True), data(1, S, E)
    call = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiles else ours
    gate = ours.attention.gate
    assert gate is not None
    near = gate.get_parameter("nearness")
    outs = []
    for weight in (100.0, -100.0):  # of what is far, then of what is near
        with torch.no_grad():
            near[:, 0] = weight
        outs.append([call(*[x] * 3)[0]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs[-1].append(call(*[x] * 3)[0])
    fresh = MultiheadAttention(E, H, batch_first=True, pattern=LEARNED, is_causal=True)
    fresh.load_state_dict(ours.state_dict())
    assert error(outs[1][0], fresh(*[x] * 3)[0]) < 1e-5
    for far, close in zip(*outs, strict=True):
        assert error(far, close) > 0.1
    for whole, half in outs:
        assert error(half, whole) < 0.03


def test_dropout_may_be_set_for_a_learned_pattern_too() -> None:
    module, x = MultiheadAttention(E, H, batch_first=True, pattern=LEARNED), data(B, S, E)
    expected = module(x, x, x)[0]
    module.dropout = 0.5
    assert not torch.equal(module(x, x, x)[0], expected)
    assert torch.equal(module.eval()(x, x, x)[0], expected)
