"""Triton, as far as it is used here."""

from collections.abc import Callable, Iterable
from typing import Any, overload

class JITFunction:
    """A kernel, or a function that kernels call."""

    params: list[Any]
    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

@overload
def jit(fn: Callable[..., Any], /) -> JITFunction: ...
@overload
def jit(*, do_not_specialize: Iterable[str]) -> Callable[[Callable[..., Any]], JITFunction]: ...
def cdiv(x: int, y: int, /) -> int: ...
def next_power_of_2(n: int, /) -> int: ...
