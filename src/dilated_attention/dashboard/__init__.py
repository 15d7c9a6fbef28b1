"""The dashboard: one page for what this machine would run, how fast that was, and what a run counted.

The page holds all that it needs and makes no requests.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from ..core.errors import ConfigError
from ..writing import check_writable, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..bench.history import Run
    from ..registry.discovery import Registry
    from .page import Gathered

HISTORY_BYTES: Final = 5 << 20
HISTORY_RUNS: Final = 2000
HISTORY_RESULTS: Final = 11_000
_LIBRARIES: Final = {"bokeh": "bokeh", "jinja2": "Jinja2"}


def make_page(
    out: Path,
    *,
    history: Path | None,
    counters: Path | None,
    config: Mapping[str, Any] | None,
    registry: Callable[[], Registry] | None,
) -> dict[str, Any]:
    """Gather, render, and write the page in one step, so that nobody meets half of it.

    Files are read first: they are refused before anything slow starts.

    Args:
        out: the page.
        history: file of `bench --save`.
        counters: file of `attention.counters().to_dict()`.
        config: fields of the configuration to plan; None takes LongNet at 128K tokens.
        registry: where backends are looked up, asked for when files were read; None leaves the plan, the ring and the
            patterns out.

    Returns:
        What was shown, for `--json`.

    Raises:
        ConfigError: a file that cannot be read, a configuration that no backend could honour, or no place for the page.
    """
    check_can_render(out, history, counters)
    runs = None if history is None else read_runs(history)
    gathered = _files(runs, history, counters)
    if registry is not None:
        gathered = _machine(gathered, config, registry())
    from .page import render

    content = render(gathered).encode()
    write_whole(out, content, option="--out")
    return {
        "page": str(out),
        "nbytes": len(content),
        "runs": None if runs is None else len(runs),
        "backend": None if gathered.plan is None else gathered.plan.backend,
    }


def check_can_render(out: Path, *inputs: Path | None) -> None:
    """Raise `ConfigError` for a place where no page can be written or which is read, or without what makes the page."""
    check_writable(out, option="--out", inputs=inputs)
    missing = [name for module, name in _LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"the dashboard needs {' and '.join(missing)}: pip install 'dilated-attention[dashboard]'")


def read_runs(path: Path) -> list[Run]:
    """The history, if it is no larger than a page can show.

    Raises:
        ConfigError: a file that is larger, or that `read_history` refuses.
    """
    from ..bench.history import read_history

    try:
        with path.open("rb") as file:
            content = file.read(HISTORY_BYTES + 1)  # not the size it claims: a device or a pipe claims none
    except OSError as error:
        raise ConfigError(f"cannot read the history {str(path)!r}: {error.strerror or error}") from error
    counts = (
        (len(content), HISTORY_BYTES, "bytes"),
        (content.count(b"\n"), HISTORY_RUNS, "runs"),
        (content.count(b'"median_ms"'), HISTORY_RESULTS, "results"),
    )
    for count, most, what in counts:
        if count > most:
            raise ConfigError(
                f"the history {str(path)!r} has more than the {most:,} {what} that a page shows; give it the newest "
                f"runs: tail -n 100 {shlex.quote(str(path))} > newest.jsonl"
            )
    return read_history(path)


def _files(runs: list[Run] | None, history: Path | None, counters: Path | None) -> Gathered:
    from .counters import read_counters
    from .page import Gathered

    return Gathered(
        history=runs,
        history_name=history.name if history else "",
        counters=None if counters is None else read_counters(counters),
        counters_name=counters.name if counters else "",
    )


def _machine(gathered: Gathered, config: Mapping[str, Any] | None, registry: Registry) -> Gathered:
    from . import machine
    from .ring import measured_ring

    fields = machine.DEFAULT_CONFIG if config is None else config
    plan = machine.make_plan(fields, registry)
    plans = gathered.counters.plans if gathered.counters is not None else ()
    return attrs.evolve(
        gathered,
        plan=plan,
        rings=tuple(machine.ring_costs(fields, registry)),
        measured=tuple(line for found in plans for line in measured_ring(fields, found, registry)),
        pictures=tuple(machine.pictures(plan, registry)),
    )
