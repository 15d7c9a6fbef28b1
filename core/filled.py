"""Documents of many lengths as few batches: each is filled up with copies of its last token, which none of it sees.

That is exact for causal attention over patterns that keep prefixes: what a query sees does not depend on what follows.
A length is then lowered (and compiled) for all documents that are about as long, and a launch serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from .documents import Document, Stack, of_values, stacked
from .geometry import about_as_long

MOST_ADDED = 256  # tokens by which a document is filled up are fewer
MOST_TOKENS = 1 << 16  # of a batch, which has fewer rows than CUDA has blocks along the second dimension of a grid
TOKENS_TOGETHER = 1 << 13  # of batches that are copied together, which saves launches and takes memory
_FINEST = 16


def filled_length(length: int) -> int:
    """The length that a document is computed at: up to an eighth longer, or up to 16 tokens, never over 256."""
    return about_as_long(length, _FINEST, MOST_ADDED)


class _Places(NamedTuple):
    """Where the tokens of copies come from: (N,) int64 over all batch rows.

    Attributes:
        queries: of each token; of the last one where a document has ended.
        keys: likewise.
        inside: the tokens of documents, counted over the copies.
        homes: where the queries of these come from, and go home to.
        key_homes: likewise their keys.
        beyond: (1, N, 1, 1) bool, where a document has ended.
    """

    queries: Tensor
    keys: Tensor
    inside: Tensor
    homes: Tensor
    key_homes: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, batches: Sequence[tuple[Sequence[Document], int]], device: torch.device, length: int) -> _Places:
        """Of documents that are filled up to the length of their batch, in batch rows of so many tokens."""
        listed = [
            (d.row * length + d.q_start, d.row * length + d.kv_start, d.q_len, filled)
            for documents, filled in batches
            for d in documents
        ]
        of_each = torch.tensor(listed, dtype=torch.int64, device="cpu")
        filled = of_each[:, 3]
        query, key, tokens, _ = of_each.repeat_interleave(filled, dim=0).unbind(1)
        place = torch.arange(len(query), device="cpu") - (filled.cumsum(0) - filled).repeat_interleave(filled)
        inside = (place < tokens).nonzero().squeeze(1)
        place = torch.minimum(place, tokens - 1)
        query, key = query + place, key + place
        found = query, key, inside, query[inside], key[inside]
        together = torch.cat(found)
        if device.type == "cuda":  # from elsewhere, the host would wait for all that is queued before
            together = together.pin_memory()
        together = together.to(device, non_blocking=device.type == "cuda")
        queries, keys, inside, homes, key_homes = torch.split(together, [len(x) for x in found])
        beyond = torch.ones(len(queries), dtype=torch.bool, device=device).index_fill_(0, inside, False)
        return cls(queries, keys, inside, homes, key_homes, beyond.view(1, -1, 1, 1))


@attrs.frozen(eq=False)
class Filled:
    """Documents copied one behind the other, each filled up: (1, N, H, D).

    Attributes:
        batches: documents whose queries and keys are equally many, and the length of their copies.
        stacks: the batches, in the copies.
    """

    batches: tuple[tuple[tuple[Document, ...], int], ...]
    stacks: tuple[Stack, ...] = attrs.field(init=False, repr=False)
    _places: dict[tuple[torch.device, int], _Places] = attrs.field(factory=dict, init=False, repr=False)

    @stacks.default
    def _find_stacks(self) -> tuple[Stack, ...]:
        start, stacks = 0, []
        for documents, length in self.batches:
            first = Document(0, start, length, start, length)
            tokens = tuple(document.q_len for document in documents)
            stacks.append(Stack(first, len(documents), q_step=length, kv_step=length, lengths=tokens))
            start += length * len(documents)
        return tuple(stacks)

    def queries(self, x: Tensor) -> Tensor:
        """The queries' part of x (B, S, H, D)."""
        return self._taken(x, self._at(x.device, x.shape[1]).queries)

    def keys(self, x: Tensor) -> Tensor:
        """The keys' part of x (B, T, H, D)."""
        return self._taken(x, self._at(x.device, x.shape[1]).keys)

    def gradient(self, x: Tensor) -> Tensor:
        """As `queries`, zeros where a document has ended: nothing is to come home from there."""
        return self._ended(x, 0.0)

    def value_gradient(self, x: Tensor) -> Tensor:
        """As `gradient`, of x (B, H, S) as (1, H, N)."""
        return of_values(self.gradient, x)

    def row_lse(self, x: Tensor) -> Tensor:
        """Of lse (B, H, S) as (1, H, N), +inf where a document has ended, so that p = exp(s - lse) is 0 there.

        Such a row may see keys that the last token does not: by the lse of that one, p could be infinite there.
        """
        return of_values(lambda rows: self._ended(rows, math.inf), x)

    def put_queries(self, total: Tensor, part: Tensor) -> None:
        """Write (1, N, H, D) to where it belongs in total (B, S, H, D), which is contiguous."""
        places = self._at(total.device, total.shape[1])
        total.flatten(0, 1).index_copy_(0, places.homes, part[0].index_select(0, places.inside))

    def put_keys(self, total: Tensor, part: Tensor) -> None:
        """As `put_queries`, to total (B, T, H, D)."""
        places = self._at(total.device, total.shape[1])
        total.flatten(0, 1).index_copy_(0, places.key_homes, part[0].index_select(0, places.inside))

    def put_values(self, total: Tensor, part: Tensor) -> None:
        """Write (1, H, N) to where it belongs in total (B, H, S)."""
        length = total.shape[2]
        places = self._at(total.device, length)
        values = part[0].index_select(1, places.inside)
        if total.shape[0] == 1:
            total[0].index_copy_(1, places.homes, values)
        else:
            total.transpose(1, 2)[places.homes // length, places.homes % length] = values.transpose(0, 1)

    def _ended(self, x: Tensor, value: float) -> Tensor:
        """As `queries`, with this value where a document has ended."""
        return self.queries(x).masked_fill_(self._at(x.device, x.shape[1]).beyond, value)

    def _taken(self, x: Tensor, places: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        if batch == 1 or x.stride(0) == length * x.stride(1):  # rows of tokens without a copy
            taken = (x[0] if batch == 1 else x.flatten(0, 1)).index_select(0, places)
        else:
            taken = x[places // length, places % length]
        return taken.unsqueeze(0)

    def _at(self, device: torch.device, length: int) -> _Places:
        """For tensors of so many tokens a batch row on that device."""
        key = device, length
        if key not in self._places:
            self._places[key] = _Places.of(self.batches, *key)
        return self._places[key]


def filled(documents: Sequence[Document]) -> tuple[Stack | Filled, ...]:
    """All documents, those about as long as each other together."""
    alike: dict[int, list[Document]] = {}
    others = []
    for document in documents:
        if document.q_len == document.kv_len:
            alike.setdefault(filled_length(document.kv_len), []).append(document)
        else:
            others.append(document)
    found: list[Stack | Filled] = [*stacked(others)]
    batches: list[tuple[tuple[Document, ...], int]] = []
    for length, group in alike.items():
        exact = stacked(group)
        if len(exact) == 1 and exact[0].q_len == length:
            found.append(exact[0])
        else:
            most = max(1, MOST_TOKENS // length)
            batches += [(tuple(group[i : i + most]), length) for i in range(0, len(group), most)]
    return (*found, *_together(batches))


def _together(batches: Sequence[tuple[tuple[Document, ...], int]]) -> Iterator[Filled]:
    """As few copies as hold no more than `TOKENS_TOGETHER` each, but for a batch that is larger."""
    taken: list[tuple[tuple[Document, ...], int]] = []
    tokens = 0
    for batch in batches:
        more = len(batch[0]) * batch[1]
        if taken and tokens + more > TOKENS_TOGETHER:
            yield Filled(tuple(taken))
            taken, tokens = [], 0
        taken.append(batch)
        tokens += more
    if taken:
        yield Filled(tuple(taken))
