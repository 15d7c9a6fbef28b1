"""The rows of `benchmarks.options`: each option of a configuration, and what it is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dilated_attention import Attention, ConfigError, Dilated, Full, Limits, Random, build_attention, preflight
from dilated_attention.core.pattern import Pattern

from .options import Case, Row, checked

Call = Callable[[], object]


def rows(case: Case) -> Iterator[Callable[[], Row]]:
    """One maker a row, so that what a row holds is freed before the next."""
    makers = [_checkpointing, _checkpointing_in_a_layer, _deterministic, _no_gradient, _layout, _offsets_by]
    makers += [_return_lse, _padding, _varlen, _prepare, _seq_len, _compile, _dropout, _cache_bytes, _layout_bytes]
    makers += [_workspace_bytes, _exchange_bytes, _mask_bytes]
    if case.device == "cuda":
        makers += [_cuda_graph]
    yield from (lambda make=make: make(case) for make in makers)


def _longnet(case: Case, **more: Any) -> Dilated:
    return Dilated(case.segment_lengths, (1, 2, 4, 8), **more)


def _forward(attention: Attention, inputs: list[Tensor], **more: Any) -> Call:
    return lambda: attention(*inputs[:3], **more)


def _training(attention: Callable[..., Any], inputs: list[Tensor]) -> Call:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, inputs[3])


def _pair(case: Case, pattern: Pattern, **more: Any) -> tuple[Attention, Attention]:
    """Without and with an option, both through the gate."""
    return checked(case, pattern), checked(case, pattern, **more)


def _checkpointing(case: Case) -> Row:
    """Four attentions whose outputs nobody else keeps: each is scaled and summed."""
    ways = []
    for attention in _pair(case, _longnet(case), activation_checkpointing=True):
        ways.append(_training(lambda q, k, v, a=attention: sum(a(q, k, v) * s for s in (1, 2, 3, 4)), case.inputs()))
    return Row(
        option="`activation_checkpointing=True`", measured="f+b of four, outputs not kept otherwise",
        without=ways[0], chosen=ways[1],
    )  # fmt: skip


class _Layer(nn.Module):
    """Projections around an attention; the last one keeps the attention's output anyway."""

    def __init__(self, case: Case, attention: Attention) -> None:
        super().__init__()
        width, dtype = case.heads * case.head_dim, getattr(torch, case.dtype)
        self.attention, self.heads = attention, case.heads
        self.inside = nn.Linear(width, 3 * width, dtype=dtype, device=case.device)
        self.outside = nn.Linear(width, width, dtype=dtype, device=case.device)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, width)."""
        query, key, value = torch.unflatten(self.inside(x), -1, (3, self.heads, -1)).unbind(2)
        attended: Tensor = self.attention(query, key, value)
        added: Tensor = x + self.outside(attended.flatten(2))
        return added


def _checkpointing_in_a_layer(case: Case) -> Row:
    x = torch.randn(1, case.seq_len, case.heads * case.head_dim, dtype=getattr(torch, case.dtype), device=case.device)
    ways = []
    for attention in _pair(case, _longnet(case), activation_checkpointing=True):
        model = nn.Sequential(*(_Layer(case, attention) for _ in range(4)))
        ways.append(lambda m=model: torch.autograd.grad(m(x).sum(), list(m.parameters())))
    return Row(
        option="`activation_checkpointing=True`", measured="f+b of four layers with projections",
        without=ways[0], chosen=ways[1], note="the output projection keeps the output anyway",
    )  # fmt: skip


def _deterministic(case: Case) -> Row:
    before, chosen = _pair(case, _longnet(case), deterministic=True)
    kernels = {before._engine.kernel.name, chosen._engine.kernel.name}
    return Row(
        option="`deterministic=True`", measured="f+b", without=_training(before, case.inputs()),
        chosen=_training(chosen, case.inputs()), note=" → ".join(sorted(kernels)),
    )  # fmt: skip


def _no_gradient(case: Case) -> Row:
    before, chosen = _pair(case, _longnet(case), requires_grad=False)
    inputs = case.inputs()
    return Row(
        option="`requires_grad=False`", measured="forward", without=_forward(before, inputs),
        chosen=_forward(chosen, inputs), note="admits backends and kernels that have no (deterministic) backward",
    )  # fmt: skip


def _layout(case: Case) -> Row:
    before, chosen = _pair(case, _longnet(case), tensor_layout="bhsd")
    inputs = [x.transpose(1, 2).contiguous() for x in case.inputs()]

    def copied(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = before(*(x.transpose(1, 2).contiguous() for x in (query, key, value)))
        return out.transpose(1, 2).contiguous()

    return Row(
        option='`tensor_layout="bhsd"`', measured="f+b on (B, H, S, D), against copies to (B, S, H, D)",
        without=_training(copied, inputs), chosen=_training(chosen, inputs),
    )  # fmt: skip


def _offsets_by(case: Case) -> Row:
    groups = case.heads // 4
    before = checked(case, _longnet(case), num_kv_heads=groups)
    chosen = checked(case, _longnet(case, offsets_by="kv_head"), num_kv_heads=groups)
    inputs = case.inputs(kv_heads=groups)
    return Row(
        option='`Dilated(offsets_by="kv_head")`', measured=f"f+b, {case.heads} heads on {groups}",
        without=_training(before, inputs), chosen=_training(chosen, inputs),
        note="another pattern: heads that share keys keep the same positions",
    )  # fmt: skip


def _return_lse(case: Case) -> Row:
    attention, inputs = checked(case, _longnet(case)), case.inputs()
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    dlse = torch.ones(1, case.heads, case.seq_len, device=case.device)

    def through_lse() -> object:
        return torch.autograd.grad(attention(*leaves, return_lse=True), leaves, [inputs[3], dlse])

    return Row(
        option="`return_lse=True`", measured="f+b, its gradient used", without=_training(attention, inputs),
        chosen=through_lse,
    )  # fmt: skip


def _padding(case: Case) -> Row:
    attention, inputs = checked(case, _longnet(case)), case.inputs()
    mask = torch.zeros(1, case.seq_len, dtype=torch.bool, device=case.device)
    mask[:, -case.seq_len // 4 :] = True
    return Row(
        option="`key_padding_mask`", measured="forward, a quarter padding", without=_forward(attention, inputs),
        chosen=_forward(attention, inputs, key_padding_mask=mask),
    )  # fmt: skip


def _varlen(case: Case) -> Row:
    inputs = case.inputs()
    bounds = torch.arange(0, case.seq_len + 1, case.seq_len // 32)
    bounds[1:-1:2] += 3  # no two that follow each other are as long
    ways = []
    for attention in _pair(case, Full(), varlen=True):
        ways.append(_training(lambda q, k, v, a=attention: a(q, k, v, cu_seqlens=bounds), inputs))
    return Row(
        option="`varlen=True`", measured="f+b of `Full`, 32 packed documents", without=ways[0], chosen=ways[1],
        note="`auto` prefers kernels that compute all documents together",
    )  # fmt: skip


def _unseen(case: Case, count: int, first: int) -> list[Attention]:
    """Attentions of one shape that have seen no length; their limits differ, so that they share nothing."""
    limits = (Limits(reference_mask_bytes=(1 << 30) + first + number) for number in range(count))
    return [build_attention(case.fields(pattern=_longnet(case), limits=each)) for each in limits]


def _prepare(case: Case) -> Row:
    inputs, count = case.inputs(), case.rounds + 8
    checked(case, _longnet(case))(*inputs[:3])  # what is slow once a process is not counted
    unseen, prepared = _unseen(case, count, 0), _unseen(case, count, count)
    for attention in prepared:
        attention.prepare(case.seq_len)
    return Row(
        option="`attention.prepare(seq_len)`", measured="the first call of a length",
        without=lambda: unseen.pop()(*inputs[:3]), chosen=lambda: prepared.pop()(*inputs[:3]),
        note="needed before a CUDA graph is captured",
    )  # fmt: skip


def _seq_len(case: Case) -> Row:
    fields = case.fields(pattern=_longnet(case))
    return Row(
        option="`seq_len=N`", measured="`build_attention`", without=lambda: build_attention(fields),
        chosen=lambda: build_attention(fields, seq_len=case.seq_len),
        note="backends are judged for that length, and the plan shows its cost",
    )  # fmt: skip


def _compile(case: Case) -> Row:
    attention, inputs = checked(case, _longnet(case)), case.inputs()
    layer = _Layer(case, attention)
    compiled = torch.compile(layer, fullgraph=True)
    x = inputs[0].flatten(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)

    def forward(run: Callable[..., Any]) -> Call:
        return lambda: torch.autograd.grad(run(x).sum(), list(layer.parameters()))

    return Row(
        option="`torch.compile(fullgraph=True)`", measured="f+b of a layer with projections", without=forward(layer),
        chosen=forward(compiled), note="the attention is one operator in its graph",
    )  # fmt: skip


def _dropout(case: Case) -> Row:
    before, chosen = checked(case, _longnet(case)), checked(case, _longnet(case), dropout_p=0.1)
    inputs = case.inputs(case.seq_len)
    return Row(
        option="`dropout_p=0.1`", measured="f+b", without=_training(before, inputs), chosen=_training(chosen, inputs),
        note=f"`{chosen.plan.backend}` in place of `{before.plan.backend}`",
    )  # fmt: skip


def _cache_bytes(case: Case) -> Row:
    pattern = Random(2, 64)
    before = checked(case, pattern, backend="sdpa")
    chosen = checked(case, pattern, backend="sdpa", limits=Limits(pattern_cache_bytes=1))
    lengths = case.seq_len // 4, case.seq_len // 4 - 64

    def in_turns(attention: Attention) -> Call:
        calls = [_forward(attention, case.inputs(length)) for length in lengths]
        return lambda: [call() for call in calls]

    ways = in_turns(before), in_turns(chosen)
    for way in ways:
        way()
    kept = [attention.counters().layouts.nbytes for attention in (before, chosen)]
    return Row(
        option="`Limits.pattern_cache_bytes` too small (1 byte)",
        measured="forward of two lengths in turns, `Random(2)`, `sdpa`",
        without=ways[0], chosen=ways[1], memory=(kept[0], kept[1]),
        note="memory: layouts kept; the newest alone is, and the pattern is lowered at every call",
    )  # fmt: skip


def _refused(attention: Attention, seq_len: int) -> Call:
    def prepare() -> None:
        attention.prepare(1)  # so that the other is no longer the newest, which is kept
        with contextlib.suppress(ConfigError):
            attention.prepare(seq_len)

    return prepare


def _layout_bytes(case: Case) -> Row:
    pattern, length = Random(8, 64), 1 << 17
    before = build_attention(case.fields(pattern=pattern, limits=Limits(pattern_cache_bytes=1), backend="sdpa"))
    tight = Limits(layout_bytes=1 << 20, pattern_cache_bytes=1)
    chosen = build_attention(case.fields(pattern=pattern, limits=tight, backend="sdpa"))
    table = before._engine.prepare(length, length, 0, 0, torch.device(case.device))
    return Row(
        option="`Limits.layout_bytes` too small (1 MiB)", measured="`prepare` of `Random(8)`, 131,072 tokens",
        without=_refused(before, length), chosen=_refused(chosen, length), memory=(table.nbytes, 0),
        note="memory: the table; an error before it is made",
    )  # fmt: skip


def _workspace_bytes(case: Case) -> Row:
    pattern = Random(2, 64)
    before = checked(case, pattern, backend="sdpa")
    chosen = checked(case, pattern, backend="sdpa", limits=Limits(workspace_bytes=4 << 20))
    inputs = case.inputs(case.seq_len // 2)
    return Row(
        option="`Limits.workspace_bytes` 64 → 4 MiB", measured="f+b, `Random(2)`, `sdpa`",
        without=_training(before, inputs), chosen=_training(chosen, inputs),
        note="on CPUs no more than 16 MiB are used" if case.device == "cpu" else "",
    )  # fmt: skip


def _exchange_bytes(case: Case) -> Row:
    fields = case.fields(pattern=_longnet(case), seq_len=case.seq_len)

    def simulate(budget: int) -> int:
        costs = preflight(fields, limits=Limits(exchange_buffer_bytes=budget), ranks=4)
        return max(load.forward_received for load in costs.loads)

    return Row(
        option="`Limits.exchange_buffer_bytes` too small (1 byte)", measured="`preflight` of 4 ranks",
        without=lambda: simulate(2 << 30), chosen=lambda: simulate(1), memory=(simulate(2 << 30), simulate(1)),
        note="memory: most that a rank receives forward; times of a ring: `bench --scaling`",
    )  # fmt: skip


def _mask_bytes(case: Case) -> Row:
    fields = case.fields(pattern=_longnet(case), backend="reference")
    query, key, value, _ = case.inputs(1024)
    attention = build_attention(fields)
    tight = build_attention(fields, limits=Limits(reference_mask_bytes=1 << 20))

    def refused() -> None:
        with contextlib.suppress(ConfigError):
            tight(query, key, value)

    return Row(
        option="`Limits.reference_mask_bytes` too small (1 MiB)", measured="forward of `reference`, 1,024 tokens",
        without=lambda: attention(query, key, value), chosen=refused, note="an error before the mask is made",
    )  # fmt: skip


def _cuda_graph(case: Case) -> Row:
    length = case.seq_len // 8
    attention, inputs = checked(case, _longnet(case)), case.inputs(length)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    attention.prepare(length)

    def step() -> object:
        return torch.autograd.grad(attention(*leaves), leaves, inputs[3])

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):  # type: ignore[call-overload]
        assert float(functional.mse_loss(ours.float(), theirs.float())) < 1e-4
    return Row(
        option="CUDA graph", measured=f"f+b, {length:,} tokens", without=step, chosen=graph.replay,
        note="memory: that of the capture is held by the graph",
    )  # fmt: skip
