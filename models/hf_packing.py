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
_READ_BESIDE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # another tensor, such a dictionary for each


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


def _once(x: Tensor, read: Callable[[], Tensor | None], known: WeakTensorKeyDictionary = _READ) -> Tensor | None:
    """What is read of a tensor, read again only after it has been changed in place."""
    if x.is_inference():  # of those nobody knows whether they were
        return read()
    if x not in known or known[x][0] != x._version:
        known[x] = x._version, read()
    found: Tensor | None = known[x][1]
    return found


def _starts(ids: Tensor, step: int, batch: int, padding: Tensor | None = None) -> Tensor | None:
    """Cumulative lengths over the flattened rows, (documents + 1,) int64; None where each row is one document.

    Read once a tensor. A graph cannot look: it asserts that no row starts again.

    Args:
        ids: (B or 1, S), which count up by `step` within a document.
        step: 1 for positions, 0 for numbers of documents.
        batch: B.
        padding: (B, S), True for padding, whatever its ids are: runs of it become documents of their own.
    """

    def found() -> Tensor:
        breaks = ids.diff(dim=-1) != step
        if padding is None:
            return breaks
        absent = padding.to(ids.device)
        return breaks & ~absent[:, 1:] & ~absent[:, :-1]

    def read() -> Tensor | None:
        breaks = found()
        if not bool(breaks.any()):
            return None
        return _cumulative(breaks if padding is None else breaks | padding.to(ids.device).diff(dim=-1), batch).cpu()

    if torch.compiler.is_compiling():
        require(~found().any(), "packed position_ids in a compiled graph: give cu_seq_lens_q and cu_seq_lens_k too")
        return None
    if padding is None:
        return _once(ids, read)
    if padding not in _READ_BESIDE:
        _READ_BESIDE[padding] = WeakTensorKeyDictionary()
    return _once(ids, read, _READ_BESIDE[padding])


def _cumulative(breaks: Tensor, batch: int) -> Tensor:
    breaks = breaks.expand(batch, -1)
    starts = torch.cat([torch.ones_like(breaks[:, :1]), breaks], dim=-1).flatten()
    return torch.cat([starts.nonzero().squeeze(-1), starts.new_tensor([starts.numel()], dtype=torch.int64)])


def packed_lengths(
    arguments: dict[str, Any], documents: Tensor | None, padding: Tensor | None, *, batch: int, is_self: bool
) -> Tensor | None:
    """The cumulative lengths that a call speaks of, or None.

    Args:
        arguments: what the attention function was given by name.
        documents: (B, S), the number of each token's document, of `padding_mask`.
        padding: (B, S) bool, True for padding, or None.
        batch: B.
        is_self: as many queries as keys, so that positions may start again within a row.

    Raises:
        ConfigError: lengths of queries and keys that differ, or lengths for several rows or beside padding.
    """
    queries, keys = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    if queries is not None or keys is not None:
        if queries is None or keys is None or (queries is not keys and not torch.equal(queries, keys)):
            raise ConfigError("cu_seq_lens_q and cu_seq_lens_k must be equal: documents attend to themselves only")
        if batch != 1:
            raise ConfigError(f"cu_seq_lens_q packs documents in a batch of one row, got {batch} rows")
        if padding is not None:
            raise ConfigError(
                "cu_seq_lens_q stands beside an attention_mask with padding; make the padding a document of its own, "
                "and leave attention_mask out"
            )
        lengths: Tensor = queries
        return lengths
    if documents is not None:
        return _starts(documents, 0, batch)
    position_ids = arguments.get("position_ids")
    if position_ids is None or not is_self:
        return None
    if position_ids.dim() != 2:
        raise ConfigError(f"position_ids must be (batch, seq_len), got {tuple(position_ids.shape)}")
    return _starts(position_ids, 1, batch, padding)
