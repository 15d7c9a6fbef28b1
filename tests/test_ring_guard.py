"""What ends waits that a rank cannot end itself: the thread that watches passes, and calls made with a deadline."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dilated_attention.exchange.communicator import Communicator
from dilated_attention.exchange.control import Control, Failure, Header
from dilated_attention.exchange.guard import LOOK_EVERY_S, Guard
from dilated_attention.exchange.nccl import in_time

SOON_S = 0.5  # of a guard that looks every 20 ms, on a machine that does other things too


def header(step: int) -> Header:
    return Header(generation=0, step=step, kind=0, digest=bytes(16), batch=1, length=8, dtype=1)


@pytest.fixture
def controls() -> Iterator[list[Control]]:
    """Three ranks' connections to each other."""
    store, deadline = dist.HashStore(), time.monotonic() + 20  # type: ignore[attr-defined]
    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(Control.connect, store, rank, 3, deadline) for rank in range(3)]
        found = [rank.result() for rank in ranks]
    yield found
    for control in found:
        control.close(None, failed=False)


class Door:
    """A wait that only closing ends, as NCCL's is."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def wait_for_ever(self) -> None:
        assert self.closed.wait(20)
        raise OSError("it was closed")


def blocked(guard: Guard, door: Door, deadline: float) -> tuple[Failure, float]:
    """How a pass that blocks for ever ends, and when."""
    before = time.monotonic()
    with pytest.raises(Failure) as caught, guard.over(deadline):
        door.wait_for_ever()
    return caught.value, time.monotonic() - before


def test_a_blocked_rank_is_woken_when_another_vanishes(controls: list[Control]) -> None:
    door = Door()
    guard = Guard(controls[0], door.closed.set)
    for link in controls[1]._sockets.values():
        link.close()  # as the end of a process does
    failure, after = blocked(guard, door, time.monotonic() + 20)
    assert (failure.peer, failure.reason) == (1, "it is gone (its connection is closed)")
    assert after < SOON_S
    assert isinstance(failure.__cause__, OSError)


def test_a_blocked_rank_is_woken_by_a_notice_and_blames_whom_it_names(controls: list[Control]) -> None:
    door = Door()
    guard = Guard(controls[0], door.closed.set)
    controls[2].close(1, failed=True)
    failure, after = blocked(guard, door, time.monotonic() + 20)
    assert (failure.peer, failure.reason) == (1, "rank 2 says that it failed")
    assert after < SOON_S


def test_who_waited_in_vain_is_not_blamed_for_it(controls: list[Control]) -> None:
    controls[2].close(None, failed=True)
    time.sleep(0.05)
    with pytest.raises(Failure) as caught:
        controls[0].look()
    assert (caught.value.peer, caught.value.reason) == (None, "rank 2 says that it waited in vain, and not for whom")


def test_a_rank_that_is_late_hears_who_has_given_up_behind_its_header(controls: list[Control]) -> None:
    controls[1].announce(header(1))
    controls[2].announce(header(1))
    time.sleep(0.05)
    controls[0].look()  # the headers are read before the notice is there
    controls[2].close(0, failed=True)
    time.sleep(0.05)
    controls[0].announce(header(1))
    with pytest.raises(Failure, match="rank 2 says that it failed") as caught:
        controls[0].agree(header(1), time.monotonic() + 20)
    assert caught.value.peer == 0


def test_who_waits_for_one_rank_hears_that_another_has_given_up(controls: list[Control]) -> None:
    controls[1].announce(header(1))
    before = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(controls[0].agree, header(1), before + 20)
        time.sleep(0.1)
        controls[1].close(None, failed=True)
        with pytest.raises(Failure, match="rank 1 says that it waited in vain"):
            waiting.result()
    assert time.monotonic() - before < SOON_S


def test_a_rank_that_is_done_and_gone_breaks_no_pass_that_it_was_in(controls: list[Control]) -> None:
    for rank in (1, 2):
        controls[rank].announce(header(1))
    for link in controls[2]._sockets.values():
        link.close()  # as the end of a process does
    time.sleep(0.05)
    controls[0].agree(header(1), time.monotonic() + 20)
    with pytest.raises(Failure, match="it is gone"):
        controls[0].look()


def test_a_blocked_rank_is_woken_at_the_deadline(controls: list[Control]) -> None:
    door = Door()
    guard = Guard(controls[0], door.closed.set)
    failure, after = blocked(guard, door, time.monotonic() + 0.2)
    assert (failure.peer, failure.reason) == (None, "rows were not there before the timeout")
    assert 0.2 <= after < 0.2 + SOON_S


def test_a_pass_that_comes_further_has_more_time(controls: list[Control]) -> None:
    door, before = Door(), time.monotonic()
    guard = Guard(controls[0], door.closed.set)
    guard.put_off(before)  # nothing is watched yet

    def work() -> None:
        for _ in range(4):
            guard.put_off(time.monotonic() + 0.3)
            time.sleep(0.1)
        guard.put_off(time.monotonic() + 0.1)
        door.wait_for_ever()

    with pytest.raises(Failure, match="rows were not there before the timeout"), guard.over(math.inf):
        work()
    assert 0.5 <= time.monotonic() - before < 0.5 + SOON_S
    kept = guard.failure
    assert kept is not None
    assert "in over" not in "".join(traceback.format_tb(kept.__traceback__))  # which would keep what is computed


def test_ranks_that_are_ahead_or_have_left_in_peace_break_nothing(controls: list[Control]) -> None:
    door = Door()
    guard = Guard(controls[0], door.closed.set)
    with ThreadPoolExecutor(2) as pool:
        for control in controls:
            control.announce(header(1))
        others = [pool.submit(controls[rank].agree, header(1), time.monotonic() + 20) for rank in (1, 2)]
        controls[0].agree(header(1), time.monotonic() + 20)
        for other in others:
            other.result()
    with guard.over(time.monotonic() + 20):
        controls[1].announce(header(2))  # it has entered the next pass
        controls[2].close(None, failed=False)
        time.sleep(5 * LOOK_EVERY_S)
    assert not door.closed.is_set()
    controls[0].announce(header(2))
    with pytest.raises(Failure, match="it has closed its attention") as caught:  # what was read is not lost
        controls[0].agree(header(2), time.monotonic() + 20)
    assert caught.value.peer == 2


def test_errors_of_a_pass_that_nobody_broke_stay_what_they_are(controls: list[Control]) -> None:
    door = Door()
    guard = Guard(controls[0], door.closed.set)
    with pytest.raises(KeyError, match="mine"), guard.over(time.monotonic() + 20):
        raise KeyError("mine")
    time.sleep(3 * LOOK_EVERY_S)  # and between passes nothing is watched
    assert not door.closed.is_set()


def test_a_guard_ends_with_its_ring(controls: list[Control]) -> None:
    before = set(threading.enumerate())  # those of other tests may end at any time
    guard = Guard(controls[0], Door().closed.set)
    (own,) = (thread for thread in threading.enumerate() if thread not in before and thread.name == "ring-guard")
    time.sleep(2 * LOOK_EVERY_S)
    assert own.is_alive()
    del guard
    own.join(20)
    assert not own.is_alive()


def test_a_ring_that_is_dropped_is_aborted_once_no_rank_can_be_in_its_last_pass(controls: list[Control]) -> None:
    transport: Any = SimpleNamespace(is_guarded=True, closed=threading.Event())
    transport.close = transport.closed.set
    ring = Communicator(controls[0], transport, rank=0, size=3, generation=0, timeout_s=20)
    controls[1].announce(header(2))
    del ring
    controls[1].close(None, failed=False)
    assert not transport.closed.wait(0.2)
    for link in controls[2]._sockets.values():
        assert link.recv(200)  # it has heard of both
        link.close()
    assert transport.closed.wait(SOON_S)


def test_a_call_that_never_returns_is_left_at_the_deadline_or_when_a_rank_fails() -> None:
    def fails() -> None:
        raise Failure(1, "it is gone")

    door, before = Door(), time.monotonic()
    with pytest.raises(RuntimeError, match="did not connect all ranks in time"):
        in_time(door.wait_for_ever, before + 0.2, lambda: None)
    assert 0.2 <= time.monotonic() - before < 0.2 + SOON_S
    with pytest.raises(RuntimeError, match="rank 1 failed while NCCL connected: it is gone"):
        in_time(door.wait_for_ever, before + 20, fails)
    assert time.monotonic() - before < 0.2 + 2 * SOON_S
    door.closed.set()
    assert in_time(lambda: 7, time.monotonic() + 20, lambda: None) == 7
    with pytest.raises(OSError, match="it was closed"):
        in_time(door.wait_for_ever, time.monotonic() + 20, lambda: None)
