"""Draws who attends to whom: a square for each pattern, as in the README.

python -m benchmarks.pattern_pictures docs/patterns.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from dilated_attention import Dilated, Full, Global, Local, Pattern, Random, Strided
from dilated_attention.demo.pictures import GREY, Shades, counts

TOKENS: Final = 64
HEADS: Final = 2
_LONGNET: Final = Dilated((16, 32, 64), (1, 2, 4))
_RANDOM: Final = Random(2, 4)
# Title, pattern, head.
SQUARES: Final[tuple[tuple[str, Pattern, int], ...]] = (
    ("Full()", Full(), 0),
    ("Local((11, 0))", Local((11, 0)), 0),
    ("Local((11, 0)) | Global(4)", Local((11, 0)) | Global(4), 0),
    ("Strided(8)", Strided(8), 0),
    ("Dilated((16, 32, 64), (1, 2, 4))", _LONGNET, 0),
    ("the same, another head", _LONGNET, 1),
    ("Random(2, 4)", _RANDOM, 0),
    ("Random(2, 4) | Local((7, 0))", _RANDOM | Local((7, 0)), 0),
)


def draw(path: Path) -> None:
    """All squares: queries down, keys across, causal, darker where a key counts more often."""
    from matplotlib.figure import Figure

    found = [counts(pattern, TOKENS, HEADS, head) for _, pattern, head in SQUARES]
    shades = Shades.up_to(max(int(square.max()) for square in found))
    figure = Figure(figsize=(11.2, 6.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, square, (title, _, _) in zip(axes.flat, found, SQUARES, strict=True):
        axis.imshow(square, **shades.of_image)
        axis.set_title(title, fontsize=9, family="monospace")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color(GREY)
    for axis in axes[-1]:
        axis.set_xlabel("key position", fontsize=8, color=GREY)
    for axis in axes[:, 0]:
        axis.set_ylabel("query position", fontsize=8, color=GREY)
    figure.legend(**shades.of_legend)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a .png, .svg or .pdf")
    draw(parser.parse_args(arguments).path)


if __name__ == "__main__":
    main()
