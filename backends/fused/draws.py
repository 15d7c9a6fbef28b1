"""What the kernels read of a call's dropout: see `drop_kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from .block_tables import moved

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PARTS: Final = 1 << 32  # in which probabilities are counted


def draws_of(dropout_p: float, seed: Tensor, part: int, device: torch.device) -> Tensor:
    """What the kernels read of the draws of a part of a layout, (5,) int32.

    Args:
        dropout_p: rounded to one of 2^32 parts, not away.
        seed: int64 scalar, of the call.
        part: its number, since pairs that several parts have are drawn for each.
        device: of the tensors.
    """
    dropped = min(max(round(dropout_p * _PARTS), 1), _PARTS - 1)
    words = np.random.SeedSequence(int(seed), spawn_key=(part,)).generate_state(3).tolist()
    scale = np.float32(_PARTS / (_PARTS - dropped)).view(np.uint32)
    return moved(np.array([*words, dropped ^ 1 << 31, scale], dtype=np.uint32).view(np.int32), device)
