"""The file of runs: what goes in comes out, and what is not a run is refused with its line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytest

from dilated_attention.bench.history import (
    LIMIT_BYTES,
    Machine,
    Result,
    Run,
    append_run,
    check_appendable,
    read_history,
)
from dilated_attention.errors import ConfigError

from .disk import room_for

RESULT = Result(
    case="longnet-4k",
    backend="sdpa",
    kernel="aten flash for CPU",
    phase="forward",
    seq_len=4096,
    head_dim=64,
    dtype="float32",
    is_causal=True,
    rounds=7,
    median_ms=42.5,
    low_ms=42,
    high_ms=44.25,
    tflops=0.19,
    distinct_tflops=0.15,
    floor_share=0.8,
    peak_bytes=0,
    error=3e-7,
)
RUN = Run(
    when="2026-11-23T01:02:03Z",
    commit=None,
    modified=True,
    version="0.1.0",
    machine=Machine(device="cpu", name="Größe <b>", cores=2, threads=1),
    versions={"python": "3.11.7", "torch": "2.13.0+cpu"},
    floor_tflops=0.2,
    results=(RESULT, attrs.evolve(RESULT, backend="dense SDPA", phase="training", tflops=None, error=None, peer=True)),
)


def test_runs_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    later = attrs.evolve(RUN, when="2026-11-24T00:00:00Z", commit="b4ecdfa", results=())
    append_run(path, RUN)
    append_run(path, later)
    assert read_history(path) == [RUN, later]
    assert list(json.loads(path.read_text(encoding="utf-8").splitlines()[0])) == [
        "schema", "when", "commit", "modified", "version", "machine", "versions", "floor_tflops", "results",
    ]  # fmt: skip
    path.write_text(path.read_text(encoding="utf-8") + "\n  \n", encoding="utf-8")
    assert len(read_history(path)) == 2


def changed(**fields: Any) -> dict[str, Any]:
    """The run as JSON gives it, some fields of its first result replaced, or left out where they are `...`."""
    run: dict[str, Any] = json.loads(RUN.to_json())
    run["results"][0] |= fields
    run["results"][0] = {name: value for name, value in run["results"][0].items() if value is not ...}
    return run


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"median_ms": -1.0}, "Result.median_ms must be a finite number above 0, got -1.0"),
        ({"median_ms": 0}, "Result.median_ms must be a finite number above 0, got 0"),
        ({"median_ms": "42"}, "Result.median_ms must be a finite number above 0, got '42'"),
        ({"median_ms": True}, "Result.median_ms must be a finite number above 0, got True"),
        ({"high_ms": 10**400}, "Result.high_ms must be a finite number above 0, got 1000"),
        ({"median_ms": 50.0}, "must lie between low_ms and high_ms, got 50.0 beside 42 and 44.25"),
        ({"tflops": -0.5}, "Result.tflops must be a finite number, not negative, got -0.5"),
        ({"peak_bytes": 1.5}, "Result.peak_bytes must be an integer from 0"),
        ({"peak_bytes": 1 << 63}, "Result.peak_bytes must be an integer from 0"),
        ({"seq_len": 0}, "Result.seq_len must be an integer from 1"),
        ({"phase": "backward"}, "Result.phase must be one of forward, training, got 'backward'"),
        ({"case": ["x"]}, "Result.case must be text"),
        ({"peer": 1}, "Result.peer must be true or false, got 1"),
        ({"case": ...}, "Result needs case"),
        ({"medain_ms": 1.0}, "Result has no 'medain_ms' (did you mean 'median_ms'?)"),
    ],
)
def test_a_wrong_result_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, RUN)
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(changed(**fields)) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^line 2 of '.*runs\.jsonl'") as caught:
        read_history(path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[1]", "is no JSON object but a list"),
        (b"{}", "must be of schema 1, which is what this release reads; it has none"),
        (b'{"schema": 2}', "it has 2"),
        (b'{"schema": true}', "it has True"),
        (b'{"schema": 1.0}', "it has 1.0"),
        (b'{"schema": 1}', "the run needs when, commit"),
        (b'{"schema": 1, "when": NaN}', "NaN is no number of JSON"),
        (b'{"a":' * 100_000, "is no JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is no JSON"),
        (RUN.to_json().replace("42.5", "1e999").encode(), "Result.median_ms must be a finite number"),
        (RUN.to_json().replace("T01:02:03Z", "").encode(), "Run.when must be a time in UTC"),
        (RUN.to_json().replace("03Z", "03+01:00").encode(), "Run.when must be a time in UTC"),
        (RUN.to_json().replace('"3.11.7"', "3").encode(), "Run.versions must be a mapping of names to versions"),
        (RUN.to_json().replace('"cpu"', '"abacus"').encode(), "Machine.device must be one of cpu, cuda"),
        (json.dumps({**json.loads(RUN.to_json()), "results": 3}).encode(), "the run: "),
        (json.dumps({**json.loads(RUN.to_json()), "machine": None}).encode(), "must be a mapping of names to values"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(ConfigError, match=r"^line 2 of ") as caught:
        read_history(path)
    assert said in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the history '.*none': No such file"):
        read_history(tmp_path / "none")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_history(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot append to .*No such file"):
        append_run(tmp_path / "none" / "runs.jsonl", RUN)


def test_whether_a_run_can_be_appended_is_known_before_it(tmp_path: Path) -> None:
    check_appendable(tmp_path / "runs.jsonl")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs.jsonl").write_text("kept\n", encoding="utf-8")
    check_appendable(tmp_path / "runs.jsonl")
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8") == "kept\n"
    for place in (tmp_path, tmp_path / "none" / "runs.jsonl"):
        with pytest.raises(ConfigError, match="cannot append to"):
            check_appendable(place)


def test_a_file_beyond_the_limit_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with path.open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    before = time.perf_counter()
    with pytest.raises(ConfigError, match="larger than 67,108,864 bytes"):
        read_history(path)
    assert time.perf_counter() - before < 2
    with path.open("wb") as file:
        file.truncate(LIMIT_BYTES)
    with pytest.raises(ConfigError, match="would outgrow the 67,108,864"):
        append_run(path, RUN)
    with pytest.raises(ConfigError, match="larger than 67,108,864 bytes"):
        read_history("/dev/zero")


def test_half_a_line_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"schema": 1, "when"', encoding="utf-8")
    with pytest.raises(ConfigError, match="ends in the middle of a line"):
        append_run(path, RUN)
    assert path.read_text(encoding="utf-8") == '{"schema": 1, "when"'


def test_a_run_that_has_no_room_leaves_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, RUN)
    size = path.stat().st_size
    for room in (0, 1, 40):
        with room_for(size + room), pytest.raises(ConfigError, match=r"cannot append to '.*runs\.jsonl': "):
            append_run(path, RUN)
        assert read_history(path) == [RUN]
    append_run(path, RUN)
    assert read_history(path) == [RUN, RUN]


def test_reading_needs_no_torch() -> None:
    code = "import sys, dilated_attention.bench.history; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
