"""A thread that watches a pass under way, where its rank may block in calls that only closing the transport ends.

Over NCCL a rank can block where Python does not look: in NCCL connecting to a peer, or in CUDA's allocator or loader,
which wait for all kernels of the device, so for NCCL's, which wait for a peer that is dead. Another thread then sees
the peer's connection close, its notice, or the deadline pass, and closes the transport, which ends all of these.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from .control import Control, Failure

LOOK_EVERY_S: Final = 0.02


class Guard:
    """Watches the passes of one communicator, one after another.

    Attributes:
        failure: what it has closed the transport for, or None.
    """

    def __init__(self, control: Control, close: Callable[[], None]) -> None:
        self.failure: Failure | None = None
        self._control = control
        self._close = close
        self._deadline: float | None = None
        self._lock = threading.Lock()  # held while the control plane is read, which a pass's beginning does too
        threading.Thread(target=_look_on, args=(weakref.ref(self),), name="ring-guard", daemon=True).start()

    @contextmanager
    def over(self, deadline: float) -> Iterator[None]:
        """Watch what runs inside, until the deadline (`time.monotonic`).

        Raises:
            Failure: a rank failed or the deadline passed; in place of whatever the closed transport made of it.
        """
        with self._lock:
            self._deadline = deadline
        try:
            yield
        except Exception as error:
            self._end()
            if self.failure is not None:
                raise self.failure.again() from error
            raise
        finally:
            self._end()
        if self.failure is not None:
            raise self.failure.again()

    def put_off(self, deadline: float) -> None:
        """Watch until another deadline: the pass has come further."""
        with self._lock:
            if self._deadline is not None:
                self._deadline = deadline

    def _end(self) -> None:
        with self._lock:
            self._deadline = None

    def look(self) -> bool:
        """Judge a pass that is under way; False once it has failed."""
        with self._lock:
            if self._deadline is None:
                return True
            try:
                self._control.look()
                if time.monotonic() >= self._deadline:
                    late, *others = self._control.peers
                    raise Failure(None if others else late, "rows were not there before the timeout")
            except Failure as failure:
                self.failure = failure
        if self.failure is None:
            return True
        self._close()
        return False


def _look_on(reference: weakref.ref[Guard]) -> None:
    """A guard's thread; ends with it, or once it has closed the transport."""
    while True:
        time.sleep(LOOK_EVERY_S)
        guard = reference()
        if guard is None or not guard.look():
            return
        del guard
