"""The opaque operator of a call whose sequences have one length, its backward, and their autograd.

`torch.compile` sees one operator a call: lengths, layouts and kernels stay inside it, found by the engine's key.
Padded rows and packed documents go through two operators of their own, in `packed`. Ranks that share a sequence
(`exchange.engine`) use none: there `torch.compile` breaks the graph. Shapes as in `engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .merging import accumulator_dtype
from .transforms import Operators, is_active, is_watched, needs_operator, no_second_derivative, transformed

if TYPE_CHECKING:
    from .engine import Engine

# Engines alive in this process. Equal keys compute equal things, so the first of them serves all.
_ENGINES: WeakValueDictionary[str, Engine] = WeakValueDictionary()


def intern(engine: Engine) -> Engine:
    """The engine that serves `engine.key`: the given one, or an equal one made before and still alive.

    Somebody's pattern may not say in its repr all that it is: what differs gets a key of its own.
    """
    while (known := _ENGINES.setdefault(engine.key, engine)).pattern != engine.pattern:
        engine.key += "'"
    return known


def living_engines() -> list[Engine]:
    """The engines of all attentions that are alive in this process."""
    return list(_ENGINES.values())


_LIBRARY: Any = torch.library.Library("dilated_attention", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? seed, Tensor? tables, str engine, SymInt q_offset,"
    " SymInt kv_offset, bool recompute) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attend_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? out, Tensor? lse,"
    " Tensor? seed, Tensor? tables, str engine, SymInt q_offset, SymInt kv_offset) -> (Tensor, Tensor, Tensor)"
)


def engine_of(key: str) -> Engine:
    """The engine of a graph, by its key."""
    engine = _ENGINES.get(key)
    if engine is None:
        raise RuntimeError(
            "the attention of this graph is not in this process: it was deleted, or the graph was loaded "
            "(torch.export) where it was not built. Build it again with the same configuration, on a machine with the "
            "same device and versions, and keep it as long as the graph"
        )
    return engine


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside the operators every product runs in the dtype that the engine chose."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    tables: Tensor | None,
    engine: str,
    q_offset: int,
    kv_offset: int,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """The operator: returns (out, lse); `recompute` only says what the backward may keep."""
    with without_autocast(query.device):
        return engine_of(engine).forward(query, key, value, q_offset, kv_offset, seed, tables)


def _attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    seed: Tensor | None,
    tables: Tensor | None,
    engine: str,
    q_offset: int,
    kv_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    runner = engine_of(engine)
    with without_autocast(query.device):
        if out is None or lse is None:  # activation checkpointing
            out, lse = runner.forward(query, key, value, q_offset, kv_offset, seed, tables)
        return runner.backward(dout, dlse, query, key, value, out, lse, q_offset, kv_offset, seed, tables)


def attend_fake(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """The shapes of out and lse."""
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, length), dtype=accumulator_dtype(query.dtype))


def attend_backward_fake(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of dq, dk and dv."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, and the outputs unless they are to be recomputed."""
    query, key, value, seed, tables, engine, q_offset, kv_offset, recompute = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, seed, tables, *((None, None) if recompute else output))
    ctx.rest = (engine, q_offset, kv_offset)
    ctx.owner = _ENGINES.get(engine)


def _gradients(run: Callable[..., Any], ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; lse costs only where its gradient is used."""
    query, key, value, seed, tables, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(query)
    grads: tuple[Tensor, ...] = run(dout, dlse, query, key, value, out, lse, seed, tables, *ctx.rest)
    return grads


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operator's backward: the other operator, so that tracing sees nothing of what is inside."""
    grads = _gradients(torch.ops.dilated_attention.attend_backward.default, ctx, dout, dlse)
    return (*grads, None, None, None, None, None, None)


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dilated_attention::attend", attend_fake, lib=_LIBRARY)
torch.library.register_fake("dilated_attention::attend_backward", attend_backward_fake, lib=_LIBRARY)
torch.library.register_autograd("dilated_attention::attend", _backward, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("dilated_attention::attend_backward", no_second_derivative, lib=_LIBRARY)


def unviewed(out: Tensor) -> Tensor:
    """The same memory as no view: one that is among several results of a function cannot be changed in place.

    Before it is kept for the backward, which notices changes of the tensor that it keeps alone.
    """
    return out.data if out._is_view() else out


class _Attend(torch.autograd.Function):
    """`attend` without the dispatcher, whose autograd would cost eager calls more than a small attention does.

    Not with a separate setup_context: torch then inspects the signature at every call. What is no tensor to be
    differentiated travels as one argument, since torch looks at each.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        engine, q_offset, kv_offset, seed, tables, recompute = rest
        out, lse = engine.forward(query, key, value, q_offset, kv_offset, seed, tables)
        out = unviewed(out)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, seed, tables, *((None, None) if recompute else (out, lse)))
        ctx.rest = (engine.key, q_offset, kv_offset)
        ctx.owner = engine  # the graph may outlive the module
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        run = torch.ops.dilated_attention.attend_backward.default if needs_operator(dout, dlse) else _attend_backward
        return (*_gradients(run, ctx, dout, dlse), None)


_OPERATORS = Operators("attend", "attend_backward", ("seed", "tables"))
# What `Function.apply` itself calls. The layers above it serve functorch alone and cost a tiny call 6 us and more.
_RECORD: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _Attend).apply


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    engine: Engine,
    *,
    q_offset: int,
    kv_offset: int,
    seed: Tensor | None,
    tables: Tensor | None,
    recompute: bool,
    origin: object = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable attention. Autocast must be off.

    Args:
        query: (B, S, H, D).
        key: (B, T, K, D).
        value: (B, T, K, D).
        engine: computes it.
        q_offset: absolute position of the first query.
        kv_offset: absolute position of the first key.
        seed: int64 scalar that determines the dropout, or None.
        tables: the blocks that a gate chose, (B, H, R, k) int64, or None.
        recompute: keep only the inputs for the backward.
        origin: which attention calls, for ranks that share a sequence.

    Returns:
        out (B, S, H, D) and lse (B, H, S), contiguous.
    """
    if (attend_together := getattr(engine, "attend", None)) is not None:  # ranks that share a sequence
        out, lse = attend_together(
            query, key, value, q_offset=q_offset, kv_offset=kv_offset, recompute=recompute, origin=origin
        )
        return out, lse
    if is_active():
        return transformed(_OPERATORS, query, key, value, seed, tables, engine.key, q_offset, kv_offset, recompute)
    if torch.compiler.is_compiling() or is_watched():
        out, lse = torch.ops.dilated_attention.attend.default(
            query, key, value, seed, tables, engine.key, q_offset, kv_offset, recompute
        )
        return out, lse
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _RECORD(query, key, value, (engine, q_offset, kv_offset, seed, tables, recompute))
    return engine.forward(query, key, value, q_offset, kv_offset, seed, tables)
