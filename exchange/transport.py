"""The data planes: what moves rows between ranks. Both post without waiting and are used for one pass at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from .control import Failure

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_TAG: Final = 1


class Pending(Protocol):
    """Messages under way."""

    def wait(self, deadline: float) -> None:
        """Return when all have arrived; on CUDA, when the current stream will wait for them.

        Raises:
            Failure: a peer is gone, or late at the deadline (`time.monotonic`).
        """


class Transport(Protocol):
    """Moves tensors between the ranks of one ring."""

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """Start sending and receiving contiguous tensors, at most one a peer and direction."""

    def close(self) -> None:
        """Drop all connections, waking everyone who waits for one."""


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
                self.works.clear()
                raise Failure(peer, _first_line(error)) from error
        self.tensors = ()


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


class GlooTransport:
    """Gloo between CPUs, on a process group of its own that torch's registry knows nothing of.

    Dropping the last reference to such a group closes its connections, which is what wakes the peers.
    """

    name: Final = "gloo_cpu"

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timedelta(seconds=timeout_s))

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """See `Transport`."""
        works: list[tuple[int, Any]] = []
        peer = -1
        try:  # nothing may keep a reference to the group here: the traceback of an error would keep it open
            for peer, x in receives:
                works.append((peer, self._group.recv([x], peer, _TAG)))
            for peer, x in sends:
                works.append((peer, self._group.send([x], peer, _TAG)))
        except RuntimeError as error:
            raise Failure(peer, _first_line(error)) from error
        return _Works(works, tuple(x for _, x in (*sends, *receives)))

    def close(self) -> None:
        """See `Transport`."""
        self._group = None


class NcclTransport:
    """NCCL between CUDA devices, on a process group of its own made over `ranks` of the default group.

    Waiting is done by the current stream, so a failure shows in the control plane, or in NCCL's watchdog.
    """

    name: Final = "ring_nccl"

    def __init__(self, ranks: Sequence[int], timeout_s: float) -> None:
        self._ranks = tuple(ranks)
        self._group: Any = dist.new_group(
            list(ranks),
            backend="nccl",
            timeout=timedelta(seconds=timeout_s),
            use_local_synchronization=True,
        )
        # NCCL connects at a group's first call, in which all its ranks must take part; in an exchange some may not.
        dist.all_reduce(torch.zeros(1, device="cuda"), group=self._group)
        torch.cuda.synchronize()

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """See `Transport`."""
        operations = [dist.P2POp(dist.irecv, x, self._ranks[peer], self._group) for peer, x in receives]
        operations += [dist.P2POp(dist.isend, x, self._ranks[peer], self._group) for peer, x in sends]
        if not operations:
            return _Works([], ())
        works = dist.batch_isend_irecv(operations)
        return _Streams(works, tuple(x for _, x in (*sends, *receives)))

    def close(self) -> None:
        """Abort: kernels that wait for a peer end, and the group is forgotten."""
        if self._group is not None:
            self._group.abort()
            dist.destroy_process_group(self._group)
            self._group = None


@attrs.define(eq=False)
class _Streams:
    """NCCL's handles: the current stream waits, the host does not. `wait` has no deadline to keep."""

    works: list[Any]
    tensors: tuple[Tensor, ...]

    def wait(self, deadline: float) -> None:
        """See `Pending`."""
        for work in self.works:
            work.wait()
        self.works, self.tensors = [], ()
