"""Modes that are shown every operator see ours, one a pass: selective checkpointing, fake tensors, FLOP counters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention import Attention, Dilated, Full, Global, Learned, Local, Pattern, Random, build_attention

PATTERNS = [
    Full(),
    Dilated((16, 32), (1, 2)),
    Random(block_size=8, blocks_per_row=2, seed=0),
    Learned(block_size=8, blocks_per_row=2),
    Dilated((16, 32), (1, 2)) | Global(3),
]
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"key_padding_mask": torch.arange(40) >= torch.tensor([[40], [31]])},
}
ATEN, OURS = torch.ops.aten, torch.ops.dilated_attention
PRODUCTS = {
    ATEN.mm.default,
    ATEN.bmm.default,
    ATEN.addmm.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
ATTENTIONS = {OURS.attend.default, OURS.attend_documents.default}
# What is saved, and how often ours is computed then; compiled alike for two of them.
SAVED: list[tuple[set[Any], int]] = [(PRODUCTS, 2), (ATTENTIONS, 1), (PRODUCTS | ATTENTIONS, 1), (set(), 2)]


def build(pattern: Pattern, **fields: Any) -> Attention:
    return build_attention(pattern=pattern, num_heads=4, num_kv_heads=2, head_dim=8, is_causal=True, **fields)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 40, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def projected(attention: Attention, call: dict[str, Any], *tensors: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 64).view(8, 8)
    out, lse = attention(*(x @ weight for x in tensors), return_lse=True, **call)
    result: Tensor = (out @ weight).sin().sum() + torch.where(lse.isinf(), 0.0, lse).cos().sum()
    return result


def saving(operators: set[Any]) -> Callable[[], Any]:
    def policy(_: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


@pytest.mark.parametrize(
    ("compiled", "call", "pattern"),
    [
        pytest.param(*case, id=repr(case))
        for case in itertools.product([False, True], CALLS, PATTERNS)
        if case[:2] != (True, "padded") or not isinstance(case[2], Learned)  # which torch.compile cannot trace
    ],
)
def test_selective_checkpointing(compiled: bool, call: str, pattern: Pattern) -> None:
    attention, tensors = build(pattern), inputs()
    expected = torch.autograd.grad(projected(attention, CALLS[call], *tensors), tensors)
    for saved, forwards in SAVED[: 2 if compiled else None]:

        def run(*tensors: Tensor, saved: set[Any] = saved) -> Tensor:
            result: Tensor = checkpoint(
                projected, attention, CALLS[call], *tensors, use_reentrant=False, context_fn=saving(saved)
            )
            return result

        torch._dynamo.reset()
        total = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(*tensors)
        before = attention.counters().forward.calls
        found = torch.autograd.grad(total, tensors)
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e)
        assert attention.counters().forward.calls - before == forwards - 1


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_lengths_are_prepared_in_real_tensors(pattern: Pattern) -> None:
    attention, other = build(pattern, scale=0.3), build(pattern, scale=0.3, deterministic=True)
    if isinstance(pattern, Learned):
        other.load_state_dict(attention.state_dict())
    with FakeTensorMode():
        attention.prepare(40)
    tensors = inputs()
    assert torch.equal(attention(*tensors), other(*tensors))


def test_fake_tensors_leave_nothing_behind() -> None:
    attention = build(Local(5))
    with FakeTensorMode():
        out, lse = attention(*(torch.empty(2, 40, heads, 8) for heads in (4, 2, 2)), return_lse=True)
        assert (out.shape, lse.shape) == ((2, 40, 4, 8), (2, 4, 40))
    tensors = inputs()
    assert torch.equal(attention(*tensors), build(Local(5), deterministic=True)(*tensors))


def flops_of(attention: Attention) -> int:
    counters = attention.counters()
    return counters.forward.flops + counters.backward.flops


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_flop_counters_count_what_ours_count(pattern: Pattern, call: str, recompute: bool) -> None:
    attention = build(pattern, activation_checkpointing=recompute)
    before = flops_of(attention)
    with FlopCounterMode(display=False) as counter:
        attention(*inputs(), **CALLS[call]).sum().backward()
    counted = counter.get_flop_counts()["Global"]  # a gate's own products stand there by their own names
    ours = sum(flops for operator, flops in counted.items() if str(operator).startswith("dilated_attention."))
    assert ours == flops_of(attention) - before > 0


def test_flop_counters_of_fake_tensors() -> None:
    attention, other = build(Local(6)), build(Local(6), deterministic=True)
    before = flops_of(attention)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        attention(*(torch.empty(2, 40, heads, 8) for heads in (4, 2, 2)))
    tensors = inputs()
    assert torch.equal(attention(*tensors), other(*tensors))
    assert counter.get_total_flops() == flops_of(attention) - before > 0
