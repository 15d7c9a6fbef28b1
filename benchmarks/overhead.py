"""What a call costs beyond the bare kernel: a single piece on a tiny input, in microseconds.

python -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from dilated_attention import build_attention

_ROUNDS, _CALLS = 41, 400


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of interleaved rounds, microseconds a call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(_ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(_CALLS):
                call()
            if round_number:
                times[name].append((time.perf_counter() - start) / _CALLS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Time the call of an attention against aten's kernel and `scaled_dot_product_attention`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    attention = build_attention(num_heads=1, head_dim=16)
    rows = {}
    for mode in ("inference", "training"):
        x = torch.randn(1, 8, 1, 16, requires_grad=mode == "training")
        swapped = x.transpose(1, 2)
        rows[mode] = microseconds(
            {
                "bare aten kernel": partial(kernel, swapped, swapped, swapped, 0.0, False),
                "scaled_dot_product_attention": partial(scaled_dot_product_attention, swapped, swapped, swapped),
                "ours": partial(attention, x, x, x),
            }
        )
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for mode, times in rows.items():
        for name, value in times.items():
            more = value - times["bare aten kernel"]
            print(f"{mode:12}{name:32}{value:8.1f} us   {more:+8.1f} us beyond the bare kernel")


if __name__ == "__main__":
    main()
