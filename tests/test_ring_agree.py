"""Agreements: who comes too late, or comes again, joins no generation that is over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from dilated_attention import ConfigError, RingBroken, agree
from dilated_attention.exchange.rebuild import _ROOM as ROOM
from dilated_attention.exchange.rebuild import Membership

Store = Any


@pytest.fixture
def store() -> Store:
    return dist.HashStore()  # type: ignore[attr-defined]


def all_agree(store: Store, generation: int | None, **asked: Any) -> list[Membership]:
    """Two ranks that come at once."""
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(agree, store, identity=n, generation=generation, size=2, **asked) for n in ("a", "b")]
        return [call.result() for call in calls]


def broken(call: Callable[[], object]) -> RingBroken:
    with pytest.raises(RingBroken) as caught:
        call()
    return caught.value


def test_a_generation_is_formed_once(store: Store) -> None:
    assert [member.rank for member in all_agree(store, 3)] == [0, 1]
    for name, generation in (("a", 3), ("a", 2), ("c", 1)):  # one of its members, one of an older ring, a stranger
        error = broken(lambda name=name, generation=generation: agree(store, identity=name, generation=generation))  # type: ignore[misc]
        assert error.generation == 3
        assert f"generation {generation} is over: agree on generation 4" in error.reason
    assert [member.generation for member in all_agree(store, error.generation + 1)] == [4, 4]


def test_who_comes_as_members_are_settled_is_told_which_is_next(store: Store) -> None:
    all_agree(store, 1)
    room = dist.PrefixStore(ROOM, store)  # type: ignore[attr-defined]
    room.set("generation", "0")  # as it is until the first of them has said so
    for name in ("a", "c"):
        error = broken(lambda name=name: agree(store, identity=name, generation=1))  # type: ignore[misc]
        assert error.generation == 1
        assert error.reason == f"{name!r} came after its members were settled (a, b); agree on generation 2"


def test_a_generation_that_did_not_form_is_not_tried_again(store: Store) -> None:
    with ThreadPoolExecutor(2) as pool:
        for call in [pool.submit(agree, store, identity="a", size=2) for _ in range(2)]:
            with pytest.raises(ConfigError, match=r"two participants have the same identity.*agree on generation 2"):
                call.result()
    error = broken(lambda: agree(store, identity="a", size=2, timeout_s=0.1))
    assert (error.generation, error.reason) == (2, "1 came where 2 were to: a; agree on generation 3")
    assert [member.generation for member in all_agree(store, None)] == [3, 3]


def test_generations_are_counted_from_1(store: Store) -> None:
    with pytest.raises(ConfigError, match="generation must be at least 1, got 0"):
        agree(store, identity="a", generation=0)
