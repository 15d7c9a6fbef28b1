"""Lowering: from a pattern and a geometry to strided branches and tables of blocks.

Addends of a sum are lowered one by one; those that are sums of strided branches stay branches, all others become one
table of blocks over the sum of their multiplicities. Of a union with branch-like members the first stays branches and
the rest becomes a block term by max(a, b) = a + max(b - a, 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import attrs
import numpy as np

from .geometry import Geometry, joined_groups
from .layout import BlockSupport, Layout
from .pattern import Branch, Full, KeySpans, Pattern, Sum, Union
from .supports import branch_overlap, branch_signature, branch_signature_groups

if TYPE_CHECKING:
    from .layout import BlockGrid
    from .pattern import IntArray


def layout_kinds(pattern: Pattern, geometry: Geometry) -> frozenset[str]:
    """The kinds of parts ("branch", "block") that `lower` gives this pattern, without lowering it."""
    kinds = (("branch" if isinstance(term, tuple) else "block") for term in _terms(pattern, geometry))
    return frozenset(kinds)


def block_traits(pattern: Pattern, geometry: Geometry) -> frozenset[str]:
    """What the table of blocks that `lower` gives this pattern may have: "weights" above 1, a table "per_head"."""
    terms = tuple(term for term in _terms(pattern, geometry) if isinstance(term, Pattern))
    if not terms:
        return frozenset()
    rest = terms[0] if len(terms) == 1 else Sum(terms)
    traits = (
        ("weights", rest.max_multiplicity > 1),
        ("per_head", len(set(rest.head_groups(geometry.num_heads, geometry.num_kv_heads))) > 1),
    )
    return frozenset(name for name, present in traits if present)


def table_block_size(pattern: Pattern, geometry: Geometry) -> int:
    """The block size of the table that `lower` gives this pattern, by default, where it gives one."""
    from .blocking import DEFAULT_BLOCK_SIZE

    terms = (term for term in _terms(pattern, geometry) if isinstance(term, Pattern))
    return min((size for term in terms if (size := term.block_size) is not None), default=DEFAULT_BLOCK_SIZE)


def lower(
    pattern: Pattern, geometry: Geometry, *, block_size: int | None = None, limit_bytes: int | None = None
) -> Layout:
    """Lower `pattern` for one geometry.

    Args:
        pattern: what to lower.
        geometry: lengths, heads, offsets and causality of the call.
        block_size: queries and keys in a block of the table; by default what the pattern is defined on, else 128.
        limit_bytes: most bytes that the table may take.

    Raises:
        ConfigError: the table needs more than `limit_bytes`, or counts a pair more than 255 times.
    """
    from .blocking import lower_blocks

    branches, rest = split(pattern, geometry)
    blocks = None
    if rest is not None:
        blocks = lower_blocks(rest, geometry, block_size=block_size, limit_bytes=limit_bytes)
    return Layout(pattern, geometry, branches, blocks)


def split(pattern: Pattern, geometry: Geometry) -> tuple[tuple[Branch, ...], Pattern | None]:
    """The branches of what `lower` gives this pattern, and what it lowers to blocks; None where nothing is.

    Raises:
        ConfigError: the pattern does not take these heads.
    """
    pattern.validate(geometry.num_heads, geometry.num_kv_heads)
    merged: dict[tuple[int | None, int, tuple[int | None, ...]], int] = {}
    block_terms: list[Pattern] = []
    for term in _terms(pattern, geometry):
        if isinstance(term, Pattern):
            block_terms.append(term)
            continue
        for branch in term:
            place = (branch.segment_length, branch.stride, branch.offsets)
            merged[place] = merged.get(place, 0) + branch.weight
    branches = tuple(Branch(*place, weight) for place, weight in merged.items())
    if len(block_terms) > 1:
        return branches, Sum(tuple(block_terms))
    return branches, block_terms[0] if block_terms else None


def _terms(pattern: Pattern, geometry: Geometry) -> Iterator[tuple[Branch, ...] | Pattern]:
    """Addends of `pattern`: branches where it has that form, else a pattern to be lowered to blocks."""
    pattern = pattern.unwrap()
    if isinstance(pattern, Sum):
        for member in pattern.of:
            yield from _terms(member, geometry)
        return
    if isinstance(pattern, Union):
        yield from _union_terms(pattern, geometry)
        return
    branches = pattern.branches(geometry)
    yield pattern if branches is None else branches


def _union_terms(union: Union, geometry: Geometry) -> Iterator[tuple[Branch, ...] | Pattern]:
    members = _distinct_members(union)
    if len(members) == 1:
        yield from _terms(members[0], geometry)
        return
    for index, member in enumerate(members):
        branches = member.branches(geometry)
        if branches is not None:
            others = members[:index] + members[index + 1 :]
            yield branches
            yield Residual(others[0] if len(others) == 1 else Union(others), branches, member)
            return
    yield Union(members)


def _distinct_members(union: Union) -> tuple[Pattern, ...]:
    """The members that can matter: nested unions opened, none twice, and beside `Full` only what may exceed 1."""
    flat: list[Pattern] = []
    for member in (named.unwrap() for named in union.of):
        opened = _distinct_members(member) if isinstance(member, Union) else (member,)
        flat += [m for m in opened if not any(type(m) is type(other) and m == other for other in flat)]
    if any(isinstance(member, Full) for member in flat):
        flat = [member for member in flat if isinstance(member, Full) or member.max_multiplicity > 1]
    return tuple(flat)


@attrs.frozen
class Residual(Pattern):
    """max(pattern - branches, 0): what a union adds to the member that stays branches. Never leaves this module.

    Attributes:
        pattern: the other members of the union.
        branches_taken: the branches of the member that stays.
        member: that member.
    """

    kind: ClassVar[str] = "residual"

    pattern: Pattern
    branches_taken: tuple[Branch, ...]
    member: Pattern

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """What `pattern` counts beyond `member`."""
        wanted = self.pattern.multiplicity(query, key, head, geometry)
        beyond: IntArray = np.maximum(wanted - self.member.multiplicity(query, key, head, geometry), 0)
        return beyond

    @property
    def max_multiplicity(self) -> int:
        """That of the pattern."""
        return self.pattern.max_multiplicity

    @property
    def block_size(self) -> int | None:
        """That of the pattern."""
        return self.pattern.block_size

    def head_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Heads are alike where both sides say so."""
        return Sum((self.pattern, self.member)).head_groups(num_heads, num_kv_heads)

    def signature_groups(self, num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
        """Signatures are alike where the pattern's and the branches' are."""
        wanted = self.pattern.signature_groups(num_heads, num_kv_heads)
        return joined_groups(wanted, branch_signature_groups(self.branches_taken, num_heads))

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """Those of the pattern, nothing constant."""
        spans = self.pattern.key_spans(query_low, query_high, head, geometry)
        return KeySpans(spans.low, spans.high, spans.low, spans.low)

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """Blocks of the pattern, constant where it is and the branches have no pair."""
        support = self.pattern.block_support(grid, head, geometry)
        low = grid.query_low[support.rows], grid.key_low[support.cols]
        touched = branch_overlap(self.branches_taken, *low, grid.block_size, head)
        return BlockSupport(support.rows, support.cols, np.where(touched, 0, support.multiplicity))

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """The pattern's and the branches' side by side."""
        wanted = self.pattern.block_signature(query_low, key_low, block_size, head, geometry)
        taken = branch_signature(self.branches_taken, query_low, key_low, block_size, head)
        return np.concatenate([wanted, taken], axis=-1)
