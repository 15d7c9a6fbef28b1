"""Small cases of the fused kernels, forward and backward, for NVIDIA's compute-sanitizer to look at.

python -m benchmarks.sanitized                                                   compile them first
compute-sanitizer --tool memcheck python -m benchmarks.sanitized [NUMBER ...]    some of the cases, or all
compute-sanitizer --tool racecheck python -m benchmarks.sanitized

Each is compared with the same kernels in float32. racecheck reports where Triton hands arguments to the warps of a
program (the line of the kernel's `def`), which a barrier orders that it does not follow.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import version
from typing import Final

import attrs
import torch

from dilated_attention import Dilated, Global, Local, Pattern, Random, build_attention
from dilated_attention.backends.cards import PROVEN
from dilated_attention.backends.fused.kernel import FusedKernel
from dilated_attention.backends.fused.tiles import TileSizes
from dilated_attention.bench.timing import difference, random_inputs
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import LayoutPiece
from dilated_attention.core.lowering import lower

_BRANCHES: Final = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
_MASKED: Final = Local(100) | Global(3)
_FULL: Final = Random(density=0.5, block_size=128)
_ALWAYS: Final = 0
_NEVER: Final = 1 << 30
# pattern, head_dim, causal, from how many pairs a key on scores are bounded
CASES: Final[tuple[tuple[Pattern, int, bool, int], ...]] = (
    (_BRANCHES, 64, True, _ALWAYS),
    (_BRANCHES, 64, False, _NEVER),
    (_BRANCHES, 128, True, _ALWAYS),
    (_BRANCHES, 104, False, _NEVER),
    (_BRANCHES, 32, True, _ALWAYS),
    (_MASKED, 64, True, _ALWAYS),
    (_FULL, 48, False, _NEVER),
    (_MASKED, 128, True, _NEVER),
    (_FULL, 128, False, _ALWAYS),
    (_BRANCHES, 96, True, _ALWAYS),
    (_FULL, 80, False, _NEVER),
    (_BRANCHES, 192, False, _NEVER),
    (_MASKED, 256, True, _ALWAYS),
)
# pattern, head_dim, causal: over packed documents, whose kernels bound scores or not as they find worth it
PACKED: Final[tuple[tuple[Pattern, int, bool], ...]] = (
    (_BRANCHES, 64, True),
    (_BRANCHES, 128, False),
    (Random(2, 128), 64, True),
    (_MASKED, 128, True),
    (_MASKED, 64, False),
    (_MASKED, 96, False),
    (_BRANCHES, 200, True),
)
# The same, over one sequence and over documents, with half of the weights dropped
DROPPING: Final[tuple[tuple[Pattern, int, bool], ...]] = (
    (_BRANCHES, 64, True),
    (_BRANCHES + Random(2, 128), 64, True),
    (_MASKED, 128, False),
)
_ENDS: Final = (0, 0, 130, 131, 390)


def off(pattern: Pattern, head_dim: int, is_causal: bool, bound_from: int) -> float:
    """How far bfloat16 is from float32, in the worst of out and the gradients, in one launch and in two."""
    geometry = Geometry(q_len=390, kv_len=390, num_heads=4, num_kv_heads=2, is_causal=is_causal)
    piece = LayoutPiece(layout=lower(pattern, geometry), scale=head_dim**-0.5)
    exact = attrs.evolve(piece, deterministic=True)
    tensors = random_inputs((1, 390, 4, head_dim), "bfloat16", "cuda", kv_heads=2)
    found: list[tuple[torch.Tensor, ...]] = []
    for dtype, asked in ((torch.float32, exact), (torch.bfloat16, exact), (torch.bfloat16, piece)):
        query, key, value, dout = (x.to(dtype) for x in tensors)
        tiles = TileSizes.chosen(PROVEN, head_dim, dtype, is_causal=is_causal, version=version("triton"))
        kernel = FusedKernel("checked", tiles, bound_from)
        out, lse = kernel.forward(query, key, value, piece)
        found.append((out, *kernel.backward(dout, query, key, value, out, lse, asked)))
    return _worst(*found)


def off_packed(pattern: Pattern, head_dim: int, is_causal: bool, ends: tuple[int, ...], dropout_p: float) -> float:
    """The same of documents in one call, whatever is dropped."""
    tensors = random_inputs((1, _ENDS[-1], 4, head_dim), "bfloat16", "cuda", kv_heads=2)
    bounds, found = torch.tensor(ends), []
    for dtype, deterministic in (("float32", True), ("bfloat16", True), ("bfloat16", False)):
        attention = build_attention(
            pattern=pattern, num_heads=4, num_kv_heads=2, head_dim=head_dim, is_causal=is_causal, dtype=dtype,
            deterministic=deterministic, dropout_p=dropout_p, backend="triton", device="cuda",
        )  # fmt: skip
        *given, dout = (x.detach().to(getattr(torch, dtype)).requires_grad_() for x in tensors)
        torch.manual_seed(1)  # which decides on what is dropped, whatever the dtype
        out = attention(*given, cu_seqlens=bounds)
        found.append((out.detach(), *torch.autograd.grad(out, given, dout.detach())))
    return _worst(*found)


def _worst(expected: tuple[torch.Tensor, ...], *others: tuple[torch.Tensor, ...]) -> float:
    return max(difference(a, b) for other in others for a, b in zip(other, expected, strict=True))


def main() -> None:
    """Run the cases that are named by number, those of documents and then those that drop after the others."""
    runs: list[tuple[object, partial[float]]] = [(case, partial(off, *case)) for case in CASES]
    runs += [(case, partial(off_packed, *case, _ENDS, 0.0)) for case in PACKED]
    runs += [(case, partial(off_packed, *case, ends, 0.5)) for case in DROPPING for ends in (_ENDS, (0, _ENDS[-1]))]
    for number in [int(word) for word in sys.argv[1:]] or range(len(runs)):
        what, run = runs[number]
        error = run()
        print(f"{number}: {what} off by {error:.1e}", flush=True)
        if not error < 1e-2:
            sys.exit(1)


if __name__ == "__main__":
    main()
