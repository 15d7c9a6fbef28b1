"""`bench --compare`: a planted slow-down and a planted leak are caught, equal code passes, and intervals are honest."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from benchmarks.detection import LEAK, SLOW, compared, copied_checkout, plant
from dilated_attention.bench import checkout
from dilated_attention.bench.cases import CASES
from dilated_attention.bench.checkout import commit_of, git
from dilated_attention.bench.compare import CompareSettings, WorkerProcess, compare, prepared
from dilated_attention.bench.intervals import Interval, ratio_interval, student_quantile
from dilated_attention.errors import ConfigError

from .bench_kit import TINY
from .conftest import Invoke
from .distributions import as_json

CASE = "longnet-1k"
OTHER = "CpuFlash.forward = lambda *a, **k: (_plain(*a, **k)[0] * 1.1, _plain(*a, **k)[1])\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def compare_here(tree: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """`compared` by the command in this process: what measures the trees are processes of their own all the same."""
    monkeypatch.setitem(CASES, CASE, attrs.evolve(CASES[CASE], gate_len=256))
    monkeypatch.setattr(checkout, "_PACKAGE", tree / "src" / "dilated_attention")
    return partial(invoke, "bench", "--compare", "--case", CASE, "--json", "--device", "cpu")


def test_a_slow_down_and_a_leak_are_caught(tree: Path, compare_here: Invoke) -> None:
    plant(tree, SLOW.format(share=0.4) + LEAK)
    done = compare_here()
    assert done.returncode == 1, done.stderr
    data = as_json(done)
    assert [(row["phase"], row["verdict"], row["has_grown"]) for row in data["comparisons"]] == [
        ("forward", "slower", True), ("training", "slower", True)
    ]  # fmt: skip
    for row in data["comparisons"]:
        assert row["ratio"]["ratio"] > 1.2
        assert row["new_bytes"] - row["old_bytes"] >= 1024 * 8 * 64 * 4
    assert git(tree, "worktree", "list").count("\n") == 0


@pytest.mark.slow
def test_equal_code_passes(tree: Path, compare_here: Invoke) -> None:
    plant(tree, "")
    done = compare_here("--threshold", "1.3", "HEAD~0")
    assert done.returncode == 0, done.stderr
    for row in as_json(done)["comparisons"]:
        assert row["verdict"] == "equal"
        assert row["new_bytes"] == row["old_bytes"] > 0


def test_one_that_is_ended_leaves_no_worktree_and_no_process(tree: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "dilated_attention", "bench", "--compare", "--case", CASE, "--device", "cpu"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        end = time.monotonic() + 60
        while len(git(tree, "worktree", "list").splitlines()) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        run.terminate()
        _, said = run.communicate(timeout=60)  # the pipe ends with the last process that holds it
    assert (run.returncode, said) == (128 + signal.SIGTERM, "")
    assert len(git(tree, "worktree", "list").splitlines()) == 1
    assert not list(tmp_path.glob("dilated-attention-*"))


@pytest.mark.slow
def test_other_results_get_no_times(tree: Path) -> None:
    plant(tree, "\n_plain = CpuFlash.forward\n" + OTHER)
    status, data, said = compared(tree)
    assert (status, data["comparisons"]) == (1, [])
    assert "is off the float64 oracle" in said
    assert "FAILED longnet-1k: old and new code compute different results: no times" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "no-such-commit"], "--compare takes a commit, a branch or a tag of "),
        (["--compare", "no-such-commit"], ", got 'no-such-commit': git rev-parse"),
        (["--compare", "--threshold", "1"], "--threshold must be a ratio above 1, such as 1.05; got 1.0"),
        (["--compare", "--memory-threshold", "-1"], "--memory-threshold must be at least 0 bytes, got -1"),
        (["--compare", "--threads", "0"], "--threads must be 1 to 1,024, got 0"),
        (["--threads", "2"], "--threads: not for measuring cases; it goes with --compare"),
        (["--compare", "--backend", "sdpa", "--backend", "fa3"], "--compare takes one --backend, got sdpa, fa3"),
        (
            ["--compare", "--save", "x", "--rounds", "3"],
            "--rounds, --save: not for --compare; --rounds goes with measuring cases or",
        ),
        (["HEAD"], "a case is named by --case HEAD"),
        (["HEAD"], "the argument REF: not for measuring cases; it goes with --compare"),
        (["--memory-threshold", "0"], "--memory-threshold: not for measuring cases; it goes with --compare"),
        (["--scaling", "--case", "longnet-4k"], "--case: not for --scaling; it goes with measuring cases or --compare"),
        (["--list", "--gpus", "1"], "--gpus: not for --list; it goes with --scaling"),
    ],
)
def test_what_cannot_be_compared_is_refused(invoke: Invoke, arguments: list[str], said: str) -> None:
    device = [] if "--list" in arguments else ["--device", "cpu"]
    done = invoke("bench", *device, *arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("triton:unproven_card=true", {"triton": {"unproven_card": True}}),
        ("sdpa:flash", {"sdpa": {"kernel": "flash"}}),
        ("sdpa", {}),
    ],
)
def test_both_sides_are_built_with_the_option(backend: str, options: dict[str, object]) -> None:
    asked: list[dict[str, object]] = []

    def ask(command: str, *, config: dict[str, object], shape: object) -> dict[str, object]:
        asked.append(config)
        return {"backend": config["backend"], "kernel": "", "sums": [[1.0]]}

    workers: Any = [SimpleNamespace(ask=ask)] * 2
    made = prepared(TINY, CompareSettings(backend=backend), workers)
    assert made == [f"{backend.partition(':')[0]}: "] * 2
    assert [config["backend_options"] for config in asked] == [options] * 2


def test_an_installed_copy_has_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkout, "_PACKAGE", tmp_path / "site-packages" / "dilated_attention")
    with pytest.raises(ConfigError, match="needs the package to run from a git checkout"):
        compare([TINY], CompareSettings(), lambda line: None)
    assert commit_of(checkout.checkout_root()) == (None, False)


def test_a_worker_computes_with_the_threads_it_is_given(tree: Path) -> None:
    worker = WorkerProcess(tree, "cpu", 3)
    try:
        worker.ready()
        assert worker.ask("threads") == 3
    finally:
        worker.close()


def test_a_checkout_knows_its_commit(tree: Path) -> None:
    plant(tree, "")
    commit, modified = commit_of(tree)
    assert (commit, modified) == (git(tree, "rev-parse", "HEAD"), False)
    plant(tree, "\n")
    assert commit_of(tree) == (commit, True)


def test_student_quantiles() -> None:
    for freedom, expected in ((5, 4.0321), (10, 3.1693), (30, 2.7500), (1000, 2.5808)):  # two-sided 99 %, tables
        assert student_quantile(0.995, freedom) == pytest.approx(expected, rel=0.01)


def test_intervals_hold_what_they_say() -> None:
    noise = random.Random(0)

    def pairs(ratio: float, count: int) -> tuple[list[float], list[float]]:
        """Lognormal noise of 10 %; every eighth time other work doubles one of the two."""
        times = []
        for scale in (1.0, ratio):
            times.append([scale * noise.lognormvariate(0, 0.1) * noise.choice((2, *[1] * 7)) for _ in range(count)])
        return times[0], times[1]

    held = [ratio_interval(*pairs(1.1, 30)) for _ in range(1000)]
    assert sum(found.low <= 1.1 <= found.high for found in held) >= 975
    assert sum(found.high / found.low < 1.5 for found in held) >= 900
    assert Interval(1.1, 1.06, 1.14).verdict(1.05) == "slower"
    assert Interval(1.1, 1.04, 1.16).verdict(1.05) == "undecided"
    assert Interval(0.9, 0.86, 0.94).verdict(1.05) == "faster"
    assert Interval(1.0, 0.96, 1.04).verdict(1.05) == "equal"
