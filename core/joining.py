"""Which pieces of a schedule are kept until all are there, to be joined in one pass (`kernel.Joins`).

Merging one after another moves 18 bytes for each element of each piece in half precision; joining reads each piece once
and writes the result once, rounded once. It is only done where it takes no more memory, beside that of lse: merging
holds 3 elements in half precision for each of the result (sums in float32, and the first piece or the result). The five
branches of LongNet have 1.94 elements for each, and the result 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import torch
from torch import Tensor

from .kernel import Joins
from .schedule import Call
from .slabs import Place, Slab, slabs_of

MOST_HELD: Final = 3  # elements of pieces and of a result, for each element of the results


@attrs.frozen
class Launch:
    """One launch of a dense kernel: of a call, the part that `slab` takes."""

    call: Call
    slab: Slab

    @property
    def of_queries(self) -> Place:
        """Where its rows of queries stand."""
        return self.slab.place(self.call.query, self.call.segments)

    @property
    def of_keys(self) -> Place:
        """Where its rows of keys stand."""
        return self.slab.place(self.call.key, self.call.segments)


def launches_of(calls: Sequence[Call], queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[Launch]:
    """All launches of the calls, in their order."""
    return [Launch(call, slab) for call in calls for slab in slabs_of(call, queries, keys)]


def are_joined(joins: Joins, sums: Sequence[tuple[Tensor, Sequence[Place]]], *, adds: bool) -> bool:
    """Whether `joins` takes the pieces of these sums, and holding them all takes no more memory than merging them.

    Args:
        joins: what would join them.
        sums: tensors shaped like the results, in the order in which these are written, with the places of the pieces.
        adds: they are gradients.
    """
    if any(x.dtype not in (torch.bfloat16, torch.float16) for x, _ in sums):
        return False  # float32 is merged into the first piece itself
    rows = [x.shape[0] * x.shape[1] * x.shape[2] for x, _ in sums]
    held = sum(place.num_rows for _, places in sums for place in places)
    if held + rows[0] > MOST_HELD * sum(rows):
        return False
    return all(len(places) > 1 and joins.can_join(x, places, adds=adds) for x, places in sums)
