"""What every gate compares with: the definition in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import reference
from ..core.pattern import Pattern


def truth(inputs: Sequence[Tensor], pattern: Pattern, *, is_causal: bool) -> list[Tensor]:
    """out, dq, dk and dv by the definition, float64, of query, key, value and the gradient of out.

    Shapes: query and the gradient of out (B, S, H, D), key and value (B, T, K, D).
    """
    query, key, value = (x.detach().double().requires_grad_() for x in inputs[:3])
    out, _ = reference.attention(query, key, value, pattern=pattern, is_causal=is_causal)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3].double())]
