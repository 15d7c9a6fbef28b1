"""The `xformers` backend: xformers' operators that return lse and whose backward takes out and lse.

`flash` is FlashAttention-2 (the package flash-attn where it is installed, else PyTorch's copy), `cutlass` the
memory-efficient kernel. Where query heads share key heads, flash's forward reads them in place; its backward, and all
of cutlass, need a key head for each query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs
import torch

from ..core.checks import require_choice
from ..core.errors import ConfigError
from ..core.groups import repeated_heads, summed_groups
from ..core.refusal import Refusal
from ..registry.specs import compute_capability
from .joining import joining
from .libraries import first_line, labelled

if TYPE_CHECKING:
    from torch import Tensor
    from xformers.ops import LowerTriangularMask
    from xformers.ops.fmha.common import AttentionBwOpBase, AttentionFwOpBase

    from ..core.kernel import DenseKernel, DensePiece
    from ..registry.specs import Request

# From the faster to the slower.
_KERNELS: Final = ("flash", "cutlass")


class XformersBackend:
    """Chooses among xformers' operators; `backend_options={"xformers": {"kernel": "cutlass"}}` forces one."""

    def refusals(self, request: Request) -> list[Refusal]:
        """What xformers itself says of device, dtype and head_dim, or why it cannot be imported."""
        names = _candidates(request)
        try:
            found = {name: list(_kernel_refusals(name, request)) for name in names}
        except ImportError as error:  # flash-attn-4 beside it looks to xformers like a broken flash-attn
            remedy = "reinstall xformers; beside flash-attn-4 it also needs flash-attn"
            return [Refusal("not_installed", "an xformers.ops that imports", first_line(error), remedy)]
        if any(not reasons for reasons in found.values()):
            return []
        return [reason for reasons in found.values() for reason in reasons]

    def pin(self, request: Request) -> str:
        """The operator with the release of xformers."""
        return self.build(request).name

    def build(self, request: Request) -> DenseKernel:
        """The fastest operator that takes the request, or the forced one."""
        for name in _candidates(request):
            if not any(_kernel_refusals(name, request)):
                return joining(_kernel(name))
        raise ConfigError("xformers was asked to build what it refused")


def _candidates(request: Request) -> tuple[str, ...]:
    options = request.options("xformers")
    if "kernel" not in options:
        return _KERNELS
    return (require_choice("backend_options['xformers']['kernel']", options["kernel"], _KERNELS),)


def _operators(name: str) -> tuple[type[AttentionFwOpBase], type[AttentionBwOpBase]]:
    from xformers.ops import fmha

    module = fmha.flash if name == "flash" else fmha.cutlass
    return module.FwOp, module.BwOp


def _kernel_refusals(name: str, request: Request) -> Iterator[Refusal]:
    """Why one of the operators cannot take the request, by what it declares of itself."""
    from xformers import _cpp_lib

    config = request.config
    capability = compute_capability(request.device.arch)
    if not _cpp_lib._built_with_cuda:
        failure = _cpp_lib._cpp_library_load_exception
        actual = "one without" if failure is None else first_line(failure.__cause__ or failure)
        yield Refusal("not_installed", "xformers with its library for CUDA", actual, "python -m xformers.info")
    for operator in _operators(name) if config.requires_grad else _operators(name)[:1]:
        oldest, newest = operator.CUDA_MINIMUM_COMPUTE_CAPABILITY, operator.CUDA_MAXIMUM_COMPUTE_CAPABILITY
        if not operator.is_available():
            yield Refusal("not_installed", operator.NAME, "an xformers or a PyTorch without it")
        if capability < oldest or (newest is not None and capability > newest):
            until = "" if newest is None else f" up to sm_{newest[0]}{newest[1]}"
            bounds = f"sm_{oldest[0]}{oldest[1]}{until or ' or newer'}"
            yield Refusal("arch", request.device.arch, f"{bounds} ({operator.NAME})")
        if getattr(torch, config.dtype) not in operator.SUPPORTED_DTYPES:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in operator.SUPPORTED_DTYPES))
            yield Refusal("dtypes", config.dtype, f"{known} ({operator.NAME})")
        if not operator.SUPPORTED_MIN_K <= config.head_dim <= operator.SUPPORTED_MAX_K:
            bounds = f"{operator.SUPPORTED_MIN_K}..{operator.SUPPORTED_MAX_K}"
            yield Refusal("head_dims", str(config.head_dim), f"{bounds} ({operator.NAME})")
        if not operator.IS_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            remedy = "choose another backend, or call torch.use_deterministic_algorithms(False)"
            yield Refusal("deterministic", "what torch.use_deterministic_algorithms asks for", operator.NAME, remedy)
    multiple = 4 if config.dtype == "float32" else 8
    if config.head_dim % multiple:
        yield Refusal("head_dims", str(config.head_dim), f"multiples of {multiple} ({name})", "pad with zeros")


def _kernel(name: str) -> XformersKernel:
    from xformers.ops import LowerTriangularMask

    forward, backward = _operators(name)
    full_name = f"{forward.NAME} ({labelled('xformers')})"
    return XformersKernel(full_name, forward, backward, shares_keys=name == "flash", causal_mask=LowerTriangularMask())


@attrs.frozen(eq=False)
class XformersKernel:
    """A dense kernel over one pair of operators; strided inputs are read where they lie.

    Attributes:
        name: the forward operator, with the release of xformers.
        forward_operator: an `xformers.ops.fmha` operator.
        backward_operator: its backward.
        shares_keys: the forward operator reads one key head for several query heads.
        causal_mask: what a causal piece is masked with.
    """

    name: str
    forward_operator: type[AttentionFwOpBase]
    backward_operator: type[AttentionBwOpBase]
    shares_keys: bool
    causal_mask: LowerTriangularMask

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        from xformers.ops import memory_efficient_attention_forward_requires_grad

        batch, length, heads, _ = query.shape
        groups = key.shape[2]
        if heads != groups and self.shares_keys:  # five dimensions: the heads of a group have one of their own
            query = torch.unflatten(query, 2, (groups, heads // groups))
            key, value = (x.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1) for x in (key, value))
        elif heads != groups:
            key, value = repeated_heads(key, heads), repeated_heads(value, heads)
        mask = self.causal_mask if piece.is_causal else None
        out, lse = memory_efficient_attention_forward_requires_grad(
            query, key, value, mask, 0.0, piece.scale, op=self.forward_operator
        )
        return out.reshape(batch, length, heads, -1), lse.reshape(batch, heads, -1)[:, :, :length]  # cutlass pads lse

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseKernel`. In half precision cutlass takes out to be compact whatever its strides say."""
        from xformers.ops import memory_efficient_attention_backward

        heads, groups = query.shape[2], key.shape[2]
        key, value = repeated_heads(key, heads), repeated_heads(value, heads)
        mask = self.causal_mask if piece.is_causal else None
        dq, dk, dv = memory_efficient_attention_backward(
            dout,
            out.contiguous(),
            lse.contiguous(),
            query,
            key,
            value,
            mask,
            0.0,
            piece.scale,
            op=self.backward_operator,
        )
        return dq, summed_groups(dk, groups), summed_groups(dv, groups)
