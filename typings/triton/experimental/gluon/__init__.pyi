"""Gluon, Triton's lower dialect, as far as it is used here."""

from collections.abc import Callable
from typing import Any

from triton import JITFunction

def jit(fn: Callable[..., Any], /) -> JITFunction: ...
def constexpr_function(fn: Callable[..., Any], /) -> Callable[..., Any]: ...
