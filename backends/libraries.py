"""What the backends over third-party kernels share: their options, their versions, and inputs fit for bulk copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

import torch

from ..core.checks import did_you_mean
from ..core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..registry.specs import Request

# What Hopper's bulk copies (TMA) and 128-bit loads need of addresses and strides.
ALIGNMENT_BYTES: Final = 16


def checked_options(request: Request, backend: str, known: Iterable[str] = ()) -> Mapping[str, Any]:
    """The options that the request gives for `backend`.

    Raises:
        ConfigError: for an option that is not among `known`.
    """
    allowed = tuple(known)
    options = request.options(backend)
    for name in options:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            has = f"it has: {', '.join(allowed)}" if allowed else "it has none"
            raise ConfigError(f"backend_options[{backend!r}] has no option {name!r}{hint}; {has}")
    return options


def labelled(distribution: str) -> str:
    """`distribution version` as installed, or `distribution` alone where there is no metadata of it."""
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a row of a table."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def aligned(*tensors: Tensor) -> Iterator[Tensor]:
    """Each tensor as it is where its address and strides are multiples of 16 bytes, else a compact copy of it.

    Only a caller's own unusual views are ever copied: what core makes of aligned tensors is aligned.
    """
    for x in tensors:
        size = x.element_size()
        if x.data_ptr() % ALIGNMENT_BYTES or any(stride * size % ALIGNMENT_BYTES for stride in x.stride()[:-1]):
            yield x.clone(memory_format=torch.contiguous_format)
        else:
            yield x
