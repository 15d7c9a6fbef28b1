"""Windows and global tokens by every backend that takes them: calls that follow each other, and CUDA graphs.

python -m benchmarks.windows [--device cuda] [--dtype bfloat16] [BACKEND ...]

A backend gets a row only after out and gradients have come near those of the first that is named.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Final

import torch

from dilated_attention import ConfigError, Global, Local, NoBackendError, build_attention
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.graphs import capture
from dilated_attention.bench.timing import difference, random_inputs, training

from .kit import Case, following, parser_of, print_rows

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


def main(arguments: list[str] | None = None) -> None:
    """Print them."""
    args = parser_of(__doc__, CASES).parse_args(arguments)
    print_rows(CASES, args.longest, lambda case: rows(case, args.backends, args.device, args.dtype))


if __name__ == "__main__":
    main()
