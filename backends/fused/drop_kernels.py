"""Dropout inside the kernels, in Triton: which occurrences of pairs they keep, told by the places of these alone.

Every query of a call has two random words a and b of 32 bits, and every occurrence of a key c and d. An occurrence of a
pair is kept where a·c + b·d, modulo 2^32 and signed, is not below a threshold: a multilinear hash (Lemire and Kaser,
"Strongly universal string hashing is fast", arXiv 1202.4961) of two words, each of which stands for a place. So passes
that meet pairs in another order, or in tiles of other sizes, drop the same, and a pair costs two multiplications.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import AS_THEY_ARE

HEADER = tl.constexpr(3)  # numbers before the words: see `draw_words`


@triton.jit
def _mixed(x):
    """A permutation of the numbers of 32 bits, in which every bit depends on all ("lowbias32", C. Wellons, 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _joined(low, high):
    return low.to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def draw_words(seeds_ptr, draws_ptr, length, key_words, all_words, BLOCK_M: tl.constexpr):
    """The words of keys, for each of their occurrences, and of queries, in pairs of 32 bits: grid (tiles,).

    Before them: the threshold and, as a float32, 1 / keep; the `length` of the keys; and where those of queries begin.
    `seeds_ptr` is what `draws.draws_of` made.
    """
    seeds = seeds_ptr.to(tl.pointer_type(tl.uint32))
    number = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_key = number < key_words
    own = tl.where(is_key, number, number - key_words).to(tl.uint32)
    low = _mixed(own ^ tl.where(is_key, tl.load(seeds), tl.load(seeds + 2)))
    high = _mixed(own ^ tl.where(is_key, tl.load(seeds + 1), tl.load(seeds + 3)))
    tl.store(draws_ptr + HEADER + number, _joined(low, high), mask=number < all_words)
    if tl.program_id(0) == 0:
        tl.store(draws_ptr, _joined(tl.load(seeds + 4), tl.load(seeds + 5)))
        tl.store(draws_ptr + 1, length.to(tl.int64))
        tl.store(draws_ptr + 2, (key_words + HEADER).to(tl.int64))


@triton.jit
def drawing(draws_ptr):
    """The least number of a pair that is kept, and the factor of its weight, 1 / keep."""
    both = tl.load(draws_ptr)
    return both.to(tl.int32), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def words_of_queries(draws_ptr, row):
    """Of queries by their number among all of the call."""
    return tl.load(draws_ptr + tl.load(draws_ptr + 2) + row)


@triton.jit
def words_of_keys(draws_ptr, place, occurrence):
    """Of keys at their places, for one of their occurrences (a float32)."""
    return tl.load(draws_ptr + HEADER + occurrence.to(tl.int64) * tl.load(draws_ptr + 1) + place)


@triton.jit
def factors(of_rows, of_columns, least, scale):
    """By what the weights (M, N) of queries and keys with these words are multiplied: the scale of what is kept, or 0.

    Either may be the rows.
    """
    first = of_rows.to(tl.int32)[:, None] * of_columns.to(tl.int32)[None, :]
    second = (of_rows >> 32).to(tl.int32)[:, None] * (of_columns >> 32).to(tl.int32)[None, :]
    return tl.where(first + second >= least, scale, 0.0)
