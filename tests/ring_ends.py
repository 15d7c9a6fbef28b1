"""How rings end: broken, dropped, rebuilt in part; and what is left of them."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dilated_attention import RingBroken, rebuild
from dilated_attention.exchange import setup

from .ring_builds import attempt, build, works
from .ring_calls import leaf
from .ring_cases import mesh_of, ring_engine


def open_rings() -> int:
    """How many rings this process has: each has one such thread."""
    return sum(thread.name == "ring-wait" for thread in threading.enumerate())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def settled(count: int) -> bool:
    """Whether so many rings are open, or soon are: their threads end a moment after them."""
    deadline = time.monotonic() + 2
    while open_rings() != count:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def released() -> dict[str, bool]:
    """Whether what a call held is let go of once its error is handled, in a ring that stays around."""
    said = {}
    for name in ("forward", "backward", "retried"):
        attention, x = build(), leaf()
        held = x * 2
        out = attention(held, held, held) if name == "backward" else held
        there = weakref.ref(held)
        if dist.get_rank() == 0:
            ring_engine(attention).communicator.close()
        for _ in range(2 if name == "retried" else 1):
            with suppress(RingBroken):
                if name == "backward":
                    out.sum().backward()
                else:
                    attention(held, held, held)
        del held, out
        said[name] = there() is None
        dist.barrier()
    return said


def dropped_rings() -> list[bool]:
    """How many rings are open while attentions come and go."""
    base = open_rings()
    first, second = build(), build()
    said = [settled(base + 1), works(first), works(second)]
    del first
    said += [settled(base + 1), works(second)]
    dist.barrier()
    del second
    return [*said, settled(base)]


def rebuilt_beside_others() -> list[bool]:
    """One of two attentions is rebuilt: whether both work, and the old ring is open for as long as it is used."""
    base = open_rings()
    first, second = build(), build()
    rebuild(first, mesh=mesh_of(2), generation=1)
    said = [settled(base + 2), works(first), works(second)]
    dist.barrier()
    del second
    return [*said, settled(base + 1), works(first)]


def rebuilt_in_part() -> dict[str, Any]:
    """Rank 1 rebuilds one of two attentions, rank 0 both: what rank 0 says, and what is left of it."""
    base = open_rings()
    found = [build(1.0), build(1.0)]
    model = nn.ModuleList(found[: 2 - dist.get_rank()])
    name, words, seconds = attempt(lambda: rebuild(model, mesh=mesh_of(2), generation=1))
    said: dict[str, Any] = {"told": (name, words), "seconds": seconds}
    dist.barrier()
    said["rings"] = settled(base + 1 + dist.get_rank())
    said["old"] = works(found[1])
    if dist.get_rank() == 1:
        said["new"] = attempt(lambda: works(found[0]))
    return said


def refused_rebuild() -> list[tuple[str, str, float]]:
    """Rank 0 has nothing to rebuild; then both have."""
    attention = build()
    model = attention if dist.get_rank() else nn.Linear(1, 1)
    first = attempt(lambda: rebuild(model, mesh=mesh_of(2), generation=1))
    return [
        first,
        attempt(lambda: rebuild(attention, mesh=mesh_of(2), generation=2)),
        attempt(lambda: works(attention)),
    ]


def broken_set_up() -> dict[str, Any]:
    """Rank 1 fails as both connect, each time: what is said, and whether anything stays open."""
    base, files = open_rings(), open_files()
    make = setup._transport

    def failing(*rest: Any) -> Any:
        made = make(*rest)
        if dist.get_rank() == 1:
            raise OSError("no route to host")
        return made

    setup._transport = failing  # type: ignore[assignment]
    try:
        told = attempt(lambda: build(1.5))
    finally:
        setup._transport = make
    closed = settled(base)
    return {"told": told, "closed": closed, "files": open_files() - files}


def forked() -> tuple[str, str, float]:
    """Rank 1 is killed while a child of its own goes on; what rank 0 hears, and when. The child may not call."""
    attention = build()
    works(attention)
    if dist.get_rank() == 1:
        read, write = os.pipe()
        if os.fork() == 0:
            said = "|".join(attempt(lambda: works(attention))[:2])
            del attention
            gc.collect()
            os.write(write, said.encode())
            time.sleep(3)  # it has all that its parent had open
            os._exit(0)
        said = os.read(read, 1000).decode()
        works(attention)
        dist.send(torch.frombuffer(bytearray(said.encode().ljust(400)), dtype=torch.uint8), 0)
        os.kill(os.getpid(), signal.SIGKILL)
    works(attention)
    heard = torch.empty(400, dtype=torch.uint8)
    dist.recv(heard, 1)
    before = time.perf_counter()
    broken = attempt(lambda: works(attention))
    return bytes(heard.tolist()).decode().strip(), broken[1], time.perf_counter() - before
