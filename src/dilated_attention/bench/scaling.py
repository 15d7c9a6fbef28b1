"""Weak and strong scaling over ranks of this machine: torchrun for each size, the pre-flight beside it, a chart."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from ..core.errors import ConfigError, DilatedAttentionError
from ..core.explain import columns
from ..registry.build import preflight
from ..writing import save_figure, write_whole
from .longest import LOG
from .output import versions
from .ring_settings import PATTERNS, RingSettings

FILES: Final = ("scaling.json", "scaling.png")
SIMULATED: Final = (4, 8, 64, 1024)
_LONGEST_S: Final = 240
_GREY: Final = "#6B6B6B"
# Okabe and Ito's palette; marks and dashes say the same without colour.
_LINES: Final = {"longnet": ("#0072B2", "o", "-"), "local-global": ("#D55E00", "s", "--")}
# Of the columns that their names do not explain.
_LEGEND: Final = (
    "efficiency  time alone (weak) or the smallest size's, shared out (strong), over the ring's; in a row: of steps "
    "that follow each other, as in training; to auto: to what a rank alone would run",
    "as planned  the bytes are the pre-flight's to the byte; hidden: share of the exchange behind computing; planned: "
    "peak memory by the pre-flight",
)


def run_scaling(settings: RingSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every size; the simulation of larger rings runs beside the first.

    Raises:
        ConfigError: fewer devices than ranks.
        DilatedAttentionError: ranks that failed, with what they said, a result that differs from the oracle included.
    """
    _check_devices(settings)
    report: dict[str, Any] = {
        "settings": attrs.asdict(settings), "versions": versions(), "sizes": [], "longest": None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "settings.json"
        path.write_text(settings.to_json(), encoding="utf-8")
        for size in settings.sizes:
            say(f"{size} rank{'s' * (size > 1)}")
            with _running(size, path, folder) as process:
                if "simulated" not in report:
                    report["simulated"] = simulated(settings)
                _finish(process, size)
            ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
            report["sizes"].append({"size": size, "errors": ranks[0]["errors"], "ranks": ranks})
        if settings.longest:
            report["longest"] = _longest(settings, path, folder, say)
    report["summary"] = list(summarised(report["sizes"]))
    return report


def _check_devices(settings: RingSettings) -> None:
    if settings.device == "cpu":
        return
    import torch

    if torch.cuda.device_count() < max(settings.sizes):
        raise ConfigError(
            f"--gpus asks for {max(settings.sizes)} CUDA devices, this machine has {torch.cuda.device_count()}; "
            "--device cpu measures over Gloo"
        )


@contextmanager
def _running(size: int, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """torchrun on this machine alone, at a port of its own; it does not outlive what waits for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(size), "-m", f"{__package__}.ring_worker", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks
            process.communicate()


def _finish(process: subprocess.Popen[str], size: int) -> None:
    said, _ = process.communicate()
    if process.returncode:
        lines = [line for line in said.splitlines() if line.strip()]
        raise DilatedAttentionError(f"the run over {size} ranks failed:\n" + "\n".join(lines[-30:]))


def _longest(settings: RingSettings, path: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The lengths that a layer was trained at over the largest size, and what ended it."""
    size = max(settings.sizes)
    say(f"the longest sequence over {size} rank{'s' * (size > 1)}")
    with _running(size, path, folder, "longest") as process:
        try:
            said, _ = process.communicate(timeout=_LONGEST_S)
            ended = "" if process.returncode == 0 else "\n".join(said.splitlines()[-15:])
        except subprocess.TimeoutExpired:
            ended = f"it was ended after {_LONGEST_S} s"
    log = folder / LOG
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    trained = [line for line in lines if line.get("finite")]
    full = [line for line in lines if "out_of_memory" in line]
    return {
        "ranks": size,
        "tokens": max((line["tokens"] for line in trained), default=None),
        "trained": trained,
        "ended_by": full[0] if full else ended or "the limit given",
    }


def simulated(settings: RingSettings) -> list[dict[str, Any]]:
    """What the pre-flight says of larger rings that no machine here has, at the weak-scaling share a rank."""
    rows = []
    for ranks in SIMULATED:
        tokens = settings.weak_tokens * ranks
        for kind in PATTERNS:
            config = attrs.evolve(settings.config(kind, tokens, 1), seq_len=tokens, context_parallel=None)
            costs = preflight(config, ranks=ranks)
            rows.append(
                {
                    "ranks": ranks,
                    "pattern": kind,
                    "tokens": tokens,
                    "mode": costs.mode,
                    "forward_received": max(load.forward_received for load in costs.loads),
                    "backward_received": max(load.backward_received for load in costs.loads),
                    "full_ring_bytes": costs.full_ring_bytes,
                    "fewer_than_a_full_ring": costs.saving,
                    "imbalance": costs.imbalance,
                    "peak_bytes": max(load.peak_bytes for load in costs.loads),
                }
            )
    return rows


def summarised(sizes: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row a pattern, way of scaling and size, of what the ranks have measured.

    The efficiency of weak scaling is against a rank alone that took turns with the ring; of strong scaling, against
    the smallest size. Both run the same backend. `to_auto` is the same against what one rank alone would run, and
    `in_a_row` of steps that follow each other as in training, where all ranks wait for each other before a single one.
    """
    for way in ("weak", "strong"):
        for index, kind in enumerate(PATTERNS):
            first = sizes[0]["ranks"][0][way][index]
            for entry in sizes:
                each = [rank[way][index] for rank in entry["ranks"]]
                taken, times = each[0]["seconds"], entry["size"] / sizes[0]["size"]
                alone = taken if way == "weak" else {name: value / times for name, value in first["seconds"].items()}
                base = alone["ring"] if way == "strong" else alone.get("alone", alone["ring"])
                in_a_row = each[0]["seconds_in_a_row"]
                base_in_a_row = in_a_row.get("alone", in_a_row["ring"])
                if way == "strong":
                    base_in_a_row = first["seconds_in_a_row"]["ring"] / times
                row = {
                    "way": way,
                    "pattern": kind,
                    "ranks": entry["size"],
                    "tokens": each[0]["tokens"],
                    "backends": each[0]["backends"],
                    "milliseconds": {name: 1e3 * value for name, value in taken.items()},
                    "rounds": each[0]["rounds"],
                    "efficiency": base / taken["ring"],
                    "efficiency_in_a_row": base_in_a_row / in_a_row["ring"],
                    "efficiency_to_auto": alone.get("alone, auto", base) / taken["ring"],
                    "peak_bytes": max(one["peak_bytes"] for one in each),
                }
                yield row | (_exchange_row(each) if entry["size"] > 1 else {})


def _exchange_row(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    hidden = [one["hidden_share"] for one in each if one["hidden_share"] is not None]
    return {
        "received_bytes": max(one["bytes"]["forward_received"] + one["bytes"]["backward_received"] for one in each),
        "bytes_as_planned": all(one["bytes"] == one["planned_bytes"] for one in each),
        "fewer_than_a_full_ring": each[0]["fewer_than_a_full_ring"],
        "mode": each[0]["mode"],
        "planned_peak_bytes": max(one["planned_peak_bytes"] for one in each),
        "exchange_ms": 1e3 * max(one["exchange_s"] for one in each),
        "hidden_share": min(hidden, default=None),
    }


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    header = (
        "", "ranks", "tokens", "f+b ms", "alone", "alone, auto", "full ring", "efficiency", "in a row", "to auto",
        "received", "as planned", "hidden", "peak MiB", "planned",
    )  # fmt: skip
    lines = [*columns([header, *(_cells(row) for row in report["summary"])]), "", *_LEGEND]
    backends = {
        f"{row['pattern']}: {name} {text}" for row in report["summary"] for name, text in row["backends"].items()
    }
    lines += ["", "backends  " + "; ".join(sorted(backends))]
    errors = [
        f"{entry['size']} ranks, {name}: {error:.1e}"
        for entry in report["sizes"]
        for name, error in entry["errors"].items()
    ]
    told = "; ".join(errors) or "not measured: a rank alone exchanges nothing"
    lines.append(f"errors against the float64 oracle  {told}")
    lines += ["", "simulated by the pre-flight, bytes of the busiest rank, a forward pass"]
    head = ("", "ranks", "tokens", "received", "a full ring", "times fewer", "imbalance", "peak MiB")
    lines += columns([head, *(_simulated_cells(row) for row in report["simulated"])])
    if report["longest"]:
        found = report["longest"]
        lines += ["", f"the longest sequence that trains one LongNet layer over {found['ranks']} ranks: "
                  f"{_counted(found['tokens'])} tokens; ended by {found['ended_by']}"]  # fmt: skip
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = row["milliseconds"]
    exchange = ("-",) * 3
    if "received_bytes" in row:
        hidden = row["hidden_share"]
        exchange = (
            f"{row['received_bytes']:,}",
            "yes" if row["bytes_as_planned"] else "NO",
            "-" if hidden is None else f"{100 * hidden:.0f}%",
        )
    planned = f"{row['planned_peak_bytes'] / 2**20:.1f}" if "planned_peak_bytes" in row else "-"
    return (
        f"{row['way']}, {row['pattern']}", str(row["ranks"]), f"{row['tokens']:,}", f"{times['ring']:.2f}",
        *(f"{times[name]:.2f}" if name in times else "-" for name in ("alone", "alone, auto", "full ring")),
        f"{row['efficiency']:.3f}", f"{row['efficiency_in_a_row']:.3f}", f"{row['efficiency_to_auto']:.3f}", *exchange,
        f"{row['peak_bytes'] / 2**20:.1f}", planned,
    )  # fmt: skip


def _simulated_cells(row: dict[str, Any]) -> tuple[str, ...]:
    fewer = row["fewer_than_a_full_ring"]
    return (
        row["pattern"], str(row["ranks"]), f"{row['tokens']:,}", f"{row['forward_received']:,}",
        f"{row['full_ring_bytes']:,}", "-" if fewer is None else f"{fewer:.4g}", f"{row['imbalance']:.3f}",
        f"{row['peak_bytes'] / 2**20:.0f}",
    )  # fmt: skip


def _counted(tokens: int | None) -> str:
    return "none" if tokens is None else f"{tokens:,}"


def write_scaling(folder: Path, report: dict[str, Any]) -> None:
    """`FILES` in `folder`."""
    figures, picture = (folder / name for name in FILES)
    write_whole(figures, json.dumps(report, indent=1).encode(), option="--output")
    draw_scaling(report, picture)


def draw_scaling(report: dict[str, Any], path: Path) -> None:
    """Efficiency against ranks for both ways of scaling, and bytes received against a full ring's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3)
    settings = report["settings"]
    titles = {
        "weak": f"weak scaling: {settings['weak_tokens']:,} tokens a rank",
        "strong": f"strong scaling: {settings['strong_tokens']:,} tokens",
    }
    best = max(max(row["efficiency"], row["efficiency_in_a_row"]) for row in report["summary"])
    for axis, (way, title) in zip(axes, titles.items(), strict=False):
        axis.axhline(1, color=_GREY, linewidth=0.8)
        for kind in _LINES:
            _draw_efficiency(axis, [row for row in report["summary"] if (row["way"], row["pattern"]) == (way, kind)])
        axis.set(
            title=title,
            xlabel="ranks",
            ylabel="efficiency, forward and backward",
            xscale="log",
            ylim=(0, max(1.2, 1.05 * best)),
        )
        axis.set_xticks(settings["sizes"], [str(n) for n in settings["sizes"]])
        axis.minorticks_off()
        axis.grid(axis="y", color="#E3E3E3", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.margins(x=0.12)
        axis.legend(frameon=False, loc="lower left")
    _draw_bytes(axes[2], report["simulated"])
    save_figure(figure, path, option="--output")


def _draw_efficiency(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """One pattern: steps one by one, and in a row."""
    if not rows:
        return
    kind, x = rows[0]["pattern"], [row["ranks"] for row in rows]
    colour, mark, dash = _LINES[kind]
    y = [row["efficiency"] for row in rows]
    axis.plot(x, y, color=colour, marker=mark, linestyle=dash, label=f"{kind}, step by step")
    axis.plot(
        x, [row["efficiency_in_a_row"] for row in rows],
        color=colour, marker=mark, markerfacecolor="white", linestyle=":", linewidth=1, label=f"{kind}, in a row",
    )  # fmt: skip


def _draw_bytes(axis: Any, simulated: Sequence[dict[str, Any]]) -> None:
    """What the busiest rank receives, by the pre-flight."""
    for kind, (colour, mark, dash) in _LINES.items():
        rows = [row for row in simulated if row["pattern"] == kind]
        x, y = [row["ranks"] for row in rows], [row["forward_received"] for row in rows]
        axis.plot(x, y, color=colour, marker=mark, linestyle=dash, label=kind)
    rows = [row for row in simulated if row["pattern"] == "longnet"]
    x, y = [row["ranks"] for row in rows], [row["full_ring_bytes"] for row in rows]
    axis.plot(x, y, color=_GREY, marker="^", linestyle=":", label="a full ring")
    axis.set(xscale="log", yscale="log", xlabel="ranks", title="received in a forward pass (simulated)")
    axis.set_xticks(x, [f"{n:,}" for n in x])
    sizes = {1 << 20: "1 MiB", 1 << 25: "32 MiB", 1 << 30: "1 GiB", 1 << 35: "32 GiB", 1 << 40: "1 TiB"}
    axis.set_yticks(list(sizes), list(sizes.values()))
    axis.minorticks_off()
    axis.legend(frameon=False, loc="upper left")
