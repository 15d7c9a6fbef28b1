"""NCCL between CUDA devices, one a rank.

NCCL's kernels wait for peers and never give up; its calls block where a peer is missing; neither ends but by aborting
the communicator. So the host waits for every exchange before its pass ends, looking at an event: nothing is computed
with rows that have not arrived, and no kernel of ours is left waiting behind a pass. `Guard` aborts if a peer is gone.

Messages travel on streams of their own, of high priority: they need not wait for what the compute stream was given
after their rows were ready, nor until a kernel under way has no more blocks to place. Nor need what is computed on such
a stream: rows are packed, and gradients of received ones computed, beside the rank's own keys.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor

from .control import Failure

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from .transport import Pending

T = TypeVar("T")

_LOOK_EVERY_S: Final = 5e-5
# Freeing a communicator waits for all kernels of the device, also those of communicators that nobody has aborted.
_ABORT_PATIENCE_S: Final = 5.0
# By default torch's watchdog ends the process when messages time out: only where we have not acted before.
_WATCHDOG_MARGIN_S: Final = 60.0


class NcclTransport:
    """A communicator of its own, which torch's registry of groups knows nothing of.

    Args:
        store: for NCCL's rendezvous; what is put there must not have been used before.
        rank: this rank within the ring, on the current CUDA device.
        size: ranks in the ring.
        timeout_s: of a wait in a pass.
        deadline: `time.monotonic` until which to connect.
        watch: called while connecting; raises `Failure` where another rank has failed.

    Raises:
        RuntimeError: not connected by the deadline, or another rank failed meanwhile.
    """

    name: Final = "ring_nccl"
    is_guarded: Final = True
    launches_first: Final = True

    def __init__(
        self, store: Store, rank: int, size: int, *, timeout_s: float, deadline: float, watch: Callable[[], None]
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        timeout = timedelta(seconds=2 * timeout_s + _WATCHDOG_MARGIN_S)  # from posting a message to the end of its wait
        group = in_time(lambda: _connected(store, rank, size, device, timeout), deadline, watch)
        self._group: Any = group
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._abort = weakref.finalize(self, _abort, group)

    def mark(self) -> torch.cuda.Event:
        """See `Transport`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def aside(self, after: object = None) -> Iterator[None]:
        """See `Transport`."""
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            yield

    def rejoin(self) -> None:
        """See `Transport`."""
        torch.cuda.current_stream().wait_stream(self._side)

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """See `Transport`."""
        group = self._group
        if group is None:
            raise Failure(None, "it was closed while rows were under way")
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if sends or receives:
            # NCCL's own stream waits for the one that is current, which waits for NCCL's in the end.
            with self.aside(self.mark()):
                group._start_coalescing()
                try:
                    for peer, x in receives:
                        group.recv([x], peer, 0)
                    for peer, x in sends:
                        group.send([x], peer, 0)
                finally:  # else all later calls of NCCL on this thread would be part of this group
                    work = group._end_coalescing()
                work.wait()
        event.record(self._side)
        return _Exchange(self, event, tuple(x for _, x in (*sends, *receives)))

    @property
    def is_closed(self) -> bool:
        """Aborted, or about to be."""
        return self._group is None

    def close(self) -> None:
        """Abort: kernels and calls of this rank that wait for a peer end. Others hear of it by the control plane."""
        self._group = None
        thread = threading.Thread(target=self._abort, name="ring-abort", daemon=True)
        thread.start()
        thread.join(_ABORT_PATIENCE_S)


class _Exchange:
    """Messages under way, with an event that is there when all have arrived."""

    def __init__(self, transport: NcclTransport, event: torch.cuda.Event, tensors: tuple[Tensor, ...]) -> None:
        self._transport = transport
        self._event = event
        self._tensors = tensors  # kept until NCCL has done with them

    def wait(self, deadline: float) -> None:
        """See `Pending`; the deadline is the guard's to keep."""
        while not self._transport.is_closed and not self._event.query():  # type: ignore[no-untyped-call]
            time.sleep(_LOOK_EVERY_S)
        if self._transport.is_closed:  # the event of an aborted exchange is there too, without its rows
            raise Failure(None, "it was closed while rows were under way")
        torch.cuda.current_stream().wait_event(self._event)
        self._tensors = ()


def _connected(store: Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    """NCCL's group with its communicator made, which takes all ranks; blocks until they are there."""
    from torch._C._distributed_c10d import ProcessGroupNCCL

    torch.cuda.set_device(device)  # this thread's
    options: Any = ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    group: Any = ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def _abort(group: Any) -> None:
    group.abort()


def in_time(call: Callable[[], T], deadline: float, watch: Callable[[], None]) -> T:
    """The result of `call`, made in a thread of its own; one that blocks for ever is left behind in it.

    Args:
        call: has no way to end early.
        deadline: `time.monotonic` until which to wait.
        watch: called while waiting; raises `Failure` to give up.

    Raises:
        RuntimeError: it raised one, the deadline passed, or `watch` gave up.
    """
    done: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            errors.append(error)

    thread = threading.Thread(target=run, name="ring-connect", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.01)
        try:
            watch()
        except Failure as failure:
            raise RuntimeError(f"rank {failure.peer} failed while NCCL connected: {failure.reason}") from failure
        if thread.is_alive() and time.monotonic() >= deadline:
            raise RuntimeError("NCCL did not connect all ranks in time")
    if errors:
        raise errors[0]
    return done[0]
