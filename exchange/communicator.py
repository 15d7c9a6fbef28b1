"""A ring of ranks: passes that either happen on all of them or break the ring, and counters of what was moved."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import attrs
from torch import Tensor

from ..core.errors import RingBroken
from ..core.tracing import span
from .control import DTYPES, Control, Failure, Header
from .guard import Guard

if TYPE_CHECKING:
    from .transport import Pending, Transport

ROWS, GRADIENTS, HOPS, HOPS_BACK = range(4)
# A broken connection may be the wake of another rank's end: so long one waits to hear whose.
_LAST_WORDS_S: Final = 0.25
_NO_RETRY: Final = "nothing is retried in place: rebuild it over the ranks that are left"


@attrs.define(eq=False)
class Counters:
    """What one rank has moved, over the ring or for one plan; bytes of rows and gradients, headers apart.

    Attributes:
        passes: forward and backward passes begun.
        forward_sent, forward_received: bytes of keys and values.
        backward_sent, backward_received: bytes of gradients, and of keys and values that travel again beside them.
        header_bytes: bytes of headers sent.
        waited_s: time spent waiting for rows after the local work was done (on CUDA, after it was launched).
    """

    passes: int = 0
    forward_sent: int = 0
    forward_received: int = 0
    backward_sent: int = 0
    backward_received: int = 0
    header_bytes: int = 0
    waited_s: float = 0.0

    def count(self, kind: int, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        """Add the messages of one exchange."""
        sent, received = (sum(x.nbytes for _, x in messages) for messages in (sends, receives))
        if kind in (ROWS, HOPS):
            self.forward_sent += sent
            self.forward_received += received
        else:
            self.backward_sent += sent
            self.backward_received += received


@attrs.frozen(eq=False)
class Posted:
    """An exchange under way, and its name in traces."""

    pending: Pending
    name: str


@attrs.frozen
class Origin:
    """Which call of which attention a pass computes: attentions that are built alike share all else.

    Attributes:
        attention: the number of its build, which copies keep.
        call: the forward pass that is gone back through, or computed again; 0 in a first one.
    """

    attention: int = 0
    call: int = 0


class Pass:
    """One pass of one rank, which the others know of: everything posted in it is waited for before it ends.

    What is computed before the first messages are posted runs while the others' headers are on their way.

    Attributes:
        number: of all passes of the ring, from 1.
    """

    def __init__(self, communicator: Communicator, kind: int, counters: Counters, agree: Callable[[], None]) -> None:
        self.number = communicator.passes
        self._communicator = communicator
        self._counters = (communicator.counters, counters)
        self._kind = kind
        self._agree: Callable[[], None] | None = agree
        self._step = 0

    def agree(self) -> None:
        """Wait, once, until all ranks are in this pass; nothing is posted before.

        Raises:
            Failure: a rank is gone, has failed, is in another pass, or silent for too long.
        """
        if self._agree is not None:
            agree, self._agree = self._agree, None
            with span("ring headers"):
                agree()

    @property
    def launches_first(self) -> bool:
        """See `Transport`."""
        return self._communicator.transport.launches_first

    def mark(self) -> object:
        """See `Transport`."""
        return self._communicator.transport.mark()

    def aside(self, after: object = None) -> AbstractContextManager[None]:
        """See `Transport`."""
        return self._communicator.transport.aside(after)

    def rejoin(self) -> None:
        """See `Transport`."""
        self._communicator.transport.rejoin()

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Posted:
        """Start an exchange, once all ranks are in the pass; messages of 0 elements are left out on both sides.

        Args:
            sends: contiguous tensors, by receiver.
            receives: contiguous tensors, by sender.
        """
        self.agree()
        sends = [(peer, x) for peer, x in sends if x.numel()]
        receives = [(peer, x) for peer, x in receives if x.numel()]
        for counters in self._counters:
            counters.count(self._kind, sends, receives)
        self._step += 1
        self._communicator.expect()  # a rank may block before it comes to wait
        peers = ", ".join(str(peer) for peer, _ in receives) or "none"
        pending = self._communicator.transport.post(sends, receives)
        return Posted(pending, f"ring step {self._step} receive from {peers}")

    def wait(self, posted: Posted) -> None:
        """Wait for an exchange, for `timeout_s` at most."""
        before = time.perf_counter()
        with span(posted.name):
            posted.pending.wait(self._communicator.expect())
        self._communicator.expect(math.inf)
        waited = time.perf_counter() - before
        for counters in self._counters:
            counters.waited_s += waited


class Communicator:
    """The ranks of one ring, in one generation. All passes of a rank go through it, one after another.

    Attributes:
        rank: this rank, within the ring.
        size: ranks in the ring.
        generation: 0 as built; every rebuild is a later one.
        timeout_s: longest wait for another rank, each time.
        number: of the build that it was connected for, the same on all ranks.
        counters: what was moved, for all plans that share the ring.
    """

    def __init__(
        self,
        control: Control,
        transport: Transport,
        *,
        rank: int,
        size: int,
        generation: int,
        timeout_s: float,
        number: int = 0,
    ) -> None:
        self.rank = rank
        self.size = size
        self.generation = generation
        self.timeout_s = timeout_s
        self.number = number
        self.transport = transport
        self.counters = Counters()
        self._control = control
        self._guard = Guard(control, transport.close) if transport.is_guarded else None
        self._step = 0
        self._broken: RingBroken | None = None
        self._lock = threading.Lock()
        # Nobody uses it any more. At exit the connections end with the process.
        self._end = weakref.finalize(self, _leave, control, transport, timeout_s)
        self._end.atexit = False
        _LIVING.add(self)

    def __deepcopy__(self, memo: dict[int, object]) -> Communicator:
        return self

    @property
    def passes(self) -> int:
        """Passes entered by now."""
        return self._step

    @property
    def broken(self) -> RingBroken | None:
        """Why it is closed, or None while it works."""
        return self._broken

    @contextmanager
    def begin(
        self, kind: int, x: Tensor, *, digest: bytes, counters: Counters, origin: Origin = Origin()
    ) -> Iterator[Pass]:
        """Tell all ranks of a pass and enter it; whatever goes wrong inside breaks the ring.

        Before anything is posted, and before the pass ends, all ranks are waited for (`Pass.agree`).

        Args:
            kind: `ROWS` or another of these.
            x: a shard, (B, S, ...), of which all ranks' are alike.
            digest: 16 bytes that identify configuration and length.
            counters: of the plan that is computed; what is moved is counted there too.
            origin: which call this is.

        Raises:
            RingBroken: it was broken before, a rank is gone or silent or in another pass, or the body raised.
        """
        with self._lock:
            if self._broken is not None:
                raise self._closed(self._broken.peer, self._broken.reason)
            self._step += 1
            self.counters.passes += 1
            counters.passes += 1
            header = Header(
                generation=self.generation, step=self._step, kind=kind, digest=digest, batch=x.shape[0],
                length=x.shape[1], dtype=DTYPES.index(str(x.dtype).removeprefix("torch.")),
                attention=origin.attention, call=origin.call,
            )  # fmt: skip
            try:
                self._control.announce(header)
                counters.header_bytes += self._control.bytes_sent - self.counters.header_bytes
                self.counters.header_bytes = self._control.bytes_sent
                with ExitStack() as watched:
                    current = Pass(self, kind, counters, lambda: self._agree(header, watched))
                    yield current
                    current.agree()
            except Exception as error:
                raise self._break(error) from error
            except BaseException as error:  # an interrupt goes on as it is; the others still hear of it
                self._break(error)
                raise

    def _agree(self, header: Header, watched: ExitStack) -> None:
        """Wait for all ranks; from then on the pass is guarded, where it needs to be."""
        self._control.agree(header, time.monotonic() + self.timeout_s)
        if self._guard is not None:
            watched.enter_context(self._guard.over(math.inf))

    def expect(self, deadline: float | None = None) -> float:
        """Within a pass, from now on, wait until `deadline`, or for `timeout_s`; returns until when."""
        if deadline is None:
            deadline = time.monotonic() + self.timeout_s
        if self._guard is not None:
            self._guard.put_off(deadline)
        return deadline

    def _break(self, error: BaseException) -> RingBroken:
        """Close at once, telling the others; returns what to raise."""
        if isinstance(error, Failure):
            self.transport.close()  # whoever waits for this rank wakes, and tells what it knows
            peer, reason = error.peer, error.reason
            blamed = None if error.is_certain else self._control.blame(_LAST_WORDS_S)
            if blamed is not None and blamed[0] != self.rank:
                peer, reason = blamed
            self._control.close(peer, failed=True)
        else:
            peer, reason = self.rank, f"{type(error).__name__}: {error}"
            self._control.close(peer, failed=True)  # first, since aborting a transport may take its time
            self.transport.close()
        self._broken = self._closed(peer, f"{reason}; {_NO_RETRY}")
        return self._closed(peer, reason)  # not the one that is kept: its traceback keeps what the caller computed

    def _closed(self, peer: int | None, reason: str) -> RingBroken:
        return RingBroken(self.generation, self._step, peer, reason)

    def close(self) -> None:
        """Leave the ring in peace; the next pass of any rank raises `RingBroken`."""
        with self._lock:
            if self._broken is None:
                self._broken = self._closed(self.rank, f"it was closed; {_NO_RETRY}")
                _leave(self._control, self.transport, self.timeout_s)

    def abandon(self) -> None:
        """In the child of a fork: the ring is its parent's, whose death the others hear by connections that close."""
        self._lock = threading.Lock()  # another thread of the parent may have held the old one
        self._end.detach()
        self._control.abandon()
        _PARENTS.append(self.transport)
        reason = f"this process was forked from rank {self.rank} and is none itself: call attentions in the rank alone"
        self._broken = self._closed(None, reason)


_LIVING: Final[weakref.WeakSet[Communicator]] = weakref.WeakSet()
_PARENTS: Final[list[Transport]] = []  # kept by children of a fork: to take one down is to wait for its threads


def _abandon_all() -> None:
    for communicator in tuple(_LIVING):
        communicator.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


def _leave(control: Control, transport: Transport, patience_s: float) -> None:
    """Close in peace; what is closed already stays so.

    Where a transport is aborted, ranks in the last pass may still read what this one holds: they are waited for, aside.
    """
    control.tell_end(None, failed=False)
    if not transport.is_guarded:
        _close(control, transport)
        return
    aside = (control, transport, time.monotonic() + patience_s)
    threading.Thread(target=_leave_last, args=aside, name="ring-leave", daemon=True).start()


def _leave_last(control: Control, transport: Transport, deadline: float) -> None:
    control.await_ends(deadline)
    _close(control, transport)


def _close(control: Control, transport: Transport) -> None:
    transport.close()
    control.abandon()


def digest_bytes(text: str) -> bytes:
    """16 bytes of SHA-256."""
    from hashlib import sha256

    return sha256(text.encode()).digest()[:16]
