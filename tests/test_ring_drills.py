"""Failures of real processes: every survivor knows at once, nothing hangs beyond its bound, nothing is wrong.

Over Gloo on CPUs, and over NCCL with one card a rank: `-m gpu -n 3`, where two cards are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist

from .ring_drills import EXACT, Seat, absent, astray, drill, elastic, fall_back, mismatched, newcomer, single
from .ring_ranks import Ranks

# An SIGKILLed process keeps its connections until the driver has taken its card back.
WITHIN_S = {"cpu": 1.0, "cuda": 3.0}
CARDS = pytest.param(
    ("cuda", 2),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL takes one a rank"),
    ],
    id="nccl",
)


@attrs.define
class Drills:
    """Processes that belong to no group yet; what they leave is ended with the test.

    Attributes:
        device: "cpu" or "cuda".
        size: ranks in a ring.
        folder: the test's own.
        record: keeps a figure in the report of a run (`--junitxml=F -o junit_family=xunit1`).
        pools: those started.
    """

    device: str
    size: int
    folder: Path
    record: Callable[[str, object], None]
    pools: list[Ranks] = attrs.field(factory=list)

    def start(self, size: int) -> Ranks:
        """New processes."""
        self.pools.append(Ranks(size, self.folder, join=False))
        return self.pools[-1]

    def seat(self, rank: int, *, where: str = "drill") -> Seat:
        """A rank's place; `where` is a file in the folder, or a `host:port`."""
        return Seat(where if ":" in where else str(self.folder / where), rank, self.size, self.device)

    def run(self, case: Callable[..., Any]) -> list[Any]:
        """What every rank of a new ring returns."""
        pool = self.start(self.size)
        for rank in range(self.size):
            pool.send(rank, case, self.seat(rank))
        return [pool.receive(rank, 90) for rank in range(self.size)]

    def break_ring(
        self,
        kind: str,
        culprit: int,
        *,
        timeout_s: float = 20,
        near: bool = False,
        blocks: bool = False,
        at: int = 3,
        where: str = "drill",
    ) -> dict[int, dict[str, Any]]:
        """What every rank that is left reports of a ring of which one fails."""
        pool = self.start(self.size)
        for rank in range(self.size):
            pool.send(rank, drill, self.seat(rank, where=where), kind, culprit, at, timeout_s, near, blocks)
        alive = [rank for rank in range(self.size) if rank != culprit or not kind.startswith("kill")]
        return {rank: pool.receive(rank, 90) for rank in alive}

    def check(self, reports: dict[int, dict[str, Any]], culprit: int, *, after_s: float = 0, at: int = 3) -> None:
        """Everyone knows in time, blames the right rank, was never wrong, and was refused a retry at once."""
        for rank, report in reports.items():
            assert "wrong" not in report, report
            assert "survived" not in report
            assert (report["generation"], report["steps"]) == (0, at), report
            if rank != culprit:
                self.record(f"rank {rank} knew after_s", report["after"])
                assert report["peer"] == culprit, report
                assert after_s - 0.1 <= report["after"] < after_s + WITHIN_S[self.device], report
            assert "nothing is retried in place" in report["retry"]
            assert report["retry_took"] < 0.1
            assert report["device_took"] < 1


@pytest.fixture(params=[pytest.param(("cpu", 4), id="gloo"), CARDS])
def drills(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> Iterator[Drills]:
    device, size = request.param
    found = Drills(device, size, tmp_path, record_property)
    yield found
    for pool in found.pools:
        pool.close()


@pytest.mark.parametrize(("culprit", "near"), [(1, False), (-1, True), (0, False)], ids=["1", "last, far from 0", "0"])
def test_a_killed_rank_is_known_at_once(drills: Drills, culprit: int, near: bool) -> None:
    reports = drills.break_ring("kill", culprit % drills.size, near=near)
    assert len(reports) == drills.size - 1
    drills.check(reports, culprit % drills.size)


@pytest.mark.parametrize("at", [3, 0], ids=["connected", "never connected"])
def test_a_rank_killed_while_others_wait_for_its_rows_is_known_at_once(drills: Drills, at: int) -> None:
    drills.check(drills.break_ring("kill before sending", 0, at=at), 0, at=at)


@pytest.mark.parametrize("kind", ["kill once launched", "raise once launched"])
def test_a_rank_that_fails_with_its_own_work_under_way_is_known_at_once(drills: Drills, kind: str) -> None:
    culprit = drills.size - 1
    drills.check(drills.break_ring(kind, culprit), culprit)


def test_a_rank_that_waits_for_its_device_amid_a_pass_knows_too(drills: Drills) -> None:
    drills.check(drills.break_ring("kill before sending", 0, blocks=True), 0)


@pytest.mark.parametrize("kind", ["raise", "raise before sending", "raise while preparing", "raise amid hops"])
def test_a_raising_rank_is_known_at_once_and_says_what_of(drills: Drills, kind: str) -> None:
    culprit = drills.size // 2
    reports = drills.break_ring(kind, culprit)
    drills.check(reports, culprit)
    assert reports[culprit]["reason"] == "MemoryError: the device is out of memory"
    assert reports[culprit]["peer"] == culprit


@pytest.mark.parametrize("kind", ["hang", "hang before sending"])
def test_a_hanging_rank_is_known_after_the_timeout(drills: Drills, kind: str) -> None:
    reports = drills.break_ring(kind, 1, timeout_s=1)
    drills.check(reports, 1, after_s=1)


def test_the_store_may_be_elsewhere_when_rank_0_dies(drills: Drills) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    drills.check(drills.break_ring("kill", 0, where=f"127.0.0.1:{server.port}"), 0)


def test_ranks_that_build_different_attentions_say_what_differs_where(drills: Drills) -> None:
    said = set(drills.run(mismatched))
    assert len(said) == 1
    (message,) = said
    assert "config.scale is" in message
    assert f"0.5 on rank {drills.size - 2}" in message
    assert "config.pattern is" in message
    assert f"on rank {drills.size - 1}" in message


def test_a_rank_in_another_pass_is_an_error_on_all(drills: Drills) -> None:
    found, odd = drills.run(astray), drills.size // 2
    assert {peer for rank, (peer, _) in enumerate(found) if rank != odd} == {odd}
    said = "it has a shard of 12 tokens where this rank has a shard of 24 tokens: all ranks must make the same calls in"
    assert any(said in reason for _, reason in found)


def test_a_rank_that_does_not_build_is_missed_in_time(drills: Drills) -> None:
    for rank, (peer, reason, after) in enumerate(drills.run(absent)):
        if rank != 1:
            assert peer == 1
            assert "it did not call build_attention within 1.5 s" in reason
            assert after < 2.5


def test_training_goes_on_over_fewer_ranks_and_again_over_all(drills: Drills) -> None:
    steps, dies_at, grows_at = 12, 4, 8
    pool, late, size = drills.start(drills.size), drills.start(1), drills.size
    for rank in range(size):
        pool.send(rank, elastic, drills.seat(rank), dies_at, grows_at, steps)
    late.send(0, newcomer, drills.seat(1), steps)
    reports = {rank: pool.receive(rank, 90) for rank in range(size) if rank != 1}
    joined = late.receive(0)
    truth, (_, bound) = single(steps), EXACT[drills.device]
    assert truth[-1] < truth[0]
    for report in reports.values():
        assert report["sizes"] == {s: size if s < dies_at or s >= grows_at else size - 1 for s in range(steps)}
        assert report["generation"] == 2
        assert report["pause"] < 5
    for losses in (*(report["losses"] for report in reports.values()), joined["losses"]):
        assert all(abs(loss - truth[step]) < bound for step, loss in losses.items())
    assert sorted(joined["losses"]) == list(range(grows_at, steps))


def test_a_local_fallback_is_agreed_on_and_equals_the_ring(drills: Drills) -> None:
    for report in drills.run(fall_back):
        assert report["local"]
        assert report["backend"] == "'Engine'"
        assert report["apart"] < EXACT[drills.device][1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_drills_in_a_row(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    for number in range(100):
        kind = ("kill", "raise", "hang", "kill before sending", "hang before sending")[number % 5]
        culprit, at = number % 4, 1 + number % 6
        drills = Drills("cpu", 4, tmp_path, record_property)
        timeout_s = 1.0 if kind.startswith("hang") else 20
        reports = drills.break_ring(kind, culprit, timeout_s=timeout_s, at=at, where=str(number))
        drills.check(reports, culprit, after_s=timeout_s if kind.startswith("hang") else 0, at=at)
        drills.pools[0].close()
        assert not any(process.is_alive() for process in drills.pools[0].processes)
