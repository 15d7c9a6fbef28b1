"""Launching a kernel again without asking Triton anew what it was compiled for, which takes longer than the launch.

What Triton compiles a kernel for are dtypes, which addresses are multiples of 16, and of which integers that is so or
which are 1. Here numbers themselves are compared: equal ones are alike in that too, and floats are never given where
integers were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from .libraries import FP_FUSION

if TYPE_CHECKING:
    from triton import JITFunction

_MOST: Final = 1024  # launches that are known, where lengths are new at every call
# Of a kernel (by its id) on a device, a grid, and all that is given to it: what launches it, the constants that it
# takes, and the kernel, so that its id stays its own.
_KNOWN: dict[tuple[Any, ...], tuple[Callable[..., object], tuple[Any, ...], JITFunction]] = {}


def launch(
    kernel: JITFunction,
    grid: tuple[int, ...],
    pointers: tuple[Any, ...],
    numbers: tuple[Any, ...],
    constants: Mapping[str, Any],
    fresh: tuple[int, ...] = (),
) -> None:
    """As `kernel[grid](*pointers, *numbers, *fresh, **constants, **FP_FUSION)`.

    Args:
        kernel: what is launched, on the current device.
        grid: how many programs, in each dimension.
        pointers: tensors of the current device, the first of them one, tuples of such, and descriptors of tensors that
            are told apart by constants.
        numbers: its other arguments, integers and floats, and tuples of them.
        constants: what it is compiled for besides, always in the same order, and the compiler's options.
        fresh: integers of 32 bits, with a sign, that are others at every launch: the kernel takes them as they are.
    """
    given, kinds = _given(pointers)
    key = (id(kernel), pointers[0].get_device(), grid, *kinds, numbers, *constants.values())
    known = _KNOWN.get(key)
    if known is not None:
        run, rest, _kernel = known
        run(*given, *numbers, *fresh, *rest)
        return
    compiled = kernel[grid](*pointers, *numbers, *fresh, **constants, **FP_FUSION)
    if compiled is None:  # by the interpreter
        return
    if len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    names = kernel.arg_names[len(pointers) + len(numbers) + len(fresh) :]
    _KNOWN[key] = compiled[(*grid, 1, 1)[:3]], tuple(constants[name] for name in names), kernel


def _given(pointers: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What a compiled kernel is given for them, and what Triton compiles it for."""
    given: list[Any] = []
    kinds: list[Any] = []
    for x in pointers:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            given.append(address)
            kinds.append((x.dtype, address & 15))
        elif isinstance(x, tuple):
            addresses, of_each = _given(x)
            given.append(tuple(addresses))
            kinds.append(tuple(of_each))
        else:
            given.append(x)
            kinds.append(type(x))
    return given, kinds
