"""The language itself."""

from collections.abc import Callable
from typing import TypeVar

from . import runtime as runtime

_F = TypeVar("_F", bound=Callable[..., object])

def compile(func: object, /, *args: object, options: str = ...) -> Callable[..., object]: ...
def jit(func: _F, /) -> _F: ...
