"""Methods at which a graph of torch.compile breaks, instead of being traced."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which torch.compile does not trace; `torch.compiler.disable` itself would load it into every process.

    For what is the host's work: dynamo fails in numpy's and attrs' code with internal errors, and would compile again
    for every length.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            from .graphs import run_outside

            result: R = run_outside(function, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call
