"""What the kit found, as a table for people and as data for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs

from ...core.explain import columns, counted
from ..specs import AXES
from .checks import CHECKS
from .grid import DTYPES
from .kit import Kit, Outcome
from .measure import Finding

# Axes that no configuration of this release can ask for, so that nothing can be checked about them.
UNASKED: tuple[str, ...] = (
    "window",
    "mask",
    "bias",
    "softcap",
    "sink",
    "alignment_bytes",
    "workspace_bytes",
    "paged",
    "descale",
)
_SHOWN = 3


@attrs.frozen(kw_only=True)
class Row:
    """One check over all its cases.

    Attributes:
        check: its name.
        title: what it asserts.
        status: "ok", "failed", or "skipped" where it was made on no case.
        made: on how many cases.
        failed: on how many of them.
        worst: the finding nearest to its bound or furthest beyond, where something was measured.
        case: the case of `worst`.
        why: why it was skipped.
        seconds: what it took.
    """

    check: str
    title: str
    status: Literal["ok", "failed", "skipped"]
    made: int = 0
    failed: int = 0
    worst: Finding | None = None
    case: str = ""
    why: str = ""
    seconds: float = 0.0


@attrs.frozen(kw_only=True, eq=False)
class Report:
    """What came of all checks. `str(report)` is the table.

    Attributes:
        backend: the backend's name.
        origin: its distribution and version.
        devices: what it was tested on.
        options: of the backend, with which it was tested.
        quick: on the smaller grid.
        cases: number of cases of the grid.
        drawn: number of cases that were drawn beside it.
        rows: one a check.
        failures: every outcome that did not pass.
        refusals: reasons for which the backend itself refused cases that it declares, and how many each.
        unchecked: what it declares and the kit has no check for.
        seconds: what it took.
    """

    backend: str
    origin: str
    devices: tuple[str, ...]
    options: dict[str, Any]
    quick: bool
    cases: int
    drawn: int
    rows: tuple[Row, ...]
    failures: tuple[Outcome, ...]
    refusals: dict[str, int]
    unchecked: tuple[str, ...]
    seconds: float

    @classmethod
    def of(cls, kit: Kit, outcomes: Sequence[Outcome]) -> Report:
        """The report of a kit's outcomes."""
        return cls(
            backend=kit.name,
            origin=kit.registered.source.origin,
            devices=kit.devices,
            options=dict(kit.options),
            quick=kit.quick,
            cases=len(kit.grid),
            drawn=len(kit.drawn),
            rows=tuple(_row(check.name, check.title, outcomes) for check in CHECKS),
            failures=tuple(outcome for outcome in outcomes if not outcome.passed),
            refusals=dict(kit.refusals),
            unchecked=tuple(_unchecked(kit)),
            seconds=sum(outcome.seconds for outcome in outcomes),
        )

    @property
    def passed(self) -> bool:
        """No check failed."""
        return not self.failures

    def __str__(self) -> str:
        return "\n".join(_text(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "backend": self.backend,
            "origin": self.origin,
            "devices": list(self.devices),
            "options": self.options,
            "quick": self.quick,
            "cases": self.cases,
            "drawn": self.drawn,
            "passed": self.passed,
            "seconds": self.seconds,
            "checks": [attrs.asdict(row) for row in self.rows],
            "failures": [
                {"check": failure.check, "case": failure.case, "pattern": failure.pattern}
                | {"findings": [attrs.asdict(finding) for finding in failure.findings]}
                for failure in self.failures
            ],
            "refusals": self.refusals,
            "unchecked": list(self.unchecked),
        }


def _row(name: str, title: str, outcomes: Sequence[Outcome]) -> Row:
    own = [outcome for outcome in outcomes if outcome.check == name]
    made = [outcome for outcome in own if not outcome.skipped]
    seconds = sum(outcome.seconds for outcome in own)
    if not made:
        why = "; ".join(dict.fromkeys(outcome.skipped for outcome in own))
        return Row(check=name, title=title, status="skipped", why=why or "no case of the grid is for it")
    failed = [outcome for outcome in made if not outcome.passed]
    worst = max(made, key=lambda outcome: outcome.worst.severity if outcome.worst else 0.0)
    return Row(
        check=name,
        title=title,
        status="failed" if failed else "ok",
        made=len(made),
        failed=len(failed),
        worst=worst.worst,
        case=worst.case,
        seconds=seconds,
    )


def _unchecked(kit: Kit) -> Iterator[str]:
    for axis, declared in kit.capabilities.items():
        if axis in UNASKED or axis not in AXES:
            yield axis
        elif axis == "dtypes" and declared is not True:
            yield from (f"dtype {name}" for name in declared if name not in DTYPES)


def _text(report: Report) -> Iterator[str]:
    grid = "quick grid" if report.quick else "full grid"
    on = ", ".join(report.devices)
    on += "".join(f", {name}={value}" for name, value in report.options.items())
    drawn = f" and {report.drawn} drawn" if report.drawn else ""
    yield f"{report.backend} of {report.origin} on {on}: {counted(report.cases, 'case')} ({grid}){drawn}"
    yield ""
    header = ("check", "status", "made", "worst error", "allowed", "correlation", "where")
    yield from columns([header, *(_cells(row) for row in report.rows)])
    for row in report.rows:
        if row.status == "failed":
            yield ""
            yield f"{row.check}  failed on {row.failed} of {row.made}: {row.title}"
            yield from _failures([f for f in report.failures if f.check == row.check])
    yield ""
    for refusal, count in report.refusals.items():
        yield f"left out, since the backend refuses them: {counted(count, 'case')} ({refusal})"
    if report.unchecked:
        yield f"declared, and not checked by this kit: {', '.join(report.unchecked)}"
    yield _verdict(report)


def _cells(row: Row) -> tuple[str, ...]:
    if row.status == "skipped":
        return (row.check, row.status, "-", "-", "-", "-", row.why)
    worst = row.worst
    if worst is None or worst.error is None or worst.bound is None:
        return (row.check, row.status, str(row.made), "-", "-", "-", row.case if row.failed else "")
    alike = "-" if worst.correlation is None else f"{worst.correlation:.6f}"
    return (row.check, row.status, str(row.made), f"{worst.error:.1e}", f"{worst.bound:.1e}", alike, row.case)


def _failures(failures: Sequence[Outcome]) -> Iterator[str]:
    for failure in failures[:_SHOWN]:
        yield from (f"    {line}" for line in str(failure).splitlines()[: _SHOWN + 2])
    if len(failures) > _SHOWN:
        yield f"    and {len(failures) - _SHOWN} more (--json has them all)"


def _verdict(report: Report) -> str:
    made = sum(1 for row in report.rows if row.status != "skipped")
    bad = sum(1 for row in report.rows if row.status == "failed")
    if bad:
        return f"{bad} of {made} checks failed, in {report.seconds:.1f} s"
    return f"all {made} checks passed, in {report.seconds:.1f} s"
