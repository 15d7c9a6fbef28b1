"""What every option costs and gives: time and peak memory without it and with it, in one interleaved run.

    python -m benchmarks.options                      the CPU, some two minutes
    python -m benchmarks.options --device cuda        a CUDA card, within a minute
    python -m benchmarks.options --only limits        rows whose option contains the word

Every attention that is timed has passed the float64 oracle first, at a length where that fits; a row that fails ends
the run. Times are medians of calls in turns, without and with; memory is the peak of one call above what was held
before, results included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from dilated_attention import Attention, build_attention
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.oracle import truth
from dilated_attention.bench.timing import difference, extra_bytes, in_turns, random_inputs
from dilated_attention.core.pattern import Pattern

_WARM_UP = 2


@attrs.frozen
class Case:
    """Where options are measured."""

    device: str
    seq_len: int
    heads: int
    head_dim: int
    dtype: str
    gate_tokens: int
    rounds: int

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """Of LongNet's pattern: the last segment holds the whole sequence."""
        return tuple(self.seq_len >> shift for shift in (3, 2, 1, 0))

    def fields(self, **more: Any) -> dict[str, Any]:
        """Of an attention, with those of an option."""
        own = {"num_heads": self.heads, "head_dim": self.head_dim, "dtype": self.dtype, "device": self.device}
        return own | {"is_causal": True} | more

    def inputs(self, seq_len: int | None = None, *, kv_heads: int | None = None) -> list[Tensor]:
        """Random query, key, value and gradient of out, (1, seq_len, heads, head_dim)."""
        shape = (1, seq_len or self.seq_len, self.heads, self.head_dim)
        return random_inputs(shape, self.dtype, self.device, kv_heads=kv_heads)


CASES = {
    "cpu": Case("cpu", 2048, 8, 64, "float32", 640, 7),
    "cuda": Case("cuda", 32768, 16, 64, "bfloat16", 640, 9),
}


@attrs.frozen(kw_only=True)
class Row:
    """One option.

    Attributes:
        option: its name and value.
        measured: what the numbers are of.
        without: one call as it is by default, or None where there is nothing to compare with.
        chosen: one call with the option.
        memory: what peak memory is taken of, if it is not of the calls.
        note: what numbers cannot say.
    """

    option: str
    measured: str
    without: Callable[[], object] | None
    chosen: Callable[[], object]
    memory: tuple[Callable[[], object] | int, Callable[[], object] | int] | None = None
    note: str = ""


@attrs.frozen
class Result:
    """A measured row: milliseconds and bytes, without and with."""

    option: str
    measured: str
    without_ms: float | None
    chosen_ms: float
    without_bytes: int | None
    chosen_bytes: int
    note: str


def checked(case: Case, pattern: Pattern, **more: Any) -> Attention:
    """The attention that is asked for, after out and gradients have passed the oracle at `gate_tokens`."""
    fields = case.fields(pattern=pattern, **more)
    attention = build_attention(fields)
    query, key, value, dout = case.inputs(case.gate_tokens, kv_heads=attention.config.kv_heads)
    expected = truth((query, key, value, dout), pattern, is_causal=fields["is_causal"])
    swap = attention.config.tensor_layout == "bhsd"
    leaves = [x.transpose(1, 2) if swap else x for x in (query, key, value)]
    attention.eval()  # undropped
    if attention.config.requires_grad:
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, dout.transpose(1, 2) if swap else dout)
        actual = [out, *grads]
    else:
        actual, expected = [attention(*leaves)], expected[:1]
    actual = [x.transpose(1, 2) if swap else x for x in actual]
    error = max(difference(a, e) for a, e in zip(actual, expected, strict=True))
    if not error < BOUNDS[case.dtype]:
        sys.exit(f"{attention} differs from the oracle by {error:.1e}, more than {BOUNDS[case.dtype]:.0e}: no times")
    return attention.train()


def measure(case: Case, row: Row) -> Result:
    """Interleaved medians and peaks."""
    calls = [call for call in (row.without, row.chosen) if call is not None]
    times = in_turns(dict(enumerate(calls)), case.rounds, case.device, warm_up=_WARM_UP)
    sources = row.memory if row.memory is not None else tuple(calls)
    peaks = [source if isinstance(source, int) else extra_bytes(source, case.device) for source in sources]
    medians = [statistics.median(found) for found in times.values()]
    first = (medians[0], peaks[0]) if row.without is not None else (None, None)
    return Result(row.option, row.measured, first[0], medians[-1], first[1], peaks[-1], row.note)


def markdown(results: list[Result]) -> str:
    """The table, as docs/performance_log.md shows it."""

    def pair(first: float | None, second: float, form: str) -> str:
        return f"{second:{form}}" if first is None else f"{first:{form}} → {second:{form}}"

    lines = ["| option | measured | ms | peak MiB | |", "|---|---|---|---|---|"]
    for r in results:
        first = None if r.without_bytes is None else r.without_bytes / 2**20
        time, memory = pair(r.without_ms, r.chosen_ms, ".4g"), pair(first, r.chosen_bytes / 2**20, ".4g")
        lines.append(f"| {r.option} | {r.measured} | {time} | {memory} | {r.note} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every option's row on one device."""
    from .option_rows import rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--only", default="", help="rows whose option contains this")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    case = CASES[args.device]
    results = []
    for make in rows(case):
        row = make()
        if args.only in row.option:
            results.append(measure(case, row))
            print(f"{row.option}: {results[-1].chosen_ms:.3g} ms", file=sys.stderr)
    print(json.dumps([attrs.asdict(r) for r in results], indent=2) if args.json else markdown(results))


if __name__ == "__main__":
    main()
