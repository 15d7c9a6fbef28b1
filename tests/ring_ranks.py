"""Real ranks for tests: processes that stay, each in one torch process group, and run the cases that they are sent."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])


class RankError(AssertionError):
    """A rank raised, vanished or was silent."""


def serve(rank: int, size: int, path: str, pipe: Connection, join: bool) -> None:
    """A rank's life: join torch's process group if it is to, then run what comes until None does."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if join:
        store = dist.FileStore(path, -1)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    pipe.send(("ready", None))
    while (message := pipe.recv()) is not None:
        case, arguments = message
        try:
            pipe.send(("done", case(*arguments)))
        except Exception:  # noqa: BLE001 - the parent raises whatever it was
            pipe.send(("raised", traceback.format_exc()))
    pipe.send(("ended", None))
    os._exit(0)  # no tidying up, which takes torch seconds


class Ranks:
    """`size` processes, in one process group over a FileStore in `folder` unless they are not to join any.

    They are forked from a server that has imported all they need, so that starting them takes moments.
    """

    def __init__(self, size: int, folder: Path, *, join: bool = True) -> None:
        if ROOT not in sys.path:
            sys.path.insert(0, ROOT)  # spawned processes get this path, and find the cases there
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ring_preload"])
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            arguments = (rank, size, str(folder / "store"), theirs, join)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        for rank in range(size):
            self.receive(rank, 120)

    def send(self, rank: int, case: Callable[..., Any], *arguments: object) -> None:
        """Give a rank something to do."""
        self.pipes[rank].send((case, arguments))

    def receive(self, rank: int, timeout_s: float = 60) -> Any:
        """What the rank returned; an error if it raised, ended or is late."""
        if not self.pipes[rank].poll(timeout_s):
            raise RankError(f"rank {rank} is silent for {timeout_s} s")
        try:
            kind, result = self.pipes[rank].recv()
        except EOFError:
            raise RankError(f"rank {rank} has ended") from None
        if kind == "raised":
            raise RankError(f"rank {rank} raised\n{result}")
        return result

    def run(self, case: Callable[..., Any], *arguments: object, timeout_s: float = 60) -> list[Any]:
        """The results of all ranks, each of which calls `case(*arguments)`."""
        for rank in range(len(self.pipes)):
            self.send(rank, case, *arguments)
        return [self.receive(rank, timeout_s) for rank in range(len(self.pipes))]

    def close(self) -> None:
        """End all of them; what does not end by itself within some seconds is killed."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # it is dead, as some tests want it
        deadline = time.monotonic() + 10
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(5)
