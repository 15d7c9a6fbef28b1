"""Dropout inside the kernels, in Triton: which occurrences of pairs they keep, told by the places of these alone.

Every query and every key of a call has 32 random bytes, which depend on the seed and on its place. The product of both,
a sum of 32 products modulo 256, decides on the pair: a multilinear hash (Carter and Wegman, "Universal classes of hash
functions", 1979) that tensor cores compute beside q·k. Heads, batch rows and the occurrences of a pair multiply the
bytes by some of their own, on either side. So passes that meet pairs in another order, or in tiles of other sizes, drop
the same ones, and nothing is kept of pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import AS_THEY_ARE

BYTES = tl.constexpr(32)  # the fewest that a product of bytes takes
BITS = tl.constexpr(8)  # of a product that decide: the others depend on which side has been multiplied
ODD = tl.constexpr(16)  # bytes of a multiplier that are: see `_multiplier`
HEADER = tl.constexpr(64)  # bytes before the first words: see `draw_words`


@triton.jit
def _mixed(x):
    """A permutation of the numbers of 32 bits, in which every bit depends on all ("lowbias32", C. Wellons, 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _seeded(word, seed):
    """A word of a seed, an int64, in the place of one of none."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return _mixed(_mixed(word.to(tl.uint32, bitcast=True) ^ low) + high).to(tl.int32, bitcast=True)


@triton.jit
def _random_bytes(number, word):
    """32 bytes (..., 32) for each of some numbers (..., 1), by a word, an int32."""
    column = tl.arange(0, BYTES).to(tl.uint32)
    return _mixed(_mixed((number ^ word).to(tl.uint32, bitcast=True)) + column * 0x9E3779B9) >> 24


@triton.jit
def _multiplier(number, word):
    """As `_random_bytes`: other products for each number (of a head in the batch, or of an occurrence).

    Odd bytes let a product have all values. Were they all odd, its lowest bit would be the pair's, the same everywhere;
    and of an odd number of values that are dropped more are even.
    """
    column = tl.arange(0, BYTES)
    return _random_bytes(number, word) | (column < ODD).to(tl.uint32)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def draw_words(
    draws_ptr, seed_ptr, k_len, q_len, key_rows, all_rows, least, scale_bits, key_word, query_word, occurrence_word,
    head_word, BLOCK_M: tl.constexpr, SEEDED: tl.constexpr,
):  # fmt: skip
    """The bytes of keys for each of their occurrences, and those of queries, likewise: grid (tiles,).

    `key_rows` is of the one, and `all_rows` of both, how many times 32 bytes. Before them are, as int64: the least
    number that is kept, and the bits of 1 / keep as a float32; the bytes of one occurrence of all keys, and of all
    queries; where those of queries begin; a word for heads. All words are random, or if SEEDED mixed with the int64 in
    memory, which is.
    """
    if SEEDED:
        seed = tl.load(seed_ptr)
        key_word, query_word = _seeded(key_word, seed), _seeded(query_word, seed)
        occurrence_word, head_word = _seeded(occurrence_word, seed), _seeded(head_word, seed)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_key = row < key_rows
    own = tl.where(is_key, row, row - key_rows)
    length = tl.where(is_key, k_len, q_len)
    occurrence = own // length
    words = _random_bytes((own - occurrence * length)[:, None], tl.where(is_key, key_word, query_word)[:, None])
    factor = tl.where(occurrence[:, None] == 0, 1, _multiplier(occurrence[:, None], occurrence_word))
    place = draws_ptr + HEADER + row.to(tl.int64)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    tl.store(place, (words * factor).to(tl.int8), mask=(row < all_rows)[:, None])
    if tl.program_id(0) == 0:
        header = draws_ptr.to(tl.pointer_type(tl.int64))
        tl.store(header, least.to(tl.uint32, bitcast=True).to(tl.int64) | (scale_bits.to(tl.int64) << 32))
        tl.store(header + 1, k_len.to(tl.int64) * BYTES)
        tl.store(header + 2, q_len.to(tl.int64) * BYTES)
        tl.store(header + 3, key_rows.to(tl.int64) * BYTES + HEADER)
        tl.store(header + 4, head_word.to(tl.int64))


@triton.jit
def _drawn(draws_ptr, OF_KEYS: tl.constexpr):
    """Where the bytes of keys, or of queries, begin, and how many there are for each occurrence."""
    header = draws_ptr.to(tl.pointer_type(tl.int64))
    if OF_KEYS:
        return draws_ptr + HEADER, tl.load(header + 1)
    return draws_ptr + tl.multiple_of(tl.load(header + 3), 16), tl.load(header + 2)


@triton.jit
def drawn_of_rows(draws_ptr, place, valid, first_column, head, BY_KEYS: tl.constexpr):
    """What a tile of rows (queries, or BY_KEYS) drops by, for `factors`.

    Args:
        draws_ptr: of `draw_words`.
        place: of the rows (M,).
        valid: which of them there are.
        first_column: the place that columns are counted from.
        head: number of the query head in the batch.
        BY_KEYS: rows are keys.

    Returns:
        Bytes of the rows (M, 32), where those of the columns are, how many of these each occurrence has, the least
        number of a pair that is kept, and 1 / keep.
    """
    header = draws_ptr.to(tl.pointer_type(tl.int64))
    own, _each = _drawn(draws_ptr, BY_KEYS)
    columns, each = _drawn(draws_ptr, not BY_KEYS)
    pointers = own + place.to(tl.int64)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    drawn = tl.load(pointers, mask=valid[:, None], other=0).to(tl.int32)
    of_head = _multiplier(head.to(tl.int32), tl.load(header + 4).to(tl.int32)).to(tl.int32)
    both = tl.load(header)
    least, scale = both.to(tl.int32), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return (drawn * of_head[None, :]).to(tl.int8), columns + first_column * BYTES, each, least, scale


@triton.jit
def drawn_of_columns(drops, place, occurrence, WIDE: tl.constexpr):
    """Bytes (N, 32) of the columns at these places that all exist, for one of their occurrences (a float32)."""
    _of_rows, columns, each, _least, _scale = drops
    if WIDE:
        place = place.to(tl.int64)
    first = columns + tl.multiple_of(occurrence.to(tl.int64) * each, 16)
    return tl.load(first + place[:, None] * BYTES + tl.arange(0, BYTES)[None, :])


@triton.jit
def factors(drops, of_columns):
    """By what weights (M, N) of rows and columns are multiplied: 0, or 1 / keep where a pair is kept."""
    of_rows, _columns, _each, least, scale = drops
    number = tl.dot(of_rows, of_columns.trans(), out_dtype=tl.int32)
    return tl.where((number << (32 - BITS)) >= least, scale, 0.0)
