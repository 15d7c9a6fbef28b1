"""LongNet's attention against dense attention: a case of the bench, its forward pass alone."""

from __future__ import annotations

import statistics

import attrs

from ..bench.cases import CASES
from ..bench.contenders import Contender, Gate, admitted, candidates, ours
from ..bench.peers import dense_sdpa
from ..bench.timing import extra_bytes, in_turns
from ..core.errors import DilatedAttentionError
from ..core.explain import columns

CASE = CASES["longnet-16k"]
REPEATS = 3


@attrs.frozen
class Result:
    """One way to compute attention.

    Attributes:
        seconds: median of the forward passes.
        peak_bytes: most that PyTorch's CPU allocator held during one of them, above the inputs.
        error: the largest distance of out or a gradient to the oracle, on the case's likeness.
    """

    name: str
    seconds: float
    peak_bytes: int
    error: float | None


def compare() -> tuple[Result, Result]:
    """LongNet and dense attention, taking turns, after both have passed the bench's gate.

    Raises:
        DilatedAttentionError: one did not pass.
    """
    gate, notes = Gate(CASE, "cpu", CASE.inputs("cpu")), list[str]()
    longnet = ours(gate, candidates(CASE, ("auto",), "cpu", notes.append), notes.append)
    peer = dense_sdpa(CASE, "cpu")
    dense = admitted(gate, peer, dense_sdpa) if peer else None
    if not longnet or dense is None:
        raise DilatedAttentionError("; ".join([*gate.failures, *notes]))
    calls = {"LongNet, dilated-attention": longnet[0], "dense, PyTorch SDPA": dense}
    times = in_turns({name: call.forward for name, call in calls.items()}, REPEATS, "cpu", warm_up=0)
    first, second = (_result(name, call, times[name]) for name, call in calls.items())
    return first, second


def _result(name: str, contender: Contender, times: list[float]) -> Result:
    return Result(name, statistics.median(times) / 1e3, extra_bytes(contender.forward, "cpu"), contender.error)


def table(results: tuple[Result, ...]) -> str:
    """The results as aligned text."""
    rows = [("", "forward", "peak extra memory", "relative error")]
    rows += [(r.name, f"{r.seconds:.2f} s", f"{r.peak_bytes / 2**20:.0f} MiB", f"{r.error:.1e}") for r in results]
    return "\n".join(columns(rows))
