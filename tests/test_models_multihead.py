"""`MultiheadAttention` against `torch.nn.MultiheadAttention`, against the oracle, and inside torch's own layers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention import ConfigError, Dilated, Full, Local, Pattern
from dilated_attention.models import MultiheadAttention

from .support import error

E, H, S, B = 32, 4, 24, 2
DILATED = Dilated(segment_lengths=(8, 16), dilation_rates=(1, 2))


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(**fields: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with equal weights, biases that are not zero included."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **fields)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(E, H, **fields)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, data(*out.shape, seed=9, dtype=out.dtype)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_full_is_torchs(batch_first: bool, is_causal: bool) -> None:
    ours, theirs = pair(batch_first=batch_first)
    x = data(B, S, E).requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(S) if is_causal else None
    expected, _ = theirs(x, x, x, need_weights=False, attn_mask=mask, is_causal=is_causal)
    actual, weights = (
        ours(x, x, x, is_causal=is_causal) if batch_first else ours(x, x, x, attn_mask=mask, is_causal=is_causal)
    )
    if not batch_first and not is_causal:
        assert actual.shape == x.shape
    assert weights is None
    assert error(actual, expected) < 1e-5
    wanted = gradients(expected, x, *theirs.parameters())
    assert all(
        error(a, e) < 1e-5
        for a, e in zip(
            gradients(actual, x, *(ours.get_parameter(n) for n, _ in theirs.named_parameters())), wanted, strict=True
        )
    )
