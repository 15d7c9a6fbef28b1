"""Measures one case: the gate, then interleaved rounds, then memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import attrs
import torch

from ..core.errors import ConfigError, DilatedAttentionError
from ..registry.build import explain
from .cases import BenchCase
from .contenders import Contender, Gate, admitted, candidates, ours
from .graphs import LONGEST, captured
from .history import PHASES, Phase, Result
from .peers import Peer, PeerMaker
from .timing import extra_bytes, in_turns, matrix_tflops, milliseconds

TRAINING_FACTOR = 3.5  # forward and backward against forward: five matrix products more, of two
_FEWEST_ROUNDS = 3


@attrs.frozen(kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        device: torch's name of the device.
        rounds: timed calls of each; the median counts.
        backends: NAME, NAME:KERNEL or NAME:OPTION=VALUE; where none are named, as `contenders.candidates` says.
        makers: of peers.
        case_seconds: rounds become fewer, but not below three, where they would take longer than this.
        slowest_seconds: a peer is left out where one training step of it would take longer by its FLOPs.
    """

    device: str
    rounds: int = 7
    backends: tuple[str, ...] = ()
    makers: tuple[PeerMaker, ...] = ()
    case_seconds: float = 10.0
    slowest_seconds: float = 10.0

    @property
    def device_type(self) -> str:
        """Without an index."""
        return self.device.partition(":")[0]


@attrs.frozen(kw_only=True)
class AutoPick:
    """What `auto` picks for a case, against the fastest of ours that was measured.

    Attributes:
        backend, kernel: its pick; the backend is None where none fits.
        fastest: name of the fastest in each phase, its kernel included.
        slower_percent: by how much the pick's median is above the fastest's; None where the pick was not measured.
    """

    backend: str | None
    kernel: str
    fastest: dict[Phase, str]
    slower_percent: dict[Phase, float | None]


@attrs.frozen(kw_only=True)
class CaseReport:
    """What came of one case.

    Attributes:
        case: which.
        results: one a contender and phase.
        auto: what `auto` picks.
        failures: what did not pass the gate, a line each.
        notes: what was left out and why.
    """

    case: BenchCase
    results: tuple[Result, ...]
    auto: AutoPick
    failures: tuple[str, ...]
    notes: tuple[str, ...]


def measure_case(case: BenchCase, settings: Settings, *, floor_tflops: float) -> CaseReport:
    """Gate, time and weigh every way to compute `case`."""
    notes: list[str] = []
    gate = Gate(case, settings.device, case.inputs(settings.device))
    names = candidates(case, settings.backends, settings.device, notes.append)
    found = ours(gate, names, notes.append)
    found += _peers(gate, settings, floor_tflops, notes.append)
    if settings.device_type == "cuda":
        found += _graphs(found, case, notes.append)
    times = interleaved(found, settings, notes.append)
    results = tuple(
        _result(case, contender, phase, times[i, phase], settings, floor_tflops)
        for i, contender in enumerate(found)
        for phase in PHASES
    )
    return CaseReport(
        case=case,
        results=results,
        auto=_auto(case, settings, results),
        failures=tuple(gate.failures),
        notes=tuple(notes),
    )


def floor_of(case: BenchCase, device: str) -> float:
    """The rate of a matrix product in the case's dtype, TFLOP/s."""
    return matrix_tflops(getattr(torch, case.dtype), device)


def _peers(gate: Gate, settings: Settings, floor_tflops: float, note: Callable[[str], None]) -> list[Contender]:
    found = []
    for make in settings.makers:
        peer: object = None
        with gate.reporting(getattr(make, "__name__", repr(make))):
            peer = make(gate.case, settings.device)
        if peer is None:
            continue
        if not isinstance(peer, Peer):
            raise ConfigError(
                f"what makes a peer must return a dilated_attention.bench.peers.Peer or None, got {peer!r}"
            )
        config = attrs.evolve(
            gate.case.config("auto", device=settings.device), pattern=peer.computes or gate.case.pattern
        )
        flops = explain(config).layout.flops
        assert flops is not None
        seconds = TRAINING_FACTOR * flops / (0.5e12 * floor_tflops)
        if seconds > settings.slowest_seconds:
            note(
                f"{gate.case.name}: {peer.name} left out: a step needs about {seconds:.2g} s by its FLOPs, allowed are "
                f"{settings.slowest_seconds:g} (--slowest)"
            )
            continue
        contender = admitted(gate, peer, make)
        found += [contender] if contender is not None else []
    return found


def _graphs(found: Sequence[Contender], case: BenchCase, note: Callable[[str], None]) -> list[Contender]:
    graphs = []
    for contender in found:
        if not contender.can_be_captured or case.seq_len > LONGEST:
            continue
        try:
            graphs.append(captured(contender, case.dtype))
        except (RuntimeError, DilatedAttentionError) as error:
            note(f"{case.name}: {contender.name} is not captured in a CUDA graph: {str(error).splitlines()[0]}")
    return graphs


def interleaved(
    found: Sequence[Contender], settings: Settings, note: Callable[[str], None]
) -> dict[tuple[int, Phase], list[float]]:
    """Milliseconds of every call, in rounds in which all take turns; the first ones warm up."""
    calls = {(i, phase): getattr(contender, phase) for i, contender in enumerate(found) for phase in PHASES}
    spent = 0.0
    for _ in range(2 if settings.device_type == "cuda" else 1):
        spent = sum(milliseconds(call, settings.device_type) for call in calls.values()) / 1e3
    rounds = settings.rounds
    if spent and rounds * spent > settings.case_seconds:
        rounds = min(rounds, max(_FEWEST_ROUNDS, int(settings.case_seconds / spent)))
    if rounds < settings.rounds:
        note(f"{rounds} rounds instead of {settings.rounds}: one takes {spent:.1f} s (--case-seconds)")
    return in_turns(calls, rounds, settings.device_type, warm_up=0)


def _result(
    case: BenchCase, contender: Contender, phase: Phase, times: list[float], settings: Settings, floor_tflops: float
) -> Result:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    factor = TRAINING_FACTOR if phase == "training" else 1.0
    rate = factor * contender.flops / median / 1e9
    is_graph = contender.name.endswith("CUDA graph")  # its memory was taken when it was captured
    return Result(
        case=case.name,
        backend=contender.name,
        kernel=contender.kernel,
        phase=phase,
        seq_len=case.seq_len,
        head_dim=case.head_dim,
        dtype=case.dtype,
        is_causal=case.is_causal,
        rounds=len(times),
        median_ms=median,
        low_ms=low,
        high_ms=high,
        tflops=rate,
        distinct_tflops=factor * contender.distinct_flops / median / 1e9,
        floor_share=rate / floor_tflops,
        peak_bytes=None if is_graph else extra_bytes(getattr(contender, phase), settings.device_type),
        error=contender.error,
        peer=contender.is_peer,
    )


def _auto(case: BenchCase, settings: Settings, results: Sequence[Result]) -> AutoPick:
    plan = explain(case.config("auto", device=settings.device))
    fastest: dict[Phase, str] = {}
    slower: dict[Phase, float | None] = {}
    for phase in PHASES:
        mine = [r for r in results if r.phase == phase and not r.peer and not r.backend.endswith("CUDA graph")]
        if not mine:
            continue
        best = min(mine, key=lambda r: r.median_ms)
        picked = [r for r in mine if (r.backend, r.kernel) == (plan.backend, plan.kernel)]
        fastest[phase] = f"{best.backend}: {best.kernel}"
        slower[phase] = 100 * (picked[0].median_ms / best.median_ms - 1) if picked else None
    return AutoPick(backend=plan.backend, kernel=plan.kernel, fastest=fastest, slower_percent=slower)
