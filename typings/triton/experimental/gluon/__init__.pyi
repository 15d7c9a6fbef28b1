"""Gluon, Triton's lower dialect, as far as it is used here."""

from collections.abc import Callable, Iterable
from typing import Any, overload

from triton import JITFunction

@overload
def jit(fn: Callable[..., Any], /) -> JITFunction: ...
@overload
def jit(*, do_not_specialize: Iterable[str]) -> Callable[[Callable[..., Any]], JITFunction]: ...
def constexpr_function(fn: Callable[..., Any], /) -> Callable[..., Any]: ...
