"""The history of `bench` as series: one a case, machine, phase, backend and set of versions, with regressions marked.

Needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Final, Literal, TypeAlias

import attrs

from ..bench.history import Machine, Phase, Result, Run
from ..core.explain import counted

Mark: TypeAlias = Literal["", "slower", "faster"]

REFERENCE_RUNS: Final = 10
RULE: Final = (
    f"A run is marked slower when its whole interval (the quartiles of its rounds) lies above the intervals of all "
    f"earlier runs of the same case, phase, backend, machine and versions, of which the last {REFERENCE_RUNS} count; "
    "it is marked faster when it lies below all of them. A first run has nothing to be compared with."
)
THIN_RUNS: Final = 400
MAX_GROUPS: Final = 100
MAX_SERIES: Final = 40
_NAME_LENGTH: Final = 80


@attrs.frozen(kw_only=True)
class Point:
    """One run of a series.

    Attributes:
        run: which the result is of.
        result: as it was measured.
        mark: what the rule says of it.
        peer: the fastest peer of the same run, case and phase; None where the run has none.
    """

    run: Run
    result: Result
    mark: Mark
    peer: Result | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as that peer."""
        return None if self.peer is None else self.peer.median_ms / self.result.median_ms

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory as a share of that peer's."""
        own, other = self.result.peak_bytes, None if self.peer is None else self.peer.peak_bytes
        return own / other if own is not None and other else None


@attrs.frozen(kw_only=True)
class Series:
    """Runs that may be compared with each other, oldest first.

    Attributes:
        backend: or the peer's name.
        phase: "forward" or "training".
        peer: whether it is what ours are compared with.
        versions: of Python and the libraries, in one line.
        points: one a run.
    """

    backend: str
    phase: Phase
    peer: bool
    versions: str
    points: tuple[Point, ...]

    @property
    def recent(self) -> tuple[Mark, int]:
        """The last mark among the runs that the rule looks at, and how many runs ago that was."""
        for ago, point in enumerate(reversed(self.points[-REFERENCE_RUNS:])):
            if point.mark:
                return point.mark, ago
        return "", 0


@attrs.frozen(kw_only=True)
class Group:
    """All series of one case on one machine, the newest first.

    Attributes:
        case: its name.
        workload: length, head_dim, dtype and causality in one line.
        machine: in one line.
        series: at most `MAX_SERIES` of them.
        left_out: how many more there are.
    """

    case: str
    workload: str
    machine: str
    series: tuple[Series, ...]
    left_out: int


def short(text: str) -> str:
    """A name that someone else chose: cut where it is longer than a name has reason to be, and of signs that show.

    A sign that turns the direction of writing would otherwise turn what stands beside the name, too.
    """
    cut = text if len(text) <= _NAME_LENGTH else f"{text[: _NAME_LENGTH - 1]}…"
    return cut if cut.isprintable() else "".join(sign if sign.isprintable() else "\ufffd" for sign in cut)


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], int]:
    """The `MAX_GROUPS` groups that were measured last, those of the last run first, and how many more there are."""
    found: dict[object, dict[object, list[tuple[Run, Result]]]] = {}
    last: dict[object, int] = {}
    peers: dict[object, Result] = {}
    for index, run in enumerate(sorted(runs, key=lambda run: moment(run.when))):
        versions = tuple(sorted(run.versions.items()))
        for result in run.results:
            group = (result.case, *_workload_of(result), run.machine)
            last[group] = index
            series = (result.backend, result.phase, result.peer, versions)
            found.setdefault(group, {}).setdefault(series, []).append((run, result))
            key = _peer_key(run, result)
            if result.peer and (key not in peers or result.median_ms < peers[key].median_ms):
                peers[key] = result
    shown = sorted(found, key=last.__getitem__, reverse=True)[:MAX_GROUPS]
    return [_group(list(found[group].values()), peers) for group in shown], len(found) - len(shown)


def moment(when: str) -> float:
    """Seconds since 1970 of a run's time."""
    return datetime.fromisoformat(when).timestamp()


def marked(results: Sequence[Result]) -> Iterator[Mark]:
    """What `RULE` says of each result of a series, oldest first."""
    for index, result in enumerate(results):
        earlier = results[max(0, index - REFERENCE_RUNS) : index]
        if earlier and result.low_ms > max(other.high_ms for other in earlier):
            yield "slower"
        elif earlier and result.high_ms < min(other.low_ms for other in earlier):
            yield "faster"
        else:
            yield ""


def newest(group: Group) -> list[Series]:
    """The series that was measured last of each backend and phase: forward first, ours first, fastest first."""
    last: dict[tuple[str, str, bool], Series] = {}
    for series in group.series:  # the newest first
        last.setdefault((series.backend, series.phase, series.peer), series)
    return sorted(last.values(), key=lambda series: (series.phase, series.peer, series.points[-1].result.median_ms))


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `THIN_RUNS` of a longer series, besides all marked ones.

    The series is cut into stretches with as many runs each; a stretch keeps its fastest and its slowest run, so no
    peak is lost, and the series its first and last.
    """
    if len(points) <= THIN_RUNS:
        return list(points)
    kept = {0, len(points) - 1} | {index for index, point in enumerate(points) if point.mark}
    stretches = THIN_RUNS // 2 - 1
    bounds = [len(points) * i // stretches for i in range(stretches + 1)]
    for low, high in pairwise(bounds):
        stretch = range(low, high)
        kept.add(min(stretch, key=lambda index: points[index].result.median_ms))
        kept.add(max(stretch, key=lambda index: points[index].result.median_ms))
    return [points[index] for index in sorted(kept)]


def _workload_of(result: Result) -> tuple[int, int, str, bool]:
    return result.seq_len, result.head_dim, result.dtype, result.is_causal


def _peer_key(run: Run, result: Result) -> object:
    """What a result shares with the peers that it is compared with."""
    return id(run), result.case, _workload_of(result), result.phase


def _group(members: list[list[tuple[Run, Result]]], peers: dict[object, Result]) -> Group:
    members.sort(key=lambda pairs: moment(pairs[-1][0].when), reverse=True)
    run, result = members[0][-1]
    return Group(
        case=result.case,
        workload=_workload_words(result),
        machine=machine_words(run.machine),
        series=tuple(_series(pairs, peers) for pairs in members[:MAX_SERIES]),
        left_out=max(0, len(members) - MAX_SERIES),
    )


def _series(pairs: list[tuple[Run, Result]], peers: dict[object, Result]) -> Series:
    run, first = pairs[0]
    marks = marked([result for _, result in pairs])
    return Series(
        backend=first.backend,
        phase=first.phase,
        peer=first.peer,
        versions=", ".join(f"{name} {version}" for name, version in sorted(run.versions.items())),
        points=tuple(
            Point(
                run=run,
                result=result,
                mark=mark,
                peer=None if result.peer else peers.get(_peer_key(run, result)),
            )
            for (run, result), mark in zip(pairs, marks, strict=True)
        ),
    )


def _workload_words(result: Result) -> str:
    causal = "causal" if result.is_causal else "not causal"
    return f"{counted(result.seq_len, 'token')}, head_dim {result.head_dim:,}, {result.dtype}, {causal}"


def machine_words(machine: Machine) -> str:
    """A machine in one line."""
    if machine.device != "cpu":
        return machine.name
    return f"{machine.name}, {counted(machine.cores, 'core')}, {counted(machine.threads, 'thread')}"
