"""The picture and the markdown table of `benchmarks.longnet_table`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dilated_attention.demo.pictures import smooth

# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = {"dense": "#6B6B6B", "sparse": "#0072B2", "dilated": "#D55E00"}


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def markdown(report: dict[str, Any]) -> str:
    """A row for each model by the length it was trained at; the best of each group and test is bold."""
    lengths = report["shape"]["lengths"]
    head = ["trained at", "model", "keys a query sees there", "tokens", "tokens/s", *(_short(n) for n in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    rows = sorted(report["rows"], key=lambda row: row["trained_at"])
    for row in rows:
        group = [other for other in rows if other["trained_at"] == row["trained_at"]]
        cells = []
        for n in map(str, lengths):
            best = min(other["bits"][n] for other in group)
            cells.append(f"**{row['bits'][n]:.3f}**" if row["bits"][n] == best else f"{row['bits'][n]:.3f}")
        tokens = row["steps"] * report["shape"]["stretches"] * lengths[-1]
        cut = "" if row["is_complete"] else " (cut off)"
        line = [
            _short(row["trained_at"]),
            f"{row['name']} (`{row['backend']}`)",
            f"{row['keys_seen'][str(row['trained_at'])]:,.0f}",
            f"{tokens / 1e6:.1f} M{cut}",
            f"{row['tokens_a_second'] / 1e3:,.0f} K",
            *cells,
        ]
        lines.append("| " + " | ".join(line) + " |")
    lines.append(f"\nBits per byte of the same {report['test_bytes']:,} held-out bytes; xz -9 on them: "
                 f"{report['xz_bits_per_byte']:.2f}.")  # fmt: skip
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Small multiples, a column for each training length: curves above, bits by position in the longest test below."""
    from matplotlib.figure import Figure

    lengths, step_tokens = report["shape"]["lengths"], report["shape"]["stretches"] * report["shape"]["lengths"][-1]
    figure = Figure(figsize=(3.6 * len(lengths) + 0.6, 6.4), dpi=160, layout="constrained")
    axes = figure.subplots(2, len(lengths), sharey="row", squeeze=False)
    drawn: dict[str, Any] = {}
    seen: list[float] = []
    for column, length in enumerate(lengths):
        above, below = axes[0][column], axes[1][column]
        for row in (row for row in report["rows"] if row["trained_at"] == length):
            style: dict[str, Any] = {"color": _COLOURS[row["name"]], "linewidth": 1.6}
            steps, bits = zip(*row["curve"], strict=True)
            places, smoothed = smooth(bits, max(1, len(bits) // 12))
            seen += [float(value) for value in smoothed]
            read = np.interp(places, range(len(steps)), steps) * step_tokens / 1e6
            drawn[row["name"]] = above.plot(read, smoothed, **style)[0]
            firsts, by_position = zip(*row["bits_by_position"], strict=True)
            below.step([*firsts, lengths[-1]], [*by_position, by_position[-1]], where="post", **style)
        if length < lengths[-1]:
            below.axvline(length, color="#6B6B6B", linewidth=1, linestyle=":")
        above.set(title=f"trained at {_short(length)}", xlabel="million bytes read")
        below.set(xlabel=f"position in a window of {_short(lengths[-1])}")
        below.set_xscale("symlog", base=2, linthresh=128, linscale=0.5)
        ticks = [n for n in (0, 128, 512, 2048, 8192, 32768) if n <= lengths[-1]]
        below.set_xlim(0, lengths[-1])
        below.set_xticks(ticks, [str(n) if n < 1024 else _short(n) for n in ticks])
        for axis in (above, below):
            axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set(ylabel="bits per byte, training, smoothed")
    if seen:
        axes[0][0].set_ylim(min(seen) - 0.1, min(max(seen), min(seen) + 2.5) + 0.1)
    axes[1][0].set(ylabel="bits per byte, held out")
    figure.legend(
        [*drawn.values()], [*drawn], loc="outside lower center", ncols=max(1, len(drawn)), frameon=False
    )  # fmt: skip
    figure.savefig(path)
