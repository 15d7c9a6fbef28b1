"""Lists of blocks as kernels of others read them: of each row, how many blocks it meets, and which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def block_lists(
    table: NDArray[np.int64], row: NDArray[np.int64], col: NDArray[np.int64], shape: tuple[int, int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Counts (T, R) and columns (T, R, width), ascending and then 0, of blocks that are given one by one.

    Args:
        table: of each block, its table.
        row: its row.
        col: its column.
        shape: T tables, R rows, and the width of the lists.
    """
    place = table * shape[1] + row
    order = np.lexsort((col, place))
    counts = np.bincount(place, minlength=shape[0] * shape[1])
    within = np.arange(place.size) - np.repeat(np.cumsum(counts) - counts, counts)
    indices = np.zeros((shape[0] * shape[1], shape[2]), dtype=np.int32)
    indices[place[order], within] = col[order]
    return counts.astype(np.int32).reshape(shape[:2]), indices.reshape(shape)
