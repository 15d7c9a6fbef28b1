"""Uniform samples without replacement, row by row, the same on every machine and in every order of calls.

The random numbers are counter-based: number i of row (seed, head, row) is a hash (SplitMix64's finaliser, Steele et
al., OOPSLA 2014) of the four, so no row depends on another. Each row keeps a reservoir of its sample and offers it the
last `size` items of the population one by one: item j enters as one drawn from 0 ... j, or as itself where that one is
in already (Floyd's form, Bentley and Floyd, CACM 30(9), 1987). Every subset is equally likely, as with Vitter's and
Li's reservoirs, but it needs `size` numbers instead of Li's size * (1 + log(population / size)), and no logarithm:
integer arithmetic alone, hence the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32))
_LOW_HALF: Final = np.uint64(0xFFFFFFFF)


def _kept(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled, and kept beside this module or in the user's cache: a process that finds it there saves seconds."""
    try:
        compiled: Callable[..., None] = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # as numba says that it can write to neither
        compiled = njit(nogil=True)(function)
    return compiled


@njit(nogil=True)
def _hash(x: np.uint64) -> np.uint64:
    """A bijection of 64 bits that spreads every input bit over all output bits."""
    x = (x ^ (x >> _SHIFTS[0])) * _MULTIPLIERS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return x ^ (x >> _SHIFTS[2])


@njit(nogil=True)
def _below(state: np.uint64, bound: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The next state, and an integer uniform on 0 ... bound - 1 (bound < 2**32; Lemire, TOMACS 2019)."""
    threshold = (_LOW_HALF + np.uint64(1)) % bound
    while True:
        state += _STEP
        product = (_hash(state) >> _SHIFTS[3]) * bound
        if (product & _LOW_HALF) >= threshold:
            return state, product >> _SHIFTS[3]


@_kept
def draw_rows(
    seed: np.uint64,
    heads: NDArray[np.int64],
    rows: NDArray[np.int64],
    allowed: NDArray[np.int64],
    row_ptr: NDArray[np.int64],
    cols: NDArray[np.int32],
) -> None:
    """Fill cols[row_ptr[i]:row_ptr[i + 1]] with distinct columns, ascending, one of them rows[i].

    Args:
        seed: distinguishes samples.
        heads: (n,), the head that each row is a sample for.
        rows: (n,), its own column, below allowed[i].
        allowed: (n,), each row draws from columns 0 ... allowed[i] - 1; below 2**32.
        row_ptr: (n + 1,), ascending; row i gets 1 to allowed[i] columns.
        cols: (row_ptr[n],), the result.
    """
    taken = np.zeros(max(1, int(allowed.max())), dtype=np.bool_)
    for i in range(rows.size):
        own, sample = rows[i], cols[row_ptr[i] : row_ptr[i + 1]]
        state = _hash(_hash(_hash(seed + _STEP) ^ np.uint64(heads[i])) ^ np.uint64(own))
        # The population is everything but the row's own column, which the columns from `own` on make room for.
        population, size = allowed[i] - 1, sample.size - 1
        for j in range(population - size, population):
            state, number = _below(state, np.uint64(j + 1))
            item = np.int64(number)
            if taken[item + (item >= own)]:
                item = np.int64(j)
            item += item >= own
            taken[item] = True
            sample[j - population + size] = item
        taken[own] = True
        sample[size] = own
        if size < 64:
            for item in sample:
                taken[item] = False
            _insertion_sort(sample)
        else:
            _collect(taken[: allowed[i]], sample)


@njit(nogil=True)
def _insertion_sort(values: NDArray[np.int32]) -> None:
    for i in range(1, values.size):
        value, place = values[i], i
        while place > 0 and values[place - 1] > value:
            values[place] = values[place - 1]
            place -= 1
        values[place] = value


@njit(nogil=True)
def _collect(taken: NDArray[np.bool_], sample: NDArray[np.int32]) -> None:
    """Write the indices of all set marks in ascending order, and clear the marks."""
    place = 0
    for item in range(taken.size):
        if taken[item]:
            sample[place] = item
            taken[item] = False
            place += 1
