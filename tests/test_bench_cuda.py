"""`bench` on a CUDA device: CUDA graphs stand beside the calls, and every backend passes the gate."""

from __future__ import annotations

import attrs
import pytest

from dilated_attention import Dilated
from dilated_attention.bench.cases import CASES
from dilated_attention.bench.measure import Settings, floor_of, measure_case
from dilated_attention.bench.peers import dense_sdpa

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["longnet-32k", "longnet-32k-d128-full", "random-32k-10", "local-global-32k"])
def test_cases_are_measured_with_and_without_graphs(name: str) -> None:
    case = attrs.evolve(CASES[name], seq_len=4096)
    settings = Settings(device="cuda", rounds=3, makers=(dense_sdpa,))
    report = measure_case(case, settings, floor_tflops=floor_of(case, "cuda"))
    assert report.failures == ()
    plain = {result.backend for result in report.results if not result.peer and "graph" not in result.backend}
    graphs = {result.backend for result in report.results if "graph" in result.backend}
    assert "sdpa" in plain
    if isinstance(case.pattern, Dilated):
        assert {f"{backend}, CUDA graph" for backend in plain} == graphs, report.notes
    else:  # the block product of core's reads nothing back, so that it can be captured too
        assert graphs, report.notes
