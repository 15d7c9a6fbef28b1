"""Bounds on memory, in one place, with units in their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from .checks import positive_int
from .structure import NamesChecked

if TYPE_CHECKING:
    from torch import Tensor

_CPU_BYTES: Final = 16 << 20  # temporaries that stay in a processor's last cache: measurably faster than 64 MiB


def at_once(workspace_bytes: int, like: Tensor) -> int:
    """How much of a workspace serves temporaries beside `like`: on a processor no more than stays in its cache."""
    return workspace_bytes if like.is_cuda else min(workspace_bytes, _CPU_BYTES)


@attrs.frozen(kw_only=True)
class Limits(NamesChecked):
    """Upper bounds that an `AttentionConfig` carries; every value is a positive integer number of bytes.

    Attributes:
        pattern_cache_bytes: lowered layouts kept per attention for lengths already seen (least recently used go first);
            the newest is kept even if it alone is larger.
        layout_bytes: one lowered layout; a pattern that needs more at a given length is refused before it is built.
        workspace_bytes: temporary tensors of the batched block computation, per step; copies of rows that are read
            backwards, for windows by kernels that have none.
        exchange_buffer_bytes: rows that a rank receives from others in one forward pass; where any rank would receive
            more, shards travel hop by hop instead.
        reference_mask_bytes: the dense multiplicity of the `reference` backend, (num_heads, q_len, kv_len) in float64.
    """

    pattern_cache_bytes: int = attrs.field(default=256 << 20, validator=positive_int)
    layout_bytes: int = attrs.field(default=2 << 30, validator=positive_int)
    workspace_bytes: int = attrs.field(default=64 << 20, validator=positive_int)
    exchange_buffer_bytes: int = attrs.field(default=2 << 30, validator=positive_int)
    reference_mask_bytes: int = attrs.field(default=1 << 30, validator=positive_int)
