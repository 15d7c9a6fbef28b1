"""Hypothesis strategies: small patterns, unions and sums of them, and geometries with offsets and ragged lengths."""

from __future__ import annotations

from hypothesis import strategies as st

from dilated_attention.core.geometry import Geometry
from dilated_attention.core.head_shard import HeadShard
from dilated_attention.core.pattern import Full, Pattern, Sum, Union
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.global_tokens import Global
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.random import Random
from dilated_attention.patterns.strided import Strided


@st.composite
def dilated(draw: st.DrawFn) -> Dilated:
    branches = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4))
    lengths, rates = tuple(w for w, _ in branches), tuple(r for _, r in branches)
    if draw(st.integers(0, 3)) == 0:
        return Dilated(lengths, rates, heads="split")
    offsets = draw(st.sampled_from(("interleaved", "blocked")))
    return Dilated(lengths, rates, offsets=offsets, offsets_by=draw(st.sampled_from(("query_head", "kv_head"))))


def generators() -> st.SearchStrategy[Pattern]:
    """One pattern, no algebra."""
    sides = st.tuples(st.integers(0, 12), st.integers(0, 12))
    return st.one_of(
        st.just(Full()), dilated(), st.builds(Local, sides), st.builds(Global, st.integers(1, 20)),
        st.builds(Strided, st.integers(1, 20)),
        st.builds(Random, st.integers(1, 6), st.integers(1, 20), st.integers(0, 3)),
        st.builds(Random, block_size=st.integers(1, 20), density=st.sampled_from((0.01, 0.1, 0.5, 1.0))),
    )  # fmt: skip


def composed(leaves: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """These and their unions and sums, nested."""

    def compose(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
        members = st.lists(inner, min_size=1, max_size=3).map(tuple)
        return st.one_of(st.builds(Union, members), st.builds(Sum, members))

    return st.recursive(leaves, compose, max_leaves=4)


def sharded(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """Some heads of a model, enough for those of `geometries`, which share keys there whichever share them here."""
    total = {"total_heads": st.just(12), "total_kv_heads": st.just(1)}
    return st.builds(HeadShard, inner, first_head=st.integers(0, 6), **total)


def patterns() -> st.SearchStrategy[Pattern]:
    """Generators, their unions and sums, shards of these, and unions and sums of shards."""
    plain = generators()
    return st.one_of(composed(plain), composed(st.one_of(plain, sharded(plain))), sharded(composed(plain)))


@st.composite
def geometries(draw: st.DrawFn, max_len: int = 60) -> Geometry:
    """At least four heads, so that split heads reach all branches that `dilated` draws."""
    q_len, kv_len = draw(st.integers(0, max_len)), draw(st.integers(0, max_len))
    kv_heads, group = draw(st.sampled_from(((1, 4), (2, 2), (4, 1), (3, 2), (1, 5), (5, 1))))
    offsets: dict[str, int] = {}
    if draw(st.booleans()):
        offsets["q_offset"] = draw(st.integers(-70, 70))
    if draw(st.booleans()):
        offsets["kv_offset"] = draw(st.integers(-70, 70))
    if draw(st.booleans()):
        q_len = kv_len
    return Geometry(
        q_len=q_len, kv_len=kv_len, num_heads=kv_heads * group, num_kv_heads=kv_heads, is_causal=draw(st.booleans()),
        **offsets,
    )  # fmt: skip
