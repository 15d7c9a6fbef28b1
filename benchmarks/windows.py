"""Windows and global tokens by every backend that takes them: calls that follow each other, and CUDA graphs.

python -m benchmarks.windows [--device cuda] [--dtype bfloat16] [BACKEND ...]

A backend gets a row only after out and gradients have come near those of the first that is named.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from dilated_attention import ConfigError, Global, Local, NoBackendError, Pattern, build_attention
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.graphs import capture
from dilated_attention.bench.timing import difference, milliseconds, random_inputs, training

Case = tuple[Pattern, int, int, int, bool]  # pattern, tokens, heads, head_dim, causal
CASES: Final[tuple[Case, ...]] = (
    (Local((255, 0)), 4096, 8, 64, True),
    *((Local((1023, 0)), 16_384, 8, head_dim, True) for head_dim in (64, 96, 128, 136, 192, 256)),
    (Local((4095, 0)), 16_384, 8, 128, True),
    *((Local((1023, 0)) | Global(64), 16_384, 8, head_dim, True) for head_dim in (64, 128, 192, 256)),
    (Local((256, 256)) | Global(64), 16_384, 8, 64, False),
    (Global(64), 16_384, 8, 64, True),
    (Local((1023, 0)), 131_072, 16, 64, True),
    (Local((1023, 0)), 131_072, 16, 128, True),
)
_CALLS, _ROUNDS = 20, 5


def following(call: Callable[[], object], device: str) -> float:
    """Milliseconds of a call of many that follow each other; the median of rounds."""

    def several() -> None:
        for _ in range(_CALLS):
            call()

    several()
    return statistics.median(milliseconds(several, device) / _CALLS for _ in range(_ROUNDS))


def rows(case: Case, backends: list[str], device: str, dtype: str) -> Iterator[str]:
    """A line for each backend: forward and forward with backward, as calls and replayed from graphs."""
    pattern, tokens, heads, head_dim, is_causal = case
    fields = {"num_heads": heads, "head_dim": head_dim, "dtype": dtype, "device": device, "seq_len": tokens}
    inputs = random_inputs((1, tokens, heads, head_dim), dtype, device)
    expected: list[torch.Tensor] = []
    for name in backends:
        try:
            attention = build_attention(pattern=pattern, is_causal=is_causal, backend=name, **fields)  # type: ignore[arg-type]
        except NoBackendError:
            yield f"{name:10} refused"
            continue
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = attention(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
        expected = expected or found
        off = max(itertools.starmap(difference, zip(found, expected, strict=True)))
        if not off < BOUNDS[dtype]:
            raise ConfigError(f"{name}, {pattern}: differs by {off:.1e}, allowed are {BOUNDS[dtype]:.0e}")

        @torch.no_grad()
        def forward(attention: Callable[..., object] = attention) -> object:
            return attention(*inputs[:3])

        calls: list[Callable[[], object]] = [forward, training(attention, inputs)]
        line = f"{name:10} " + " / ".join(f"{following(call, device):.3f}" for call in calls)
        if device == "cuda":
            replays = [capture(call)[0] for call in calls]
            line += ", in graphs " + " / ".join(f"{following(replay, device):.3f}" for replay in replays)
        yield f"{line}, differs by {off:.1e}"


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


def main(arguments: list[str] | None = None) -> None:
    """Print them."""
    args = parser_of(__doc__, CASES).parse_args(arguments)
    print_rows(CASES, args.longest, lambda case: rows(case, args.backends, args.device, args.dtype))


if __name__ == "__main__":
    main()
