"""Autograd around a ring's passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.transforms import is_traced, needs_operator, no_second_derivative

if TYPE_CHECKING:
    from .engine import RingEngine


def refuse_traced(*tensors: Tensor | None) -> None:
    """Raise `ConfigError` before other ranks are told of a call that they may not make, and that moves no rows."""
    if is_traced(*tensors):
        raise ConfigError(
            "ranks that share a sequence cannot be traced (torch.export, make_fx, fake tensors): a pass needs all; "
            "trace an attention that is built without a mesh, or use torch.compile, which leaves it out of its graphs"
        )


class RingAttend(torch.autograd.Function):
    """`RingEngine.ring_forward` and its backward. What is no tensor to be differentiated travels as one argument."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """out and lse; `rest` is the engine, whether to recompute, and the origin of the call."""
        engine, recompute, origin = rest
        out, lse, received, number = engine.ring_forward(query, key, value, origin)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *((None,) * 3 if recompute else (out, lse, received)))
        ctx.engine, ctx.origin = engine, attrs.evolve(origin, call=number)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        refuse_traced(dout, dlse)
        if torch.is_grad_enabled():
            no_second_derivative()
        if needs_operator(dout, dlse):
            raise ConfigError(
                "batched gradients (is_grads_batched, vectorize=True) do not reach over ranks that share a sequence; "
                "loop over them"
            )
        query, key, value, out, lse, received = ctx.saved_tensors
        engine: RingEngine = ctx.engine
        if out is None:
            out, lse, received, _ = engine.ring_forward(query, key, value, ctx.origin)
        if dout is None:
            dout = torch.zeros_like(query)
        return (*engine.ring_backward(dout, dlse, query, key, value, out, lse, received, ctx.origin), None)
