"""Dropout of attention weights by every backend that has it: calls that follow each other.

python -m benchmarks.dropout [--device cuda] [--dtype bfloat16] [--dropout-p 0.1] [BACKEND ...]

A backend gets a row only after its backward has dropped what its forward dropped: out is linear in the values, so that
<dout, out> and <dv, value> are equal, with out in the place of dout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch

from dilated_attention import (
    ConfigError,
    Dilated,
    Full,
    Global,
    Learned,
    Local,
    NoBackendError,
    Random,
    build_attention,
)
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.timing import random_inputs, training

from .kit import Case, following, parser_of, print_rows

_LONGNET: Final = Dilated((2048, 4096, 8192, 16_384, 32_768), (1, 2, 4, 8, 16))
_GIGAPATH: Final = Dilated((1024, 5792, 32_768, 185_363, 1_048_576), (1, 2, 4, 8, 16))
CASES: Final[tuple[Case, ...]] = (
    (Dilated((512, 1024, 2048), (1, 2, 4)), 2048, 8, 64, True),
    (Full(), 2048, 8, 64, True),
    (_GIGAPATH, 10_000, 16, 48, False),
    *((Full(), 16_384, 8, head_dim, True) for head_dim in (64, 128)),
    *((Local((1023, 0)), 16_384, 8, head_dim, True) for head_dim in (64, 128)),
    *((Local((1023, 0)) | Global(64), 16_384, 8, head_dim, True) for head_dim in (64, 128)),
    *((Random(density=0.05, block_size=128), 16_384, 8, head_dim, False) for head_dim in (64, 128, 200)),
    (Learned(block_size=128, blocks_per_row=8), 16_384, 8, 64, False),
    *((Dilated((4096,), (4,)), 32_768, 8, head_dim, True) for head_dim in (64, 128)),
    *((_LONGNET, 32_768, 8, head_dim, True) for head_dim in (32, 64, 128, 200, 256)),
    (Local((1023, 0)) | Random(8, 128), 32_768, 16, 64, True),
    *((_LONGNET, 131_072, 16, 64, is_causal) for is_causal in (True, False)),
)


def rows(case: Case, backends: list[str], device: str, dtype: str, dropout_p: float) -> Iterator[str]:
    """A line for each backend: forward and forward with backward, with dropout and, of the same kernel, in eval."""
    pattern, tokens, heads, head_dim, is_causal = case
    inputs = random_inputs((1, tokens, heads, head_dim), dtype, device)
    for name in backends:
        try:
            attention = build_attention(
                pattern=pattern, is_causal=is_causal, backend=name, num_heads=heads, head_dim=head_dim, dtype=dtype,
                device=device, seq_len=tokens, dropout_p=dropout_p,
            )  # fmt: skip
        except NoBackendError:
            yield f"{name:10} refused"
            continue
        query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
        out = attention(query, key, value)
        (dv,) = torch.autograd.grad(out, value, out.detach())
        left, right = (float((a.detach().double() * b.detach().double()).sum()) for a, b in ((out, out), (dv, value)))
        if not abs(left - right) < BOUNDS[dtype] * abs(left):
            raise ConfigError(f"{name}, {pattern}: <out, out> is {left:.6g}, <dv, value> {right:.6g}")

        @torch.no_grad()
        def forward(attention: Callable[..., object] = attention) -> object:
            return attention(*inputs[:3])

        found = []
        for drops in (True, False):
            calls: list[Callable[[], object]] = [forward, training(attention.train(drops), inputs)]
            found.append(" / ".join(f"{following(call, device):.3f}" for call in calls))
        yield f"{name:10} {found[0]}, in eval {found[1]}  ({attention.plan.kernel})"


def main(arguments: list[str] | None = None) -> None:
    """Print them."""
    parser = parser_of(__doc__, CASES)
    parser.add_argument("--dropout-p", type=float, default=0.1)
    args = parser.parse_args(arguments)
    print_rows(CASES, args.longest, lambda case: rows(case, args.backends, args.device, args.dtype, args.dropout_p))


if __name__ == "__main__":
    main()
