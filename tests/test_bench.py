"""`dilated-attention bench`: what it prints, writes and refuses; what is wrong gets no time."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention.bench import history, output
from dilated_attention.bench.cases import CASES, named_cases
from dilated_attention.bench.history import read_history
from dilated_attention.bench.measure import Settings, measure_case
from dilated_attention.bench.output import print_report, table_cells
from dilated_attention.bench.timing import difference, matrix_tflops, peak_bytes
from dilated_attention.errors import ConfigError

from .bench_kit import BLOCKS, TINY
from .conftest import Invoke
from .disk import room_for
from .distributions import ROOT, as_json, install_backend

KIT = "tests.bench_kit"


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (TINY, BLOCKS):
        monkeypatch.setitem(CASES, case.name, case)
    monkeypatch.chdir(ROOT)  # where --peer finds benchmarks and tests


def test_a_run_is_printed_saved_and_drawn(invoke: Invoke, tmp_path: Path) -> None:
    history, folder = tmp_path / "runs.jsonl", tmp_path / "made" / "out"
    peers = ("--peer", "benchmarks.torchscale_algorithm:official", "--peer", f"{KIT}:right", "--peer", f"{KIT}:none")
    done = invoke(
        "bench", "--case", "tiny", "--case", "bl*", "--rounds", "3", "--device", "cpu", *peers,
        "--save", str(history), "--output", str(folder), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = as_json(done)
    (kept,) = read_history(history)
    assert [json.loads(kept.to_json())[name] for name in ("results", "machine")] == [data["results"], data["machine"]]
    found = [(r.case, r.backend, r.phase) for r in kept.results]
    tiny = ["sdpa", "dense SDPA", "official algorithm", "right"]
    expected = [("tiny", name, phase) for name in tiny for phase in ("forward", "training")]
    expected += [
        ("blocks", name, phase) for name in ("sdpa", "dense SDPA", "right") for phase in ("forward", "training")
    ]
    assert found == expected
    for result in kept.results:
        assert result.rounds == 3
        assert result.error is not None
        assert result.error < 1e-5
        assert result.peer == (result.backend != "sdpa")
        assert result.peak_bytes is not None
        assert result.peak_bytes >= 4 * math.prod(TINY.shape)  # out, at least
        assert result.tflops is not None
        factor = 3.5 if result.phase == "training" else 1.0
        computed = 1e9 * result.tflops * result.median_ms / factor / (4 * 16)
        if (result.case, result.backend) == ("tiny", "dense SDPA"):
            assert computed == pytest.approx(4 * 256 * 257 / 2)
    assert data["auto"] == {
        "cases": 2, "measured": 2, "within_5_percent": 2, "slower_percent": {"tiny": 0.0, "blocks": 0.0}
    }  # fmt: skip
    assert [case["auto"]["slower_percent"] for case in data["cases"]] == [{"forward": 0.0, "training": 0.0}] * 2
    with (folder / "results.csv").open(encoding="utf-8") as file:
        assert [(row["case"], row["backend"], row["phase"]) for row in csv.DictReader(file)] == found
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == data["results"]
    assert (folder / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_is_plain_where_it_is_not_a_terminal(invoke: Invoke) -> None:
    done = invoke("bench", "--case", "tiny", "--rounds", "2", "--device", "cpu")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny: Dilated((64, 128, 256), (1, 2, 4), offsets='blocked'), 256 tokens")
    assert lines[1].split()[:3] == ["error", "fwd", "ms"]
    assert lines[2].split()[0] == "sdpa:"
    assert lines[4].strip().startswith("auto picks sdpa: aten flash for CPU; forward: 0.0% slower than the fastest")
    assert lines[-1] == "auto is within 5% of the fastest in 1 of 1 cases"
    assert "\x1b" not in done.stdout
    assert "refused by triton" in done.stderr


@pytest.mark.parametrize("width", [50, 200])
def test_a_terminal_gets_a_table_that_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    settings = Settings(device="cpu", rounds=2)
    report = measure_case(TINY, settings, floor_tflops=0.1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_report(report)
    printed = capsys.readouterr().out
    assert "\x1b[" in printed
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    lines = [line.rstrip() for line in plain.splitlines()]
    assert " ".join(plain.split()).startswith(str(report.case))
    header, *rows = table_cells(report)
    if width == 200:
        begin = lines.index(next(line for line in lines if line.split()[:1] == ["error"]))
        for row, line in zip([header, *rows], lines[begin:], strict=False):
            assert line.split() == " ".join(row).split()
    else:
        begin = lines.index(next(line for line in lines if line.split()[:1] == ["ms"]))
        for i, (name, error, *cells) in enumerate(rows):
            own = lines[begin + 1 + 3 * i : begin + 4 + 3 * i]
            assert own[0] == f"{name}, error {error}"
            assert [line.split() for line in own[1:]] == [["forward", *cells[:6]], ["f+b", *cells[6:]]]
            assert max(map(len, own)) <= 64
    assert "auto picks sdpa" in plain


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (
            "wrong",
            "FAILED tiny, wrong: dk is off the float64 oracle by 1.0e-02 at 64 tokens, allowed is 1e-05: no times",
        ),
        ("wrong_when_long", "FAILED tiny, wrong when long: differs from sdpa by 1.0e-02 at 256 tokens, allowed is"),
        ("failing", "FAILED tiny, failing: RuntimeError: "),
        ("raising", "FAILED tiny, raising: KeyError: 'tiny': no times"),
        ("failing_otherwise", "FAILED tiny, failing otherwise: TypeError: no tensors, please: no times"),
    ],
)
def test_what_is_wrong_gets_no_time(invoke: Invoke, peer: str, said: str) -> None:
    done = invoke("bench", "--case", "tiny", "--rounds", "1", "--device", "cpu", "--peer", f"{KIT}:{peer}", "--json")
    assert done.returncode == 1
    assert said in done.stderr
    assert {r["backend"] for r in as_json(done)["results"]} == {"sdpa", "dense SDPA"}


def test_a_wrong_backend_gets_no_time(tmp_path: Path, invoke_at: Invoke) -> None:
    code = """
        from dilated_attention.backends.aten import CpuFlash

        class Scaled(CpuFlash):
            name = "scaled"

            def forward(self, q, k, v, piece):
                out, lse = super().forward(q, k, v, piece)
                return out * 1.001, lse

        class Toy:
            def refusals(self, request):
                return []
            def pin(self, request):
                return "scaled"
            def build(self, request):
                return Scaled()
    """
    able: dict[str, Any] = {
        "device_types": ["cpu"], "dtypes": ["float32"], "head_dims": [16], "layouts": ["dense"], "causal": True,
        "backward": True, "lse": True,
    }  # fmt: skip
    install_backend(tmp_path, "wrong-one", backend="wrong", capabilities=able, code=code)
    done = invoke_at(tmp_path, "bench", "--case", "tiny", "--device", "cpu", "--rounds", "1", "--json")
    assert done.returncode == 1, done.stderr
    assert "FAILED tiny, wrong: dq is off the float64 oracle by" in done.stderr
    data = as_json(done)
    assert [r["backend"] for r in data["results"] if not r["peer"]] == ["sdpa", "sdpa"]
    auto = data["cases"][0]["auto"]
    assert (auto["backend"], auto["slower_percent"]) == ("wrong", {"forward": None, "training": None})


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--case", "longnet-4"], 2, "no case is called 'longnet-4' (did you mean 'longnet-4k'?)"),
        (["--case", "tiny", "--peer", "x"], 2, "--peer must be MODULE:ATTR, got 'x'"),
        (["--case", "tiny", "--peer", "no_such:x"], 2, "the module cannot be imported: No module named 'no_such'"),
        (["--case", "tiny", "--peer", f"{KIT}:TINY"], 2, "has no callable 'TINY'"),
        (
            ["--case", "tiny", "--peer", "operator:is_"],
            2,
            "must return a dilated_attention.bench.peers.Peer or None",
        ),
        (["--case", "tiny", "--load-library", "/no/such.so"], 2, "--load-library /no/such.so: "),
        (["--case", "tiny", "--device", "cuda:9"], 2, "cuda"),
        (["--case", "tiny", "--device", "meta"], 2, "--device must be cpu, cuda or cuda:INDEX, got 'meta'"),
        (["--case", "tiny", "--rounds", "0"], 2, "Invalid value for '--rounds'"),
        (["--case", "tiny", "--backend", "fa3"], 1, "tiny: fa3 refuses: device_types: needs cpu, has cuda"),
    ],
)
def test_what_cannot_be_is_refused(invoke: Invoke, arguments: list[str], status: int, said: str) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = invoke("bench", "--rounds", "1", *device, *arguments)
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr


@pytest.mark.parametrize("way", [["--case", "tiny"], ["--compare"]])
def test_a_misspelt_backend_is_told_before_anything_is_measured(invoke: Invoke, way: list[str]) -> None:
    done = invoke("bench", *way, "--device", "cpu", "--backend", "sdap:flash")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --backend must be one of auto, triton, ")
    assert done.stderr.endswith("; got 'sdap' (did you mean 'sdpa'?)\n")


@pytest.mark.parametrize("name", ["auto:kernel=flash", "sdpa:", "sdpa:=1"])
def test_a_backend_with_half_an_option_is_told_before_anything_is_measured(invoke: Invoke, name: str) -> None:
    done = invoke("bench", "--case", "tiny", "--device", "cpu", "--backend", name)
    said = f"error: --backend must be NAME, NAME:KERNEL, NAME:OPTION=VALUE or auto, got {name!r}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("command", [["demo"], ["bench"], ["bench", "--scaling", "--gpus", "1"]])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(
    tmp_path: Path, invoke: Invoke, command: list[str]
) -> None:
    (tmp_path / "file").touch()
    device = [] if command == ["demo"] else ["--device", "cpu"]
    done = invoke(*command, *device, "--output", str(tmp_path / "file" / "folder"))
    said = f"error: --output: cannot make the folder {str(tmp_path / 'file' / 'folder')!r}: Not a directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize(
    ("command", "name"),
    [(["demo"], "loss.png"), (["bench"], "results.csv"), (["bench", "--scaling", "--gpus", "1"], "scaling.png")],
)
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, invoke: Invoke, command: list[str], name: str
) -> None:
    (tmp_path / name).mkdir()
    device = [] if command == ["demo"] else ["--device", "cpu"]
    done = invoke(*command, *device, "--output", str(tmp_path))
    said = f"error: --output must be a file in a folder that exists, got {str(tmp_path / name)!r}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_disk_that_is_full_after_all_costs_no_measurement(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((history, "append_run"), (output, "write_files")):
        write = getattr(module, name)

        def without_room(*arguments: Any, write: Callable[..., None] = write) -> None:
            with room_for(0):
                write(*arguments)

        monkeypatch.setattr(module, name, without_room)
    asked = ("bench", "--case", "tiny", "--rounds", "1", "--device", "cpu", "--backend", "sdpa", "--json")
    for option, place in (("--save", tmp_path / "runs.jsonl"), ("--output", tmp_path / "out")):
        done = invoke(*asked, option, str(place))
        assert (done.returncode, "File too large" in done.stderr) == (2, True)
        assert {row["backend"] for row in json.loads(done.stdout)["results"]} == {"sdpa", "dense SDPA"}
    assert [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()] == [0]


def test_half_a_line_is_told_before_anything_is_measured(tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "runs.jsonl").write_text("{")
    done = invoke("bench", "--device", "cpu", "--case", "tiny", "--save", str(tmp_path / "runs.jsonl"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("runs.jsonl' ends in the middle of a line; mend or move it first\n")


def test_a_place_that_cannot_be_saved_to_is_refused_before_anything_is_measured(invoke: Invoke) -> None:
    done = invoke("bench", "--device", "cpu", "--case", "tiny", "--save", "/no/such/runs")
    assert (done.returncode, done.stderr) == (
        2,
        "error: cannot append to '/no/such/runs': No such file or directory\n",
    )


def test_charts_need_matplotlib(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke("bench", "--case", "tiny", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "charts need matplotlib, which is not installed: pip install 'dilated-attention[plot]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_cases_are_listed(invoke: Invoke) -> None:
    rows = as_json(invoke("bench", "--list", "--json"))
    assert {row["name"] for row in rows} == set(CASES)
    assert {row["name"] for row in rows if row["device"] == "cpu" and row["is_default"]} == {
        "longnet-4k", "random-4k", "local-global-4k"
    }  # fmt: skip
    lines = invoke("bench", "--list").stdout.splitlines()
    assert len(lines) == 1 + len(CASES)
    assert lines[0].split() == ["case", "on", "measured", "tokens", "heads", "dtype", "causal", "pattern"]
    assert lines[1].endswith("yes     Dilated((1024, 2048, 4096, 8192), (1, 2, 4, 8), offsets='blocked')")
    (near,) = (line for line in lines if line.startswith("local-global-4k"))
    assert near.endswith("Local((511, 0)) | Global(16)")
    assert " by default " in near
    assert [case.name for case in named_cases(["longnet-32k*"], "cuda")] == [
        "longnet-32k", "longnet-32k-full", "longnet-32k-d128", "longnet-32k-d128-full", "longnet-32k-d256"
    ]  # fmt: skip


def test_every_case_and_its_likeness_can_be_planned() -> None:
    for case in CASES.values():
        assert case.config("auto", device="cpu").seq_len == case.seq_len
        small = case.small()
        assert small.seq_len <= 1024
        small.config("auto", device="cpu")
    with pytest.raises(ConfigError, match="no case is called"):
        named_cases(["nothing-like-it"], "cpu")


def test_a_difference_of_nothing_finite_is_infinite() -> None:
    x = torch.randn(1, 40_000, 2)
    assert difference(x, x) == 0
    assert difference(x * 1.01, x) == pytest.approx(0.01, rel=1e-3)
    for value in (math.nan, math.inf):
        y = x.clone()
        y[0, -1, 0] = value
        assert difference(y, x) == math.inf
        assert difference(x, y) == math.inf
    assert difference(x, x[:, :-1]) == math.inf


def test_the_profiler_is_silent_and_others_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        torch.zeros(1 << 18)
        # As a build for CUDA says once a process where there is no GPU.
        os.write(2, b"ERROR:2026-11-29 11:12:43 1:1 DeviceProperties.cpp:56] gpuGetDeviceCount failed with code 35\n")
        os.write(2, b"a warning of the library\n")

    assert peak_bytes(call) == 1 << 20
    assert capfd.readouterr().err == "a warning of the library\n"


def test_the_floor_is_a_rate() -> None:
    assert 1e-3 < matrix_tflops(torch.float32, "cpu") < 100
