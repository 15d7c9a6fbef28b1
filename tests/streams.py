"""Two streams that a CPU only pretends to have: whoever reads or writes memory out of order is told of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


@attrs.define(eq=False)
class Memory:
    """What is known of one storage, which is kept: where it was allocated, its last write, and the reads since."""

    storage: torch.UntypedStorage
    pool: str
    written: tuple[str, int] | None = None
    read: Clock = attrs.field(factory=dict)


class Streams(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In it every operation belongs to the stream "main" or "side", which know of each other what `mark`s told them.

    Its methods stand in for those of a transport (see `exchange.transport.Transport`).

    Attributes:
        found: what was read or written before it was there, and what "side" allocated and "main" touched.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self._stream = "main"
        self._clocks: dict[str, Clock] = {"main": {"main": 0, "side": 0}, "side": {"main": 0, "side": 0}}
        self._memory: dict[int, Memory] = {}

    def mark(self) -> Clock:
        """What the current stream has done and waited for."""
        return dict(self._clocks[self._stream])

    @contextmanager
    def aside(self, after: Clock | None = None) -> Iterator[None]:
        """On the other stream, after a mark."""
        if after is not None:
            self._wait("side", after)
        before, self._stream = self._stream, "side"
        try:
            yield
        finally:
            self._stream = before

    def rejoin(self) -> None:
        """The current stream waits for the other one."""
        self._wait(self._stream, self._clocks["side"])

    def _wait(self, stream: str, clock: Clock) -> None:
        for name, time in clock.items():
            self._clocks[stream][name] = max(self._clocks[stream][name], time)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run it, and look at what it reads and writes."""
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for x in _tensors(given):
                self._touch(x, func, "main", writes=writes)
        result = func(*args, **kwargs)
        for x in _tensors(result):
            if x.untyped_storage()._cdata not in self._memory:
                self._touch(x, func, self._stream, writes=True)
        return result

    def _touch(self, x: Tensor, func: Any, pool: str, *, writes: bool) -> None:
        """Judge a use of x, whose memory is of that pool if it is seen for the first time."""
        storage, stream = x.untyped_storage(), self._stream
        memory, clock = self._memory.setdefault(storage._cdata, Memory(storage, pool)), self._clocks[stream]
        clock[stream] += 1
        others = [memory.written] if memory.written is not None else []
        others += list(memory.read.items()) if writes else []
        for other, time in others:
            if clock[other] < time:
                self.found.append(f"{func} on {stream} does not wait for what {other} did to {tuple(x.shape)}")
        if memory.pool == "side" and stream == "main":
            self.found.append(f"{func} on main touches {tuple(x.shape)}, which is side's")
        if writes:
            memory.written, memory.read = (stream, clock[stream]), {}
        else:
            memory.read[stream] = clock[stream]
