"""Ranks that do not make the same calls in the same order are told so; compiled, checkpointed and copied ones do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dilated_attention import Limits

from .ring_calls import alike, dropped, mixed, swapped
from .ring_ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def test_attentions_that_are_built_alike_are_told_apart(ranks: Ranks) -> None:
    for said in (*ranks.run(swapped), *ranks.run(dropped, False), *ranks.run(dropped, True)):
        assert "attention" in said


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
        assert ("attention" if recomputed else "call") in said


def test_calls_are_the_same_when_compiled_checkpointed_or_copied(ranks: Ranks) -> None:
    for said in ranks.run(alike, 10):
        assert {said[name] for name in ("compiled", "kept", "both", "copied")} == {True}
        assert said["graphs"] <= 4
