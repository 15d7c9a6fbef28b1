"""A pattern as a map of cells: how much of each cell of queries against keys a head sees. Drawn with characters.

Shapes: R rows of queries and C columns of keys. A cell is nan where causality allows none of its pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .core.blocking import DEFAULT_BLOCK_SIZE, lower_blocks
from .core.explain import columns, counted
from .core.geometry import Geometry
from .core.layout import BlockLayout
from .core.pattern import Pattern
from .quality import Quality, Spread

Cells = NDArray[np.float64]
Counts = NDArray[np.int64]

# Cells darken at these shares of their pairs; whatever is seen at all shows.
_STEPS = (0.1, 0.35, 0.7)
UNICODE, ASCII = "·░▒▓█", ".:+%#"
_ROWS, _LARGEST_BLOCK = 4096, 1024
_EVERY_PAIR = 512  # tokens up to which every pair is evaluated, so that cells need not follow blocks


def cells(pattern: Pattern, geometry: Geometry, head: int, *, rows: int, cols: int, limit_bytes: int) -> Cells:
    """The share of the pairs of each cell that `head` sees, (R, C) float64, R and C at most the length.

    Up to 512 tokens cells are exact; beyond, a block counts for the cell that holds its middle.

    Raises:
        ConfigError: the table of blocks needs more than `limit_bytes`.
    """
    length = geometry.q_len
    rows, cols = min(rows, length), min(cols, length)
    if length <= _EVERY_PAIR:
        place = np.arange(length, dtype=np.int64)
        return _exact(pattern, geometry, head, place * rows // length, place * cols // length)
    size = min(table_block_size(pattern, length), max(1, length // max(rows, cols)))
    blocks = lower_blocks(pattern, geometry, block_size=size, limit_bytes=limit_bytes)
    low = np.arange(0, length, size, dtype=np.int64)
    middle = low + np.minimum(length - low, size) // 2
    return _binned(blocks, head, middle * rows // length, middle * cols // length)


def table_block_size(pattern: Pattern, length: int) -> int:
    """The pattern's own block size, else one that gives a table of at most some thousand rows."""
    if pattern.block_size is not None:
        return pattern.block_size
    return max(DEFAULT_BLOCK_SIZE, min(_LARGEST_BLOCK, 1 << ((length - 1) // _ROWS).bit_length()))


def _exact(pattern: Pattern, geometry: Geometry, head: int, row: Counts, col: Counts) -> Cells:
    place = np.arange(geometry.q_len, dtype=np.int64)
    seen = pattern.multiplicity(place[:, None], place, np.array(head, dtype=np.int64), geometry) > 0
    seen = np.broadcast_to(seen, (place.size, place.size))
    allowed = place <= place[:, None] if geometry.is_causal else np.ones_like(seen)
    found, possible = (
        np.add.reduceat(np.add.reduceat(x.astype(np.int64), _starts(row), axis=0), _starts(col), axis=1)
        for x in (seen & allowed, allowed)
    )
    return _shares(found, possible)


def _binned(blocks: BlockLayout, head: int, row: Counts, col: Counts) -> Cells:
    length, size, table = blocks.geometry.q_len, blocks.block_size, int(blocks.head_table[head])
    sizes = np.minimum(length - np.arange(0, length, size), size)
    pointers = blocks.row_ptr[table]
    entries = slice(int(pointers[0]), int(pointers[-1]))
    q_block = np.repeat(np.arange(sizes.size), np.diff(pointers))
    k_block, mask_ids = blocks.cols[entries], blocks.mask_ids[entries]
    pairs = sizes[q_block] * sizes[k_block]
    if blocks.masks.size:
        ones = np.count_nonzero(blocks.masks, axis=(1, 2))
        pairs = np.where(mask_ids >= 0, ones[mask_ids], pairs)
    shape = int(row[-1]) + 1, int(col[-1]) + 1
    found = np.bincount(row[q_block] * shape[1] + col[k_block], weights=pairs, minlength=shape[0] * shape[1])
    q_tokens, k_tokens = (np.add.reduceat(sizes, _starts(cell)) for cell in (row, col))
    possible = q_tokens[:, None] * k_tokens
    if blocks.geometry.is_causal:
        q_end, k_end = np.cumsum(q_tokens), np.cumsum(k_tokens)
        possible = _causal_pairs(q_end - q_tokens, q_end, k_end - k_tokens, k_end)
    return _shares(found.reshape(shape), possible)


def _causal_pairs(q_low: Counts, q_high: Counts, k_low: Counts, k_high: Counts) -> Counts:
    """Pairs q_low <= p < q_high, k_low <= q < k_high with q <= p, for every cell: (R, C)."""

    def below(p: Counts, q: Counts) -> Counts:  # pairs with 0 <= p' < p, 0 <= q' < q and q' <= p'
        p, q = p[:, None], np.minimum(p[:, None], q)
        return q * (q + 1) // 2 + (p - q) * q

    return below(q_high, k_high) - below(q_low, k_high) - below(q_high, k_low) + below(q_low, k_low)


def _starts(cell: Counts) -> Counts:
    return np.flatnonzero(np.diff(cell, prepend=-1))


def _shares(found: NDArray[Any], possible: Counts) -> Cells:
    return np.where(possible > 0, found / np.maximum(possible, 1), np.nan)


def draw(shares: Cells, *, length: int, ink: str) -> list[str]:
    """The cells as framed lines; where there are no more columns than rows each is two characters wide."""
    levels = np.where(shares > 0, 1 + np.searchsorted(_STEPS, shares), 0)
    wide = 1 if shares.shape[1] > shares.shape[0] else 2  # a cell is square on the screen
    lines = [
        "".join((" " if np.isnan(share) else ink[level]) * wide for share, level in zip(row, levels_row, strict=True))
        for row, levels_row in zip(shares, levels, strict=True)
    ]
    side, edge = ("|", "-") if ink == ASCII else ("│", "─")
    corners = "++++" if ink == ASCII else "┌┐└┘"
    rule = edge * (wide * shares.shape[1])
    scale = f" 0 {f'key {length - 1:,}':>{len(rule) - 2}}"
    framed = [f"{side}{line}{side}" for line in lines]
    return [scale, f"{corners[0]}{rule}{corners[1]}", *framed, f"{corners[2]}{rule}{corners[3]}"]


def legend(ink: str, *, is_causal: bool) -> list[str]:
    """What the characters mean, a line each."""
    bounds = ("0", *(f"{step:.0%}".rstrip("%") for step in _STEPS), "100")
    lines = [f"{ink[0]}  not seen"]
    lines += [f"{ink[i + 1]}  {bounds[i]} to {bounds[i + 1]} % of the cell" for i in range(4)]
    return [*lines, "   in the future"] if is_causal else lines


def quality_lines(quality: Quality) -> list[str]:
    """The quality report as aligned lines of at most 32 characters."""
    followed = quality.receptive_field[: quality.layers_to_full]  # behind that all lines would be alike
    field = [
        (counted(layer, "layer") if layer in (1, len(followed)) else f"{layer}", f"{part:.1%}")
        for layer, part in enumerate(followed, 1)
    ]
    reached = "not yet" if quality.layers_to_full is None else counted(quality.layers_to_full, "layer")
    return [
        *columns([("density", f"{quality.density:.3%}"), ("empty rows", f"{quality.empty_rows:,}")]),
        "",
        "          least     mean   most",
        _spread_line("fan-out", quality.fan_out),
        _spread_line("fan-in", quality.fan_in),
        "",
        "blocks reached, by layers",
        *(f"  {name:<10}{part:>8}" for name, part in field),
        f"  all       {reached:>8}",
        "",
        f"dearest tile {quality.load_imbalance:.2f} x the mean",
        f"idle tiles   {quality.idle_tiles:.1%}",
    ]


def _spread_line(name: str, spread: Spread) -> str:
    return f"{name:<8}{_short(spread.least):>7}{_short(spread.mean):>9}{_short(spread.most):>7}"


def _short(number: float) -> str:
    """At most seven characters."""
    if number >= 100_000:
        return f"{number / 1e6:.2f}M" if number < 1e9 else f"{number:.1e}"
    return f"{number:,.0f}" if number == int(number) or number >= 1000 else f"{number:.1f}"
