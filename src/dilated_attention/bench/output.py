"""What a run looks like: a table, files of rows, a chart."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import attrs
import torch

from ..core.errors import ConfigError
from ..core.explain import columns
from ..core.version import VERSION
from ..registry.device import describe_device
from ..report import is_terminal
from ..writing import save_figure, write_whole
from .checkout import checkout_root, commit_of
from .history import PHASES, Machine, Result, Run
from .measure import CaseReport

FILES: Final = ("results.csv", "results.jsonl", "results.png")

_NEAR_PERCENT = 5.0
_LIBRARIES = ("torch", "triton", "numpy", "numba", "flash-attn-4", "xformers")
_COLUMNS = ("quartiles", "TFLOP/s", "distinct", "floor", "MiB")
# Okabe and Ito's palette: told apart with any colour vision; forward is hatched besides.
_OURS, _PEER = "#0072B2", "#E69F00"


def make_run(reports: Sequence[CaseReport], device: str, floor_tflops: float | None) -> Run:
    """The run as the history keeps it."""
    described = describe_device(device)
    commit, modified = commit_of(checkout_root())
    return Run(
        when=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit,
        modified=modified,
        version=VERSION,
        machine=Machine(
            device="cpu" if device.startswith("cpu") else "cuda",
            name=described.name or described.arch or described.type,
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
        ),
        versions=versions(),
        floor_tflops=floor_tflops,
        results=tuple(result for report in reports for result in report.results),
    )


def versions() -> dict[str, str]:
    """Of Python and the libraries that take part, those that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table_cells(report: CaseReport) -> Iterator[tuple[str, ...]]:
    """A header, and a row a contender with both phases."""
    yield ("", "error", "fwd ms", *_COLUMNS, "f+b ms", *_COLUMNS)
    for name, error, forward, training in _contenders(report):
        yield (name, error, *_phase_cells(forward), *_phase_cells(training))


def _contenders(report: CaseReport) -> Iterator[tuple[str, str, Result, Result]]:
    """Name, error and both phases of each."""
    by_phase = {phase: [r for r in report.results if r.phase == phase] for phase in PHASES}
    for forward, training in zip(by_phase["forward"], by_phase["training"], strict=True):
        name = f"{forward.backend}: {forward.kernel}" if forward.kernel else forward.backend
        yield name, "-" if forward.error is None else f"{forward.error:.1e}", forward, training


def stacked_lines(report: CaseReport) -> Iterator[str]:
    """The same in some 60 columns: a header, and three lines a contender, its name and the two phases."""
    contenders = list(_contenders(report))
    rows: list[tuple[str, ...]] = [("  ", "ms", *_COLUMNS)]
    for _, _, forward, training in contenders:
        rows += [("  forward", *_phase_cells(forward)), ("  f+b", *_phase_cells(training))]
    header, *lines = columns(rows)
    yield header
    for i, (name, error, _, _) in enumerate(contenders):
        yield f"{name}, error {error}"
        yield from lines[2 * i : 2 * i + 2]


def _phase_cells(r: Result) -> tuple[str, ...]:
    """Of one phase; rates below one TFLOP/s keep three digits, which matters on a CPU."""
    return (
        _short(r.median_ms),
        f"{_short(r.low_ms)}-{_short(r.high_ms)}",
        "-" if r.tflops is None else _short(r.tflops),
        "-" if r.distinct_tflops is None else _short(r.distinct_tflops),
        "-" if r.floor_share is None else f"{100 * r.floor_share:.0f}%",
        "-" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.1f}",
    )


def _short(number: float) -> str:
    """Three or four digits."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.4g}" if number >= 100 else f"{number:.3g}"


def auto_line(report: CaseReport) -> str:
    """What `auto` picks and how far it is from the fastest."""
    auto = report.auto
    if auto.backend is None:
        return "auto picks nothing: no backend fits"
    words = []
    for phase, name in auto.fastest.items():
        slower = auto.slower_percent[phase]
        short = "forward" if phase == "forward" else "f+b"
        if slower is None:
            words.append(f"{short}: not measured here (the fastest is {name})")
        else:
            words.append(f"{short}: {slower:.1f}% slower than the fastest" + (f" ({name})" if slower else ""))
    return f"auto picks {auto.backend}: {auto.kernel}; {'; '.join(words) or 'nothing was measured'}"


def auto_summary(reports: Sequence[CaseReport]) -> dict[str, Any]:
    """In how many cases `auto`'s pick is at most 5 % slower than the fastest measured, in both phases."""
    slower = {
        report.case.name: [percent for percent in report.auto.slower_percent.values() if percent is not None]
        for report in reports
    }
    measured = {name: max(percents) for name, percents in slower.items() if len(percents) == len(PHASES)}
    near = sum(percent <= _NEAR_PERCENT for percent in measured.values())
    return {"cases": len(reports), "measured": len(measured), "within_5_percent": near, "slower_percent": measured}


def print_report(report: CaseReport) -> None:
    """A table on a terminal, stacked where that is narrow; else aligned text that nothing wraps or cuts."""
    if is_terminal(sys.stdout):
        _print_rich(report)
        return
    lines = [str(report.case), *(f"  {line}" for line in columns(list(table_cells(report)))), f"  {auto_line(report)}"]
    print("\n".join(lines) + "\n", flush=True)  # noqa: T201 - data goes to stdout


def _print_rich(report: CaseReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(str(report.case), style="bold"))
    header, *rows = table_cells(report)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i != 0)
    fastest = set(report.auto.fastest.values())
    for row in rows:
        table.add_row(*(Text(cell) for cell in row), style="green" if row[0] in fastest else "")
    if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(table)
    else:  # rich would cut the numbers
        stacked = Text("\n".join(stacked_lines(report)))
        stacked.highlight_words(fastest, "green")
        console.print(stacked, soft_wrap=True)
    console.print(Text(auto_line(report) + "\n"))


def report_data(report: CaseReport) -> dict[str, Any]:
    """Plain values beside the run's rows: what auto picks, what failed, what was left out."""
    return {
        "case": report.case.to_dict() | {"description": str(report.case)},
        "auto": attrs.asdict(report.auto),
        "failures": list(report.failures),
        "notes": list(report.notes),
    }


def require_matplotlib() -> None:
    """Raise `ConfigError` where the extra `plot` is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("charts need matplotlib, which is not installed: pip install 'dilated-attention[plot]'")


def write_files(folder: Path, run: Run) -> None:
    """`FILES` in `folder`."""
    rows = [attrs.asdict(result) for result in run.results]
    table, lines, picture = (folder / name for name in FILES)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [field.name for field in attrs.fields(Result)])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(table, file.getvalue().encode(), option="--output")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(lines, text.encode(), option="--output")
    draw(run, picture)


def draw(run: Run, path: Path) -> None:
    """A row a case, a column a phase: milliseconds from zero, quartiles as whiskers, peers hatched."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(result.case for result in run.results)) or [""]
    counts = [max(1, sum((r.case, r.phase) == (case, PHASES[0]) for r in run.results)) for case in cases]
    height = 0.9 + 0.85 * len(cases) + 0.3 * sum(counts)
    figure = Figure(figsize=(11, height), dpi=100, layout="constrained")
    grid = figure.subplots(len(cases), 2, squeeze=False, height_ratios=[1 + 0.6 * count for count in counts])
    for axes, case in zip(grid, cases, strict=True):
        for axis, phase, words in zip(axes, PHASES, ("forward", "forward and backward"), strict=True):
            rows = [r for r in run.results if (r.case, r.phase) == (case, phase)]
            _draw_bars(axis, rows)
            axis.set_title(f"{case}, {words}", fontsize=10, loc="left")
    for axis in grid[-1]:
        axis.set_xlabel("milliseconds, median and quartiles")
    figure.suptitle(f"{run.machine.name}, {run.when[:10]}; hatched: what ours are compared with", fontsize=10)
    save_figure(figure, path, option="--output")


def _draw_bars(axis: Any, rows: Sequence[Result]) -> None:
    middle = [r.median_ms for r in rows]
    spread = [[r.median_ms - r.low_ms for r in rows], [r.high_ms - r.median_ms for r in rows]]
    bars = axis.barh(
        range(len(rows)), middle, xerr=spread, color=[_PEER if r.peer else _OURS for r in rows],
        hatch=["//" if r.peer else "" for r in rows], edgecolor="white", error_kw={"elinewidth": 1},
    )  # fmt: skip
    axis.bar_label(bars, [f"  {_short(ms)}" for ms in middle], fontsize=8)
    axis.set_yticks(range(len(rows)), [_label(r) for r in rows], fontsize=8)
    axis.set_xlim(0, 1.18 * max((r.high_ms for r in rows), default=1.0))
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()


def _label(result: Result) -> str:
    short = result.kernel if len(result.kernel) <= 24 else f"{result.kernel[:21]}..."
    return f"{result.backend}: {short}" if short else result.backend
