"""The `fa3` backend: FlashAttention-3 (Shah et al., arXiv 2407.08608), dense, for Hopper.

Two packages bring it, and both register the same PyTorch operators, `flash_attn_3::fwd` and `flash_attn_3::bwd`: a
build of flash-attention's `hopper` folder (module `flash_attn_interface`) and the wheels of xformers up to 0.0.34. The
operators are called directly; nothing of PyTorch's own choice of kernels is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import torch

from ..core.refusal import Refusal
from .joining import joining
from .libraries import aligned, first_line, labelled

if TYPE_CHECKING:
    from torch import Tensor
    from torch._ops import OpOverload

    from ..core.kernel import DenseKernel, DensePiece
    from ..registry.specs import Request

_INTERFACE: Final = "flash_attn_interface"
_BUNDLED: Final = "xformers.flash_attn_3._C"
_REMEDY: Final = (
    "pip install 'xformers==0.0.34', which bundles them, or build them: pip install --no-build-isolation "
    "'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'"
)
_NO_WINDOW: Final = (-1, -1)
# What is passed by name; older builds lack some of it.
_WINDOW_ARGUMENTS: Final = {"window_size_left", "window_size_right"}
_FORWARD_ARGUMENTS: Final = {"softmax_scale", "is_causal", "num_splits"} | _WINDOW_ARGUMENTS
_BACKWARD_ARGUMENTS: Final = {"dq", "dk", "dv", "softmax_scale", "is_causal"} | _WINDOW_ARGUMENTS


@attrs.frozen
class Operators:
    """The two operators, registered and found to take what is passed to them.

    Attributes:
        label: the distribution that brought them, with its version.
        forward: flash_attn_3::fwd.
        backward: flash_attn_3::bwd.
    """

    label: str
    forward: OpOverload
    backward: OpOverload


def find_operators() -> Operators | Refusal:
    """The operators, loaded where they are not yet, or why there are none."""
    if not _registered():
        failure = _load()
        if failure is not None:
            return failure
    forward, backward = torch.ops.flash_attn_3.fwd.default, torch.ops.flash_attn_3.bwd.default
    for operator, needed in ((forward, _FORWARD_ARGUMENTS), (backward, _BACKWARD_ARGUMENTS)):
        missing = needed - {argument.name for argument in operator._schema.arguments}
        if missing:
            required = f"{operator} with the arguments {', '.join(sorted(needed))}"
            return Refusal("not_installed", required, f"one without {', '.join(sorted(missing))}", _REMEDY)
    return Operators(_label(), forward, backward)


def _registered() -> bool:
    return hasattr(torch.ops.flash_attn_3, "fwd") and hasattr(torch.ops.flash_attn_3, "bwd")


def _load() -> Refusal | None:
    """Let an installed package register the operators; what prevents that, where something does."""
    required = "the operators flash_attn_3::fwd and flash_attn_3::bwd"
    bundled = _bundled_library()
    try:
        if find_spec(_INTERFACE) is not None:
            import flash_attn_interface  # noqa: F401 - importing it registers them
        elif bundled is not None:
            torch.ops.load_library(bundled)  # type: ignore[no-untyped-call]
        else:
            actual = f"neither {_INTERFACE} nor an xformers that bundles them"
            return Refusal("not_installed", required, actual, _REMEDY)
    except (ImportError, OSError) as error:  # a library that this PyTorch or this machine cannot load
        where = _INTERFACE if bundled is None else str(bundled)
        remedy = "install a build for this PyTorch, and the CUDA runtime that it was linked with"
        return Refusal("not_installed", required, f"{where}, which cannot be loaded ({first_line(error)})", remedy)
    if not _registered():
        return Refusal("not_installed", required, f"a {_INTERFACE} that does not register them", _REMEDY)
    return None


def _bundled_library() -> Path | None:
    """The library inside an installed xformers, found without importing xformers."""
    spec = find_spec("xformers")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder, "flash_attn_3").glob("_C*.so")):
            return path.resolve()
    return None


def _label() -> str:
    """Whose operators are registered: several packages may be installed, only one can have registered them."""
    if _INTERFACE in sys.modules or "flash_attn_3._C" in sys.modules:
        return labelled("flash_attn_3")
    if _BUNDLED in sys.modules or str(_bundled_library()) in torch.ops.loaded_libraries:
        return labelled("xformers")
    return "operators already loaded"


class Fa3Backend:
    """FlashAttention-3: bfloat16 and float16, head_dim a multiple of 8 up to 256, on sm_90."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """Operators that are not there, or not as they must be."""
        found = find_operators()
        if isinstance(found, Refusal):
            yield found

    def pin(self, request: Request) -> str:
        """The kernel with the distribution that brought it."""
        return self.build(request).name

    def build(self, request: Request) -> DenseKernel:
        """The kernel.

        Raises:
            ImportError: when the operators have gone since they were found.
        """
        found = find_operators()
        if isinstance(found, Refusal):
            raise ImportError(str(found))
        return joining(FlashAttention3(found))


@attrs.frozen
class FlashAttention3:
    """A dense kernel: strided inputs are read where they lie, lse is float32 with natural logarithm."""

    operators: Operators
    takes_windows: bool = True

    @property
    def name(self) -> str:
        """`FlashAttention-3 (xformers 0.0.34)`."""
        return f"FlashAttention-3 ({self.operators.label})"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`. One split: its own choice of splits is for decoding."""
        left, right = piece.window or _NO_WINDOW
        out, lse, *_ = self.operators.forward(
            *aligned(query, key, value),
            softmax_scale=piece.scale,
            is_causal=piece.is_causal,
            window_size_left=left,
            window_size_right=right,
            num_splits=1,
        )
        return out, lse

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseKernel`. Releases differ in what the operator returns, none in what it writes."""
        left, right = piece.window or _NO_WINDOW
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        self.operators.backward(
            *aligned(dout, query, key, value, out),
            lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=piece.scale,
            is_causal=piece.is_causal,
            window_size_left=left,
            window_size_right=right,
        )
        return dq, dk, dv
