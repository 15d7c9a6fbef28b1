"""The backends of this package, as manifests: nothing here imports torch or a kernel library."""

from __future__ import annotations

from collections.abc import Iterable

from ..registry.hooks import hookimpl
from ..registry.specs import BackendSpec, Range

SDPA = BackendSpec(
    name="sdpa",
    target="dilated_attention.backends.sdpa:SdpaBackend",
    priority=0,
    capabilities={
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", "bfloat16", "float16"),
        "head_dims": Range(1, 256),
        "layouts": ("dense",),
        "dynamic_tables": True,  # core's block product takes them
        "gqa": True,
        "causal": True,
        "offsets": True,
        "unequal_lengths": True,
        "backward": True,
        "lse": True,
        "deterministic": ("forward", "backward"),
        "compile": "opaque",
    },
)

FA3 = BackendSpec(
    name="fa3",
    target="dilated_attention.backends.fa3:Fa3Backend",
    # LongNet's case at 128K tokens on an H100, bf16, D = 64, forward + backward: fa3 13.4 ms, fa4 13.3, sdpa with
    # FlashAttention-2 20.6; at 32K, where launches count, 3.62, 6.23 and 6.12; at 512K 52.1, 52.7 and 79.1. Dense at
    # 16K, D = 64: 484, 526 and (cuDNN) 433 TFLOP/s.
    priority=30,
    capabilities={
        "device_types": ("cuda",),
        "arch": ("sm_90",),
        "dtypes": ("bfloat16", "float16"),
        "head_dims": Range(8, 256, 8),
        "layouts": ("dense",),
        "gqa": True,
        "causal": True,
        "offsets": True,
        "unequal_lengths": True,
        "backward": True,
        "lse": True,
        # Not backward: its deterministic mode was reported not to be (Dao-AILab/flash-attention#2244).
        "deterministic": ("forward",),
        "compile": "opaque",
        "cuda_graph": True,
    },
)

XFORMERS = BackendSpec(
    name="xformers",
    target="dilated_attention.backends.xformers:XformersBackend",
    priority=-10,  # FlashAttention-2 and cutlass are in sdpa too, with less work on the host for each call
    capabilities={
        "device_types": ("cuda",),
        "dtypes": ("float32", "bfloat16", "float16"),
        "head_dims": Range(4, 256, 4),
        "layouts": ("dense",),
        "gqa": True,
        "causal": True,
        "offsets": True,
        "unequal_lengths": True,
        "backward": True,
        "lse": True,
        "deterministic": ("forward",),
        "compile": "opaque",
        "cuda_graph": True,
    },
    requires=("xformers>=0.0.34",),
)

REFERENCE = BackendSpec(
    name="reference",
    target="dilated_attention.backends.reference:ReferenceBackend",
    priority=-100,  # the dense float64 oracle: for comparison, and where nothing else fits
    capabilities={
        "device_types": ("cpu", "cuda"),
        "dtypes": ("float64", "float32", "bfloat16", "float16"),
        "head_dims": Range(1, 1 << 16),
        "layouts": ("branch", "block"),
        "weights": True,
        "per_head": True,
        "gqa": True,
        "causal": True,
        "offsets": True,
        "unequal_lengths": True,
        "dropout": True,
        "backward": True,
        "dlse": True,
        "lse": True,
        "deterministic": ("forward", "backward"),
        "compile": "opaque",
    },
)


@hookimpl
def dilated_attention_backends() -> Iterable[BackendSpec]:
    """Those that need torch alone, and those over third-party kernels."""
    return (FA3, SDPA, XFORMERS, REFERENCE)
