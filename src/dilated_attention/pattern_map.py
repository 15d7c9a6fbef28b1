"""A pattern as a map, drawn with characters, and its quality beside it."""

from __future__ import annotations

import numpy as np

from .core.blocking import DEFAULT_BLOCK_SIZE
from .core.explain import columns, counted
from .core.geometry import Geometry
from .core.pattern import Pattern
from .pattern_cells import Cells, count_cells
from .quality import Quality, Spread

# Cells darken at these shares of their pairs; whatever is seen at all shows.
_STEPS = (0.1, 0.35, 0.7)
UNICODE, ASCII = "·░▒▓█", ".:+%#"
_ROWS, _LARGEST_BLOCK = 4096, 1024
_EVERY_PAIR = 512  # tokens up to which blocks are of one token, so that all cells are as alike as can be


def even_cells(pattern: Pattern, geometry: Geometry, head: int, *, rows: int, cols: int, limit_bytes: int) -> Cells:
    """Cells that fill `rows` and `cols`, each at most the length, and differ by a block at most.

    Raises:
        ConfigError: the table of blocks needs more than `limit_bytes`.
    """
    length = geometry.q_len
    rows, cols = min(rows, length), min(cols, length)
    size = min(table_block_size(pattern, length), max(1, length // max(rows, cols)))
    if length <= _EVERY_PAIR:
        size = 1
    low = np.arange(0, length, size, dtype=np.int64)
    middle = low + np.minimum(length - low, size) // 2
    starts = [low[np.flatnonzero(np.diff(middle * count // length, prepend=-1))] for count in (rows, cols)]
    return count_cells(
        pattern, geometry, head, rows=starts[0], cols=starts[1], block_size=size, limit_bytes=limit_bytes
    )


def table_block_size(pattern: Pattern, length: int) -> int:
    """The pattern's own block size, else one that gives a table of at most some thousand rows."""
    if pattern.block_size is not None:
        return pattern.block_size
    return max(DEFAULT_BLOCK_SIZE, min(_LARGEST_BLOCK, 1 << ((length - 1) // _ROWS).bit_length()))


def draw(cells: Cells, *, length: int, ink: str) -> list[str]:
    """The cells as framed lines; where there are no more columns than rows each is two characters wide."""
    levels = cells.levels(_STEPS)
    wide = 1 if levels.shape[1] > levels.shape[0] else 2  # a cell is square on the screen
    shades = f"{ink} "  # the last one, for -1
    lines = ["".join(shades[level] * wide for level in row) for row in levels.tolist()]
    side, edge = ("|", "-") if ink == ASCII else ("│", "─")
    corners = "++++" if ink == ASCII else "┌┐└┘"
    rule = edge * (wide * levels.shape[1])
    scale = f" 0 {f'key {length - 1:,}':>{len(rule) - 2}}"
    framed = [f"{side}{line}{side}" for line in lines]
    return [scale, f"{corners[0]}{rule}{corners[1]}", *framed, f"{corners[2]}{rule}{corners[3]}"]


def legend(ink: str, *, is_causal: bool) -> list[str]:
    """What the characters mean, a line each."""
    bounds = ("0", *(f"{step:.0%}".rstrip("%") for step in _STEPS), "100")
    lines = [f"{ink[0]}  not seen"]
    lines += [f"{ink[i + 1]}  {bounds[i]} to {bounds[i + 1]} % of the cell" for i in range(4)]
    return [*lines, "   in the future"] if is_causal else lines


def quality_lines(quality: Quality, block_size: int) -> list[str]:
    """The quality report as aligned lines of at most 32 characters; docs/patterns.md explains them."""
    followed = quality.receptive_field[: quality.layers_to_full]  # behind that all lines would be alike
    field = [
        (counted(layer, "layer") if layer in (1, len(followed)) else f"{layer}", f"{part:.1%}")
        for layer, part in enumerate(followed, 1)
    ]
    if quality.layers_to_full is None:
        reached = f"not all after {counted(len(followed), 'layer')}"
    else:
        reached = f"all after {counted(quality.layers_to_full, 'layer')}"
    return [
        *columns([("density", f"{quality.density:.3%}"), ("queries without keys", f"{quality.empty_rows:,}")]),
        "",
        "          least     mean   most",
        "keys that a query sees",
        _spread_line(quality.fan_out),
        "queries that see a key",
        _spread_line(quality.fan_in),
        "",
        f"blocks (of {counted(block_size, 'token')}) reached",
        *(f"  {name:<10}{part:>8}" for name, part in field),
        f"  {reached}",
        "",
        f"busiest block row  {quality.load_imbalance:.2f} x mean",
        f"idle block rows    {quality.idle_tiles:.1%}",
    ]


def _spread_line(spread: Spread) -> str:
    return f"{_short(spread.least):>15}{_short(spread.mean):>9}{_short(spread.most):>7}"


def _short(number: float) -> str:
    """At most seven characters."""
    if number >= 100_000:
        return f"{number / 1e6:.2f}M" if number < 1e9 else f"{number:.1e}"
    return f"{number:,.0f}" if number == int(number) or number >= 1000 else f"{number:.1f}"
