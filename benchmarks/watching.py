"""What counters and ranges cost: this code against a copy of it without them, and their own time within a pass.

    python -m benchmarks.watching                     some eight minutes
    python -m benchmarks.watching --seconds 20        less of every row

*In turns*: two processes, one thread each, compute the same; the code of one has been stripped of counters and ranges.
The interval is that of the trimmed mean of the pairs' log ratios, 99 %. *Within*: in a third process every entry into
the watching code is timed, timers included, so that what is measured is no less than what it costs. The second is what
tells a hundredth of a long pass from noise.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dilated_attention import build_attention
from dilated_attention.bench.cases import CASES
from dilated_attention.bench.compare import WorkerProcess
from dilated_attention.bench.intervals import ratio_interval
from dilated_attention.bench.timing import random_inputs, training
from dilated_attention.core import tracing
from dilated_attention.core.counters import Tally

from .detection import copied_checkout

TINY = {"num_heads": 1, "head_dim": 16, "dtype": "float32"}
LONG = CASES["longnet-16k"]
FEWEST_ROUNDS, PASSES = 15, 7
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


def in_turns(workers: list[WorkerProcess], phase: str, calls: int, seconds: float) -> dict[str, float]:
    """Microseconds a call without and with, and the interval of their ratio."""
    shuffled = random.Random(0)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.monotonic() + seconds
    while len(times[0]) < FEWEST_ROUNDS or time.monotonic() < end:
        for which in shuffled.sample((0, 1), 2):
            times[which].append(workers[which].ask("milliseconds", phase=phase, calls=calls) / calls * 1e3)
    ratio = ratio_interval(*times)
    without = statistics.median(times[0])
    return {
        "without_us": without,
        "with_us": statistics.median(times[1]),
        "rounds": len(times[0]),
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "more_us": (ratio.ratio - 1) * without,
        "more_us_low": (ratio.low - 1) * without,
        "more_us_high": (ratio.high - 1) * without,
    }


def compared(seconds: float) -> dict[str, dict[str, float]]:
    """Every row in turns."""
    long = LONG.to_dict()
    cases: tuple[tuple[str, dict[str, Any], tuple[int, ...], int], ...] = (
        ("8 tokens", TINY, (1, 8, 1, 16), 200),
        ("16,384 tokens", long["config"], tuple(long["shape"]), 1),
    )
    found = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        workers = []
        for kind in ("without", "with"):
            tree = copied_checkout(Path(name) / kind)
            if kind == "without":
                strip(tree)
            workers.append(WorkerProcess(tree, "cpu", 1))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.ready()
        for title, config, shape, calls in cases:
            for worker in workers:
                worker.ask("prepare", config=config, shape=shape)
            for phase in ("forward", "training"):
                for worker in workers:
                    worker.ask("milliseconds", phase=phase, calls=calls)
                found[f"{title}, {phase}"] = in_turns(workers, phase, calls, seconds)
    return found


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
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    own, turns = counted(), compared(args.seconds)
    if args.json:
        print(json.dumps({"within": own, "in_turns": turns}, indent=2))
        return
    for title, row in turns.items():
        print(
            f"{title:24}{row['without_us']:12,.1f} us without, {row['with_us']:12,.1f} with: "
            f"{row['ratio']:.4f} ({row['low']:.4f} to {row['high']:.4f}), {row['more_us']:+,.2f} us "
            f"({row['more_us_low']:+,.2f} to {row['more_us_high']:+,.2f}), {row['rounds']} pairs"
        )
    for title, row in own.items():
        print(
            f"{title:24}{row['watching_us']:.1f} us in {row['entries']:.0f} entries into the watching code within "
            f"{row['pass_s']:.2f} s; at most {row['largest_share']:.2e} of a pass"
        )


if __name__ == "__main__":
    main()
