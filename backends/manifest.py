"""The backends of this package, as manifests: nothing here imports torch or a kernel library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from ..registry.hooks import hookimpl
from ..registry.specs import BackendSpec, Range, Request

# What every kernel for dense pieces of PyTorch's strided tensors brings, core's composer having done the rest.
_DENSE: Final = {
    "layouts": ("dense",),
    "dynamic_tables": True,  # core's block product takes them
    "gqa": True,
    "causal": True,
    "offsets": True,
    "unequal_lengths": True,
    "varlen": True,  # core calls them once for each length
    "backward": True,
    "lse": True,
    "compile": "opaque",
}
# What every backend here for whole layouts brings.
_WHOLE: Final = {
    "layouts": ("branch", "block"),
    "weights": True,
    "per_head": True,
    "gqa": True,
    "causal": True,
    "offsets": True,
    "unequal_lengths": True,
    "varlen": True,
    "backward": True,
    "dlse": True,
    "lse": True,
    "compile": "opaque",
}
_HALVES: Final = ("bfloat16", "float16")

SDPA = BackendSpec(
    name="sdpa",
    target="dilated_attention.backends.sdpa:SdpaBackend",
    priority=0,
    capabilities=_DENSE
    | {
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", *_HALVES),
        "head_dims": Range(1, 256),
        "dropout": True,
        "deterministic": ("forward", "backward"),
        "cuda_graph": True,
    },
    options={"kernel": "on CUDA: flash, cudnn (for any length) or efficient"},
)

# Priorities of kernels for Hopper, by forward + backward of LongNet's case on an H100 (docs/performance_log.md, "Dense
# kernels on one H100"): fa3 before sdpa's cuDNN before FlashAttention-2.
FA3 = BackendSpec(
    name="fa3",
    target="dilated_attention.backends.fa3:Fa3Backend",
    priority=30,
    capabilities=_DENSE
    | {
        "device_types": ("cuda",),
        "arch": ("sm_90",),
        "dtypes": _HALVES,
        "head_dims": Range(8, 256, 8),
        # Not backward: its deterministic mode was reported not to be (Dao-AILab/flash-attention#2244).
        "deterministic": ("forward",),
        "cuda_graph": True,
    },
)

FA4 = BackendSpec(
    name="fa4",
    target="dilated_attention.backends.fa4:Fa4Backend",
    priority=-20,  # its backward is the slowest to launch; where it is the fastest all the same: `ranking`
    capabilities=_DENSE
    | {
        "device_types": ("cuda",),
        "arch": ("sm_90",),
        "dtypes": _HALVES,
        # Those in use of which it pads a head to a multiple of 32: gradients of causal attention are wrong of others
        # (seen with 48 on an H100: dq off by 0.7). Only 24 and 56 have one with 8 columns more, for a gradient of lse.
        "head_dims": (24, 32, 56, 64, 128),
        "layouts": ("dense", "block"),
        "deterministic": ("forward",),
        "cuda_graph": True,
    },
    requires=("flash-attn-4==4.0.0b36",),
)

XFORMERS = BackendSpec(
    name="xformers",
    target="dilated_attention.backends.xformers:XformersBackend",
    priority=-10,  # FlashAttention-2 and cutlass are in sdpa too, with less work on the host for each call
    capabilities=_DENSE
    | {
        "device_types": ("cuda",),
        "dtypes": ("float32", *_HALVES),
        "head_dims": Range(4, 256, 4),
        "deterministic": ("forward",),
        "cuda_graph": True,
    },
    requires=("xformers>=0.0.34",),
    options={"kernel": "flash or cutlass"},
)

TRITON = BackendSpec(
    name="triton",
    target="dilated_attention.backends.fused.backend:TritonBackend",
    priority=40,  # where it is the fastest; see `dilated_attention_rank_backends` below
    capabilities=_WHOLE
    | {
        # On sm_90 by itself, on other cards for users who say so: `fused.backend` judges.
        "device_types": ("cuda",),
        "dtypes": ("float32", *_HALVES),
        "head_dims": Range(16, 256, 8),
        "dynamic_tables": True,
        "context_parallel": True,
        "staged_blocks": True,
        "dropout": True,
        "deterministic": ("forward", "backward"),
        "cuda_graph": True,
    },
    requires=("triton>=3.4",),
    options={
        "unproven_card": "without it on Hopper (sm_90) alone; true: on any card from sm_80 on, where the conformance "
        "kit has passed there"
    },
)

FLEX = BackendSpec(
    name="flex",
    target="dilated_attention.backends.flex:FlexBackend",
    priority=-50,  # it masks strided branches; for blocks see `ranking`
    capabilities=_WHOLE
    | {
        # Not cpu: PyTorch's FlexAttention gives no lse there.
        "device_types": ("cuda",),
        "dtypes": ("float32", *_HALVES),
        "head_dims": Range(16, 256, 8),
        "context_parallel": True,
    },
    requires=("triton>=3.4",),
)

MATH = BackendSpec(
    name="math",
    target="dilated_attention.backends.products:MathBackend",
    priority=-60,  # for what nothing else takes: head_dims beyond 256 or of odd widths, and float64 on a card
    slow="PyTorch's matrix products, no fused kernel",
    capabilities=_DENSE
    | {
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", *_HALVES),
        "head_dims": Range(1, 1 << 16),
        "dropout": True,
        "deterministic": ("forward", "backward"),
    },
)

REFERENCE = BackendSpec(
    name="reference",
    target="dilated_attention.backends.reference:ReferenceBackend",
    priority=-100,  # the dense float64 oracle: for comparison, and where nothing else fits
    slow="the oracle, in float64 over every pair of tokens",
    capabilities=_WHOLE
    | {
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", "bfloat16", "float16"),
        "head_dims": Range(1, 1 << 16),
        "dropout": True,
        "context_parallel": True,
        "deterministic": ("forward", "backward"),
    },
)


@hookimpl
def dilated_attention_backends() -> Iterable[BackendSpec]:
    """Those that need torch alone, and those over third-party kernels."""
    return (TRITON, FA3, FA4, SDPA, XFORMERS, FLEX, MATH, REFERENCE)


@hookimpl
def dilated_attention_rank_backends(request: Request, candidates: Sequence[BackendSpec]) -> Sequence[str]:
    """By what was measured."""
    from . import ranking  # which looks at patterns: listing backends does without it

    return ranking.ranked(request, candidates)
