"""Ranks that do not make the same calls in the same order are told so; compiled, checkpointed and copied ones do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from dilated_attention import Limits

from .ring_calls import alike, dropped, evaluated, mixed, shapes, swapped, traced, without_tokens
from .ring_ranks import Ranks

ORDER = ": all ranks must make the same calls in the same order"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def test_attentions_that_are_built_alike_are_told_apart(ranks: Ranks) -> None:
    for found in (ranks.run(swapped), ranks.run(dropped, False), ranks.run(dropped, True)):
        for said, (theirs, own) in zip(found, ((2, 1), (1, 2)), strict=True):
            numbers = re.findall(r"calls number (\d+) of the attentions built", said)
            assert int(numbers[0]) - int(numbers[1]) == theirs - own
            assert said.endswith(ORDER)


def test_what_a_rank_does_otherwise_is_said_in_words(ranks: Ranks) -> None:
    way = "backward", "forward"
    for rank, said in enumerate(ranks.run(evaluated)):
        assert said == f"it is in a {way[rank]} pass where this rank is in a {way[1 - rank]} pass{ORDER}"
    for rank, (pattern, batch) in enumerate(ranks.run(shapes)):
        assert "it calls number" in pattern
        assert batch == f"it has a batch of {2 - rank} where this rank has a batch of {1 + rank}{ORDER}"


@pytest.mark.parametrize(
    ("fields", "recomputed", "shared"),
    [
        ({}, False, False),
        ({}, False, True),
        ({"limits": Limits(exchange_buffer_bytes=1)}, False, True),
        ({"activation_checkpointing": True}, False, True),
        ({}, True, False),
    ],
    ids=["two", "twice", "hops", "recomputed", "checkpointed"],
)
def test_gradients_of_different_calls_never_mix(
    ranks: Ranks, fields: dict[str, Any], recomputed: bool, shared: bool
) -> None:
    for said in ranks.run(mixed, fields, recomputed, shared):
        words = "calls number" if recomputed or not shared else "goes back through pass"
        assert f"it {words}" in said


def test_calls_are_the_same_when_compiled_checkpointed_or_copied(ranks: Ranks) -> None:
    for said in ranks.run(alike, 10):
        assert {said[name] for name in ("compiled", "kept", "both", "copied")} == {True}
        assert said["graphs"] <= 4


def test_a_rank_that_traces_is_refused_before_others_hear_of_it(ranks: Ranks) -> None:
    first, second = ranks.run(traced)
    assert (first.pop("after"), second) == ("", {"after": ""})
    assert set(first) == {"fake inside", "fake", "backward", "make_fx", "export"}
    for said in first.values():
        assert "ranks that share a sequence cannot be traced (torch.export, make_fx, fake tensors)" in said


def test_no_tokens_are_a_pass_like_any_other(ranks: Ranks) -> None:
    for rank, said in enumerate(ranks.run(without_tokens)):
        assert said["shapes"] == ((1, 0, 2, 8), (1, 2, 0), (1, 0, 2, 8))
        assert said["recomputed"] == ""
        theirs, own = (32, 0) if rank == 0 else (0, 32)
        assert f"it has a shard of {theirs} tokens where this rank has a shard of {own} tokens" in said["uneven"]
