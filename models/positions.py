"""Rotary positions (RoFormer, arXiv 2104.09864) and xPos (arXiv 2212.10554), with padding respected.

Component pairs (2i, 2i + 1) turn together, as in both papers and in torchscale. xPos also scales: with
s = (p - c) / base, queries are multiplied by zeta^s and keys by zeta^-s, so that a product depends on the distance
alone, whatever the centre c; c lies in the middle of the sequence, where the scales stay smallest.

Shapes: B batch, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import require_choice
from ..core.errors import ConfigError

POSITIONS = ("none", "rotary", "xpos")
_SMALLEST_ZETA = 0.4 / 1.4  # of the first pair of components
_HEADROOM = 0.5  # of a dtype's exponent range that the scales may fill, so that their products stay finite


class Rotation(NamedTuple):
    """cos and sin of each position's angles, times the scale of its queries and of its keys.

    Each (B or 1, S, 1, D / 2), float32 (float64 for float64 modules).
    """

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


def positions_of(key_padding_mask: Tensor) -> Tensor:
    """Each token's place among those of its row that are not padding, (B, S) int64; 0 for padding before the first."""
    return (~key_padding_mask).cumsum(-1).sub(1).clamp(min=0)


def packed_positions(cu_seqlens: Tensor, length: int, device: torch.device) -> Tensor:
    """Each token's place in its document, (S,) int64; `cu_seqlens` (documents + 1,) as `Attention` takes it."""
    places, starts = torch.arange(length, device=device), cu_seqlens.to(device, torch.int64)
    return places - starts[torch.searchsorted(starts, places, right=True) - 1]


def require_pairs(kind: str, head_dim: int) -> None:
    """Raise `ConfigError` for positions that turn pairs of components, of which an odd head_dim leaves one."""
    if kind != "none" and head_dim % 2:
        raise ConfigError(
            f"{kind} positions turn pairs of components and need an even head_dim, got {head_dim}; take another "
            'embed_dim or num_heads, or positions="none"'
        )


def make_rotation(
    kind: str,
    positions: Tensor,
    head_dim: int,
    *,
    dtype: torch.dtype,
    base: float = 10_000.0,
    xpos_base: float = 512.0,
    centre: int | None = None,
) -> Rotation:
    """The rotation of each position.

    Args:
        kind: "rotary" or "xpos".
        positions: (S,) or (B, S) integers.
        head_dim: D, even.
        dtype: of the queries and keys that it will turn.
        base: the longest period over 2 pi.
        xpos_base: distance over which xPos decays by zeta.
        centre: where xPos' scales are 1; by default the middle of S positions, as in torchscale. What is cached needs
            one that does not move.

    Raises:
        ConfigError: an odd head_dim, or xPos scales that leave the range of `dtype`.
    """
    require_choice("positions", kind, POSITIONS[1:])
    require_pairs(kind, head_dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    positions = positions if positions.dim() == 2 else positions.unsqueeze(0)
    # Angles in float64: at a million positions float32 is off by a sixteenth of a radian.
    places = positions.to(torch.float64).unsqueeze(-1)
    index = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = places * base ** -(index / head_dim)
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    if kind == "rotary":
        cos, sin = cos.to(wide), sin.to(wide)
        return Rotation(cos, sin, cos, sin)
    length = positions.shape[1]
    centre = -(-length // 2) if centre is None else centre
    _check_range(max(centre, length - centre), xpos_base, dtype)
    zeta = (index + 0.4 * head_dim) / (1.4 * head_dim)
    scale = (zeta ** ((places - centre) / xpos_base)).unsqueeze(2)
    return Rotation(*(x.to(wide) for x in (cos * scale, sin * scale, cos / scale, sin / scale)))


def rotate(query_BSHD: Tensor, key_BSHD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Query and key, turned; computed in the dtype of the rotation, returned in their own."""
    turned_query = _turn(query_BSHD, rotation.query_cos, rotation.query_sin)
    return turned_query, _turn(key_BSHD, rotation.key_cos, rotation.key_sin)


def _turn(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x_BSHD[..., ::2], x_BSHD[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return pairs.flatten(-2).to(x_BSHD.dtype)


def _check_range(reach: int, xpos_base: float, dtype: torch.dtype) -> None:
    """Raise where zeta^(-reach / base) fills more than its share of what `dtype` can hold."""
    per_position = -math.log(_SMALLEST_ZETA) / xpos_base
    room = _HEADROOM * math.log(torch.finfo(dtype).max)
    if reach * per_position > room:
        raise ConfigError(
            f"xPos scales the keys {reach} positions away from the centre by exp({reach * per_position:.0f}), more "
            f"than {dtype} bears; it takes at most {int(room / per_position)} positions on either side: use shorter "
            f"sequences, a larger xpos_base, a wider dtype, or rotary positions"
        )
