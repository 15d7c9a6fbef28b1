"""The page: what was gathered, through a template that escapes every value, with scripts that the page vouches for.

The policy in the page's head names the hash of each script, so a script that came in with a value would not run, and
it allows no connection. Data are JSON in an element that no browser runs.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

import attrs
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from ..bench.history import Run
from ..core.explain import amount, request_words, row_reasons
from ..core.version import VERSION
from . import charts, view
from .series import REFERENCE_RUNS, RULE, Group, group_runs, short

if TYPE_CHECKING:
    from ..core.plan import AttentionPlan
    from .counters import Counters
    from .machine import RingCost
    from .ring import MeasuredRing
    from .tiles import Picture


@attrs.frozen(kw_only=True)
class Gathered:
    """What the page shows; what is None was not asked for.

    Attributes:
        plan: of the configuration, on this machine.
        rings: simulated costs.
        measured: the counters' bytes beside the simulation.
        pictures: of patterns, or a name and why there is none.
        history: the runs of a file.
        counters: of a file.
        history_name, counters_name: of the files.
    """

    plan: AttentionPlan | None = None
    rings: tuple[RingCost, ...] = ()
    measured: tuple[MeasuredRing, ...] = ()
    pictures: tuple[Picture | tuple[str, str], ...] = ()
    history: list[Run] | None = None
    counters: Counters | None = None
    history_name: str = ""
    counters_name: str = ""


def render(gathered: Gathered) -> str:
    """The page as HTML."""
    shown, left_out = group_runs(gathered.history or ())
    data: dict[str, Any] = {
        "history": [view.group_data(group) for group in shown],
        "ringChart": charts.ring_chart(gathered.rings) if any(ring.cost for ring in gathered.rings) else None,
        "pictures": [item.to_dict() for item in gathered.pictures if not isinstance(item, tuple)],
    }
    library = charts.library() if data["history"] or data["ringChart"] else ""
    script = _text("page.js")
    environment = Environment(
        loader=PackageLoader(__package__ or "", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"amount": amount, "short": short}
    return environment.get_template("page.html").render(
        gathered=gathered,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=VERSION,
        style=Markup(_text("page.css")),
        library=Markup(library),
        script=Markup(script),
        hashes=[_hash(text) for text in (library, script) if text],
        data=htmlsafe_json_dumps(data, allow_nan=False, separators=(",", ":")),
        ring_lines=charts.RING_LINES,
        ring_bytes=charts.ring_bytes,
        request_words=request_words,
        reasons=lambda row: list(row_reasons(row)),
        rule=RULE,
        reference_runs=REFERENCE_RUNS,
        view=view,
        groups_left_out=left_out,
        **_tables(shown),
    )


def _tables(shown: list[Group]) -> dict[str, Any]:
    """The tables of a history, cut where a page would drown in them, and how much was cut."""
    latest: list[tuple[Group, list[view.Row]]] = []
    room = view.LATEST_ROWS
    for group in shown:
        rows = view.latest_rows(group)[:room]
        if rows:
            latest.append((group, rows))
        room -= len(rows)
    marked, runs = view.marked_rows(shown), view.run_rows(shown)
    now = [row for _, rows in latest for row in rows if not row.series.peer]
    return {
        "groups": shown,
        "latest": latest,
        "latest_left_out": len(shown) - len(latest),
        "marked": marked[: view.MARKED_ROWS],
        "marked_left_out": max(0, len(marked) - view.MARKED_ROWS),
        "runs": runs[: view.RUN_ROWS],
        "runs_left_out": max(0, len(runs) - view.RUN_ROWS),
        "slower_now": sum(row.series.recent[0] == "slower" for row in now),
        "ours_now": len(now),
        "speedups": sorted(row.point.speedup for row in now if row.point.speedup is not None),
    }


def _text(name: str) -> str:
    return (resources.files(__package__ or "") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
