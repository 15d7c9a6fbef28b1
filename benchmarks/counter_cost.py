"""What counters and ranges cost: this code against a copy of it without them, and their own time within a pass.

    python -m benchmarks.counter_cost                     some ten minutes
    python -m benchmarks.counter_cost --only '8 tokens'   rows in turns whose title contains the words

*In turns*: two processes, one thread each, compute the same; the code of one has been stripped of counters and ranges.
Where a process happens to lie in memory makes it faster or slower by some hundredths for all its life, so twelve pairs
of processes are started, and the interval (trimmed mean of log ratios, 99 %) is over these. *Within*: in this process
every entry into the watching code is timed, timers included, so that what is measured is no less than what it costs.
The second is what tells a hundredth of a long pass from noise.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dilated_attention import build_attention
from dilated_attention.bench.cases import CASES
from dilated_attention.bench.compare import WorkerProcess
from dilated_attention.bench.history import PHASES
from dilated_attention.bench.intervals import ratio_interval
from dilated_attention.bench.timing import random_inputs, training
from dilated_attention.core import tracing
from dilated_attention.core.counters import Tally

from .detection import copied_checkout

TINY = {"num_heads": 1, "head_dim": 16, "dtype": "float32"}
LONG = CASES["longnet-16k"]
PROCESSES, PASSES = 12, 7
# What is stripped, line by line; all of it stands on one line each.
_STRIPPED = (
    (re.compile(r"^( *)with span\(.*\):$", re.M), r"\1if True:"),
    (re.compile(r"^( *)if profiler\._is_profiler_enabled:.*$", re.M), r"\1if False:"),
    (re.compile(r"^( *)self\.(engine\.)?(forwards|backwards)\.add\(.*\)$", re.M), r"\1pass"),
    (re.compile(r"^( *)self\._hits \+= 1$", re.M), r"\1pass"),
)


def strip(tree: Path) -> int:
    """Take counting and ranges out of a copy's sources, all but those of ranks and lowering; how many places."""
    places = 0
    for path in sorted(tree.glob("core/*.py")):
        text = path.read_text(encoding="utf-8")
        for pattern, instead in _STRIPPED:
            text, found = pattern.subn(instead, text)
            places += found
        path.write_text(text, encoding="utf-8")
    return places


class _Timed:
    """A context whose way in and out is timed as watching."""

    def __init__(self, inner: AbstractContextManager[object], spent: list[float]) -> None:
        self._inner, self._spent = inner, spent

    def __enter__(self) -> object:
        start = time.perf_counter()
        entered = self._inner.__enter__()
        self._spent.append(time.perf_counter() - start)
        return entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        start = time.perf_counter()
        swallowed = self._inner.__exit__(kind, error, trace)
        self._spent.append(time.perf_counter() - start)
        return swallowed


@contextmanager
def timed_watching() -> Iterator[list[float]]:
    """Seconds of every entry into the watching code, as they are spent."""
    spent: list[float] = []
    plain_span, plain_add = tracing.span, Tally.add

    def span(name: str) -> _Timed:
        start = time.perf_counter()
        inner = plain_span(name)
        spent.append(time.perf_counter() - start)
        return _Timed(inner, spent)

    def add(self: Tally, calls: int, tokens: int, pairs: int) -> None:
        start = time.perf_counter()
        plain_add(self, calls, tokens, pairs)
        spent.append(time.perf_counter() - start)

    with ExitStack() as stack:
        for module in [*sys.modules.values()]:
            if getattr(module, "span", None) is plain_span:
                stack.callback(setattr, module, "span", plain_span)
                module.span = span  # type: ignore[attr-defined]
        stack.callback(setattr, Tally, "add", plain_add)
        Tally.add = add  # type: ignore[method-assign]
        yield spent


def within(call: Callable[[], object], passes: int) -> dict[str, float]:
    """Medians over passes: seconds of one, entries into the watching code and their microseconds; the largest share."""
    rows = []
    for _ in range(passes + 1):
        with timed_watching() as spent:
            start = time.perf_counter()
            call()
            rows.append((time.perf_counter() - start, len(spent), sum(spent)))
    del rows[0]
    return {
        "pass_s": statistics.median(row[0] for row in rows),
        "entries": statistics.median(row[1] for row in rows),
        "watching_us": statistics.median(row[2] for row in rows) * 1e6,
        "largest_share": max(row[2] / row[0] for row in rows),
    }


def in_turns(workers: Sequence[WorkerProcess], phase: str, calls: int, seconds: float) -> tuple[float, float]:
    """Medians without and with, microseconds a call."""
    shuffled = random.Random(0)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + seconds
    while not times[0] or time.monotonic() < end:
        for which in shuffled.sample((0, 1), 2):
            times[which].append(workers[which].ask("milliseconds", phase=phase, calls=calls) / calls * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def compared(seconds: float, only: str) -> dict[str, dict[str, float]]:
    """Every row in turns whose title contains `only`."""
    long = LONG.to_dict()
    cases: tuple[tuple[str, dict[str, Any], tuple[int, ...], int], ...] = (
        ("8 tokens", TINY, (1, 8, 1, 16), 200),
        ("16,384 tokens", long["config"], tuple(long["shape"]), 1),
    )
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        trees = [copied_checkout(Path(name) / kind) for kind in ("without", "with")]
        strip(trees[0])
        for _ in range(PROCESSES):
            with ExitStack() as stack:
                workers = [WorkerProcess(tree, "cpu", 1) for tree in trees]
                for worker in workers:
                    stack.callback(worker.close)
                for worker in workers:
                    worker.ready()
                for title, config, shape, calls in cases:
                    phases = [phase for phase in PHASES if only in f"{title}, {phase}"]
                    for worker in workers if phases else ():
                        worker.ask("prepare", config=config, shape=shape)
                    for phase in phases:
                        medians = in_turns(workers, phase, calls, seconds / PROCESSES)
                        found.setdefault(f"{title}, {phase}", []).append(medians)
    return {title: _row(pairs) for title, pairs in found.items()}


def _row(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Microseconds a call, the ratio with and without, and what is added; a pair of processes is one observation."""
    ratio = ratio_interval([old for old, _ in pairs], [new for _, new in pairs])
    without = statistics.median(old for old, _ in pairs)
    return {
        "without_us": without,
        "with_us": statistics.median(new for _, new in pairs),
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "more_us": (ratio.ratio - 1) * without,
        "more_us_low": (ratio.low - 1) * without,
        "more_us_high": (ratio.high - 1) * without,
    }


def counted() -> dict[str, dict[str, float]]:
    """The watching code's own time, forward and backward of the long case."""
    torch.set_num_threads(1)
    data = LONG.to_dict()
    attention = build_attention(data["config"], seq_len=LONG.seq_len)
    inputs = random_inputs(LONG.shape, LONG.dtype, "cpu")
    with torch.no_grad():
        forward = within(lambda: attention(*inputs[:3]), PASSES)
    return {
        "16,384 tokens, forward": forward,
        "16,384 tokens, training": within(training(attention, inputs), PASSES),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100.0, help="of every row in turns")
    parser.add_argument("--only", default="", help="rows in turns whose title contains this")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    own, turns = counted(), compared(args.seconds, args.only)
    if args.json:
        print(json.dumps({"within": own, "in_turns": turns}, indent=2))
        return
    for title, row in turns.items():
        print(
            f"{title:24}{row['without_us']:12,.1f} us without, {row['with_us']:12,.1f} with: "
            f"{row['ratio']:.4f} ({row['low']:.4f} to {row['high']:.4f}), {row['more_us']:+,.2f} us "
            f"({row['more_us_low']:+,.2f} to {row['more_us_high']:+,.2f})"
        )
    for title, row in own.items():
        print(
            f"{title:24}{row['watching_us']:.1f} us in {row['entries']:.0f} entries into the watching code within "
            f"{row['pass_s']:.2f} s; at most {row['largest_share']:.2e} of a pass"
        )


if __name__ == "__main__":
    main()
