"""Cases of the benchmark with fewer key-value heads."""

from __future__ import annotations

from typing import Any

from dilated_attention.bench.cases import CASES
from dilated_attention.bench.peers import dense_sdpa


def test_grouped_heads_are_in_the_inputs_the_configuration_and_the_words() -> None:
    case = CASES["random-32k-10-gqa"]
    small = case.small()
    shapes = [tuple(x.shape) for x in small.inputs("cpu")]
    assert shapes == [(1, 1024, 16, 64), (1, 1024, 4, 64), (1, 1024, 4, 64), (1, 1024, 16, 64)]
    config: dict[str, Any] = case.to_dict()["config"]
    assert case.config("auto", device="cpu").kv_heads == config["num_kv_heads"] == 4
    assert "16/4 heads of 64" in str(case)
    assert CASES["longnet-4k"].num_kv_heads == 8
    peer = dense_sdpa(small, "cpu")
    assert peer is not None
    assert peer.attend(*small.inputs("cpu")[:3]).shape == small.shape
