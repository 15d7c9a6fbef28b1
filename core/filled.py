"""Documents of many lengths as few batches: each is filled up with copies of its last token, which none of it sees.

That is exact for causal attention over patterns that keep prefixes: what a query sees does not depend on what follows.
A length is then lowered (and compiled) for all documents that are about as long, and a launch serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from .documents import Document, Stack, of_values, stacked

MOST_ADDED = 256  # tokens by which a document is filled up are fewer
MOST_ROWS = (1 << 16) - 1  # of a batch: blocks of a launch along the second dimension of its grid, on CUDA
_FINEST = 16
_SHARE = 8  # of a document's length, at most, by which it is filled up


def filled_length(length: int) -> int:
    """The length that a document is computed at: up to an eighth longer, or up to 16 tokens, never over 256."""
    step = min(max((1 << (length.bit_length() - 1)) // _SHARE, _FINEST), MOST_ADDED)
    return -(-length // step) * step


class _Places(NamedTuple):
    """Where the tokens of copies come from: (count * length,) int64 over all batch rows.

    Attributes:
        queries: of each token; of the last one where a document has ended.
        keys: likewise.
        inside: the tokens of documents, counted over the copies.
        beyond: (count, length, 1, 1) bool, where a document has ended.
    """

    queries: Tensor
    keys: Tensor
    inside: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, documents: Sequence[Document], filled: int, device: torch.device, length: int) -> _Places:
        """Of documents that are filled up, in batch rows of so many tokens."""
        starts = [(d.row * length + d.q_start, d.row * length + d.kv_start, d.q_len) for d in documents]
        query, key, lengths = torch.tensor(starts, dtype=torch.int64, device="cpu").unsqueeze(-1).unbind(1)
        place = torch.arange(filled, device="cpu")
        inside = (place < lengths).flatten().nonzero().squeeze(1)
        place = torch.minimum(place, lengths - 1)
        found = (query + place).flatten(), (key + place).flatten(), inside
        together = torch.cat(found)
        if device.type == "cuda":  # from elsewhere, the host would wait for all that is queued before
            together = together.pin_memory()
        together = together.to(device, non_blocking=device.type == "cuda")
        queries, keys, inside = torch.split(together, [len(x) for x in found])
        beyond = torch.ones(len(queries), dtype=torch.bool, device=device).index_fill_(0, inside, False)
        return cls(queries, keys, inside, beyond.view(len(documents), filled, 1, 1))


@attrs.frozen(eq=False)
class Filled:
    """Documents as one batched call on copies; the same protocol as `Stack`.

    Attributes:
        documents: whose queries and keys are equally many.
        length: of each copy.
    """

    documents: tuple[Document, ...]
    length: int
    _places: dict[tuple[torch.device, int], _Places] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def q_len(self) -> int:
        """Queries of each."""
        return self.length

    @property
    def kv_len(self) -> int:
        """Keys of each."""
        return self.length

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each, which are fewer than it computes."""
        return [document.q_len for document in self.documents]

    def queries(self, x: Tensor) -> Tensor:
        """The queries' part of x (B, S, H, D) as (count, length, H, D)."""
        return self._taken(x, self._at(x.device, x.shape[1]).queries)

    def keys(self, x: Tensor) -> Tensor:
        """The keys' part of x (B, T, H, D) as (count, length, H, D)."""
        return self._taken(x, self._at(x.device, x.shape[1]).keys)

    def query_values(self, x: Tensor) -> Tensor:
        """The queries' part of x (B, H, S) as (count, H, length)."""
        return of_values(self.queries, x)

    def gradient(self, x: Tensor) -> Tensor:
        """As `queries`, zeros where a document has ended: nothing is to come home from there."""
        return self._ended(x, 0.0)

    def value_gradient(self, x: Tensor) -> Tensor:
        """As `query_values`, zeros where a document has ended."""
        return of_values(self.gradient, x)

    def row_lse(self, x: Tensor) -> Tensor:
        """As `query_values`, +inf where a document has ended, so that p = exp(s - lse) is 0 there.

        Such a row may see keys that the last token does not: by the lse of that one, p could be infinite there.
        """
        return of_values(lambda rows: self._ended(rows, math.inf), x)

    def put_queries(self, total: Tensor, part: Tensor) -> None:
        """Write (count, length, H, D) to where it belongs in total (B, S, H, D), which is contiguous."""
        places = self._at(total.device, total.shape[1])
        self._put(total.flatten(0, 1), part, places.queries, places.inside)

    def put_keys(self, total: Tensor, part: Tensor) -> None:
        """As `put_queries`, to total (B, T, H, D)."""
        places = self._at(total.device, total.shape[1])
        self._put(total.flatten(0, 1), part, places.keys, places.inside)

    def put_values(self, total: Tensor, part: Tensor) -> None:
        """Write (count, H, length) to where it belongs in total (B, H, S)."""
        length = total.shape[2]
        places = self._at(total.device, length)
        to = places.queries.index_select(0, places.inside)
        values = part.transpose(1, 2).flatten(0, 1).index_select(0, places.inside)
        total.transpose(1, 2)[to // length, to % length] = values

    def _ended(self, x: Tensor, value: float) -> Tensor:
        """As `queries`, with this value where a document has ended."""
        return self.queries(x).masked_fill_(self._at(x.device, x.shape[1]).beyond, value)

    def _taken(self, x: Tensor, places: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        if batch == 1 or x.stride(0) == length * x.stride(1):  # rows of tokens without a copy
            taken = (x[0] if batch == 1 else x.flatten(0, 1)).index_select(0, places)
        else:
            taken = x[places // length, places % length]
        return taken.view(len(self.documents), self.length, *x.shape[2:])

    @staticmethod
    def _put(total: Tensor, part: Tensor, places: Tensor, inside: Tensor) -> None:
        total.index_copy_(0, places.index_select(0, inside), part.flatten(0, 1).index_select(0, inside))

    def _at(self, device: torch.device, length: int) -> _Places:
        """For tensors of so many tokens a batch row on that device."""
        key = device, length
        if key not in self._places:
            self._places[key] = _Places.of(self.documents, self.length, *key)
        return self._places[key]


def filled(documents: Sequence[Document]) -> tuple[Stack | Filled, ...]:
    """All documents, those about as long as each other together; but as they are where they are one stack."""
    stacks = stacked(documents)
    if len(stacks) < 2:
        return stacks
    alike: dict[int, list[Document]] = {}
    others = []
    for document in documents:
        if document.q_len == document.kv_len:
            alike.setdefault(filled_length(document.kv_len), []).append(document)
        else:
            others.append(document)
    groups: list[Stack | Filled] = [*stacked(others)]
    for length, group in alike.items():
        exact = stacked(group)
        if len(exact) == 1 and exact[0].q_len == length:
            groups.append(exact[0])
        else:
            groups += [Filled(tuple(group[i : i + MOST_ROWS]), length) for i in range(0, len(group), MOST_ROWS)]
    return tuple(groups)
