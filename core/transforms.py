"""The operators under torch.func: gradients (grad, vjp, jacrev) and vmap, whose calls become rows of one batch.

torch.func needs autograd functions of its own form; they cost a call more than a small attention does, so `ops` and
`packed` come here only while a transform is active. Shapes as in `engine`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from .errors import ConfigError


class Operators(NamedTuple):
    """Names of an operator and of its backward, both of `torch.ops.dilated_attention`.

    forward(query, key, value, *tensors, *rest, recompute), backward(dout, dlse, query, key, value, out, lse, *tensors,
    *rest), where `tensors` names optional tensors.
    """

    forward: str
    backward: str
    tensors: tuple[str, ...]


def no_second_derivative(*_: object) -> NoReturn:
    """The backward of every backward."""
    raise NotImplementedError(
        "dilated_attention has no second derivative: its backward cannot be differentiated again (create_graph=True, "
        "hessian); dilated_attention.reference.attention has one, in float64 on dense masks"
    )


def no_forward_mode() -> NoReturn:
    """Forward-mode derivatives are refused for every backend: kernels that torch does not know would lose them."""
    raise NotImplementedError(
        "dilated_attention has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, dual tensors); use "
        "backward, torch.func.vjp or jacrev, or for second derivatives dilated_attention.reference.attention"
    )


_UNMAPPED: Final = {
    "seed": "dropout cannot be mapped by torch.vmap; call eval(), or loop over the calls",
    "cu_seqlens": "cu_seqlens cannot be mapped by torch.vmap: they divide one row of tokens; flatten all calls into it",
}


def is_active() -> bool:
    """Whether a transform of torch.func is tracing."""
    return torch._C._are_functorch_transforms_active()


def refuse_mapped_dropout() -> None:
    """Raise `ConfigError` under torch.vmap, before a seed is drawn there."""
    if torch.compiler.is_compiling() or not is_active():
        return
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
        raise ConfigError(_UNMAPPED["seed"])


def needs_operator(dout: Tensor | None, dlse: Tensor | None) -> bool:
    """Whether a backward must be one operator: for a graph of it, and for batched gradients, which loop over it.

    Graphs are those of `create_graph` and of compiled autograd. Batched gradients (`is_grads_batched`,
    `torch.autograd.functional` with `vectorize`) are batched by a vmap older than torch.func's, with rules for few
    operators and a loop for all others.
    """
    if torch.compiler.is_compiling():
        return True
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or (dout is not None and batched(dout)) or (dlse is not None and batched(dlse))


def is_watched() -> bool:
    """Whether a mode of this thread is shown every operator: selective checkpointing, fake tensors, FLOP counters."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call is only written down, or has no numbers: make_fx, torch.export, fake tensors."""
    if not is_watched() and all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors):
        return False
    if detect_fake_mode(tensors) is not None:
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def transformed(operators: Operators, *args: Any) -> tuple[Tensor, Tensor]:
    """What the operator returns for `args`, out and lse, under any transforms but forward-mode derivatives."""
    if torch.compiler.is_compiling():
        from .graphs import apply_in_graph

        out, lse = apply_in_graph(operators, *args)
        return out, lse
    return apply(operators, *args)


def apply(operators: Operators, *args: Any) -> tuple[Tensor, Tensor]:
    """`transformed`, outside a trace of torch.compile or as a node of its graph."""
    out, lse = _Forward.apply(operators, *args)  # type: ignore[no-untyped-call, unused-ignore]
    return out, lse


def _call(name: str, *args: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = getattr(torch.ops.dilated_attention, name).default(*args)
    return results


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """x (B, ...) of each of `size` calls, which lie along `dim` (None: they share it), as (size * B, ...)."""
    if x is None:
        return None
    return (x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _mapped(
    function: Any, first: int, info: Any, in_dims: tuple[int | None, ...], operators: Operators, *args: Any
) -> Any:
    """The rule for vmap of a function whose arguments after `operators` are `first` tensors and the optional ones."""
    end = first + len(operators.tensors)
    for name, x in zip(operators.tensors, args[first:end], strict=True):
        if name in _UNMAPPED and x is not None:
            raise ConfigError(_UNMAPPED[name])
    size = info.batch_size
    folded = [_fold(x, dim, size) for x, dim in zip(args[:end], in_dims[1 : end + 1], strict=True)]
    results = function.apply(operators, *folded, *args[end:])
    batch = args[0].shape[0] if in_dims[1] is None else args[0].movedim(in_dims[1], 0).shape[1]  # there may be no calls
    return tuple(x.unflatten(0, (size, batch)) for x in results), (0,) * len(results)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(operators: Operators, *args: Any) -> tuple[Tensor, ...]:
        return _call(operators.forward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        operators, *args = inputs
        end = 3 + len(operators.tensors)
        *rest, recompute = args[end:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:end], *((None, None) if recompute else output))
        ctx.operators, ctx.rest, ctx.unused = operators, rest, len(inputs) - 4

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, *tensors, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(query) if dout is None else dout
        saved = (dout, dlse, query, key, value, out, lse, *tensors)
        grads = _Backward.apply(ctx.operators, *saved, *ctx.rest)  # type: ignore[no-untyped-call, unused-ignore]
        return (None, *grads, *(None,) * ctx.unused)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operators: Operators, *args: Any) -> Any:
        return _mapped(_Forward, 3, info, in_dims, operators, *args)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        no_forward_mode()


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(operators: Operators, *args: Any) -> tuple[Tensor, ...]:
        return _call(operators.backward, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        no_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        no_second_derivative()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], operators: Operators, *args: Any) -> Any:
        return _mapped(_Backward, 7, info, in_dims, operators, *args)
