"""Dilated attention: LongNet (arXiv 2307.02486, eq. 3-10) as a sum of strided branches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import attrs

from ..core.checks import MOST_POSITIONS, is_int, plain_int, require_choice, require_int
from ..core.errors import ConfigError
from ..core.geometry import Geometry, joined_groups
from ..core.pattern import Branch, KeySpans, Pattern, parameters
from ..core.repeats import Repeats

if TYPE_CHECKING:
    from ..core.pattern import IntArray


def _tuple(value: Iterable[int]) -> tuple[object, ...]:
    """A tuple of the values, so that lists from files compare equal; anything that is no list is an error."""
    if isinstance(value, set | frozenset):
        raise ConfigError(f"Dilated takes sequences of integers, a branch a place, got {value!r}, which has no order")
    if isinstance(value, str) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        example = value if is_int(plain_int(value)) else 1024
        raise ConfigError(f"Dilated takes sequences of integers, got {value!r}; write ({example},) for one branch")
    return tuple(map(plain_int, value))


def _positive_ints(instance: Dilated, attribute: attrs.Attribute[tuple[int, ...]], value: tuple[object, ...]) -> None:
    name = f"Dilated.{attribute.name}"
    if not value:
        raise ConfigError(f"{name} is empty; it needs one value per branch, at least one")
    for index, item in enumerate(value):
        require_int(f"{name}[{index}]", item, minimum=1, maximum=MOST_POSITIONS)


def _offset_rule(instance: Dilated, attribute: attrs.Attribute[str], value: object) -> None:
    require_choice("Dilated.offsets", value, ("interleaved", "blocked"))


def _heads_rule(instance: Dilated, attribute: attrs.Attribute[str], value: object) -> None:
    require_choice("Dilated.heads", value, ("all", "split"))


def _offsets_by_rule(instance: Dilated, attribute: attrs.Attribute[str], value: object) -> None:
    require_choice("Dilated.offsets_by", value, ("query_head", "kv_head"))


@attrs.frozen
class Dilated(Pattern):
    """The sum of dilated branches: a key that several branches of a head show to a query counts once for each.

    In branch i a head keeps the positions whose place in their segment, p mod segment_lengths[i], is congruent to the
    head's offset modulo dilation_rates[i]; a kept query sees the kept keys of its own segment. Segment lengths need no
    order and may repeat; nothing is padded, a last segment is shorter, a length beyond the sequence is one segment.

    Attributes:
        segment_lengths: positions in a segment, per branch.
        dilation_rates: distance of kept positions, per branch.
        offsets: the offset of head h of H at rate r. "interleaved" is h mod r (the paper), "blocked" is
            h // ceil(H / r) (torchscale's checkpoints).
        heads: "all": every head uses every branch (the paper). "split": heads are dealt out to the branches in order,
            the first H mod G of the G branches get one head more, and branch i has the offset i mod r_i.
        offsets_by: which head numbers `offsets` counts when key-value heads are shared: "query_head" or "kv_head".

    Raises:
        ConfigError: no branches, lists of unequal length, values that are no positive integers, or `heads="split"`
            together with another `offsets` or `offsets_by`, which it would not use.
    """

    kind: ClassVar[str] = "dilated"
    keeps_prefixes: ClassVar[bool] = True

    segment_lengths: tuple[int, ...] = attrs.field(converter=_tuple, validator=_positive_ints)
    dilation_rates: tuple[int, ...] = attrs.field(converter=_tuple, validator=_positive_ints)
    offsets: str = attrs.field(default="interleaved", kw_only=True, validator=_offset_rule)
    heads: str = attrs.field(default="all", kw_only=True, validator=_heads_rule)
    offsets_by: str = attrs.field(default="query_head", kw_only=True, validator=_offsets_by_rule)

    def __attrs_post_init__(self) -> None:
        lengths, rates = len(self.segment_lengths), len(self.dilation_rates)
        if lengths != rates:
            raise ConfigError(
                f"Dilated needs one dilation rate per segment length, got {lengths} segment_lengths "
                f"{self.segment_lengths} and {rates} dilation_rates {self.dilation_rates}"
            )
        if self.heads == "split" and self.offsets != "interleaved":
            raise ConfigError(
                f"Dilated(heads='split') takes its offsets from the branches, not from offsets={self.offsets!r}; "
                f"leave offsets at 'interleaved'"
            )
        if self.heads == "split" and self.offsets_by != "query_head":
            raise ConfigError(
                f"Dilated(heads='split') takes its offsets from the branches, not from offsets_by={self.offsets_by!r}; "
                f"leave offsets_by at 'query_head'"
            )

    def validate(self, num_heads: int, num_kv_heads: int) -> None:
        """Split heads must reach every branch."""
        if self.heads == "split" and num_heads < len(self.segment_lengths):
            raise ConfigError(
                f"Dilated(heads='split') deals heads out to {len(self.segment_lengths)} branches and needs at least "
                f"as many, got num_heads={num_heads}; use heads='all' or fewer branches"
            )

    @property
    def max_multiplicity(self) -> int:
        """One per branch of a head."""
        return 1 if self.heads == "split" else len(self.segment_lengths)

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """The number of branches in which the head keeps both positions in one segment."""
        import numpy as np

        total = np.zeros(np.broadcast_shapes(query.shape, key.shape, head.shape), dtype=np.int64)
        for w, r, offsets in zip(self.segment_lengths, self.dilation_rates, self._offsets(geometry), strict=True):
            used = np.array([offset is not None for offset in offsets])[head]
            offset = np.array([offset or 0 for offset in offsets])[head]
            same_segment = query // w == key // w
            kept = (query % w % r == offset) & (key % w % r == offset)
            total += used & same_segment & kept
        return total

    def _offsets(self, geometry: Geometry) -> list[tuple[int | None, ...]]:
        """The offset of every head in every branch, None where the head does not use it."""
        h, count = geometry.num_heads, len(self.segment_lengths)
        if self.heads == "split":
            fewer, more = divmod(h, count)
            branch_of_head = [i for i in range(count) for _ in range(fewer + (i < more))]
            return [
                tuple(i % rate if branch == i else None for branch in branch_of_head)
                for i, rate in enumerate(self.dilation_rates)
            ]
        by_kv = self.offsets_by == "kv_head"
        numbers = [head // geometry.group_size if by_kv else head for head in range(h)]
        total = geometry.num_kv_heads if by_kv else h
        if self.offsets == "interleaved":
            return [tuple(n % rate for n in numbers) for rate in self.dilation_rates]
        return [tuple(n // -(-total // rate) for n in numbers) for rate in self.dilation_rates]

    def branches(self, geometry: Geometry) -> tuple[Branch, ...]:
        """One branch per segment length."""
        parts = zip(self.segment_lengths, self.dilation_rates, self._offsets(geometry), strict=True)
        return tuple(Branch(w, r, offsets) for w, r, offsets in parts)

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Heads with the same offset in every branch are alike."""
        geometry = Geometry(q_len=0, kv_len=0, num_heads=num_heads, num_kv_heads=num_kv_heads, is_causal=False)
        return joined_groups(*self._offsets(geometry))

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """From the first to the last segment of the branches that keep a query of the block."""
        from ..core.supports import branch_spans

        return branch_spans(self.branches(geometry), query_low, query_high, head, geometry)

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """Residues of the corners, and places where a segment ends inside the block."""
        from ..core.supports import branch_signature

        return branch_signature(self.branches(geometry), query_low, key_low, block_size, head)

    def signature_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Heads that use the same branches, whatever their offsets."""
        from ..core.supports import branch_signature_groups

        geometry = Geometry(q_len=0, kv_len=0, num_heads=num_heads, num_kv_heads=num_kv_heads, is_causal=False)
        return branch_signature_groups(self.branches(geometry), num_heads)

    def repeats(self) -> Repeats:
        """Segments of all branches begin together once in the least common multiple of their lengths."""
        reach = max(self.segment_lengths) - 1
        return Repeats(fixed=0, start=0, period=math.lcm(*self.segment_lengths), left=reach, right=reach)

    def to_dict(self) -> dict[str, object]:
        """The fields, with `kind`."""
        return parameters(self)
