"""What the dashboard is made of: series and their marks, exact tiles, counters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dilated_attention import Dilated, Global, Learned, Local, Pattern, Random, Strided, build_attention
from dilated_attention.core.geometry import Geometry
from dilated_attention.dashboard.counters import read_counters
from dilated_attention.dashboard.machine import RANKS, ring_costs
from dilated_attention.dashboard.series import (
    MAX_GROUPS,
    MAX_SERIES,
    REFERENCE_RUNS,
    THIN_RUNS,
    Point,
    group_runs,
    marked,
    newest,
    thin,
)
from dilated_attention.dashboard.tiles import TILES, picture
from dilated_attention.errors import ConfigError
from dilated_attention.registry.discovery import default_registry

from .dashboard_kit import result, run_of


def test_a_run_beyond_all_earlier_intervals_is_marked() -> None:
    times = [100, 104, 116, 100, 85, 100]  # intervals are 5 % to each side
    assert [*marked([result(median_ms=time) for time in times])] == ["", "", "slower", "", "faster", ""]
    assert [*marked([result(median_ms=200), *[result(median_ms=100)] * REFERENCE_RUNS, result(median_ms=150)])] == [
        "", "faster", *[""] * (REFERENCE_RUNS - 1), "slower",
    ]  # fmt: skip
    touching = [result(low_ms=90, high_ms=110), result(median_ms=115, low_ms=110, high_ms=120)]
    assert [*marked(touching)] == ["", ""]


@pytest.mark.parametrize(
    ("fields", "of_run"),
    [
        ({"case": "other"}, {}),
        ({"phase": "training"}, {}),
        ({"backend": "triton"}, {}),
        ({"seq_len": 8192}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({}, {"machine": {"device": "cpu", "name": "AMD EPYC", "cores": 2, "threads": 1}}),
        ({}, {"versions": {"python": "3.11.7", "torch": "2.11.0"}}),
    ],
)
def test_only_like_is_compared_with_like(fields: dict[str, Any], of_run: dict[str, Any]) -> None:
    if "machine" in of_run:
        of_run = {"machine": type(run_of(0, ()).machine)(**of_run["machine"])}
    runs = [run_of(0, [result()]), run_of(1, [result(median_ms=200, **fields)], **of_run)]
    groups, _ = group_runs(runs)
    assert [point.mark for group in groups for series in group.series for point in series.points] == ["", ""]
    groups, _ = group_runs([runs[0], run_of(1, [result(median_ms=200)], version="0.2.0")])
    assert [point.mark for point in groups[0].series[0].points] == ["", "slower"]


def test_peers_are_those_of_the_same_run() -> None:
    runs = [
        run_of(0, [result(), result(backend="dense", peer=True, median_ms=300, peak_bytes=1000)]),
        run_of(
            1, [result(), *(result(backend=name, peer=True, median_ms=ms) for name, ms in (("a", 150), ("b", 120)))]
        ),
        run_of(2, [result()]),
    ]
    (group,), _ = group_runs(reversed(runs))
    (own,) = (series for series in group.series if not series.peer)
    assert [point.speedup for point in own.points] == [3.0, 1.2, None]
    assert own.points[0].memory_ratio == 52_428.8
    assert [(series.backend, series.peer) for series in newest(group)] == [
        ("sdpa", False), ("b", True), ("a", True), ("dense", True),
    ]  # fmt: skip


def test_the_newest_cases_are_kept_and_the_rest_is_counted() -> None:
    runs = [run_of(index, [result(case=f"case {index}")]) for index in range(MAX_GROUPS + 3)]
    groups, left_out = group_runs(runs)
    assert (len(groups), left_out, groups[0].case) == (MAX_GROUPS, 3, f"case {MAX_GROUPS + 2}")
    groups, _ = group_runs([run_of(0, [result(case=name) for name in "abc"]), run_of(1, [result(case="c"), result()])])
    assert [group.case for group in groups] == ["c", "longnet-16k", "a", "b"]
    (group,), _ = group_runs([run_of(0, [result(backend=f"b{index}") for index in range(MAX_SERIES + 5)])])
    assert (len(group.series), group.left_out) == (MAX_SERIES, 5)


def test_thinning_keeps_peaks_marks_and_ends() -> None:
    run = run_of(0, [])
    points = [
        Point(run=run, result=result(median_ms=100 + index % 7 + 500 * (index == 4321)), mark="", peer=None)
        for index in range(10_000)
    ]
    points[777] = Point(run=run, result=result(median_ms=103), mark="slower", peer=None)
    kept = thin(points)
    assert THIN_RUNS - 10 < len(kept) <= THIN_RUNS + 1
    assert {id(points[index]) for index in (0, 777, 4321, 9_999)} <= {id(point) for point in kept}
    assert [id(point) for point in points if id(point) in {id(other) for other in kept}] == [id(p) for p in kept]
    assert thin(points[:THIN_RUNS]) == points[:THIN_RUNS]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 63, 200, 1000])
@pytest.mark.parametrize(
    "pattern",
    [
        Dilated((64, 256), (1, 4)),
        Local(40) | Global(8),
        Strided(7),
        Random(3, 16),
        Dilated((96, 96), (1, 2)) + Local(3),
    ],
)
def test_tiles_count_what_the_oracle_counts(pattern: Pattern, length: int, is_causal: bool) -> None:
    head, heads = 1, 2
    found = picture("x", pattern, length=length, num_heads=heads, is_causal=is_causal, head=head)
    geometry = Geometry.self_attention(length, heads, is_causal=is_causal)
    place = np.arange(length, dtype=np.int64)
    seen = np.broadcast_to(pattern.multiplicity(place[:, None], place, np.array(head), geometry) > 0, (length, length))
    allowed = place <= place[:, None] if is_causal else np.ones_like(seen)
    starts = np.arange(0, length, found.tile)
    assert starts.size <= TILES
    for counts, pairs in ((found.seen, seen & allowed), (found.allowed, allowed)):
        by_tile = np.add.reduceat(np.add.reduceat(pairs.astype(np.int64), starts, axis=0), starts, axis=1)
        assert np.array_equal(counts, by_tile)
    assert found.density == (seen & allowed).sum() / allowed.sum()
    assert [row.seen for row in found.rows()] == found.seen.sum(axis=1).tolist()


def test_a_picture_of_many_tokens_is_exact_too() -> None:
    length = 20_000
    found = picture("x", Local(300), length=length, num_heads=1, is_causal=True)
    place = np.arange(length)
    assert found.seen.sum() == (np.minimum(place, 300) + 1).sum()
    assert found.tile == 384
    drawn = sum(int(width) for level in range(-1, 6) for width in re.findall(r"h(\d+)v", found.path(level)))
    assert drawn == found.seen.size


def test_what_cannot_be_simulated_or_drawn_says_why() -> None:
    with pytest.raises(ConfigError, match="chooses its blocks at every call, so there is no picture of it"):
        picture("x", Learned(2, 16), length=64, num_heads=2, is_causal=True)
    fields = {
        "num_heads": 2,
        "head_dim": 16,
        "seq_len": 6,
        "pattern": {"kind": "full"},
        "context_parallel": {"size": 3},
    }
    costs = [*ring_costs(fields, default_registry())]
    assert [cost.ranks for cost in costs] == list(RANKS)
    assert [cost.cost is None for cost in costs] == [False] + [True] * 9
    assert "6 tokens cannot be cut into 4 equal shards" in costs[1].cause


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "are no JSON"),
        ("{", "are no JSON"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": 1e999}', "must hold finite numbers below 2**63 and objects of such, got inf at 'a'"),
        ('{"a": [1]}', "got [1] at 'a'"),
        ('{"a": 9223372036854775808}', "got 9223372036854775808 at 'a'"),
        ("3", "must be a JSON object or a list of such, got a int"),
        ("[{}, 3]", "must be a JSON object or a list of such, got a int"),
        ('{"a":' * 12 + "{}" + "}" * 12, "are nested deeper than 8 objects"),
        ('{"a":' * 100_000, "are no JSON"),
        (" " * (1 << 20) + "{}", "are larger than 1,048,576 bytes"),
    ],
)
def test_counters_that_are_none_are_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "ran.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"the counters '.*ran\.json'") as caught:
        read_counters(path)
    assert said in str(caught.value)


def test_counters_of_several_plans_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "ran.json"
    path.write_text(
        json.dumps([{"backend": "sdpa", "plan": "0123456789abcdef", "calls": 1234}, {"forward": {"waited_s": 0.5}}])
    )
    found = read_counters(path)
    assert [(group, [(row.title, row.text) for row in rows]) for group, rows in found.groups()] == [
        ("1. sdpa 0123456789ab", [("backend", "sdpa"), ("plan", "0123456789abcdef"), ("calls", "1,234")]),
        ("2. › forward", [("waited", "0.5 s")]),
    ]


def test_the_counters_of_an_attention_are_read(tmp_path: Path) -> None:
    query = torch.randn(1, 64, 2, 8, requires_grad=True)
    attention = build_attention(pattern=Dilated((16, 64), (1, 4)), like=query, is_causal=True)
    attention(query, query, query).sum().backward()
    path = tmp_path / "ran.json"
    path.write_text(json.dumps(attention.counters().to_dict()))
    groups = {group: {row.title: row.text for row in rows} for group, rows in read_counters(path).groups()}
    assert groups[""]["backend"] == "sdpa"
    assert groups["forward"]["calls"] == groups["backward"]["calls"] == "1"
    assert groups["forward"]["tokens"] == "64"
    assert groups["forward"]["flops"].endswith("FLOP")
    assert groups["layouts"]["nbytes"].endswith("B")
