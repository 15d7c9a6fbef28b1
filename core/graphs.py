"""What torch.compile shall not look into. Imported while it traces: the decorators load the whole compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .transforms import apply

# Dynamo cannot look into an autograd function under torch.func; whoever runs the graph can.
apply_in_graph = torch.compiler.allow_in_graph(apply)  # type: ignore[no-untyped-call]


@torch.compiler.disable(reason="lowering and decoding are the host's work")  # type: ignore[untyped-decorator, no-untyped-call]
def run_outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, at which a graph breaks."""
    return function(*args, **kwargs)
