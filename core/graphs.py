"""What torch.compile puts into a graph as it is. Imported while it traces: the decorator loads the whole compiler."""

from __future__ import annotations

import torch

from .transforms import apply

# Dynamo cannot look into an autograd function under torch.func; whoever runs the graph can.
apply_in_graph = torch.compiler.allow_in_graph(apply)  # type: ignore[no-untyped-call]
