"""What a cache for decoding holds at 128K tokens, and what a step takes; checked against the full forward first.

python -m benchmarks.decoding [--device cuda] [--dtype bfloat16]

A row is printed for an attention only after its steps, token by token over every kind of segment's end at a 32nd of
the lengths, and the last steps at 128K have given what the full forward gives. Rows are those of the head that holds
most at the worst length up to 128K; bytes are the cache's own, unused room and positions included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from dilated_attention import Attention, Dilated, Full, Global, Local, Pattern, build_attention
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.timing import difference, random_inputs
from dilated_attention.core.reach import Reach

LENGTH, SCALE, STEPS = 131_072, 32, 24


def patterns(scale: int) -> dict[str, Pattern]:
    """What is measured, at a `scale`-th of the lengths."""
    lengths = tuple((2048 << i) // scale for i in range(5))
    rates = tuple(1 << i for i in range(5))
    return {
        "LongNet, w = 2048..32768, r = 1..16": Dilated(segment_lengths=lengths, dilation_rates=rates),
        "Local(4096)": Local(window_size=4096 // scale),
        "Local(4096) | Global(64)": Local(window_size=4096 // scale) | Global(tokens=64 // scale),
        "Full": Full(),
    }


def check_short(pattern: Pattern, fields: dict[str, Any]) -> float:
    """The worst relative error of steps, one token each, over a sequence in which every segment ends."""
    attention = build_attention(pattern=pattern, **fields)
    length = LENGTH // SCALE // 2 + 100
    query, key, value = draw(length, attention)
    cache = attention.make_cache(1)
    places = [slice(i, i + 1) for i in range(length)]
    parts = [attention.step(query[:, i], key[:, i], value[:, i], cache) for i in places]
    return difference(torch.cat(parts, dim=1), attention(query, key, value))


def draw(length: int, attention: Attention) -> list[Tensor]:
    """Random query, key and value of one sequence."""
    config = attention.config
    return random_inputs((1, length, config.num_heads, config.head_dim), config.dtype, str(config.device))[:3]


def measure(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    error = check_short(patterns(SCALE)[name], fields)
    bound = BOUNDS[fields["dtype"]]
    if not error < bound:
        raise SystemExit(f"{name}: steps differ from the full forward by {error:.1e}, allowed are {bound:.0e}")
    pattern = patterns(1)[name]
    attention = build_attention(pattern=pattern, **fields)
    reach = Reach(attention.config, pattern)
    grid = range(LENGTH // SCALE - 1, LENGTH, LENGTH // SCALE)
    most, at = max((max(reach.rows(length)), length) for length in grid)
    query, key, value = draw(at, attention)
    cache = attention.make_cache(1, max_seq_len=LENGTH)
    start = at - STEPS
    cache.extend(key[:, :start], value[:, :start])  # the prompt, whose outputs this does not ask for
    times, outs, peak = [], [], 0
    for i in range(start, at):
        began = time.perf_counter()
        outs.append(attention.step(query[:, i : i + 1], key[:, i : i + 1], value[:, i : i + 1], cache))
        outs[-1].sum().item()  # waits for the device
        times.append((time.perf_counter() - began) * 1e3)
        peak = max(peak, cache.nbytes)
    last = difference(torch.cat(outs, dim=1), attention(query[:, start:], key, value))
    if not last < bound:
        raise SystemExit(f"{name}: the last steps differ from the forward by {last:.1e}, allowed are {bound:.0e}")
    return {
        "attention": name,
        "tokens": at,
        "rows": most,
        "cache_mib": peak / 2**20,
        "dense_mib": cache.dense_nbytes / 2**20,
        "percent": 100 * peak / cache.dense_nbytes,
        "step_ms": statistics.median(times),
        "error": max(error, last),
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=BOUNDS)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    fields = {"num_heads": args.heads, "head_dim": args.head_dim, "dtype": args.dtype, "device": args.device}
    with torch.no_grad():
        rows = [measure(name, fields | {"is_causal": True, "requires_grad": False}) for name in patterns(1)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{args.heads} heads of {args.head_dim}, {args.dtype} on {args.device}, batch 1")
    titles = ("tokens", "rows", "cache MiB", "dense MiB", "", "ms a step", "error")
    print("attention".ljust(38) + "".join(map(str.rjust, titles, (8, 8, 11, 11, 8, 11, 9))))
    for row in rows:
        print(
            f"{row['attention']:38}{row['tokens']:8}{row['rows']:8}{row['cache_mib']:11.1f}{row['dense_mib']:11.1f}"
            f"{row['percent']:7.2f}%{row['step_ms']:11.2f}{row['error']:9.0e}"
        )


if __name__ == "__main__":
    main()
