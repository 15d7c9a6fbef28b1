"""What is left of rings that are broken, dropped or rebuilt in part: nothing that is not used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .ring_ends import (
    broken_set_up,
    dropped_rings,
    forked,
    rebuilt_beside_others,
    rebuilt_in_part,
    refused_rebuild,
    released,
)
from .ring_ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def test_a_broken_ring_lets_go_of_what_was_computed(ranks: Ranks) -> None:
    for said in ranks.run(released):
        assert said == {"forward": True, "backward": True, "retried": True}


def test_a_ring_is_open_while_an_attention_uses_it(ranks: Ranks) -> None:
    for said in ranks.run(dropped_rings):
        assert said == [True] * 6


def test_rebuilding_one_attention_leaves_others_their_ring(ranks: Ranks) -> None:
    for said in ranks.run(rebuilt_beside_others):
        assert said == [True] * 5


def test_a_rebuild_that_fails_half_way_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    pool = Ranks(2, tmp_path)  # whose builds are out of step then
    short, whole = pool.run(rebuilt_in_part)
    pool.close()
    name, words = short["told"]
    assert name == "RingBroken"
    assert words.startswith("the ring is broken (generation 1, pass 0, rank 1): it did not call rebuild within 1 s")
    assert words.endswith("nothing was rebuilt: agree on generation 2, and rebuild for that")
    assert whole["told"] == ("", "")
    for said in (short, whole):
        assert said["rings"]
        assert said["old"]
    name, words, seconds = whole["new"]
    assert (name, "generation 1" in words) == ("RingBroken", True)
    assert seconds < 1


def test_what_one_rank_cannot_rebuild_all_are_told_at_once(ranks: Ranks) -> None:
    for (name, words, seconds), again, after in ranks.run(refused_rebuild):
        assert name == "ConfigError"
        assert "rebuild found no attention" in words
        assert seconds < 2
        assert (again[0], after[0]) == ("", "")


def test_a_set_up_that_fails_leaves_nothing_open(ranks: Ranks) -> None:
    for said in ranks.run(broken_set_up):
        assert said["told"][0] == "RingBroken"
        assert "not all 2 ranks could be connected within 1.5 s: rank 1: OSError: no route to host" in said["told"][1]
        assert said["closed"]
        assert said["files"] <= 0


def test_a_forked_child_neither_hides_a_death_nor_calls(tmp_path: Path) -> None:
    pool = Ranks(2, tmp_path)
    for rank in range(2):
        pool.send(rank, forked)
    child, broken, seconds = pool.receive(0)
    assert child.startswith("RingBroken|")
    assert child.endswith("this process was forked from rank 1 and is none itself: call attentions in the rank alone")
    assert "rank 1): it is gone" in broken
    assert seconds < 1
    pool.close()
