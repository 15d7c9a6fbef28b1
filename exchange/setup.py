"""Setting up a ring: its ranks agree on what they build, and connect, trying again with growing pauses.

Nothing has been posted yet, so trying again is safe here, and only here.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from torch.distributed.distributed_c10d import PrefixStore

from ..core.errors import ConfigError, RingBroken
from .communicator import Communicator
from .control import Control
from .deadlines import read_store
from .nccl import NcclTransport
from .transport import GlooTransport, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
_FAULTS: Final = (RuntimeError, OSError)  # torch's store and group errors are RuntimeErrors


def pauses(draw: Callable[[], float] = random.random) -> Iterable[float]:
    """Seconds to wait before each further try: doubling from 0.05 up to 2, each drawn from its upper half."""
    longest = _FIRST_PAUSE_S
    while True:
        yield longest * (0.5 + 0.5 * draw())
        longest = min(2 * longest, _LONGEST_PAUSE_S)


def with_backoff(attempt: Callable[[int], T], deadline: float) -> T:
    """The result of `attempt(n)`, n = 0, 1, ..., tried until it succeeds or the deadline (`time.monotonic`) passes.

    Raises:
        RuntimeError, OSError: the last failure.
    """
    for number, pause in enumerate(pauses()):
        try:
            return attempt(number)
        except _FAULTS:
            if time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
    raise AssertionError("pauses never end")


def connect(
    store: Store,
    rank: int,
    size: int,
    *,
    transport: str,
    generation: int,
    timeout_s: float,
    number: int = 0,
) -> Communicator:
    """A communicator over `size` ranks that share `store`.

    Every try has a prefix of its own in the store and counts only when all ranks succeed in it, so that none goes on
    with connections that another has given up.

    Args:
        store: what is put there must not have been used by another ring.
        rank: this rank within the ring.
        size: ranks in the ring.
        transport: "gloo_cpu" or "ring_nccl".
        generation: 0 for a first build.
        timeout_s: of set-up, and of every wait in a pass.
        number: see `Communicator`.

    Raises:
        RingBroken: not all ranks were there in time.
    """
    deadline = time.monotonic() + timeout_s
    told: list[str] = []  # what went wrong in tries that all ranks know the outcome of

    def attempt(number: int) -> tuple[Control, Transport]:
        here = PrefixStore(f"try-{number}", store)
        # A third of the time that is left, so that a try of which one rank has dropped out is not the last.
        until = time.monotonic() + max(0.5, (deadline - time.monotonic()) / 3)
        parts: list[Control | Transport] = []
        try:
            try:
                parts.append(control := Control.connect(PrefixStore("control", here), rank, size, until))
                parts.append(data := _transport(transport, PrefixStore("data", here), control, size, until, timeout_s))
                verdict = "ok"
            except _FAULTS as error:
                verdict = f"{type(error).__name__}: {error}"
            here.set(f"verdict/{rank}", verdict)
            verdicts = [read_store(here, f"verdict/{peer}", deadline).decode() for peer in range(size)]
            if any(said != "ok" for said in verdicts):
                told.append("; ".join(f"rank {i}: {said}" for i, said in enumerate(verdicts) if said != "ok"))
                raise RuntimeError(told[-1])
        except BaseException:
            for part in reversed(parts):
                part.close(None, failed=True) if isinstance(part, Control) else part.close()
            raise
        return control, data

    try:
        control, data = with_backoff(attempt, deadline)
    except _FAULTS as error:
        reason = f"not all {size} ranks could be connected within {timeout_s:g} s: {told[-1] if told else error}"
        raise RingBroken(generation, 0, None, reason) from error
    return Communicator(control, data, rank=rank, size=size, generation=generation, timeout_s=timeout_s, number=number)


def _transport(name: str, store: Store, control: Control, size: int, deadline: float, timeout_s: float) -> Transport:
    if name == NcclTransport.name:
        return NcclTransport(store, control.rank, size, timeout_s=timeout_s, deadline=deadline, watch=control.look)
    return GlooTransport(store, control.rank, size, max(1.0, deadline - time.monotonic()), watch=control.look)


def refuse(store: Store, rank: int, error: Exception) -> None:
    """Tell those who call `compare_plans` over `store` that this rank cannot build."""
    store.set(f"facts/{rank}", json.dumps({"refused": f"{type(error).__name__}: {error}"}))


def compare_plans(
    store: Store,
    rank: int,
    size: int,
    facts: Mapping[str, Any],
    timeout_s: float,
    *,
    generation: int,
    ring: int,
) -> list[int]:
    """Compare what all ranks are about to build.

    Args:
        store: what is put there must not have been used before.
        rank: this rank.
        size: ranks that must agree.
        facts: what must be equal, plain values.
        timeout_s: how long to wait for the others.
        generation: 0 for a first build.
        ring: the number of the ring that this rank has for it, which need not be equal.

    Returns:
        Every rank's `ring`.

    Raises:
        ConfigError: something differs, or a rank cannot build; the message, the same on every rank, names what on which
            rank.
        RingBroken: a rank did not say in time what it builds.
    """
    deadline = time.monotonic() + timeout_s
    store.set(f"facts/{rank}", json.dumps({"facts": facts, "ring": ring}, sort_keys=True))
    said: list[dict[str, Any]] = []
    for peer in range(size):
        try:
            said.append(json.loads(read_store(store, f"facts/{peer}", deadline)))
        except RuntimeError as error:
            call = "rebuild" if generation else "build_attention"
            reason = f"it did not call {call} within {timeout_s:g} s, or not as often as rank {rank}"
            if time.monotonic() < deadline:
                reason = f"the store of the mesh failed while it was waited for: {error}"
            raise RingBroken(generation, 0, peer, reason) from error
    refused = [
        f"rank {peer} cannot build its own: {words['refused']}" for peer, words in enumerate(said) if "refused" in words
    ]
    if refused:
        raise ConfigError("; ".join(refused))
    differences = list(_differences([words["facts"] for words in said]))
    if differences:
        raise ConfigError("the ranks build different attentions: " + "; ".join(differences))
    return [words["ring"] for words in said]


def _differences(said: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """One phrase a fact that is not the same everywhere, with the ranks that have each value."""
    for name in sorted({name for facts in said for name in facts}):
        holders: dict[str, list[int]] = {}
        for rank, facts in enumerate(said):
            holders.setdefault(json.dumps(facts.get(name), sort_keys=True), []).append(rank)
        if len(holders) > 1:
            sides = [f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in holders.items()]
            yield f"{name} is {' but '.join(sides)}"
