"""The ways to compute one case that have passed the gate, ours and peers alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import attrs
import torch
from torch import Tensor

from ..core.attention import Attention
from ..core.pattern import Pattern
from ..core.plan import AttentionPlan
from ..registry.build import build_attention, explain
from ..registry.plugins import PLUGIN_FAULTS
from .cases import BenchCase
from .oracle import truth
from .peers import Peer, PeerMaker
from .timing import difference, milliseconds, training

BOUNDS: Final = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
# Kernels among which a backend chooses on CUDA; where it is not told which, each is measured.
_KERNELS: Final = {"sdpa": ("cudnn", "flash"), "xformers": ("flash", "cutlass")}
# One of ours is left out where a pass takes this long, and that many times as long as another of ours.
_SLOW_MS: Final = 250.0
_SLOWER: Final = 10.0
# Beyond this, launching is less than a hundredth of a call.
_LAUNCHES_MATTER_MS: Final = 50.0

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@attrs.frozen(eq=False)
class Contender:
    """One way to compute a case, having passed the gate.

    Attributes:
        name: of the backend or peer.
        kernel: its sub-kernel.
        forward: inference; returns out.
        training: forward and backward.
        flops: that its pattern needs in a forward pass, each pair as often as it counts.
        distinct_flops: the same, each pair once.
        error: distance to the oracle; None where it cannot be said.
        is_peer: whether ours are compared with it.
        can_be_captured: whether it is worth being replayed from a CUDA graph.
    """

    name: str
    kernel: str
    forward: Callable[[], Tensor]
    training: Callable[[], object]
    flops: int
    distinct_flops: int
    error: float | None
    is_peer: bool = False
    can_be_captured: bool = False


@attrs.define(eq=False)
class Gate:
    """Compares with the oracle on the likeness of a case, and at the full length with the first that was right there.

    Attributes:
        case: which case.
        device: torch's name of the device.
        inputs: query, key, value and the gradient of out at the full length.
        failures: what was wrong, a line each.
        first: name and out of the first of ours that passed.
    """

    case: BenchCase
    device: str
    inputs: list[Tensor]
    failures: list[str] = attrs.field(factory=list)
    first: tuple[str, Tensor] | None = None
    _truths: dict[Pattern, list[Tensor]] = attrs.field(factory=dict)

    def small_inputs(self) -> list[Tensor]:
        """Those of the likeness."""
        return self.case.small().inputs(self.device, seed=1)

    def truth(self, pattern: Pattern) -> list[Tensor]:
        """out, dq, dk and dv of the likeness by the definition, float64."""
        if pattern not in self._truths:
            self._truths[pattern] = truth(self.small_inputs(), pattern, is_causal=self.case.is_causal)
        return self._truths[pattern]

    @contextmanager
    def reporting(self, name: str) -> Iterator[None]:
        """A kernel that raises (no memory, no compilation) is a failure of its own, and so is a peer; others go on."""
        try:
            yield
        except PLUGIN_FAULTS as error:  # libraries that compile raise what they like
            said = str(error).strip().partition("\n")[0]
            self.failures.append(f"{self.case.name}, {name}: {type(error).__name__}: {said}: no times")

    def error(self, name: str, attend: Attend, pattern: Pattern, *, gradients: bool = True) -> float | None:
        """How far `attend` is from the oracle; None, and a line among the failures, where that is too far."""
        inputs = self.small_inputs()
        leaves = [x.requires_grad_() for x in inputs[:3]]
        out = attend(leaves[0], leaves[1], leaves[2])
        found = [out, *(torch.autograd.grad(out, leaves, inputs[3]) if gradients else ())]
        names = ("out", "dq", "dk", "dv")
        errors = {what: difference(a, e) for what, a, e in zip(names, found, self.truth(pattern), strict=False)}
        worst, bound = max(errors, key=lambda what: errors[what]), BOUNDS[self.case.dtype]
        if errors[worst] < bound:
            return errors[worst]
        self.failures.append(
            f"{self.case.name}, {name}: {worst} is off the float64 oracle by {errors[worst]:.1e} at "
            f"{self.case.gate_len:,} tokens, allowed is {bound:.0e}: no times"
        )
        return None

    def agrees(self, name: str, out: Tensor, *, is_peer: bool = False) -> bool:
        """Whether `out` is what the first of ours computed at the full length."""
        bound = BOUNDS[self.case.dtype]
        if self.first is None:
            if bool(torch.isfinite(out).all()):
                self.first = None if is_peer else (name, out)
                return True
            self.failures.append(f"{self.case.name}, {name}: not finite at {self.case.seq_len:,} tokens: no times")
            return False
        off = difference(out, self.first[1])
        if off < bound:
            return True
        self.failures.append(
            f"{self.case.name}, {name}: differs from {self.first[0]} by {off:.1e} at {self.case.seq_len:,} tokens, "
            f"allowed is {bound:.0e}: no times"
        )
        return False


def candidates(case: BenchCase, wanted: Sequence[str], device: str, note: Callable[[str], None]) -> Iterator[str]:
    """NAME, NAME:KERNEL or NAME:OPTION=VALUE: those asked for, or all that take the case and are not `slow`.

    Those that refuse it are noted.
    """
    plan = explain(case.config("auto", device=device))
    if wanted:
        for name in wanted:
            picked = f"{plan.backend}" if name == "auto" else name
            if plan.backend is None and name == "auto":
                note(f"{case.name}: auto finds no backend")
            else:
                yield picked
        return
    refused: list[str] = []
    for row in plan.rows:
        if row.status not in ("chosen", "usable"):
            refused.append(row.name)
        elif not row.slow:
            kernels = _KERNELS.get(row.name, ()) if case.device == "cuda" and device.startswith("cuda") else ()
            yield from [f"{row.name}:{kernel}" for kernel in kernels] or [row.name]
    if refused:
        note(f"{case.name}: refused by {', '.join(refused)} (`dilated-attention explain` says why)")


def ours(gate: Gate, names: Iterable[str], note: Callable[[str], None]) -> list[Contender]:
    """Our backends, as `candidates` names them, that pass the gate."""
    case, device = gate.case, gate.device
    fastest, found = math.inf, list[Contender]()
    for name in dict.fromkeys(names):
        backend, _, option = name.partition(":")
        plan = explain(case.config(backend, option, device=device))
        if plan.backend is None:
            note(f"{case.name}: {name} refuses: {_reasons(plan, backend)}")
            continue
        with gate.reporting(name):
            error = gate.error(name, _attend(case.small(), backend, option, device), case.gate_pattern)
            if error is None:
                continue
            attention = build_attention(case.config(backend, option, device=device))
            contender = _contender(gate, backend, plan.kernel, attention, error, plan)
            if not gate.agrees(name, contender.forward()):
                continue
            taken = milliseconds(contender.forward, device.partition(":")[0])
            fastest = min(fastest, taken)
            if taken > max(_SLOW_MS, _SLOWER * fastest):
                note(f"{case.name}: {name} left out: {taken / fastest:.0f} times as long as the fastest before it")
                continue
            found.append(
                attrs.evolve(contender, can_be_captured=contender.can_be_captured and taken < _LAUNCHES_MATTER_MS)
            )
    return found


def admitted(gate: Gate, peer: Peer, make: PeerMaker) -> Contender | None:
    """The peer, where it passes the gate."""
    case = gate.case
    with gate.reporting(peer.name):
        small = make(case.small(), gate.device)
        if small is None:
            gate.failures.append(
                f"{case.name}, {peer.name}: does not take the case at {case.gate_len:,} tokens: no times"
            )
            return None
        error = gate.error(
            peer.name, small.attend, peer.computes or case.gate_pattern, gradients=peer.has_exact_gradients
        )
        if error is None:
            return None
        config = attrs.evolve(case.config("auto", device=gate.device), pattern=peer.computes or case.pattern)
        contender = _contender(gate, peer.name, peer.kernel, peer.attend, error, explain(config), is_peer=True)
        if peer.computes is None and not gate.agrees(peer.name, contender.forward(), is_peer=True):
            return None
        return contender
    return None


def _attend(case: BenchCase, backend: str, option: str, device: str) -> Attend:
    attention = build_attention(case.config(backend, option, device=device))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention(query, key, value)
        return out

    return attend


def _contender(
    gate: Gate,
    name: str,
    kernel: str,
    attend: Attend | Attention,
    error: float,
    plan: AttentionPlan,
    *,
    is_peer: bool = False,
) -> Contender:
    query, key, value, _ = gate.inputs

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = attend(query, key, value)
        return out

    assert plan.layout.flops is not None
    assert plan.layout.distinct_flops is not None
    return Contender(
        name=name,
        kernel=kernel,
        forward=forward,
        training=training(attend, gate.inputs),
        flops=plan.layout.flops,
        distinct_flops=plan.layout.distinct_flops,
        error=error,
        is_peer=is_peer,
        can_be_captured=not is_peer and gate.device.startswith("cuda"),
    )


def _reasons(plan: AttentionPlan, backend: str) -> str:
    rows = [row for row in plan.rows if row.name == backend]
    return "; ".join(map(str, rows[0].refusals)) or rows[0].detail if rows else "it is not registered"
