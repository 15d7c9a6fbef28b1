"""The `math` backend: PyTorch's matrix products over the pattern alone, in chunks.

It is what SDPBackend.MATH is among PyTorch's: not fast, and there for what no fused kernel takes. Unlike that one it
forms no more scores at once than `Limits.workspace_bytes` has room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..core.refusal import Refusal
from .dense_products import DenseProducts

if TYPE_CHECKING:
    from ..registry.specs import Request


class MathBackend:
    """Every pattern, dtype and head_dim."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """The same bits on every run, where gradients of keys are added atomically."""
        config = request.config
        is_exact = request.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if config.deterministic and config.requires_grad and not is_exact:
            actual = f"atomic additions on {request.device.type}, as PyTorch's switch is off"
            remedy = "call torch.use_deterministic_algorithms(True) before building"
            yield Refusal("deterministic", "a deterministic backward", actual, remedy)

    def pin(self, request: Request) -> str:
        """There is one sub-kernel."""
        return self.build(request).name

    def build(self, request: Request) -> DenseProducts:
        """The kernel for `request`."""
        return DenseProducts(workspace_bytes=request.config.limits.workspace_bytes)
