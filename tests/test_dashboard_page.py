"""The dashboard's page: every value escaped, nothing fetched, what cannot be shown refused, hostile files cheap."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import attrs
import pytest

from dilated_attention import Dilated, preflight
from dilated_attention.cli import main
from dilated_attention.dashboard import (
    HISTORY_BYTES,
    HISTORY_RESULTS,
    HISTORY_RUNS,
    check_can_render,
    make_page,
    read_runs,
)
from dilated_attention.errors import ConfigError

from .conftest import Invoke
from .dashboard_kit import HOSTILE, Page, history, result, run_of, write
from .disk import room_for
from .distributions import ROOT, as_json

CONFIG = """
num_heads = 2
head_dim = 16
seq_len = 1000
is_causal = true
pattern = {kind = "dilated", segment_lengths = [64, 256], dilation_rates = [1, 4]}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    """The page of a small configuration with its ring, a history and counters."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "a.toml").write_text(CONFIG + "context_parallel = {size = 2}\n")
    write(folder / "runs.jsonl", history(40))
    costs = preflight(
        num_heads=2, head_dim=16, seq_len=1000, is_causal=True, pattern=Dilated((64, 256), (1, 4)), ranks=2, batch=3
    )
    ran = {
        "plan": "0123456789abcdef",
        "backend": "sdpa",
        "forward": {
            "calls": 4,
            "tokens": 4 * 3 * 500,
            "flops": 12_345_678,
            "received_bytes": 4 * costs.loads[1].forward_received,
            "sent_bytes": 4,
        },
        "backward": {"calls": 2, "received_bytes": 2 * costs.loads[1].backward_received, "sent_bytes": 0},
        "layouts": {"hits": 7, "nbytes": 2048, "lowering_s": 0.25},
    }
    (folder / "ran.json").write_text(json.dumps(ran))
    files = ["--history", "runs.jsonl", "--counters", "ran.json", "--config", "a.toml", "--out", "page.html"]
    with (
        pytest.MonkeyPatch.context() as patched,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["dilated-attention", "dashboard", *files, "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert (stopped.value.code, err.getvalue()) == (0, "")
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {"a.toml", "runs.jsonl", "ran.json", "page.html"}
    return Page(text), json.loads(out.getvalue()) | {"text": text, "received": costs.loads[1].forward_received}


def test_the_page_is_whole_and_fetches_nothing(page: tuple[Page, dict[str, Any]]) -> None:
    found, data = page
    assert (data["runs"], data["backend"]) == (40, "sdpa")
    assert data["nbytes"] == len(data["text"].encode()) < 5_000_000
    titles = [
        "Plan of this machine",
        "Speed, against the floor and against peers",
        "History",
        "Memory",
        "Bytes on the wire",
        "Patterns",
        "Counters of a run",
    ]
    assert found.texts("h2") == titles
    assert not [e for e in found.elements if "src" in e.attributes]
    assert [e.attributes["href"] for e in found.all("link")] == ["data:,"]
    assert all((e.attributes["href"] or "").startswith("#") for e in found.all("a"))
    targets = {e.attributes["id"] for e in found.elements if "id" in e.attributes}
    assert {(e.attributes["href"] or "")[1:] for e in found.all("a")} <= targets


def test_the_policy_names_the_scripts_of_the_page(page: tuple[Page, dict[str, Any]]) -> None:
    found, _ = page
    policy = next(e.attributes["content"] for e in found.all("meta") if "http-equiv" in e.attributes) or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    held, library, own = (e.text for e in found.all("script"))
    assert [e.attributes.get("type") for e in found.all("script")] == ["application/json", "text/plain", None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (library, own)]
    assert re.findall(r"'sha256-([^']*)'", policy) == hashes
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert "unsafe-eval" not in policy
    assert json.loads(held).keys() == {"history", "ringChart", "pictures"}
    assert "<" not in held


def test_the_page_says_what_was_measured(page: tuple[Page, dict[str, Any]]) -> None:
    found, data = page
    cells = found.texts("td")
    assert "▲ slower, 1 run ago" in found.texts("span")
    assert found.texts("strong")[2] == "▲ 2 slower"
    assert "not simulated: a sequence of 1,000 tokens cannot be cut into 16 equal shards" in data["text"]
    assert f"{data['received']:,} B" in cells
    assert "✓ exactly" in found.texts("span")
    assert "✕ of no rank" in found.texts("span")
    assert {"2.05 kB", "12.3 MFLOP", "0.25 s"} <= {*found.texts("span")}
    captions = [text for text in found.texts("caption") if text]
    assert captions[0] == "Every backend, and why it is not used"
    assert len(found.all("svg")) > len([e for e in found.all("svg") if e.attributes.get("tabindex") == "0"]) == 9
    shown = json.loads(found.texts("script")[0])["history"]
    series = shown[0]["series"][0]
    assert len(series["ms"]) == len(series["x"]) == series["runs"] == 40


def test_without_files_the_page_says_how_to_make_them(tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "page.html"
    data = as_json(invoke("dashboard", "--no-machine", "--out", str(out), "--json"))
    text = out.read_text(encoding="utf-8")
    assert (data["runs"], data["backend"], data["nbytes"]) == (None, None, out.stat().st_size)
    assert "dilated-attention bench --save runs.jsonl" in text
    assert len(text) < 100_000  # nothing to draw, so no library
    assert Page(text).texts("h2")[0] == "Speed, against the floor and against peers"


def test_hostile_names_stay_text(tmp_path: Path, invoke: Invoke) -> None:
    ways = [
        result(case=text, backend=text, kernel=text, dtype=text, median_ms=100 + i) for i, text in enumerate(HOSTILE)
    ]
    machine = type(run_of(0, ()).machine)(device="cuda", name=HOSTILE[1], cores=1, threads=1)
    runs = [run_of(i, ways, machine=machine, commit=HOSTILE[0], versions={HOSTILE[2]: HOSTILE[1]}) for i in range(3)]
    (tmp_path / "ran.json").write_text(json.dumps({text: {text: text, "n_bytes": 1} for text in HOSTILE}))
    out, log = tmp_path / "page.html", write(tmp_path / "runs.jsonl", runs)
    done = invoke(
        "dashboard", "--no-machine", "--history", str(log), "--counters", str(tmp_path / "ran.json"), "--out", str(out)
    )
    assert done.returncode == 0
    text = out.read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.all("script")) == 3
    assert not found.all("img")
    assert not [name for e in found.elements for name in e.attributes if name.startswith("on")]
    assert HOSTILE[0] in found.texts("td")
    assert HOSTILE[5] in found.texts("td")
    assert max(len(cell) for cell in found.texts("td")) < 300
    names = {series["name"] for group in json.loads(found.texts("script")[0])["history"] for series in group["series"]}
    assert {*HOSTILE[:7]} <= names


def test_numbers_beyond_any_axis_are_in_the_tables_only(tmp_path: Path, invoke: Invoke) -> None:
    huge = result(
        median_ms=1e308, low_ms=1e-300, high_ms=1.7e308, tflops=1e300, floor_share=1e300, peak_bytes=2**63 - 1
    )
    log = write(tmp_path / "runs.jsonl", [run_of(0, [huge, result(backend="b")])])
    out = tmp_path / "page.html"
    assert invoke("dashboard", "--no-machine", "--history", str(log), "--out", str(out)).returncode == 0
    found = Page(out.read_text(encoding="utf-8"))
    assert "1e+308 ms" in found.texts("td")
    assert "1 case on its machine" in found.texts("span")
    (group,) = json.loads(found.texts("script")[0])["history"]
    series = next(series for series in group["series"] if series["name"] == "sdpa")
    assert [series[name] for name in ("ms", "low", "high", "tflops", "floor", "memory")] == [[None]] * 6


def test_what_cannot_be_done_is_one_clear_message(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write(tmp_path / "runs.jsonl", history(1))
    for arguments, said in (
        (["--history", str(tmp_path / "none")], "cannot read the history"),
        (["--counters", str(tmp_path / "none")], "cannot read the counters"),
        (["--history", str(log), "--out", str(tmp_path)], "--out must be a file in a folder that exists"),
        (["--out", str(tmp_path / "no" / "page.html")], "--out must be a file in a folder that exists"),
        (["--config", "a.toml", "--no-machine"], "--config is what --machine plans"),
    ):
        done = invoke("dashboard", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bokeh" else found(name))
    with pytest.raises(ConfigError, match=r"needs bokeh: pip install 'dilated-attention\[dashboard\]'"):
        check_can_render(tmp_path / "page.html")


def test_the_page_takes_the_place_of_nothing_else(tmp_path: Path, invoke: Invoke) -> None:
    log = write(tmp_path / "runs.jsonl", history(1))
    config, counters, pipe = (tmp_path / name for name in ("a.json", "ran.json", "pipe"))
    config.write_text("{}")
    counters.write_text("{}")
    os.mkfifo(pipe)
    (tmp_path / "log").symlink_to(log)

    def found() -> dict[str, tuple[int, int, int]]:
        status = {path.name: path.lstat() for path in tmp_path.iterdir()}
        return {name: (each.st_ino, each.st_mode, each.st_size) for name, each in status.items()}

    before = found()
    read = ["--history", str(log), "--counters", str(counters), "--config", str(config)]
    for out, said in (
        (log, "--out must be another file than"),
        (tmp_path / "log", "--out must be another file than"),
        (counters, "--out must be another file than"),
        (config, "--out must be another file than"),
        (pipe, "is there and is no regular one"),
        (Path(os.devnull), "is there and is no regular one"),
        (Path("/proc/page.html"), "--out: cannot write to '/proc'"),
    ):
        done = invoke("dashboard", *read, "--out", str(out))
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    assert found() == before


def test_the_page_is_a_file_like_any_other(tmp_path: Path, invoke: Invoke) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(page)
    before = os.umask(0o027)
    try:
        assert invoke("dashboard", "--no-machine", "--out", str(link)).returncode == 0
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert page.stat().st_mode & 0o777 == 0o640
    page.chmod(0o600)
    content = page.read_bytes()
    with room_for(1000):
        done = invoke("dashboard", "--no-machine", "--out", str(link))
    assert (done.returncode, "File too large" in done.stderr) == (2, True)
    assert page.read_bytes() == content
    assert invoke("dashboard", "--no-machine", "--out", str(link)).returncode == 0
    assert page.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "link.html"}


def test_nothing_is_left_of_a_page_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_page(tmp_path / "page.html", history=None, counters=None, config=None, registry=None)
    assert not list(tmp_path.iterdir())


def test_a_history_larger_than_a_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    for content, said in (
        (b"x" * (HISTORY_BYTES + 1), "more than the 5,242,880 bytes"),
        (b"\n" * (HISTORY_RUNS + 1), "more than the 2,000 runs"),
        (b'"median_ms"' * (HISTORY_RESULTS + 1), "more than the 11,000 results"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{said} that a page shows; give it the newest runs: tail -n 100 "):
            read_runs(path)
    with pytest.raises(ConfigError, match="5,242,880 bytes"):
        read_runs(Path("/dev/zero"))


# A child's peak is at first that of the process that started it, so a small one starts it.
LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done.returncode, done.stdout + done.stderr]))
"""


def cost(folder: Path, log: Path) -> tuple[float, float, int, str]:
    """Seconds of processor time, peak MiB, exit status and words of a process that makes the page of `log`."""
    command = ["-m", "dilated_attention", "dashboard", "--no-machine", "--history", str(log), "--out", "page.html"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, sys.executable, *command],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, megabytes, status, said = json.loads(done.stdout)
    return seconds, megabytes, status, said


def hostile_lines(name: str) -> list[str]:
    """A file that is as dear as one within the limits can be, or that breaks them."""
    plain = run_of(0, [result()]).to_json()
    bare = result(tflops=None, floor_share=None, peak_bytes=None, error=None, kernel="")
    return {
        "many runs": lambda: [plain] * HISTORY_RUNS,
        "many cases": lambda: [run_of(0, [attrs.evolve(bare, case=f"c{i}") for i in range(HISTORY_RESULTS)]).to_json()],
        "one long name": lambda: [run_of(0, [result(case=HOSTILE[0] * 100_000)]).to_json()],
        "half a line": lambda: [plain] * 1000 + [plain[:100]],
        "100 MB": lambda: ["x" * 104_857_600],
    }[name]()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in KiB on Linux only")
@pytest.mark.parametrize(("name", "status"), [("half a line", 2), ("100 MB", 2), ("many cases", 0)])
def test_a_hostile_file_is_cheap(tmp_path: Path, name: str, status: int) -> None:
    log, plain = tmp_path / "runs.jsonl", write(tmp_path / "plain.jsonl", history(1))
    log.write_text("\n".join(hostile_lines(name)), encoding="utf-8")
    seconds, megabytes, found, said = cost(tmp_path, log)
    assert found == status, said
    assert said.startswith("error: " if status else "page.html: ")
    assert megabytes < 300
    # What others do on this machine slows this too, so a page that is made is compared with one of a single run.
    assert seconds < (2 if status else cost(tmp_path, plain)[0] + 1.5)


# To import Bokeh takes longer than all the rest of a page.
WITHOUT_BOKEH = """
import sys
from pathlib import Path
from dilated_attention.dashboard import make_page

make_page(Path(sys.argv[1]), history=Path(sys.argv[2]), counters=None, config=None, registry=None)
print(sorted({"bokeh", "numpy", "torch"} & sys.modules.keys()))
"""


def test_a_page_of_files_imports_no_library_but_its_templates(tmp_path: Path) -> None:
    log = write(tmp_path / "runs.jsonl", history(2))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BOKEH, str(tmp_path / "page.html"), str(log)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"
    assert "Bokeh" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in KiB on Linux only")
@pytest.mark.parametrize("name", ["many runs", "many cases", "one long name"])
def test_a_page_of_a_hostile_file_takes_two_seconds_at_most(tmp_path: Path, name: str) -> None:
    log = tmp_path / "runs.jsonl"
    log.write_text("\n".join(hostile_lines(name)), encoding="utf-8")
    found = [cost(tmp_path, log) for _ in range(5)]
    assert {status for _, _, status, _ in found} == {0}
    assert min(seconds for seconds, *_ in found) < 2
    assert max(megabytes for _, megabytes, *_ in found) < 300
