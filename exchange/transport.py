"""The data planes: what moves rows between ranks. They post without waiting and are used for one pass at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakSet

import attrs
import torch.distributed as dist
from torch import Tensor

from .control import Failure

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_TAG: Final = 1


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
        """A point of the device's work so far, for `post`; None where computing is not asynchronous."""

    def post(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], after: object = None
    ) -> Pending:
        """Start sending and receiving contiguous tensors, at most one a peer and direction.

        They may be read and written from `after` on, a `mark`; None: from now on.
        """

    def close(self) -> None:
        """Drop all connections, waking everyone on this rank who waits for one; may be called twice, by any thread."""


@attrs.define(eq=False)
class _Works:
    """torch's handles, each with its peer; the tensors are kept alive until they have been waited for."""

    works: list[tuple[int, Any]]
    tensors: tuple[Tensor, ...]

    def wait(self, deadline: float) -> None:
        """See `Pending`."""
        while self.works:
            peer, work = self.works.pop(0)
            left = timedelta(seconds=max(0.001, deadline - time.monotonic()))
            try:
                work.wait(left)
            except RuntimeError as error:
                del work  # the error's traceback keeps what this frame holds
                self.drop()
                # Messages among ranks that are there need nobody else: who is late at the deadline is to blame.
                late = time.monotonic() >= deadline
                raise Failure(peer, _first_line(error), is_certain=late) from error
        self.tensors = ()

    def drop(self) -> None:
        """Forget what has not been waited for: handles keep their connections open."""
        self.works.clear()
        self.tensors = ()


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


class GlooTransport:
    """Gloo between CPUs, on a process group of its own that torch's registry knows nothing of.

    Dropping the last reference to such a group closes its connections, which is what wakes the peers.
    """

    name: Final = "gloo_cpu"
    is_guarded: Final = False
    launches_first: Final = False

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timedelta(seconds=timeout_s))
        self._posted: WeakSet[_Works] = WeakSet()  # an error's traceback may hold them for as long as it is kept

    def mark(self) -> None:
        """See `Transport`."""

    def post(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], after: object = None
    ) -> Pending:
        """See `Transport`."""
        posted = _Works([], tuple(x for _, x in (*sends, *receives)))
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
        self._group = None
