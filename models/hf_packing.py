"""Documents packed in a row, as transformers tells of them: cumulative lengths, or positions that start again.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.errors import ConfigError
from .requirements import require

# What the host has read of a tensor that all layers of a forward share, for as long as it lives: each would wait anew.
_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def padding_of(mask: Tensor) -> Tensor | None:
    """Where a mask (B, F) is 0 or False; None where it is nowhere. Read once a tensor; a graph cannot look."""
    if mask.dtype != torch.bool and mask.numel() > 1:
        steps = zip(mask.stride(), mask.shape, strict=True)
        if all(step == 0 or size == 1 for step, size in steps):
            return None  # one value, as `padding_mask` makes masks without padding
    if torch.compiler.is_compiling():
        return mask == 0
    return _once(mask, lambda: _padding(mask.cpu() == 0))


def _padding(found: Tensor) -> Tensor | None:
    return found if bool(found.any()) else None


def _once(x: Tensor, read: Callable[[], Tensor | None]) -> Tensor | None:
    """What is read of a tensor, read again only after it has been changed in place."""
    if x.is_inference():  # of those nobody knows whether they were
        return read()
    if x not in _READ or _READ[x][0] != x._version:
        _READ[x] = x._version, read()
    found: Tensor | None = _READ[x][1]
    return found


def document_starts(position_ids: Tensor) -> Tensor | None:
    """Cumulative lengths over the flattened rows, (documents + 1,) int64; None where each row is one document.

    Read once a tensor. A graph cannot look: it asserts that no row starts again.
    """
    if position_ids.dim() != 2:
        raise ConfigError(f"position_ids must be (batch, seq_len), got {tuple(position_ids.shape)}")
    return _starts(position_ids, 1)


def _starts(ids: Tensor, step: int) -> Tensor | None:
    """`document_starts` of rows (B, S) that count up by `step` within a document."""
    breaks = ids.diff(dim=-1) != step
    if torch.compiler.is_compiling():
        require(~breaks.any(), "packed position_ids in a compiled graph: give cu_seq_lens_q and cu_seq_lens_k too")
        return None
    return _once(ids, lambda: _cumulative(breaks).cpu() if bool(breaks.any()) else None)


def _cumulative(breaks: Tensor) -> Tensor:
    first = torch.ones_like(breaks[:, :1]) if breaks.shape[1] else breaks.new_ones(breaks.shape[0], 1)
    starts = torch.cat([first, breaks], dim=-1).flatten()
    return torch.cat([starts.nonzero().squeeze(-1), starts.new_tensor([starts.numel()], dtype=torch.int64)])


def packed_lengths(arguments: dict[str, Any], documents: Tensor | None, *, batch: int, is_self: bool) -> Tensor | None:
    """The cumulative lengths that a call speaks of, or None.

    Args:
        arguments: what the attention function was given by name.
        documents: (B, S), the number of each token's document, of `padding_mask`.
        batch: B.
        is_self: as many queries as keys and no padding, so that positions may start again within a row.

    Raises:
        ConfigError: lengths of queries and keys that differ, or lengths for several rows.
    """
    queries, keys = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    if queries is not None or keys is not None:
        if queries is None or keys is None or (queries is not keys and not torch.equal(queries, keys)):
            raise ConfigError("cu_seq_lens_q and cu_seq_lens_k must be equal: documents attend to themselves only")
        if batch != 1:
            raise ConfigError(f"cu_seq_lens_q packs documents in a batch of one row, got {batch} rows")
        lengths: Tensor = queries
        return lengths
    if documents is not None:
        return _starts(documents, 0)
    position_ids = arguments.get("position_ids")
    if position_ids is None or not is_self:
        return None
    return document_starts(position_ids.expand(batch, -1) if position_ids.shape[0] != batch else position_ids)
