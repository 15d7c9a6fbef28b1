"""The data planes: what moves rows between ranks. They post without waiting and are used for one pass at a time."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakSet, finalize

import attrs
import torch.distributed as dist
from torch import Tensor

from .control import Failure
from .deadlines import time_left
from .guard import LOOK_EVERY_S

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_TAG: Final = 1
# What Gloo has to say after the control plane has told of a failure: as a rule it knows whose, and a pass whose rows
# are all under way is done before a rank is missed that has failed in the next one.
_PATIENCE_S: Final = 0.2
_EARLY_S: Final = 0.001  # by which a wait may end before its timeout, which Gloo counts in milliseconds
_EXIT_S: Final = 10.0  # longer than a process takes to end


class Pending(Protocol):
    """Messages under way."""

    def wait(self, deadline: float) -> None:
        """Return when all have arrived.

        Raises:
            Failure: a peer is gone, or late at the deadline (`time.monotonic`).
        """


class Transport(Protocol):
    """Moves tensors between the ranks of one ring."""

    @property
    def is_guarded(self) -> bool:
        """A rank may block in it, or because of it, until `close` is called from another thread: see `Guard`."""

    @property
    def launches_first(self) -> bool:
        """Computing is asynchronous: launched before anyone is waited for, it hides that the host waits."""

    def mark(self) -> object:
        """A point of the device's work so far, for `aside`; None where computing is not asynchronous."""

    def aside(self, after: object = None) -> AbstractContextManager[None]:
        """What is launched inside runs beside what is launched outside, in order with all else that is inside.

        It follows `after`, a `mark`; then so does whatever is inside later. Memory that is allocated inside must be
        read and written inside alone; what is outside follows at `rejoin`.
        """

    def rejoin(self) -> None:
        """What is launched from here on follows all that was launched aside."""

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """Start sending and receiving contiguous tensors, at most one a peer and direction."""

    def close(self) -> None:
        """Drop all connections, waking everyone on this rank who waits for one; may be called twice, by any thread."""


@attrs.define(eq=False)
class _Works:
    """torch's handles, each with its peer; the tensors are kept alive until they have been waited for."""

    waiter: _Waiter
    works: list[tuple[int, Any]]
    tensors: tuple[Tensor, ...]

    def wait(self, deadline: float) -> None:
        """See `Pending`."""
        if self.works:
            self.waiter.wait(self, deadline)
        self.tensors = ()

    def finish(self, deadline: float) -> None:
        """As `wait`, but deaf to what the control plane says, and not always woken by Gloo: see `_Waiter`."""
        while self.works:
            peer, work = self.works.pop(0)
            try:
                work.wait(time_left(deadline))
            except RuntimeError as error:
                del work  # the error's traceback keeps what this frame holds
                self.drop()
                # Messages among ranks that are there need nobody else: who is late at the deadline is to blame.
                late = time.monotonic() >= deadline - _EARLY_S
                reason = f"its connection has ended: {_first_line(error)}"
                if late:
                    reason = "rows that it was to send, or to take, were not there before the timeout"
                raise Failure(peer, reason, is_certain=late) from error

    def drop(self) -> None:
        """Forget what has not been waited for: handles keep their connections open."""
        self.works.clear()
        self.tensors = ()


class _Waiter:
    """A thread that waits for a transport's messages, so that its rank can hear of failures meanwhile.

    When a connection ends, Gloo wakes whoever waits for a message that has not begun, but nobody whose message is under
    way: partly written or read, or written into a connection that was just closed. Only the timeout ends such a wait:
    torch can neither abort one nor ask whether it would end, and a shorter one that expires breaks all connections. It
    is left behind in the thread, with its one handle, until the deadline.

    Args:
        watch: called while waiting; raises `Failure` where a rank has failed.
    """

    def __init__(self, watch: Callable[[], None]) -> None:
        self._watch = watch
        self._asked: SimpleQueue[tuple[_Works, float] | None] = SimpleQueue()
        self._said: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread = Thread(target=_wait_on, args=(self._asked, self._said), name="ring-wait", daemon=True)
        self._thread.start()
        self.close: Final = finalize(self, self._asked.put, None)

    def wait(self, posted: _Works, deadline: float) -> None:
        """As `Pending.wait`. After an error nothing may be waited for again: the thread may still be at it."""
        self._asked.put((posted, deadline))
        failure, until = None, deadline
        try:
            while not self._is_done():
                if failure is None:
                    try:
                        self._watch()
                    except Failure as heard:
                        failure, until = heard, time.monotonic() + _PATIENCE_S
                elif time.monotonic() >= until:
                    raise failure
        except BaseException:
            atexit.register(_outlast, self._thread, deadline)
            raise

    def _is_done(self) -> bool:
        """Whether the thread has done what it was asked, after a moment; raises what that has raised."""
        try:
            error = self._said.get(timeout=LOOK_EVERY_S)
        except Empty:
            return False
        if error is not None:
            raise error
        return True


def _wait_on(asked: SimpleQueue[tuple[_Works, float] | None], said: SimpleQueue[BaseException | None]) -> None:
    """A waiter's thread; ends once it is asked for None."""
    while (question := asked.get()) is not None:
        posted, deadline = question
        try:
            posted.finish(deadline)
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            said.put(error)
        else:
            said.put(None)
        del question, posted


def _outlast(thread: Thread, deadline: float) -> None:
    """At exit: let a wait that is left behind end first, if it soon does; amid Python's end it aborts the process."""
    left = deadline - time.monotonic()
    thread.join(left + 1 if left < _EXIT_S else 1)


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


class GlooTransport:
    """Gloo between CPUs, on a process group of its own that torch's registry knows nothing of.

    Dropping the last reference to such a group closes its connections, which wakes most peers; `watch` wakes all.

    Args:
        store: for the rendezvous; what is put there must not have been used before.
        rank: this rank within the ring.
        size: ranks in the ring.
        timeout_s: of connecting.
        watch: called while messages are waited for; raises `Failure` where a rank has failed.
    """

    name: Final = "gloo_cpu"
    is_guarded: Final = False
    launches_first: Final = False

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float, *, watch: Callable[[], None]) -> None:
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timedelta(seconds=timeout_s))
        self._waiter = _Waiter(watch)
        self._posted: WeakSet[_Works] = WeakSet()  # an error's traceback may hold them for as long as it is kept

    def mark(self) -> None:
        """See `Transport`."""

    def aside(self, after: object = None) -> AbstractContextManager[None]:
        """See `Transport`; a CPU does one thing after the other."""
        return nullcontext()

    def rejoin(self) -> None:
        """See `Transport`."""

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """See `Transport`."""
        posted = _Works(self._waiter, [], tuple(x for _, x in (*sends, *receives)))
        self._posted.add(posted)
        peer = -1
        try:  # nothing may keep a reference to the group here: the traceback of an error would keep it open
            for peer, x in receives:
                posted.works.append((peer, self._group.recv([x], peer, _TAG)))
            for peer, x in sends:
                posted.works.append((peer, self._group.send([x], peer, _TAG)))
        except RuntimeError as error:
            raise Failure(peer, _first_line(error)) from error
        return posted

    def close(self) -> None:
        """See `Transport`."""
        for posted in tuple(self._posted):
            posted.drop()
        self._waiter.close()
        self._group = None
