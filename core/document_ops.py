"""Padded rows and packed documents: each is attended to as a sequence of its own, on views of one call's tensors.

Shapes as in `engine`. Results of tokens that belong to no document are 0, and -inf in lse. The tensors that say where
documents lie go through an operator as they are, so that `torch.compile` needs no break; the host reads them inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arranged import Arranged, arranged
from .context_parallel import refuse_in_ring
from .documents import Packing, Stack, read_documents, stacked
from .errors import ConfigError
from .filled import Filled
from .merging import accumulator_dtype
from .ops import attend_backward_fake, attend_fake, engine_of, unviewed, without_autocast
from .transforms import Operators, is_active, is_watched, needs_operator, no_second_derivative, transformed

if TYPE_CHECKING:
    from .engine import Engine

_LIBRARY: Any = torch.library.Library("dilated_attention", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "attend_documents(Tensor query, Tensor key, Tensor value, Tensor? seed, Tensor? key_padding_mask,"
    " Tensor? cu_seqlens, str engine, Tensor[]? tables, bool recompute) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attend_documents_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? out,"
    " Tensor? lse, Tensor? seed, Tensor? key_padding_mask, Tensor? cu_seqlens, str engine,"
    " Tensor[]? tables) -> (Tensor, Tensor, Tensor)"
)

Tables = Sequence[Tensor] | None
_OPERATORS = Operators("attend_documents", "attend_documents_backward", ("seed", "key_padding_mask", "cu_seqlens"))


def _read(
    engine: Engine, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None, query: Tensor, key: Tensor
) -> Arranged:
    """The documents as the engine computes them."""
    documents = read_documents(key_padding_mask, cu_seqlens, query.shape[1], key.shape[1])
    return arranged(documents, engine, query, key)


def _seeds(seed: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """A seed for each stack, the same in every pass."""
    if seed is None:
        return [None] * count
    generator = torch.Generator().manual_seed(int(seed))
    return list(torch.randint(1 << 62, (count,), dtype=torch.int64, device="cpu", generator=generator))


def _forward(
    engine: Engine,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stacks: Arranged,
    seed: Tensor | None,
    tables: Tables,
    *,
    calls: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return out (B, S, H, D) and lse (B, H, S), contiguous; counters count `calls` more."""
    if isinstance(stacks, Packing):
        return engine.forward(query, key, value, 0, 0, seed, None, calls=calls, packing=stacks)
    if not stacks:  # all of it is padding
        engine.forwards.add(calls, 0, 0)
    batch, length, heads, _ = query.shape
    out = query.new_zeros(query.shape)
    dtype = accumulator_dtype(query.dtype)
    lse = torch.full((batch, heads, length), -math.inf, dtype=dtype, device=query.device)
    for i, (stack, own_seed) in enumerate(zip(stacks, _seeds(seed, len(stacks)), strict=True)):
        taken = stack.queries(query), stack.keys(key), stack.keys(value)
        own_calls = calls if i == 0 else 0
        if isinstance(stack, Filled):
            part, part_lse = _forward(engine, *taken, stack.stacks, None, None, calls=own_calls)
        else:
            own_tables = None if tables is None else tables[i]
            part, part_lse = engine.forward(
                *taken, stack.kv_len - stack.q_len, 0, own_seed, own_tables, calls=own_calls, lengths=stack.lengths
            )
        stack.put_queries(out, part)
        stack.put_values(lse, part_lse)
    return out, lse


def _backward(
    engine: Engine,
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    stacks: Arranged,
    seed: Tensor | None,
    tables: Tables,
    *,
    calls: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous; without `out` and `lse` they are computed again. `calls` as for `_forward`."""
    if out is None or lse is None:  # activation checkpointing
        out, lse = _forward(engine, query, key, value, stacks, seed, tables)
    if isinstance(stacks, Packing):
        return engine.backward(dout, dlse, query, key, value, out, lse, 0, 0, seed, None, calls=calls, packing=stacks)
    if not stacks:
        engine.backwards.add(calls, 0, 0)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (query, key, value))
    for i, (stack, own_seed) in enumerate(zip(stacks, _seeds(seed, len(stacks)), strict=True)):
        taken = (
            stack.gradient(dout),
            None if dlse is None else stack.value_gradient(dlse).contiguous(),
            stack.queries(query),
            stack.keys(key),
            stack.keys(value),
            stack.queries(out),
            stack.row_lse(lse).contiguous(),
        )
        own_calls = calls if i == 0 else 0
        if isinstance(stack, Filled):
            grads = _backward(engine, *taken, stack.stacks, None, None, calls=own_calls)
        else:
            own_tables = None if tables is None else tables[i]
            grads = engine.backward(
                *taken, stack.kv_len - stack.q_len, 0, own_seed, own_tables, calls=own_calls, lengths=stack.lengths
            )
        stack.put_queries(dq, grads[0])
        stack.put_keys(dk, grads[1])
        stack.put_keys(dv, grads[2])
    return dq, dk, dv


def _attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    engine: str,
    tables: Tables,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """The operator: returns (out, lse); `recompute` only says what the backward may keep."""
    runner = engine_of(engine)
    stacks = _read(runner, key_padding_mask, cu_seqlens, query, key)
    with without_autocast(query.device):
        return _forward(runner, query, key, value, stacks, seed, tables)


def _attend_documents_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    seed: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    engine: str,
    tables: Tables,
) -> tuple[Tensor, Tensor, Tensor]:
    runner = engine_of(engine)
    stacks = _read(runner, key_padding_mask, cu_seqlens, query, key)
    with without_autocast(query.device):
        return _backward(runner, dout, dlse, query, key, value, out, lse, stacks, seed, tables)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, and the outputs unless they are to be recomputed."""
    *tensors, engine, tables, recompute = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *((None, None) if recompute else output))
    ctx.tables = tables  # of integers
    ctx.key, ctx.owner = engine, engine_of(engine)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[object, ...]:
    """The operator's backward: the other operator."""
    query, key, value, seed, key_padding_mask, cu_seqlens, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(query) if dout is None else dout
    grads = torch.ops.dilated_attention.attend_documents_backward.default(
        dout, dlse, query, key, value, out, lse, seed, key_padding_mask, cu_seqlens, ctx.key, ctx.tables
    )
    no_tables = None if ctx.tables is None else [None] * len(ctx.tables)
    return (*grads, None, None, None, None, no_tables, None)


_LIBRARY.impl("attend_documents", _attend_documents, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_documents_backward", _attend_documents_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dilated_attention::attend_documents", attend_fake, lib=_LIBRARY)
torch.library.register_fake("dilated_attention::attend_documents_backward", attend_backward_fake, lib=_LIBRARY)
torch.library.register_autograd("dilated_attention::attend_documents", _gradients, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("dilated_attention::attend_documents_backward", no_second_derivative, lib=_LIBRARY)


class _AttendDocuments(torch.autograd.Function):
    """The operator without the dispatcher: eager calls read where the documents lie once for both passes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        engine, stacks, seed, tables, recompute, key_padding_mask, cu_seqlens = rest
        out, lse = _forward(engine, query, key, value, stacks, seed, tables)
        out = unviewed(out)
        ctx.set_materialize_grads(False)
        results = (None, None) if recompute else (out, lse)
        ctx.save_for_backward(query, key, value, seed, key_padding_mask, cu_seqlens, *results)
        ctx.owner, ctx.key, ctx.stacks, ctx.tables = engine, engine.key, stacks, tables
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[object, ...]:
        if needs_operator(dout, dlse):
            return (*_gradients(ctx, dout, dlse)[:3], None)
        query, key, value, seed, _, _, out, lse = ctx.saved_tensors
        engine, stacks, tables = ctx.owner, ctx.stacks, ctx.tables
        dout = torch.zeros_like(query) if dout is None else dout
        with without_autocast(query.device):
            grads = _backward(engine, dout, dlse, query, key, value, out, lse, stacks, seed, tables)
        return (*grads, None)


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    engine: Engine,
    *,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    gate: Callable[..., Tensor] | None,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Differentiable attention within documents. Autocast must be off.

    Args:
        query: (B, S, H, D).
        key: (B, T, K, D).
        value: (B, T, K, D).
        engine: computes each document.
        key_padding_mask: (B, T) bool, True where a key is padding, or None.
        cu_seqlens: (N + 1,) cumulative lengths of documents, or None; one of the two is given, and has passed
            `check_documents`.
        seed: int64 scalar that determines the dropout, or None.
        gate: chooses the blocks of a learned pattern, for each document by itself.
        recompute: keep only the inputs for the backward.

    Returns:
        out (B, S, H, D) and lse (B, H, S), contiguous.

    Raises:
        ConfigError: a backend that declares no varlen, or documents that cannot be.
    """
    _check_varlen(engine, key_padding_mask)
    if gate is not None and (torch.compiler.is_compiling() or is_active()):
        raise ConfigError(
            "a learned pattern chooses blocks for each document by itself, which torch.compile and torch.func "
            "cannot trace; call it with key_padding_mask or cu_seqlens outside the compiled or transformed function"
        )
    tensors = (query, key, value, seed, key_padding_mask, cu_seqlens)
    if is_active():
        return transformed(_OPERATORS, *tensors, engine.key, None, recompute)
    watched = torch.compiler.is_compiling() or is_watched()
    reads = gate is not None or not watched
    stacks = _read(engine, key_padding_mask, cu_seqlens, query, key) if reads else ()
    tables = _tables(gate, query, key, stacks)
    if watched:
        out, lse = torch.ops.dilated_attention.attend_documents.default(*tensors, engine.key, tables, recompute)
        return out, lse
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out, lse = _AttendDocuments.apply(  # type: ignore[no-untyped-call, unused-ignore]
            query, key, value, (engine, stacks, seed, tables, recompute, key_padding_mask, cu_seqlens)
        )
        return out, lse
    return _forward(engine, query, key, value, stacks, seed, tables)


def received_in_documents(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    engine: Engine,
    *,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: Callable[..., Tensor] | None,
) -> Tensor:
    """The attention that each key receives within its document, (B, H, T) in lse's dtype; 0 for padding.

    Arguments and errors as `attend_documents`; lse (B, H, S).
    """
    _check_varlen(engine, key_padding_mask)
    stacks = stacked(read_documents(key_padding_mask, cu_seqlens, query.shape[1], key.shape[1]))
    tables = _tables(gate, query, key, stacks)
    total = lse.new_zeros(query.shape[0], query.shape[2], key.shape[1])
    for i, stack in enumerate(stacks):
        q, k, own_lse = stack.queries(query), stack.keys(key), stack.query_values(lse)
        shift = stack.kv_len - stack.q_len
        part = engine.received(q, k, own_lse, shift, 0, None if tables is None else tables[i])
        stack.key_values(total).copy_(part)
    return total


def _check_varlen(engine: Engine, key_padding_mask: Tensor | None) -> None:
    given = "cu_seqlens" if key_padding_mask is None else "key_padding_mask"
    if engine.config.ring_size > 1:
        refuse_in_ring(engine.config.ring_size, given)
    if "varlen" not in engine.call_axes:
        raise ConfigError(
            f"{given}: the backend of kernel {engine.kernel.name!r} takes no padded rows and packed documents (it does "
            "not declare varlen); build with another backend"
        )


def _tables(gate: Callable[..., Tensor] | None, query: Tensor, key: Tensor, stacks: Arranged) -> Tables:
    """The blocks that a gate chooses in each stack."""
    if gate is None:
        return None
    assert not isinstance(stacks, Packing)  # which has no blocks
    query, key = query.detach(), key.detach()
    whole = [stack for stack in stacks if isinstance(stack, Stack)]  # all: what a gate chooses keeps no prefixes
    return [gate(stack.queries(query), stack.keys(key), q_offset=stack.kv_len - stack.q_len) for stack in whole]
