"""What the kernels read of a call's dropout: see `drop_kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from .block_tables import moved
from .drop_kernels import BITS, BYTES, HEADER, draw_words
from .launching import launch
from .tiles import ceil_div

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.kernel import LayoutPiece

_PARTS: Final = 1 << BITS.value  # in which probabilities are counted
_ROWS: Final = 128  # of a program


def draws_of(
    piece: LayoutPiece, part: int, occurrences: int, query: Tensor, key: Tensor, *, backward: bool
) -> Tensor | None:
    """The draws of a part of a layout as `drop_kernels.draw_words` lays them out, int8; None where nothing is dropped.

    dropout_p is rounded to 256ths, not away.

    Args:
        piece: with its seed.
        part: its number, since pairs that several parts have are drawn for each.
        occurrences: the most that it has of a pair.
        query: (B, S, H, D).
        key: (B, T, K, D).
        backward: for all passes; else for the forward pass, which needs less.
    """
    if piece.seed is None:
        return None
    dropped = min(max(round(piece.dropout_p * _PARTS), 1), _PARTS - 1)
    words = np.random.SeedSequence(int(piece.seed), spawn_key=(part,)).generate_state(4).tolist()
    scale = np.float32(_PARTS / (_PARTS - dropped)).view(np.uint32)
    least = (dropped << 32 - BITS.value) ^ 1 << 31  # of numbers whose highest bits decide, with a sign
    seeds = moved(np.array([*words, least, scale], dtype=np.uint32).view(np.int32), query.device)
    lengths = key.shape[1], query.shape[1]
    key_rows = occurrences * lengths[0]
    all_rows = key_rows + (occurrences if backward else 1) * lengths[1]
    draws = torch.empty(HEADER.value + BYTES.value * all_rows, dtype=torch.int8, device=query.device)
    numbers = (*lengths, key_rows, all_rows)
    launch(draw_words, (ceil_div(all_rows, _ROWS),), (seeds, draws), numbers, {"BLOCK_M": _ROWS})
    return draws
