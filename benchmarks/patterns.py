"""Drawing, lowering and computing patterns on a CPU, beside what one would use otherwise.

    python -m benchmarks.patterns                      all of it
    python -m benchmarks.patterns --only lowering --json
    python -m benchmarks.patterns --processor-time     one thread; what other processes take does not count

Three comparisons: the draw of `Random` against one torch.randperm a row; lowering to blocks against FlexAttention's
create_block_mask, on lengths where that still fits; attention over a drawn pattern against dense attention. A result
that is not what the definition says prints no time.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from dilated_attention import Dilated, Global, Local, Pattern, Random, build_attention, reference
from dilated_attention.bench.timing import Clock, difference, in_turns, milliseconds, peak_bytes
from dilated_attention.core.blocking import lower_blocks
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.layout import BlockLayout

MILLION: Final = 1 << 20
LOWERED: Final[dict[str, Pattern]] = {
    "Local(1024)": Local((1024, 0)),
    "Global(128)": Global(128),
    "Random(8)": Random(8),
    "Dilated, 5 branches": Dilated((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)),
}
FLEX_TOKENS: Final = (4096, 8192, 16384)
_GATE_TOKENS: Final = 1024
_BOUND: Final = 1e-5  # relative, float32

Row = dict[str, Any]


def numpy_peak_bytes(call: Callable[[], object]) -> int:
    """The most that numpy and Python held at once during `call`, above what they held before; the result counts."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def medians(calls: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, float]:
    """Milliseconds of each call, the median of interleaved rounds after one that warms up."""
    times = in_turns(calls, rounds, "cpu", warm_up=1, clock=clock)
    return {name: statistics.median(mine) for name, mine in times.items()}


def drawing(rounds: int, clock: Clock) -> list[Row]:
    """The key blocks of every row of 16 heads at a million tokens, 8 a row, compiled beforehand."""
    heads, rows, per_row = 16, MILLION // 128, 8
    geometry = Geometry.self_attention(MILLION, heads)
    pattern = Random(per_row)
    head = np.repeat(np.arange(heads, dtype=np.int64), rows)
    row = np.tile(np.arange(rows, dtype=np.int64), heads)

    def ours() -> NDArray[np.int32]:
        return pattern._draw(head, row, pattern._allowed(row, geometry))[1].reshape(-1, per_row)

    def randperm() -> list[Tensor]:
        return [torch.randperm(rows)[:per_row] for _ in range(heads * rows)]

    drawn = ours()
    in_order = (np.diff(drawn, axis=1) > 0).all() and drawn.min() >= 0 and drawn.max() < rows
    if not in_order or not (drawn == row[:, None]).any(axis=1).all():
        sys.exit("a row of the draw is not 8 distinct blocks with its own among them: no times")
    mine = medians({"ours": ours}, rounds, clock)["ours"]
    other = milliseconds(randperm, "cpu", clock=clock)
    return [
        {"name": "Random(8)", "ms": mine, "peak_bytes": numpy_peak_bytes(ours)},
        {"name": "torch.randperm a row", "ms": other, "ratio": other / mine},
    ]


def dense(layout: BlockLayout) -> NDArray[np.int64]:
    """The multiplicities that a table stands for, (heads, q_len, kv_len)."""
    size, geometry = layout.block_size, layout.geometry
    blocks = layout.row_ptr.shape[1] - 1
    result = np.zeros((geometry.num_heads, blocks * size, blocks * size), dtype=np.int64)
    for head, table in enumerate(layout.head_table):
        for i in range(blocks):
            for e in range(layout.row_ptr[table, i], layout.row_ptr[table, i + 1]):
                j, mask = layout.cols[e], layout.mask_ids[e]
                block = layout.masks[mask] if mask >= 0 else layout.weights[e]
                result[head, i * size : (i + 1) * size, j * size : (j + 1) * size] = block
    return result[:, : geometry.q_len, : geometry.kv_len]


def lowering(rounds: int, clock: Clock) -> list[Row]:
    """To blocks of 128, causal, 16 heads, a million tokens; one head beside create_block_mask at shorter lengths."""
    found: list[Row] = []
    for name, pattern in LOWERED.items():
        small = Geometry.self_attention(_GATE_TOKENS, 16, is_causal=True)
        expected = reference.multiplicity(pattern, small).numpy()
        if not np.array_equal(dense(lower_blocks(pattern, small)), expected):
            sys.exit(f"{name} lowers to something else than the oracle's: no times")
        geometry = Geometry.self_attention(MILLION, 16, is_causal=True)
        lowered = functools.partial(lower_blocks, pattern, geometry)
        mine = medians({name: lowered}, rounds, clock)[name]
        layout = lowered()
        found.append(
            {
                "name": name,
                "tokens": MILLION,
                "ms": mine,
                "tables": layout.row_ptr.shape[0],
                "blocks": layout.cols.size,
                "layout_bytes": layout.nbytes,
                "peak_bytes": numpy_peak_bytes(lowered),
            }
        )
    return found + [row for tokens in FLEX_TOKENS for row in _beside_flex(tokens, clock)]


def _beside_flex(tokens: int, clock: Clock) -> list[Row]:
    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k <= 1024)

    geometry = Geometry.self_attention(tokens, 1, is_causal=True)

    def ours() -> BlockLayout:
        return lower_blocks(LOWERED["Local(1024)"], geometry)

    def flex() -> Any:
        return create_block_mask(window, None, None, tokens, tokens, device="cpu")

    mask, layout = flex(), ours()
    listed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    if listed != layout.cols.size:
        sys.exit(f"create_block_mask lists {listed} blocks, we {layout.cols.size}: no times")
    times = medians({"ours": ours, "flex": flex}, 3, clock)
    base = {"tokens": tokens, "blocks": listed}
    return [
        base | {"name": "Local(1024), one head", "ms": times["ours"], "peak_bytes": numpy_peak_bytes(ours)},
        base
        | {
            "name": "create_block_mask",
            "ms": times["flex"],
            "peak_bytes": peak_bytes(flex),
            "ratio": times["flex"] / times["ours"],
        },
    ]


def _attention(block_size: int) -> Callable[..., Tensor]:
    return build_attention(
        pattern=Random(density=0.05, block_size=block_size), num_heads=8, head_dim=64, device="cpu", backend="sdpa"
    )


def attention(rounds: int, clock: Clock) -> list[Row]:
    """Random(density=0.05) at 16K tokens, 8 heads, head_dim 64, float32, against dense attention."""

    def inputs(tokens: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(1, tokens, 8, 64, generator=generator, requires_grad=True) for _ in range(3)]

    small = inputs(_GATE_TOKENS)
    out = _attention(8)(*small)
    exact = [x.detach().double().requires_grad_() for x in small]
    expected = reference.attention(exact[0], exact[1], exact[2], pattern=Random(density=0.05, block_size=8))[0]
    gradients = zip(
        (out, *torch.autograd.grad(out.sum(), small)),
        (expected, *torch.autograd.grad(expected.sum(), exact)),
        strict=True,
    )
    error = max(difference(a.detach(), e.detach()) for a, e in gradients)
    if not error < _BOUND:
        sys.exit(f"sparse attention differs from the oracle by {error:.1e}, more than {_BOUND:.0e}: no times")
    whole = inputs(16384)
    query, key, value = (x.detach() for x in whole)
    swapped = [x.transpose(1, 2) for x in (query, key, value)]
    built = _attention(128)
    times = medians(
        {
            "Random(density=0.05)": lambda: built(query, key, value),
            "dense SDPA": lambda: functional.scaled_dot_product_attention(swapped[0], swapped[1], swapped[2]),
            "Random(density=0.05), forward and backward": lambda: torch.autograd.grad(built(*whole).sum(), whole),
        },
        rounds,
        clock,
    )
    ours = times["Random(density=0.05)"]
    return [{"name": name, "ms": mine, "ratio": mine / ours, "oracle_error": error} for name, mine in times.items()]


PARTS: Final[dict[str, Callable[[int, Clock], list[Row]]]] = {
    "drawing": drawing,
    "lowering": lowering,
    "attention": attention,
}


def text(row: Row) -> str:
    """A row for people."""
    name = row["name"] + (f", {row['tokens']:,} tokens" if "tokens" in row else "")
    parts = [f"{name:48}{row['ms']:12.1f} ms"]
    parts += [f"{row['ratio']:8.2f} x" if "ratio" in row else " " * 10]
    parts += [f"{row['peak_bytes'] / 2**20:9.1f} MiB peak" if "peak_bytes" in row else ""]
    parts += [f"{row['layout_bytes'] / 2**20:9.1f} MiB of tables" if "layout_bytes" in row else ""]
    parts += [f"{row['blocks']:12,} blocks" if "blocks" in row else ""]
    return "".join(parts).rstrip()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(PARTS), help="one of the comparisons")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, instead of elapsed time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.processor_time else time.perf_counter
    names = [args.only] if args.only else list(PARTS)
    results: dict[str, list[Row]] = {}
    for name in names:
        results[name] = PARTS[name](args.rounds, clock)
        if not args.json:
            print(name, *map(text, results[name]), sep="\n    ", flush=True)
    if args.json:
        print(
            json.dumps(
                {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor_time": args.processor_time}
                | results,
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
