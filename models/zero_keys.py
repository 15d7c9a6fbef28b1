"""What torchscale's dilated attention does with lengths that do not divide, as a named compatibility mode.

There each branch pads the sequence with zero keys and values to whole segments, and each segment to a multiple of the
rate, and without causality the padding is attended: a zero key has the score 0, so it adds exp(0) = 1 to a row's
denominator and nothing to its numerator. A row that sees z such keys is therefore the exact one times
exp(lse) / (exp(lse) + z). Causal rows never see padding, which lies behind them.

Shapes: B batch, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.config import AttentionConfig
from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.pattern import Branch, Pattern

_NONE = -1e30  # log of no zero keys, finite so that gradients stay so


def check_zero_padding(config: AttentionConfig) -> None:
    """Raise `ConfigError` for a pattern (resolved) that torchscale has not: it must be a sum of strided branches."""
    pattern = config.pattern
    assert isinstance(pattern, Pattern)
    if pattern.branches(_geometry(1, config.num_heads, config.kv_heads)) is None:
        raise ConfigError(
            f"compatibility with torchscale's zero padding is defined for dilated patterns, got {pattern!r}; leave "
            f"compatibility at None"
        )


def with_zero_keys(out_BSHD: Tensor, lse_BHS: Tensor, pattern: Pattern, kv_heads: int) -> Tensor:
    """The output with torchscale's zero keys in each softmax, differentiable through out and lse.

    Raises:
        ConfigError: where a segment length is no multiple of its rate and the sequence has several such segments:
            there the original writes later segments to shifted places, which no attention does.
    """
    _, length, heads, _ = out_BSHD.shape
    branches = pattern.branches(_geometry(length, heads, kv_heads)) or ()
    counts_HS = zero_keys_seen(branches, length, lse_BHS.device)
    if counts_HS is None:
        return out_BSHD
    log_counts = torch.where(counts_HS > 0, counts_HS.clamp(min=1).to(lse_BHS.dtype).log(), _NONE)
    share_BHS = torch.sigmoid(lse_BHS - log_counts)
    return out_BSHD * share_BHS.transpose(1, 2).unsqueeze(-1).to(out_BSHD.dtype)


def zero_keys_seen(branches: Sequence[Branch], length: int, device: torch.device) -> Tensor | None:
    """How many zero keys each row sees in all branches together, (H, S) int32; None where nothing is padded."""
    position = torch.arange(length, dtype=torch.int32, device=device)
    total: Tensor | None = None
    for branch in branches:
        width = min(branch.segment_length or length, length)
        rate = branch.stride
        if width == 0 or (length % width == 0 and width % rate == 0):
            continue
        if width % rate and length > width:
            raise ConfigError(
                f"segment length {width} is no multiple of its rate {rate} and {length} tokens make several segments: "
                f"torchscale then writes all but the first to shifted places, which is not reproduced; use at most "
                f"{width} tokens, or leave compatibility at None"
            )
        places = -(-width // rate) * rate
        known = [offset if offset is not None else rate for offset in branch.offsets]  # no place is ≡ rate
        offset_H1 = torch.tensor(known, dtype=torch.int32, device=device)[:, None]
        real_S = (length - position // width * width).clamp(max=width)
        zeros_HS = places // rate - (real_S - offset_H1 + rate - 1).clamp(min=0) // rate
        seen_HS = torch.where(position % width % rate == offset_H1, zeros_HS * branch.weight, 0)
        total = seen_HS if total is None else total + seen_HS
    return total


def _geometry(length: int, heads: int, kv_heads: int) -> Geometry:
    return Geometry(q_len=length, kv_len=length, num_heads=heads, num_kv_heads=kv_heads, is_causal=False)
