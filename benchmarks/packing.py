"""What a step over packed documents takes, lengths new at every step, beside a call for each document.

python -m benchmarks.packing [--device cuda] [--dtype bfloat16]

A pattern gets a row only after both ways have given the same, out and gradients.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from dilated_attention import Attention, ConfigError, Dilated, Full, Global, Local, Pattern, Random, build_attention
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.timing import difference, milliseconds, random_inputs, training

# With whether it is causal.
PATTERNS: Final[dict[str, tuple[Pattern, bool]]] = {
    "Full": (Full(), True),
    "Dilated, w = 256 ... 2048, r = 1 ... 8": (Dilated((256, 512, 1024, 2048), (1, 2, 4, 8)), True),
    "Local((255, 0)) | Global(16)": (Local((255, 0)) | Global(16), True),
    "Random(4, 64)": (Random(4, 64), True),
    "Local(64), not causal": (Local(64), False),
}
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def bounds_of(tokens: int, shortest: int, longest: int, seed: int) -> Tensor:
    """Cumulative lengths of documents, any between the two alike, that are so many tokens or a little more."""
    generator = torch.Generator().manual_seed(seed)
    ends = [0]
    while ends[-1] < tokens:
        ends.append(ends[-1] + int(torch.randint(shortest, longest + 1, (), generator=generator)))
    return torch.tensor(ends)


def ways(attention: Attention, bounds: Tensor) -> dict[str, Forward]:
    """One call for all documents, and one for each."""
    on_device = bounds.to(attention.plan.device["torch_name"])
    pairs = list(itertools.pairwise(bounds.tolist()))

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention(query, key, value, cu_seqlens=on_device)
        return out

    def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([attention(query[:, a:b], key[:, a:b], value[:, a:b]) for a, b in pairs], dim=1)

    return {"packed": packed, "alone": alone}


def measured(pattern: Pattern, is_causal: bool, args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of forward and backward each way: lengths that are new, then the same ones again; medians.

    Raises:
        ConfigError: the ways differ.
    """
    fields: dict[str, Any] = {"num_heads": args.heads, "head_dim": args.head_dim, "dtype": args.dtype}
    # Lengths are kept for a configuration: with scales that differ the ways do not find each other's.
    scales = {"packed": args.head_dim**-0.5, "alone": args.head_dim**-0.5 * (1 + 1e-9)}
    built = {
        way: build_attention(pattern=pattern, device=args.device, is_causal=is_causal, scale=scale, **fields)
        for way, scale in scales.items()
    }
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in built}
    for step in range(args.rounds + 1):
        bounds = bounds_of(args.tokens, args.shortest, args.longest, step)
        inputs = random_inputs((1, int(bounds[-1]), args.heads, args.head_dim), args.dtype, args.device, seed=step)
        found: dict[str, list[Tensor]] = {}
        for way, attention in built.items():
            forward = ways(attention, bounds)[way]
            both = training(forward, inputs)
            taken = milliseconds(both, args.device), milliseconds(both, args.device)
            times[way] += [taken] if step else []  # the first compiles
            leaves = [x.detach().requires_grad_() for x in inputs[:3]]
            out = forward(leaves[0], leaves[1], leaves[2])
            found[way] = [out, *torch.autograd.grad(out, leaves, inputs[3])]
        off = max(itertools.starmap(difference, zip(found["packed"], found["alone"], strict=True)))
        if not off < BOUNDS[args.dtype]:
            raise ConfigError(f"{pattern}: packed and alone differ by {off:.1e}, allowed are {BOUNDS[args.dtype]:.0e}")
    return {way: [statistics.median(column) for column in zip(*pairs, strict=True)] for way, pairs in times.items()}


def rows(args: argparse.Namespace) -> Iterator[str]:
    """The table."""
    yield f"{'f+b ms: new lengths / again':42}{'one call':>18}{'a call each':>18}"
    for name, (pattern, is_causal) in PATTERNS.items():
        took = measured(pattern, is_causal, args)
        yield f"{name:42}" + "".join(f"{new:9.1f} /{again:7.1f}" for new, again in took.values())


def main(arguments: list[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=BOUNDS)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5, help="of new lengths")
    for row in rows(parser.parse_args(arguments)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
