"""What benchmarks of backends beside each other share: cases, arguments, and calls that follow each other."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence

from dilated_attention import Pattern
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.timing import milliseconds

Case = tuple[Pattern, int, int, int, bool]  # pattern, tokens, heads, head_dim, causal
_CALLS, _ROUNDS = 20, 5


def following(call: Callable[[], object], device: str) -> float:
    """Milliseconds of a call of many that follow each other; the median of rounds."""

    def several() -> None:
        for _ in range(_CALLS):
            call()

    several()
    return statistics.median(milliseconds(several, device) / _CALLS for _ in range(_ROUNDS))


def parser_of(description: str | None, cases: Sequence[Case]) -> argparse.ArgumentParser:
    """Of backends, a device, a dtype and the longest case."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(BOUNDS))
    parser.add_argument("--longest", type=int, default=cases[-1][1], help="tokens of the longest case")
    parser.add_argument("backends", nargs="*", default=["triton", "sdpa"], metavar="BACKEND")
    return parser


def print_rows(cases: Sequence[Case], longest: int, of_case: Callable[[Case], Iterator[str]]) -> None:
    """A heading for each case that is no longer, and its lines as they come."""
    for case in cases:
        if case[1] <= longest:
            print(f"{case[0]}, {case[1]:,} tokens, {case[2]} heads of {case[3]}, {'causal' if case[4] else 'all'}")
            for line in of_case(case):
                print(f"  {line}", flush=True)
