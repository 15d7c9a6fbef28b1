"""The fields of `AttentionConfig` as keyword arguments, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import torch

    from .context_parallel import ContextParallel
    from .limits import Limits
    from .pattern import Pattern


class ConfigFields(TypedDict, total=False):
    """What `build_attention(**fields)` takes; `AttentionConfig` says what each means, and its default."""

    num_heads: int
    head_dim: int
    num_kv_heads: int | None
    pattern: Pattern | Mapping[str, Any]
    is_causal: bool
    scale: float | None
    dropout_p: float
    dtype: str | torch.dtype
    device: str | torch.device | None
    tensor_layout: str
    seq_len: int | None
    varlen: bool
    requires_grad: bool
    deterministic: bool
    activation_checkpointing: bool
    backend: str
    backend_options: Mapping[str, Mapping[str, Any]]
    context_parallel: ContextParallel | Mapping[str, Any] | None
    limits: Limits | Mapping[str, Any]
