"""Which tokens of a call belong together: padded rows and packed documents, read once on the host.

Shapes: B batch, S query length, T key length, H heads, D head_dim, N documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .capture import is_captured
from .checks import plain_int
from .errors import ConfigError
from .transforms import no_forward_mode

if TYPE_CHECKING:
    from .pattern import IntArray

_FARTHEST: Final = 1 << 60  # positions and sums of them fit int64


@attrs.frozen
class Document:
    """One sequence of its own within a call: its queries and keys as ranges of one batch row.

    Its keys stand at positions 0 ... kv_len - 1 and its queries at the last q_len of them.
    """

    row: int
    q_start: int
    q_len: int
    kv_start: int
    kv_len: int


def of_values(take: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of x (B, H, S) as (count, H, length) what `take` does of (B, S, H, D)."""
    return take(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


@attrs.frozen
class Stack:
    """Documents of equal lengths at equal distances: one batched call on views, nothing copied.

    Document i is `first` moved by i * row_step batch rows, i * q_step queries and i * kv_step keys. Where `lengths` are
    given, it has so many tokens, and what follows them is computed in vain.
    """

    first: Document
    count: int = 1
    row_step: int = 0
    q_step: int = 0
    kv_step: int = 0
    lengths: tuple[int, ...] | None = None

    def queries(self, x: Tensor) -> Tensor:
        """The queries' part of x (B, S, H, D) as (count, q_len, H, D)."""
        return self._view(x, self.first.q_start, self.q_step, self.first.q_len)

    def keys(self, x: Tensor) -> Tensor:
        """The keys' part of x (B, T, H, D) as (count, kv_len, H, D)."""
        return self._view(x, self.first.kv_start, self.kv_step, self.first.kv_len)

    def query_values(self, x: Tensor) -> Tensor:
        """The queries' part of x (B, H, S) as (count, H, q_len)."""
        return of_values(self.queries, x)

    def key_values(self, x: Tensor) -> Tensor:
        """The keys' part of x (B, H, T) as (count, H, kv_len)."""
        return of_values(self.keys, x)

    @property
    def q_len(self) -> int:
        """Queries of each."""
        return self.first.q_len

    @property
    def kv_len(self) -> int:
        """Keys of each."""
        return self.first.kv_len

    def gradient(self, x: Tensor) -> Tensor:
        """What comes home to `queries`."""
        return self.queries(x)

    def value_gradient(self, x: Tensor) -> Tensor:
        """What comes home to `query_values`."""
        return self.query_values(x)

    def row_lse(self, x: Tensor) -> Tensor:
        """The rows' lse as their backward is to have it, of x (B, H, S)."""
        return self.query_values(x)

    def put_queries(self, total: Tensor, part: Tensor) -> None:
        """Write (count, q_len, H, D) to where it belongs in total (B, S, H, D)."""
        self.queries(total).copy_(part)

    def put_keys(self, total: Tensor, part: Tensor) -> None:
        """Write (count, kv_len, H, D) to where it belongs in total (B, T, H, D)."""
        self.keys(total).copy_(part)

    def put_values(self, total: Tensor, part: Tensor) -> None:
        """Write (count, H, q_len) to where it belongs in total (B, H, S)."""
        self.query_values(total).copy_(part)

    def _view(self, x: Tensor, start: int, step: int, length: int) -> Tensor:
        s_batch, s_row, s_head, s_dim = x.stride()
        return x.as_strided(
            (self.count, length, x.shape[2], x.shape[3]),
            (self.row_step * s_batch + step * s_row, s_row, s_head, s_dim),
            x.storage_offset() + self.first.row * s_batch + start * s_row,
        )


@attrs.frozen(cache_hash=True)
class Packing:
    """All documents of a call, for a kernel that computes them together on the tensors of the call.

    Attributes:
        documents: those that hold a query.
        batch: B, of the tensors.
        q_len: S, likewise.
        kv_len: T, likewise.
    """

    documents: tuple[Document, ...]
    batch: int
    q_len: int
    kv_len: int

    @cached_property
    def places(self) -> IntArray:
        """The fields of each document, (N, 5) int64."""
        fields = [(d.row, d.q_start, d.q_len, d.kv_start, d.kv_len) for d in self.documents]
        return np.array(fields, dtype=np.int64).reshape(-1, 5)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.places[:, 4].max(initial=0))

    @cached_property
    def queries(self) -> int:
        """Queries that belong to a document."""
        return int(self.places[:, 2].sum())

    @cached_property
    def keys(self) -> int:
        """Keys that belong to a document with queries."""
        return int(self.places[:, 4].sum())

    @property
    def covers(self) -> bool:
        """Whether all queries and all keys belong to a document with queries."""
        return (self.queries, self.keys) == (self.batch * self.q_len, self.batch * self.kv_len)


def check_arguments(
    query: object, key: object, value: object, q_offset: object = None, kv_offset: object = 0
) -> tuple[int | None, int]:
    """The offsets as plain integers; `ConfigError` for tensors that are none and offsets that are no positions."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        found = ", ".join(type(x).__name__ for x in (query, key, value))
        raise ConfigError(f"an attention is called with tensors, got {found}")
    if not type(query) is type(key) is type(value) is Tensor and any(
        hasattr(x, "placements") for x in (query, key, value)
    ):
        raise ConfigError(
            "an attention is called with a rank's own tensors, got DTensor; pass to_local() of tensors that are "
            "sharded by batch or heads, to an attention of so many heads, and share sequences by context_parallel"
        )
    if not query.layout is key.layout is value.layout is torch.strided or query.is_nested:
        raise ConfigError(
            f"an attention is called with dense tensors, got {_layouts(query, key, value)}; sequences of several "
            "lengths are padded rows with key_padding_mask, or packed into one row with cu_seqlens"
        )
    if forward_ad._current_level >= 0:
        _check_no_tangents(query, key, value)
    if q_offset is None and type(kv_offset) is int and kv_offset == 0:  # what nearly every call has
        return None, 0
    return None if q_offset is None else _position("q_offset", q_offset), _position("kv_offset", kv_offset)


def _position(name: str, given: object) -> int:
    offset = plain_int(given)
    if isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt):
        raise ConfigError(f"{name} is one position for all batch rows, an integer, got {offset!r}")
    if not -_FARTHEST < offset < _FARTHEST:
        raise ConfigError(f"{name} must lie between -2**60 and 2**60, got {offset}")
    return offset  # type: ignore[return-value]


def _layouts(*tensors: Tensor) -> str:
    return ", ".join("nested" if x.is_nested else str(x.layout).removeprefix("torch.") for x in tensors)


def _check_no_tangents(*tensors: Tensor) -> None:
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        no_forward_mode()


def check_documents(
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    query: Tensor,
    key: Tensor,
    q_offset: int | None,
    kv_offset: int,
    *,
    is_causal: bool,
) -> None:
    """Raise `ConfigError` for what a call with documents cannot honour, as far as no number has to be read.

    Args:
        key_padding_mask: to be (B, T) bool, or None.
        cu_seqlens: to be (N + 1,) int32 or int64, or None; one of the two is given.
        query: (B, S, H, D).
        key: (B, T, K, D).
        q_offset: to be None.
        kv_offset: to be 0.
        is_causal: of the attention.
    """
    _check_forms(key_padding_mask, cu_seqlens, query, key)
    name = "cu_seqlens" if key_padding_mask is None else "key_padding_mask"
    if q_offset is not None or kv_offset:
        raise ConfigError(
            f"{name}: every sequence has positions from 0, so no offsets can be given; got q_offset={q_offset} "
            f"and kv_offset={kv_offset}"
        )
    if query.shape[1] != key.shape[1] and not is_causal:
        raise ConfigError(
            f"{name} with {query.shape[1]} queries and {key.shape[1]} keys: the last queries of a sequence stand "
            "alone in decoding, which is causal. Queries of another sequence cannot be told from padded ones; "
            "leave the padding out of the keys and call once for each row"
        )


def _check_forms(key_padding_mask: Tensor | None, cu_seqlens: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Raise `ConfigError` for arguments whose shape or dtype says already that they cannot be honoured."""
    if key_padding_mask is not None and cu_seqlens is not None:
        raise ConfigError("give key_padding_mask or cu_seqlens, not both: documents without padding need no mask")
    for name, given in (("key_padding_mask", key_padding_mask), ("cu_seqlens", cu_seqlens)):
        if not isinstance(given, Tensor | None):
            raise ConfigError(f"{name} must be a tensor, got {type(given).__name__}; give torch.tensor(...) of it")
    batch, q_len, kv_len = query.shape[0], query.shape[1], key.shape[1]
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise ConfigError(
                f"key_padding_mask must be bool, True where a key is padding, got {key_padding_mask.dtype}; "
                "of a mask with ones for tokens and zeros for padding pass `mask == 0`"
            )
        if key_padding_mask.shape != (batch, kv_len):
            raise ConfigError(
                f"key_padding_mask must be (batch, kv_len) = ({batch}, {kv_len}), got {tuple(key_padding_mask.shape)}"
            )
        if q_len > kv_len:
            raise ConfigError(
                f"key_padding_mask: queries are the last tokens of the keys' sequence, but there are {q_len} queries "
                f"and {kv_len} keys"
            )
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
            raise ConfigError(
                "cu_seqlens must be (documents + 1,) int32 or int64, the first number 0 and the last the length, got "
                f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        if batch != 1 or q_len != kv_len:
            raise ConfigError(
                "cu_seqlens divides one row of tokens, so batch must be 1 and queries and keys equally many; got batch "
                f"{batch}, {q_len} queries and {kv_len} keys; flatten the batch into the length"
            )


def read_documents(
    key_padding_mask: Tensor | None, cu_seqlens: Tensor | None, q_len: int, kv_len: int
) -> list[Document]:
    """The documents that hold a query; the one place where the host waits for the device.

    Args:
        key_padding_mask: (B, T) bool, True where a key is padding, or None.
        cu_seqlens: (N + 1,) cumulative lengths, or None; one of the two is given.
        q_len: S.
        kv_len: T.

    Raises:
        ConfigError: tokens of a row that are not one run, lengths that do not add up, or a CUDA graph being captured.
    """
    given = cu_seqlens if key_padding_mask is None else key_padding_mask
    assert given is not None
    if is_captured(given.device):
        raise ConfigError(
            "key_padding_mask and cu_seqlens are read by the host, which a CUDA graph cannot capture; capture calls of "
            "one length, or none"
        )
    if key_padding_mask is not None:
        return _rows(key_padding_mask, q_len, kv_len)
    return _packed(given.tolist(), kv_len)


def _rows(mask: Tensor, q_len: int, kv_len: int) -> list[Document]:
    """The run of tokens in each row."""
    if not mask.numel():
        return []
    token = (~mask).to(torch.int8)
    first, behind = token.argmax(dim=1), kv_len - token.flip(1).argmax(dim=1)
    documents = []
    for row, (low, high, count) in enumerate(torch.stack([first, behind, token.sum(dim=1)], dim=1).tolist()):
        if not count:
            continue
        if high - low != count:
            hole = low + int(mask[row, low:].to(torch.int8).argmax())
            raise ConfigError(
                f"key_padding_mask: row {row} has padding at position {hole} between its tokens; a row's tokens must "
                "be one run, with padding before or behind it"
            )
        skipped = kv_len - q_len  # keys that stand before the first query
        q_start = max(0, low - skipped)
        if high - skipped > q_start:
            documents.append(Document(row, q_start, high - skipped - q_start, low, count))
    return documents


def _packed(bounds: Sequence[int], length: int) -> list[Document]:
    """The documents between cumulative lengths."""
    if bounds[0] != 0 or bounds[-1] != length:
        raise ConfigError(
            f"cu_seqlens must begin with 0 and end with the number of tokens, {length}; got {bounds[0]} and "
            f"{bounds[-1]}"
        )
    documents = []
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        if high < low:
            raise ConfigError(f"cu_seqlens must not decrease, but number {number + 1} is {high}, after {low}")
        if high > low:
            documents.append(Document(0, low, high - low, low, high - low))
    return documents


def stacked(documents: Iterable[Document]) -> tuple[Stack, ...]:
    """Documents of equal lengths joined wherever they lie at equal distances."""
    alike: dict[tuple[int, int], list[Document]] = {}
    for document in documents:
        alike.setdefault((document.q_len, document.kv_len), []).append(document)
    stacks: list[Stack] = []
    for group in alike.values():
        stack = Stack(group[0])
        for before, document in itertools.pairwise(group):
            steps = (
                document.row - before.row,
                document.q_start - before.q_start,
                document.kv_start - before.kv_start,
            )
            goes_on = stack.count == 1 or (stack.row_step, stack.q_step, stack.kv_step) == steps
            if min(steps) >= 0 and goes_on:
                stack = Stack(stack.first, stack.count + 1, *steps)
            else:
                stacks.append(stack)
                stack = Stack(document)
        stacks.append(stack)
    return tuple(stacks)
