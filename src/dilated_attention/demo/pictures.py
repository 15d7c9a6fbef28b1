"""The two pictures of the demo, drawn without a display and without pyplot's global state."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.geometry import Geometry
from ..core.pattern import Pattern
from ..writing import save_figure
from .training import Training

FILES: Final = ("loss.png", "pattern.png")
# Okabe and Ito's palette, and one hue from light to dark for counts: told apart with any colour vision, and in print.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"
FUTURE, NOT_SEEN, COUNTS = "#EFEFEF", "#FFFFFF", "Blues"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def counts(pattern: Pattern, seq_len: int, num_heads: int, head: int) -> NDArray[np.int64]:
    """How often each query (row) counts each key (column) in causal attention; -1 in the future."""
    positions = np.arange(seq_len)
    geometry = Geometry.self_attention(seq_len, num_heads, is_causal=True)
    query, key = positions[:, None], positions[None, :]
    seen = np.broadcast_to(pattern.multiplicity(query, key, np.array(head), geometry), (seq_len, seq_len))
    return np.where(key <= query, seen, -1)


class Shades(NamedTuple):
    """How counts are shown, up to one of them: arguments of `imshow`, and what the legend says."""

    of_image: dict[str, Any]
    of_legend: dict[str, Any]

    @classmethod
    def up_to(cls, top: int) -> Shades:
        """Darker where a key counts more; -1 is the future."""
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
        from matplotlib.patches import Patch

        found = [FUTURE, NOT_SEEN, *(to_hex(colormaps[COUNTS](depth)) for depth in np.linspace(0.35, 1.0, top))]
        norm = BoundaryNorm(np.arange(-1.5, top + 1), len(found))
        names = ["in the future", "not seen", *(f"counted {n}×" for n in range(1, top + 1))]
        handles = [Patch(facecolor=shade, edgecolor=GREY, label=name) for shade, name in zip(found, names, strict=True)]
        placed = {"loc": "outside lower center", "ncols": len(handles), "frameon": False, "fontsize": 9}
        return cls({"cmap": ListedColormap(found), "norm": norm}, {"handles": handles} | placed)


def draw_pattern(pattern: Pattern, title: str, path: Path, *, seq_len: int, num_heads: int) -> None:
    """A square per group of heads that see the same: queries down, keys across, darker where a key counts more."""
    from matplotlib.figure import Figure

    groups: dict[int, list[int]] = {}
    for head, group in enumerate(pattern.head_groups(num_heads, num_heads)):
        groups.setdefault(group, []).append(head)
    shades = Shades.up_to(pattern.max_multiplicity)
    figure = Figure(figsize=(3.1 * len(groups) + 0.4, 4.5), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, heads in zip(axes, groups.values(), strict=True):
        axis.imshow(counts(pattern, seq_len, num_heads, heads[0]), **shades.of_image)
        axis.set_title(f"head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))}", fontsize=10)
        ticks = np.arange(0, seq_len + 1, seq_len // 4)
        axis.set_xticks(ticks - 0.5, [str(t) for t in ticks])
        axis.set_yticks(ticks - 0.5, [str(t) for t in ticks])
        axis.set_xlabel("key position")
        axis.tick_params(labelsize=8, color=GREY)
        axis.spines[:].set_color(GREY)
    axes[0].set_ylabel("query position")
    figure.suptitle(title, fontsize=12)
    figure.legend(**shades.of_legend)
    save_figure(figure, path, option="--output")


def smooth(values: Sequence[float], window: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The means of all `window` values in a row, and the middles of where they stand: means of the past would lag."""
    sums = np.cumsum([0.0, *values])
    means = (sums[window:] - sums[:-window]) / window
    return np.arange(means.size) + (window - 1) / 2, means


def draw_loss(training: Training, xz_bits: float, path: Path) -> None:
    """Bits per byte against steps: each batch faintly, their mean, the held-out files, and xz as a mark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.3), dpi=160, layout="constrained")
    axis = figure.subplots()
    steps = np.arange(len(training.bits))
    axis.plot(steps, training.bits, color=BLUE, alpha=0.25, linewidth=0.7)
    window = max(1, min(20, len(training.bits) // 10))  # a wide one would level out what few steps have
    label = "training batches" + (f", mean of {window}" if window > 1 else "")
    axis.plot(*smooth(training.bits, window), color=BLUE, linewidth=1.8, label=label)
    axis.plot(
        [mark.step for mark in training.marks],
        [mark.held_out for mark in training.marks],
        color=ORANGE, marker="o", markersize=5, linewidth=1.2, linestyle="--", label="held-out files",
        clip_on=False, zorder=3,
    )  # fmt: skip
    axis.axhline(xz_bits, color=GREY, linewidth=1, linestyle=":")
    axis.annotate(
        f"xz -9 on the held-out files: {xz_bits:.2f}", (1, xz_bits), xycoords=("axes fraction", "data"),
        xytext=(-4, -11), textcoords="offset points", ha="right", fontsize=8, color=GREY,
    )  # fmt: skip
    axis.set(xlabel="step", ylabel="bits per byte", xlim=(0, len(training.bits)), ylim=(0, 8.4))
    axis.set_title(
        f"A byte model with LongNet's attention reads {training.bytes_read / 1e6:.2f} MB of Python "
        f"in {training.seconds:.0f} s", fontsize=11, loc="left",
    )  # fmt: skip
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path, option="--output")
