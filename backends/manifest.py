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
    """The two backends that need torch alone."""
    return (SDPA, REFERENCE)
