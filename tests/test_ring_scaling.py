"""`bench --scaling`: what is asked of ranks, how overlap is read, and a run over real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dilated_attention.bench.overlap import common, hidden_in_trace, merged
from dilated_attention.bench.ring_settings import RingSettings
from dilated_attention.bench.scaling import SIMULATED, simulated, summarised, text_of
from dilated_attention.errors import ConfigError

from .bench_kit import ring_figures, ring_refused
from .conftest import Invoke
from .distributions import as_json, command
from .ring_ranks import Ranks

SMALL: dict[str, Any] = {
    "sizes": (1, 2), "device": "cpu", "weak_tokens": 512, "strong_tokens": 1024, "first": 64, "dtype": "float32",
    "num_heads": 2, "head_dim": 16,
}  # fmt: skip


def test_unions_of_intervals() -> None:
    assert merged([(3, 4), (0, 1), (0.5, 2), (4, 5)]) == [(0, 2), (3, 5)]
    assert common([(0, 2), (3, 5)], [(1, 4)]) == 2
    assert common([(0, 1)], [(1, 2)]) == 0
    assert common([], [(1, 2)]) == 0


def test_the_hidden_share_is_read_off_a_trace() -> None:
    events: list[dict[str, Any]] = [
        {"cat": "kernel", "name": "ncclDevKernel_SendRecv(...)", "ts": 0.0, "dur": 100.0},
        {"cat": "kernel", "name": "flash_fwd", "ts": 10.0, "dur": 40.0},
        {"cat": "kernel", "name": "flash_fwd", "ts": 30.0, "dur": 50.0},
        {"cat": "kernel", "name": "flash_bwd", "ts": 200.0, "dur": 50.0},
        {"cat": "cpu_op", "name": "nccl:send", "ts": 0.0, "dur": 300.0},
        {"name": "process_name"},
    ]
    seconds, share = hidden_in_trace(events)
    assert seconds == pytest.approx(100e-6)
    assert share == pytest.approx(0.7)
    assert hidden_in_trace(events[1:]) == (0.0, None)


def test_settings_travel_and_are_checked() -> None:
    settings = RingSettings(**SMALL)
    assert RingSettings.from_json(settings.to_json()) == settings
    for fields, said in (
        ({"sizes": (1, 3)}, "--strong-tokens must be a multiple of every number of ranks, got 1024 and 3"),
        ({"sizes": ()}, "--gpus must be numbers of ranks"),
        ({"sizes": (0,)}, "--gpus must be numbers of ranks"),
        ({"device": "tpu"}, "--device must be one of cpu, cuda"),
        ({"longest": True}, "--longest on a CPU needs --longest-limit"),
        ({"weak_tokens": 0}, "weak_tokens must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            RingSettings(**{**SMALL, **fields})


def test_larger_rings_are_simulated() -> None:
    rows = simulated(RingSettings(**SMALL))
    assert [row["ranks"] for row in rows if row["pattern"] == "longnet"] == list(SIMULATED)
    for row in rows:
        assert 0 < row["forward_received"] < row["full_ring_bytes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "1,x"], "--gpus must be integers with commas between them, got '1,x'"),
        (["--device", "cuda:1"], "--device must be one of cpu, cuda; got 'cuda:1'"),
        (["--device", "cuda", "--gpus", "64"], "--gpus asks for 64 CUDA devices, this machine has "),
        (["--gpus", "3"], "--strong-tokens must be a multiple"),
        (["--longest"], "--longest on a CPU needs --longest-limit"),
    ],
)
def test_what_cannot_be_scaled_is_refused(invoke: Invoke, arguments: list[str], said: str) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = invoke("bench", "--scaling", *device, *arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_two_real_ranks_are_measured(tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path)
    try:
        each = ranks.run(ring_figures, RingSettings(**{**SMALL, "sizes": (2,), "rounds": 1}).to_json(), timeout_s=120)
        refused = ranks.run(ring_refused, RingSettings(**{**SMALL, "sizes": (2,), "rounds": 1}).to_json())
    finally:
        ranks.close()
    assert all(said.startswith("longnet: off the float64 oracle by") and "no times" in said for said in refused)
    entry = {"size": 2, "errors": each[0]["errors"], "ranks": each}
    check_figures(entry, list(summarised([entry])))
    off = {**each[1], "weak": [{**each[1]["weak"][0], "planned_bytes": {}}, each[1]["weak"][1]]}
    rows = summarised([{**entry, "ranks": [each[0], off]}])
    assert [row["bytes_as_planned"] for row in rows] == [False, True, True, True]


def check_figures(entry: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert set(entry["errors"]) == {"longnet", "longnet, full ring", "local-global", "local-global, full ring"}
    assert all(error < 1e-5 for error in entry["errors"].values())
    assert [(row["way"], row["pattern"]) for row in rows] == [
        (way, pattern) for way in ("weak", "strong") for pattern in ("longnet", "local-global")
    ]
    for row in rows:
        assert row["bytes_as_planned"]
        assert row["received_bytes"] > 0
        assert 0 <= row["hidden_share"] <= 1
        assert row["peak_bytes"] > 0
        assert set(row["milliseconds"]) >= {"ring", "alone"}
        assert row["efficiency_in_a_row"] > 0


def test_the_text_explains_its_columns_and_has_no_empty_line_of_errors() -> None:
    figures: dict[str, Any] = {
        "tokens": 512, "backends": {"ring": "sdpa"}, "seconds": {"ring": 0.1}, "seconds_in_a_row": {"ring": 0.1},
        "rounds": 1, "peak_bytes": 1 << 20,
    }  # fmt: skip
    alone = {"size": 1, "errors": {}, "ranks": [{"weak": [figures] * 2, "strong": [figures] * 2}]}
    report: dict[str, Any] = {"sizes": [alone], "summary": list(summarised([alone])), "simulated": [], "longest": None}
    lines = text_of(report).splitlines()
    assert "errors against the float64 oracle  not measured: a rank alone exchanges nothing" in lines
    legend = [line for line in lines if line.startswith(("efficiency  ", "as planned  "))]
    assert len(legend) == 2
    assert all(f"{name}: " in " ".join(legend) for name in ("in a row", "to auto", "hidden", "planned"))
    measured = {**report, "sizes": [{**alone, "size": 2, "errors": {"longnet": 1e-6}}]}
    assert "errors against the float64 oracle  2 ranks, longnet: 1.0e-06" in text_of(measured).splitlines()


@pytest.mark.slow
def test_the_command_runs_ranks_of_its_own(tmp_path: Path) -> None:
    done = command(
        None, "bench", "--scaling", "--device", "cpu", "--gpus", "1,2", "--weak-tokens", "512",
        "--strong-tokens", "1024", "--rounds", "1", "--longest", "--longest-limit", "2048", "--output", str(tmp_path),
        "--json", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = as_json(done)
    check_figures(data["sizes"][1], [row for row in data["summary"] if row["ranks"] == 2])
    assert [row["tokens"] for row in data["longest"]["trained"]] == [1024, 2048]
    assert data["longest"]["ended_by"] == "the limit given"
    assert {path.name for path in tmp_path.iterdir()} == {"scaling.json", "scaling.png"}
