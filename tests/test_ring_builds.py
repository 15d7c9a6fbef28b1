"""Builds that fail are known to all ranks at once, and the next one finds them together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dilated_attention import ContextParallel

from .ring_builds import refused
from .ring_ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("odd", "name", "words"),
    [
        (
            {"context_parallel": ContextParallel(size=3)},
            "ConfigError",
            "size must divide the 2 ranks of the mesh, got 3",
        ),
        ({"context_parallel": None}, "ConfigError", "mesh is for context_parallel="),
        ({"backend": "fa3"}, "NoBackendError", "backend 'fa3' does not fit"),
        ({"head_dim": 0}, "ConfigError", "head_dim must be at least 1, got 0"),
    ],
    ids=["size", "none", "backend", "field"],
)
def test_what_one_rank_cannot_build_all_are_told_at_once(
    ranks: Ranks, odd: dict[str, Any], name: str, words: str
) -> None:
    (first, after), (other, also) = ranks.run(refused, odd)
    assert (first[0], other[0]) == (name, "ConfigError")
    assert words in first[1]
    assert f"rank 0 cannot build its own: {first[0]}: {first[1]}" == other[1]
    assert max(first[2], other[2]) < 5  # of a timeout of 30
    assert after[0] == also[0] == ""


def test_a_rank_that_shares_nothing_over_a_mesh_says_so(ranks: Ranks) -> None:
    for (name, said, seconds), after in ranks.run(refused, {"context_parallel": ContextParallel(size=1, timeout_s=30)}):
        assert (name, after[0]) == ("ConfigError", "")
        assert 'config.context_parallel is {"size": 1' in said
        assert seconds < 5
