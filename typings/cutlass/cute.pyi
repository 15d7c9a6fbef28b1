"""The language itself."""

from collections.abc import Callable
from typing import TypeVar

_F = TypeVar("_F", bound=Callable[..., object])

def jit(func: _F, /) -> _F: ...
