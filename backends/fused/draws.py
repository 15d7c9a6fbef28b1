"""What the kernels read of a call's dropout: see `drop_kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from .block_tables import moved
from .drop_kernels import HEADER, draw_words
from .launching import launch
from .tiles import ceil_div

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.kernel import LayoutPiece

_PARTS: Final = 1 << 32  # in which probabilities are counted
_ROWS: Final = 1024  # of a program


def draws_of(piece: LayoutPiece, part: int, occurrences: int, query: Tensor, key: Tensor) -> Tensor | None:
    """The draws of a part of a layout as `drop_kernels.draw_words` lays them out, int64; None where nothing is dropped.

    dropout_p is rounded to one of 2^32 parts, not away.

    Args:
        piece: with its seed.
        part: its number, since pairs that several parts have are drawn for each.
        occurrences: the most that it has of a pair.
        query: (B, S, H, D).
        key: (B, T, K, D).
    """
    if piece.seed is None:
        return None
    dropped = min(max(round(piece.dropout_p * _PARTS), 1), _PARTS - 1)
    words = np.random.SeedSequence(int(piece.seed), spawn_key=(part,)).generate_state(4).tolist()
    scale = np.float32(_PARTS / (_PARTS - dropped)).view(np.uint32)
    seeds = moved(np.array([*words, dropped ^ 1 << 31, scale], dtype=np.uint32).view(np.int32), query.device)
    batch, q_len, heads, _ = query.shape
    kv_len = key.shape[1]
    key_words = occurrences * kv_len
    all_words = key_words + batch * heads * q_len
    draws = torch.empty(HEADER.value + all_words, dtype=torch.int64, device=query.device)
    launch(
        draw_words, (ceil_div(all_words, _ROWS),), (seeds, draws), (kv_len, key_words, all_words), {"BLOCK_M": _ROWS}
    )
    return draws
