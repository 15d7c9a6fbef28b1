"""What the kernels read of a call's dropout: see `drop_kernels`."""

from __future__ import annotations

import struct
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from ...core.draws import dropped_parts
from ..launching import launch
from .drop_kernels import BITS, BYTES, HEADER, draw_words
from .tiles import ceil_div

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.kernel import LayoutPiece
    from ...core.pattern import Branch

_PARTS: Final = 1 << BITS.value  # in which probabilities are counted
_ROWS: Final = 128  # of a program
_STEP: Final = 0x9E3779B97F4A7C15  # of SplitMix64
_MASK: Final = (1 << 64) - 1


def draws_of(piece: LayoutPiece, part: int, occurrences: int, query: Tensor, key: Tensor, *, backward: bool) -> Tensor:
    """The draws of a part of a layout as `drop_kernels.draw_words` lays them out, int8.

    dropout_p is rounded to 256ths, not away.

    Args:
        piece: with its seed.
        part: its number, since pairs that several parts have are drawn for each.
        occurrences: the most that it has of a pair.
        query: (B, S, H, D).
        key: (B, T, K, D).
        backward: for all passes; else for the forward pass, which needs less.
    """
    assert piece.seed is not None
    dropped = dropped_parts(piece.dropout_p, _PARTS)
    least = (dropped << 32 - BITS.value) - (1 << 31)  # of numbers whose highest bits decide, with a sign
    is_on_device = piece.seed.device.type != "cpu"
    words = tuple(_word(0 if is_on_device else int(piece.seed), 4 * part + i) for i in range(4))
    k_len, q_len = key.shape[1], query.shape[1]
    key_rows = occurrences * k_len
    all_rows = key_rows + (occurrences if backward else 1) * q_len
    draws = torch.empty(HEADER.value + BYTES.value * all_rows, dtype=torch.int8, device=query.device)
    (scale_bits,) = struct.unpack("i", struct.pack("f", _PARTS / (_PARTS - dropped)))
    numbers = (k_len, q_len, key_rows, all_rows, least, scale_bits)
    constants = {"BLOCK_M": _ROWS, "SEEDED": is_on_device}
    pointers = draws, piece.seed if is_on_device else draws
    launch(draw_words, (ceil_div(all_rows, _ROWS),), pointers, numbers, constants, words)
    return draws


def _word(seed: int, index: int) -> int:
    """A number of 32 bits, with a sign, of the sequence of a seed: SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (seed + (index + 1) * _STEP) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return ((x ^ x >> 31) >> 32) - (1 << 31)


@lru_cache(maxsize=64)
def occurrences_of(branches: tuple[Branch, ...]) -> tuple[int, ...]:
    """Which occurrence of its pairs each branch is, from 0: no other that may have one of these pairs is the same.

    There are no more than that takes, since every one has bytes at all positions. Branches of other heads or classes of
    positions have no pair in common, such as the many that a `Strided` is.
    """
    rates = np.array([branch.stride for branch in branches])
    lengths = np.array([branch.segment_length or 0 for branch in branches])
    offsets = np.array([[-1 if x is None else x % branch.stride for x in branch.offsets] for branch in branches])
    repeats = lengths % rates == 0  # classes of positions, wherever a segment begins
    found = np.zeros(len(branches), dtype=np.int64)
    for i, own in enumerate(offsets):
        step = np.where(repeats[:i] & repeats[i], np.gcd(rates[:i], rates[i]), 1)
        shared = (offsets[:i] >= 0) & (own >= 0) & ((offsets[:i] - own) % step[:, None] == 0)
        taken = set(found[:i][shared.any(1)].tolist())
        found[i] = next(number for number in count() if number not in taken)
    return tuple(found.tolist())
