"""Old code against new on this machine, now: two processes that take turns, so that both meet the same noise.

The old tree is a git worktree in a temporary folder; the new one is the checkout that this package runs from, as it
stands. Both are measured by this harness, so the old tree needs none.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from ..core.errors import ConfigError, DilatedAttentionError
from ..core.explain import columns
from .cases import BenchCase, backend_options
from .checkout import checkout_root, git
from .contenders import BOUNDS, Gate, ours
from .history import PHASES, Phase
from .intervals import Interval, ratio_interval

MAX_THREADS: Final = 1024

_FEWEST: Final = 15
_BLOCK_MS: Final = 20.0  # what is shorter is repeated within a turn


@attrs.frozen(kw_only=True)
class CompareSettings:
    """How to compare.

    Attributes:
        ref: what git calls the old code.
        device: torch's name of the device.
        backend: `auto`, NAME, NAME:KERNEL or NAME:OPTION=VALUE.
        threshold: a ratio of times beyond this is a slow-down.
        memory_threshold: growth of peak memory beyond so many bytes is flagged.
        seconds: longest time for one case and phase; an interval that is still wide then is undecided.
        threads: of a CPU's kernels. Several wait for each other, so other work on the machine delays them far more.
    """

    ref: str = "HEAD"
    device: str = "cpu"
    backend: str = "auto"
    threshold: float = 1.05
    memory_threshold: int = 0
    seconds: float = 30.0
    threads: int = 1

    def __attrs_post_init__(self) -> None:
        if not 1 < self.threshold < math.inf:
            raise ConfigError(f"--threshold must be a ratio above 1, such as 1.05; got {self.threshold}")
        if self.memory_threshold < 0:
            raise ConfigError(f"--memory-threshold must be at least 0 bytes, got {self.memory_threshold}")
        if not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"--threads must be 1 to {MAX_THREADS:,}, got {self.threads}")


@attrs.frozen(kw_only=True)
class Comparison:
    """One case and phase.

    Attributes:
        case: its name.
        phase: "forward" or "training".
        old, new: backend and kernel of each.
        old_ms, new_ms: medians of one call.
        rounds: pairs that were timed.
        ratio: new over old.
        verdict: "slower", "faster", "equal" or "undecided" (`Interval.verdict`).
        old_bytes, new_bytes: peak memory of one call.
        has_grown: whether memory grew beyond the threshold.
    """

    case: str
    phase: Phase
    old: str
    new: str
    old_ms: float
    new_ms: float
    rounds: int
    ratio: Interval
    verdict: str
    old_bytes: int
    new_bytes: int
    has_grown: bool


class WorkerProcess:
    """A process that measures one tree."""

    def __init__(self, tree: Path, device: str, threads: int) -> None:
        worker = Path(__file__).with_name("compare_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker), str(tree), device, str(threads)],
            env=os.environ | {"PYTHONPATH": str(tree / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._tree = tree

    def ready(self) -> None:
        """Return when it has imported its tree."""
        self._answer()

    def ask(self, do: str, **order: Any) -> Any:
        """What the worker's method `do` returns.

        Raises:
            ConfigError: it raised; the message is its own.
            DilatedAttentionError: the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._answer()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            said = self._process.stderr.read().strip().splitlines()
            raise DilatedAttentionError(f"what measures {self._tree} has ended: " + "\n".join(said[-10:]))
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer.get("value")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def old_tree(root: Path, ref: str) -> Iterator[Path]:
    """The code of `ref` in a temporary folder.

    Raises:
        ConfigError: git knows no such commit.
    """
    try:
        commit = git(root, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    except ConfigError as error:
        raise ConfigError(
            f"--compare takes a commit, a branch or a tag of {str(root)!r}, got {ref!r}: {error}"
        ) from error
    with tempfile.TemporaryDirectory(prefix="dilated-attention-") as name:
        tree = Path(name) / "old"
        try:
            git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            yield tree
        finally:
            if tree.exists():
                git(root, "worktree", "remove", "--force", str(tree))


def compare(
    cases: Sequence[BenchCase],
    settings: CompareSettings,
    say: Callable[[str], None],
    *,
    phases: Sequence[Phase] = PHASES,
) -> tuple[list[Comparison], list[str]]:
    """Every case and phase, and what failed: results that are wrong, or not what the old code computed.

    Raises:
        ConfigError: this package does not run from a git checkout, or git knows no such `ref`.
    """
    root = checkout_root()
    if root is None:
        raise ConfigError("--compare needs the package to run from a git checkout: it measures the old code beside it")
    found: list[Comparison] = []
    failures: list[str] = []
    with ExitStack() as stack:
        trees = (stack.enter_context(old_tree(root, settings.ref)), root)
        workers = []
        for tree in trees:
            worker = WorkerProcess(tree, settings.device, settings.threads)
            stack.callback(worker.close)
            workers.append(worker)
        wrong = {case.name: _gated(case, settings) for case in cases}  # while the workers start
        for worker in workers:
            worker.ready()
        for case in cases:
            failures += wrong[case.name]
            try:
                made = prepared(case, settings, workers)
            except ConfigError as error:
                say(f"{case.name}: left out: {error}")
                continue
            if made is None:
                failures.append(f"{case.name}: old and new code compute different results: no times")
            if made is None or wrong[case.name]:
                continue
            for phase in phases:
                found.append(_compared(case, phase, settings, workers, made))
                say(line_of(found[-1]))
    return found, failures


def _gated(case: BenchCase, settings: CompareSettings) -> list[str]:
    """What of the new code is not right."""
    gate = Gate(case, settings.device, case.inputs(settings.device))
    notes: list[str] = []
    return [] if ours(gate, [settings.backend], notes.append) else gate.failures or notes


def prepared(case: BenchCase, settings: CompareSettings, workers: Sequence[WorkerProcess]) -> list[str] | None:
    """Both workers have built and warmed up the case; their backends and kernels, or None where results differ."""
    data = case.to_dict()
    backend, _, option = settings.backend.partition(":")
    config = data["config"] | {"backend": backend, "backend_options": backend_options(backend, option)}
    answers = [worker.ask("prepare", config=config, shape=data["shape"]) for worker in workers]
    sums = [[number for pair in answer["sums"] for number in pair] for answer in answers]
    scale = max(abs(number) for number in sums[0])
    off = max(abs(old - new) for old, new in zip(*sums, strict=True))
    if not off <= BOUNDS[case.dtype] * scale:
        return None
    return [f"{answer['backend']}: {answer['kernel']}" for answer in answers]


def _compared(
    case: BenchCase, phase: Phase, settings: CompareSettings, workers: Sequence[WorkerProcess], made: Sequence[str]
) -> Comparison:
    """Pairs of turns in random order until the interval says something, or time is up."""
    shuffled = random.Random(0)
    once = max(worker.ask("milliseconds", phase=phase, calls=1) for worker in workers)
    calls = max(1, math.ceil(_BLOCK_MS / once))
    times: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + settings.seconds
    verdict, ratio = "undecided", Interval(1.0, 0.0, math.inf)
    while verdict == "undecided" and (len(times[0]) < _FEWEST or time.monotonic() < end):
        for _ in range(5):
            for which in shuffled.sample((0, 1), 2):
                times[which].append(workers[which].ask("milliseconds", phase=phase, calls=calls) / calls)
        if len(times[0]) >= _FEWEST:
            ratio = ratio_interval(*times)
            verdict = ratio.verdict(settings.threshold)
    peaks = [worker.ask("peak_bytes", phase=phase) for worker in workers]
    return Comparison(
        case=case.name,
        phase=phase,
        old=made[0],
        new=made[1],
        old_ms=sorted(times[0])[len(times[0]) // 2],
        new_ms=sorted(times[1])[len(times[1]) // 2],
        rounds=len(times[0]),
        ratio=ratio,
        verdict=verdict,
        old_bytes=peaks[0],
        new_bytes=peaks[1],
        has_grown=peaks[1] > peaks[0] + settings.memory_threshold,
    )


def line_of(found: Comparison) -> str:
    """A comparison in one line, for whoever waits."""
    return f"{found.case}, {found.phase}: {found.ratio.ratio:.3f} ({found.ratio.low:.3f} to {found.ratio.high:.3f})"


def compare_text(found: Sequence[Comparison], settings: CompareSettings) -> str:
    """The comparisons for people."""
    header = ("", "old ms", "new ms", "new / old", "99% interval", "", "pairs", "old bytes", "new bytes", "")
    rows = [
        (
            f"{c.case}, {c.phase}", f"{c.old_ms:.3f}", f"{c.new_ms:.3f}", f"{c.ratio.ratio:.3f}",
            f"{c.ratio.low:.3f}-{c.ratio.high:.3f}", c.verdict.upper() if c.verdict == "slower" else c.verdict,
            str(c.rounds), f"{c.old_bytes:,}", f"{c.new_bytes:,}", "MORE MEMORY" if c.has_grown else "",
        )
        for c in found
    ]  # fmt: skip
    lines = list(columns([header, *rows]))
    lines += [f"{c.case}: {c.old} became {c.new}" for c in found if c.old != c.new and c.phase == PHASES[0]]
    return "\n".join([f"the working tree against {settings.ref}; slower is beyond {settings.threshold:g}", *lines])
