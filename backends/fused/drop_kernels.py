"""Dropout inside the kernels, in Triton: which occurrences of pairs they keep, told by the places of these alone.

Whether one is kept is a hash of the call's seed, of the query's batch row, head and place, of the key's place, and of
which occurrence of the pair it is. So passes that meet pairs in another order, or in tiles of other sizes, drop the
same ones, and nothing is drawn ahead or kept in memory. `draws_ptr` is what `draws.draws_of` made.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """A permutation of the numbers of 32 bits, in which every bit depends on all ("lowbias32", C. Wellons, 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _word(draws_ptr, index: tl.constexpr):
    return tl.load(draws_ptr + index).to(tl.uint32, bitcast=True)


@triton.jit
def draws_of_keys(draws_ptr):
    """What the draws of all pairs share: a word that is mixed with the keys' places, and the last number dropped."""
    return _word(draws_ptr, 0), tl.load(draws_ptr + 3)


@triton.jit
def draws_of_queries(draws_ptr, row):
    """Two words for each of some queries, by their number among all queries of the call."""
    row = row.to(tl.uint32)
    return mixed(row ^ _word(draws_ptr, 1)), mixed(row ^ _word(draws_ptr, 2))


@triton.jit
def scale_of_kept(draws_ptr):
    """By what weights that are kept are multiplied: 1 / keep."""
    return tl.load(draws_ptr + 4).to(tl.float32, bitcast=True)


@triton.jit
def is_kept(of_keys, of_queries, place, occurrence, BY_KEYS: tl.constexpr):
    """Which pairs are kept of queries (M,) and the keys (N,) at a place, (M, N); BY_KEYS of keys (M,) and queries (N,).

    `occurrence` (a float32) tells those of equal pairs apart. Two multiplications mix the words of a query and of a
    key: what is left of their structure would show in the lowest bits, and the highest decide.
    """
    word, dropped = of_keys
    first, second = of_queries
    key = mixed((place.to(tl.uint32) + occurrence.to(tl.uint32) * 0x9E3779B9) ^ word)
    if BY_KEYS:
        key, first, second = key[:, None], first[None, :], second[None, :]
    else:
        key, first, second = key[None, :], first[:, None], second[:, None]
    x = (key ^ first) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B + second
    return x.to(tl.int32, bitcast=True) >= dropped
