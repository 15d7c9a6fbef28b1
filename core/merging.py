"""Pieces of a row merged by their log-sum-exp, and what a row's sums are kept in.

Shapes: B batch, S query length, H query heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SUMMED_AT_ONCE = 1 << 22  # elements: two temporaries of 16 MiB


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: the dtype of lse and of sums over pieces."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, out_piece: Tensor, lse_piece: Tensor) -> None:
    """Merge a piece into `out` (B, S, H, D) and `lse` (B, H, S) in place; both may be strided views.

    `lse` may be -inf (nothing merged yet, `out` is 0 there); so may `lse_piece` (a row without keys). Where `out` is
    of half precision, it is rounded once more.
    """
    share = torch.sigmoid(lse_piece - lse)
    share.nan_to_num_(nan=0.0)  # -inf against -inf: the piece has no share
    out.lerp_(out_piece.to(out.dtype), share.transpose(1, 2).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, lse_piece))


def by_rows(lse: Tensor) -> Tensor:
    """lse (B, H, S) with (B, S, H) in memory, like the rows of out, so that strided views of rows serve both."""
    return lse.transpose(1, 2).contiguous().transpose(1, 2)


def delta_of(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """sum(dout * out) - dlse, (B, H, S) in the accumulator's dtype: what backward takes off each row's dout·v."""
    dtype, (batch, _, heads, head_dim) = accumulator_dtype(out.dtype), out.shape
    # In the accumulator's dtype before they are summed: rounded, they would outweigh the gradient of rows that attend
    # to one key, whose dout·v is the same sum. Some rows at a time, since both are then larger.
    step = max(1, _SUMMED_AT_ONCE // max(1, batch * heads * head_dim))
    parts = zip(torch.split(dout, step, dim=1), torch.split(out, step, dim=1), strict=True)
    delta = torch.cat([(do.to(dtype) * o).sum(dim=-1) for do, o in parts], dim=1).transpose(1, 2)
    return delta if dlse is None else delta - dlse
