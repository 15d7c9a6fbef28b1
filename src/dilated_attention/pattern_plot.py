"""A pattern's map and its quality as one figure, drawn without a display and without pyplot's global state."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .core.errors import ConfigError
from .pattern_cells import Cells
from .quality import Quality, Spread
from .writing import check_writable, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermilion, and one ramp from light to dark: told apart with any colour vision, and in print.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#6B6B6B"
_FUTURE, _NOT_SEEN, _RAMP = "#E4E4E4", "#FFFFFF", "cividis_r"
SUFFIXES = (".png", ".svg")
CELLS = 256


def check_can_plot(path: Path) -> None:
    """Raise `ConfigError` for a file that is neither PNG nor SVG or cannot be written, or without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot writes a file ending in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    check_writable(path, option="--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'dilated-attention[plot]'")


def plot(cells: Cells, quality: Quality, title: str, path: Path, *, length: int, head: int) -> None:
    """Write the figure: the map of one head at the left; of all heads, at the right, counts and what layers reach."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shares = cells.shares()
    figure = Figure(figsize=(10.5, 5.6), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.45, 1), squeeze=False)[0]
    axis = left.subplots()
    ramp = colormaps[_RAMP].with_extremes(under=_NOT_SEEN, bad=_FUTURE)
    image = axis.imshow(
        np.where(shares == 0, 1e-12, shares), cmap=ramp, norm=LogNorm(1e-3, 1.0, clip=False), interpolation="nearest",
        extent=(0, length, length, 0),
    )  # fmt: skip
    ticks = np.linspace(0, length, 5).astype(int)
    names = [f"{t:,}" if length < 10_000 else _tokens(int(t)) for t in ticks]
    axis.set_xticks(ticks, names)
    axis.set_yticks(ticks, names)
    axis.set(xlabel="key position", ylabel="query position")
    axis.set_title(f"head {head}", fontsize=10, color=_GREY)
    flat = [(_NOT_SEEN, "not seen"), (_FUTURE, "in the future")][: 1 + bool(np.isnan(shares).any())]
    left.legend(
        handles=[Patch(facecolor=colour, edgecolor=_GREY, label=name) for colour, name in flat],
        loc="outside lower center", ncols=2, frameon=False, fontsize=8,
    )  # fmt: skip
    axis.tick_params(labelsize=8, color=_GREY)
    axis.spines[:].set_color(_GREY)
    bar = left.colorbar(image, ax=axis, shrink=0.8, pad=0.02, ticks=(1e-3, 1e-2, 1e-1, 1.0))
    bar.ax.set_yticklabels(["0.1 %", "1 %", "10 %", "100 %"])
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share of a cell's pairs that is seen", fontsize=9)
    upper, lower = right.subplots(2, 1)
    _bars(upper, quality)
    _field(lower, quality)
    figure.suptitle(
        f"{title}\ndensity {quality.density:.3%}, {quality.empty_rows:,} queries without keys, "
        f"busiest block row {quality.load_imbalance:.2f} × the mean", fontsize=11,
    )  # fmt: skip
    save_figure(figure, path, option="--plot")


def _bars(axis: Axes, quality: Quality) -> None:
    from matplotlib.ticker import NullLocator

    bins = max(len(quality.fan_out.histogram), len(quality.fan_in.histogram))
    used = [i for i in range(bins) if _part(quality.fan_out, i) or _part(quality.fan_in, i)]
    first, last = min(used), max(used)
    place = range(first, last + 1)
    for name, spread, shift, colour in (
        ("keys that a query sees", quality.fan_out, -0.2, _BLUE),
        ("queries that see a key", quality.fan_in, 0.2, _ORANGE),
    ):
        axis.bar([i + shift for i in place], [_part(spread, i) * 100 for i in place], 0.4, color=colour, label=name)
    turn, side = (35, "right") if len(place) > 4 else (0, "center")
    axis.set_xticks(list(place), [_bin_name(i) for i in place], rotation=turn, ha=side)
    axis.set_xlim(min(first, last - 2) - 0.6, max(last, first + 2) + 0.6)
    axis.set_yscale("log")  # one token in a million that sees everything shows too
    least = min(_part(spread, i) for spread in (quality.fan_out, quality.fan_in) for i in place if _part(spread, i))
    # From the power of ten below the least on, so that two at least are on the axis and have their names.
    axis.set_ylim(10.0 ** (math.ceil(math.log10(least * 100)) - 1), 150)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("how many", fontsize=9)
    axis.set_ylabel("% of positions", fontsize=9)
    _tidy(axis)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1)


def _field(axis: Axes, quality: Quality) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = range(1, len(quality.receptive_field) + 1)
    axis.plot(layers, [part * 100 for part in quality.receptive_field], color=_BLUE, marker="o", clip_on=False)
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axis.set_ylim(0, 100)
    axis.set_xlabel("layers stacked", fontsize=9)
    axis.set_ylabel("% of blocks reached", fontsize=9)
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.tick_params(labelsize=8, color=_GREY)
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _part(spread: Spread, index: int) -> float:
    return spread.histogram[index] / sum(spread.histogram) if index < len(spread.histogram) else 0.0


def _bin_name(index: int) -> str:
    """The counts of k binary digits: 0, 1, 2-3, 4-7, ..."""
    low, high = (1 << index) // 2, (1 << index) - 1
    return f"{low}" if low >= high else f"{_tokens(low)}-{_tokens(high + (high >= 1024))}"


def _tokens(number: int) -> str:
    return str(number) if number < 1024 else f"{number / 1024:.4g}K" if number < 1 << 20 else f"{number / 2**20:.4g}M"
