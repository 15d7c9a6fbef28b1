"""Failures of real processes: every survivor knows at once, nothing hangs beyond its bound, nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .ring_drills import absent, astray, drill, elastic, fall_back, mismatched, newcomer, single
from .ring_ranks import Ranks

Start = Callable[[int], Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that belong to no group yet; what they leave is ended with the test."""
    pools: list[Ranks] = []

    def begin(size: int) -> Ranks:
        pools.append(Ranks(size, tmp_path, join=False))
        return pools[-1]

    yield begin
    for pool in pools:
        pool.close()


def run_drill(
    pool: Ranks, where: str, kind: str, culprit: int, *, timeout_s: float = 20, near: bool = False, at: int = 3
) -> dict[int, dict[str, Any]]:
    """What every rank that is left reports."""
    size = len(pool.pipes)
    for rank in range(size):
        pool.send(rank, drill, where, rank, size, kind, culprit, at, timeout_s, near)
    alive = [rank for rank in range(size) if rank != culprit or kind != "kill"]
    return {rank: pool.receive(rank, 40) for rank in alive}


def check(reports: dict[int, dict[str, Any]], culprit: int, *, within_s: float, at: int = 3) -> None:
    """Everyone knows in time, blames the right rank, was never wrong, and was refused a retry at once."""
    for rank, report in reports.items():
        assert "wrong" not in report
        assert "survived" not in report
        assert (report["generation"], report["steps"]) == (0, at)
        if rank != culprit:
            assert report["peer"] == culprit, report
            assert report["after"] < within_s, report
        assert "nothing is retried in place" in report["retry"]
        assert report["retry_took"] < 0.1


@pytest.mark.parametrize(("culprit", "near"), [(1, False), (3, True), (0, False)], ids=["1", "3, far from 0", "0"])
def test_a_killed_rank_is_known_within_a_second(start: Start, tmp_path: Path, culprit: int, near: bool) -> None:
    reports = run_drill(start(4), str(tmp_path / "drill"), "kill", culprit, near=near)
    assert len(reports) == 3
    check(reports, culprit, within_s=1.0)


@pytest.mark.parametrize("kind", ["raise", "raise before sending"])
def test_a_raising_rank_is_known_within_a_second_and_says_what_of(start: Start, tmp_path: Path, kind: str) -> None:
    reports = run_drill(start(4), str(tmp_path / "drill"), kind, 2)
    check(reports, 2, within_s=1.0)
    assert reports[2]["reason"] == "MemoryError: the device is out of memory"
    assert reports[2]["peer"] == 2


def test_a_hanging_rank_is_known_within_the_timeout_and_a_second(start: Start, tmp_path: Path) -> None:
    reports = run_drill(start(4), str(tmp_path / "drill"), "hang", 1, timeout_s=2)
    check(reports, 1, within_s=3.0)
    assert all(report["after"] >= 1.9 for rank, report in reports.items() if rank != 1)


def test_the_store_may_be_elsewhere_when_rank_0_dies(start: Start) -> None:
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    reports = run_drill(start(4), f"127.0.0.1:{server.port}", "kill", 0)
    check(reports, 0, within_s=1.0)


def test_ranks_that_build_different_attentions_say_what_differs_where(start: Start, tmp_path: Path) -> None:
    pool, where = start(4), str(tmp_path / "drill")
    for rank in range(4):
        pool.send(rank, mismatched, where, rank, 4)
    said = {pool.receive(rank) for rank in range(4)}
    assert len(said) == 1
    (message,) = said
    assert "config.scale is null on rank 0, 1, 3 but 0.5 on rank 2" in message
    assert "config.pattern is" in message
    assert "on rank 3" in message


def test_a_rank_in_another_pass_is_an_error_on_all(start: Start, tmp_path: Path) -> None:
    pool, where = start(4), str(tmp_path / "drill")
    for rank in range(4):
        pool.send(rank, astray, where, rank, 4)
    found = [pool.receive(rank) for rank in range(4)]
    assert {peer for rank, (peer, _) in enumerate(found) if rank != 2} == {2}
    assert any("it is in another pass: digest" in reason and "length 12 (here 24)" in reason for _, reason in found)


def test_a_rank_that_does_not_build_is_missed_in_time(start: Start, tmp_path: Path) -> None:
    pool, where = start(3), str(tmp_path / "drill")
    for rank in range(3):
        pool.send(rank, absent, where, rank, 3)
    for rank, (peer, reason, after) in enumerate(pool.receive(rank) for rank in range(3)):
        if rank != 1:
            assert peer == 1
            assert "it did not call build_attention within 1.5 s" in reason
            assert after < 2.5


def test_training_goes_on_over_three_ranks_and_again_over_four(start: Start, tmp_path: Path) -> None:
    steps, dies_at, grows_at, where = 12, 4, 8, str(tmp_path / "drill")
    pool, late = start(4), start(1)
    for rank in range(4):
        pool.send(rank, elastic, where, rank, 4, dies_at, grows_at, steps)
    late.send(0, newcomer, where, steps)
    reports = {rank: pool.receive(rank) for rank in (0, 2, 3)}
    joined = late.receive(0)
    truth = single(steps)
    assert truth[-1] < truth[0]
    for report in reports.values():
        assert report["sizes"] == {s: 4 if s < dies_at or s >= grows_at else 3 for s in range(steps)}
        assert report["generation"] == 2
        assert report["pause"] < 5
    for losses in (*(report["losses"] for report in reports.values()), joined["losses"]):
        assert all(abs(loss - truth[step]) < 1e-12 for step, loss in losses.items())
    assert sorted(joined["losses"]) == list(range(grows_at, steps))


def test_a_local_fallback_is_agreed_on_and_equals_the_ring(start: Start, tmp_path: Path) -> None:
    pool, where = start(3), str(tmp_path / "drill")
    for rank in range(3):
        pool.send(rank, fall_back, where, rank, 3)
    for rank in range(3):
        report = pool.receive(rank)
        assert report["local"]
        assert report["backend"] == "'Engine'"
        assert report["apart"] < 1e-12


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_drills_in_a_row(start: Start, tmp_path: Path) -> None:
    for number in range(100):
        kind = ("kill", "raise", "hang")[number % 3]
        culprit, at = number % 4, 1 + number % 5
        pool = start(4)
        timeout_s = 1.0 if kind == "hang" else 20
        reports = run_drill(pool, str(tmp_path / f"{number}"), kind, culprit, timeout_s=timeout_s, at=at)
        check(reports, culprit, within_s=2.0 if kind == "hang" else 1.0, at=at)
        pool.close()
        assert not any(process.is_alive() for process in pool.processes)
