"""Gloo's messages when a rank fails: all that wait for one end at once, also those that Gloo itself never ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from dilated_attention import RingBroken
from dilated_attention.exchange.communicator import Communicator, Counters
from dilated_attention.exchange.control import Failure
from dilated_attention.exchange.guard import LOOK_EVERY_S
from dilated_attention.exchange.setup import connect
from dilated_attention.exchange.transport import GlooTransport

from .ring_ranks import ROOT

KEPT: list[list[GlooTransport]] = []  # until the process ends
SOON_S = 1.0  # of waits that hear of a failure every 20 ms, and give Gloo 0.2 s to say more of it


def ends(watch: Callable[[], None] = lambda: None) -> list[GlooTransport]:
    """Both ends of a ring of two, which hear of failures from `watch`."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(GlooTransport, store, rank, 2, 20.0, watch=watch) for rank in range(2)]
        return [rank.result() for rank in ranks]


def tell() -> None:
    """What the control plane hears of a rank that is no part of the ring's messages."""
    raise Failure(2, "it has failed")


def test_who_is_late_at_the_deadline_is_to_blame_and_who_is_gone_may_have_had_a_reason() -> None:
    first, second = ends()
    row = torch.zeros(3)
    with pytest.raises(Failure) as late:
        first.post([], [(1, row)]).wait(time.monotonic() + 0.2)
    assert (late.value.peer, late.value.is_certain) == (1, True)
    first, second = ends()
    pending = first.post([], [(1, row)])
    second.close()
    with pytest.raises(Failure) as gone:
        pending.wait(time.monotonic() + 20)
    assert (gone.value.peer, gone.value.is_certain) == (1, False)


def test_a_wait_ends_when_a_rank_fails_that_it_does_not_wait_for() -> None:
    first, _ = ends(tell)
    before = time.monotonic()
    with pytest.raises(Failure, match="it has failed"):
        first.post([], [(1, torch.zeros(3))]).wait(before + 20)
    assert time.monotonic() - before < SOON_S


def test_rows_that_are_under_way_still_arrive_when_a_rank_has_failed() -> None:
    first, second = ends(tell)
    row, pending = torch.zeros(3), []
    later = threading.Timer(2.5 * LOOK_EVERY_S, lambda: pending.append(second.post([(0, torch.ones(3))], [])))
    later.start()
    first.post([], [(1, row)]).wait(time.monotonic() + 20)
    later.join()
    assert row.tolist() == [1, 1, 1]


def test_the_thread_that_waits_ends_with_its_ring() -> None:
    before = set(threading.enumerate())
    first, second = ends()
    waiting = [thread for thread in threading.enumerate() if thread not in before and thread.name == "ring-wait"]
    assert len(waiting) == 2
    first.close()
    del second
    for thread in waiting:
        thread.join(1)
        assert not thread.is_alive()


def leave_waits_behind(deadlines_s: list[float]) -> None:
    """Post receives whose senders do not come, and give up waiting for them."""
    with ThreadPoolExecutor(len(deadlines_s)) as pool:
        for deadline_s in deadlines_s:
            ring = ends(tell)
            pool.submit(ring[0].post([], [(1, torch.zeros(3))]).wait, time.monotonic() + deadline_s)
            KEPT.append(ring)


def test_a_process_ends_in_order_although_waits_are_left_behind() -> None:
    """They expire while it ends, at one moment or another."""
    code = "from tests.test_ring_gloo import leave_waits_behind; leave_waits_behind([0.3 + n / 20 for n in range(12)])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


@pytest.mark.parametrize("is_sender", [True, False], ids=["sender", "receiver"])
def test_a_rank_that_fails_amid_a_message_is_known_at_once(is_sender: bool) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    posted, size = threading.Event(), 1 << 28  # takes a second to travel, and memory only where it has arrived
    times: dict[str | int, float] = {}

    def use(ring: Communicator) -> None:
        """Rank 1 fails amid a message between 0 and 1; 2 only waits, for rows of 0's that never come."""
        rank = ring.rank
        with ring.begin(0, torch.zeros(1, 8), digest=bytes(16), counters=Counters()) as current:
            if rank == 1:
                assert posted.wait(4)
                time.sleep(0.05)
            message = [((1, 0, 0)[rank], torch.empty(size))]
            is_sent = rank < 2 and (rank == 1) == is_sender
            exchange = current.post(message, []) if is_sent else current.post([], message)
            if rank == 1:
                exchange.pending.drop()  # type: ignore[attr-defined]  # as when it closes: what is left never follows
                time.sleep(0.1)
                times["failed"] = time.monotonic()
                raise MemoryError("the device is out of memory")
            if rank == 0:
                posted.set()
            current.wait(exchange)

    def live(rank: int) -> RingBroken:
        ring = connect(store, rank, 3, transport="gloo_cpu", generation=0, timeout_s=4)
        with pytest.raises(RingBroken) as caught:
            use(ring)
        times[rank] = time.monotonic()
        return caught.value

    with ThreadPoolExecutor(3) as pool:
        for rank, broken in enumerate(pool.map(live, range(3))):
            assert broken.peer == 1
            assert times[rank] - times["failed"] < SOON_S


def test_a_pass_may_take_longer_than_the_timeout_while_rows_keep_coming() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    pauses = [0.3, 0.3, 0.3, 0.9]

    there = [0, 0]

    def use(ring: Communicator) -> None:
        with ring.begin(0, torch.zeros(1, 8), digest=bytes(16), counters=Counters()) as current:
            for pause in pauses:
                time.sleep(pause * ring.rank)  # before it sends what is due
                row, other = torch.zeros(3), 1 - ring.rank
                exchange = current.post([(other, torch.ones(3))], [(other, row)])
                time.sleep(pause / 4 * ring.rank)  # and while rows are on their way
                current.wait(exchange)
                there[ring.rank] += int(row.sum())

    def live(rank: int) -> str:
        ring = connect(store, rank, 2, transport="gloo_cpu", generation=0, timeout_s=20)
        ring.timeout_s = 0.6
        with pytest.raises(RingBroken) as caught:
            use(ring)
        return caught.value.reason

    with ThreadPoolExecutor(2) as pool:
        waiting, _ = pool.map(live, range(2))
    assert there[0] == 9
    assert waiting == "rows that it was to send, or to take, were not there before the timeout"
