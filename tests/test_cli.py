"""The command line as a user meets it: text, JSON, exit status, one clear message for an error."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from dilated_attention import AttentionPlan
from dilated_attention.backends.cards import OLDEST, PROVEN
from dilated_attention.report import progress_bar

from .conftest import Invoke
from .distributions import ROOT, as_json, command, install_backend, run

CaptureFixture = pytest.CaptureFixture[str]
LONGNET = ("--heads", "8", "--head-dim", "64", "--segment-lengths", "1024,2048", "--dilation-rates", "1,2")


def test_explain_prints_the_plan_of_the_flags(invoke: Invoke) -> None:
    done = invoke("explain", *LONGNET, "--causal", "--seq-len", "16384", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sdpa (aten flash for CPU) chosen")
    assert "causal dilated attention over 16,384 tokens: 8 heads, head_dim 64, float32 on cpu" in lines[1]
    assert "\x1b" not in done.stdout
    assert "several lengths" not in done.stdout
    assert "sequences of several lengths" in invoke("explain", *LONGNET, "--varlen", "--device", "cpu").stdout
    plan = AttentionPlan.from_json(invoke("explain", *LONGNET, "--causal", "--no-grad", "--json").stdout)
    assert plan.config["pattern"]["segment_lengths"] == [1024, 2048]
    assert plan.config["is_causal"]
    assert not plan.config["requires_grad"]


def test_flags_are_understood_by_the_names_of_fields_too(invoke: Invoke) -> None:
    flags = ("--num-heads", "4", "--num-kv-heads=2", "--head-dim", "8", "--is-causal", "--no-requires-grad")
    fields = as_json(invoke("explain", *flags, "--dropout-p", "0.1", "--json"))["config"]
    assert (fields["num_heads"], fields["num_kv_heads"], fields["dropout_p"]) == (4, 2, 0.1)
    assert (fields["is_causal"], fields["requires_grad"]) == (True, False)
    assert not as_json(invoke("explain", *flags, "--no-is-causal", "--json"))["config"]["is_causal"]
    said = invoke("explain", "--help").stdout
    assert "--heads" in said
    assert "--num-heads" not in said


def test_the_layout_is_told_briefly_at_any_length(invoke: Invoke) -> None:
    shape = ("explain", "--heads", "8", "--head-dim", "64", "--device", "cpu", "--seq-len")
    assert "% of all pairs, 2.1 EFLOP forward, 152 B of tables" in invoke(*shape, "32000000").stdout
    overlapping = invoke(*shape, "4096", "--segment-lengths", "1024,2048", "--dilation-rates", "1,2").stdout
    assert " GFLOP in distinct pairs, " in overlapping
    assert "see no key" not in overlapping
    swapped = invoke(*shape, "4096", "--segment-lengths", "1,2", "--dilation-rates", "1024,2048").stdout
    assert "          81.25% of the queries of all heads see no key: out is 0 there" in swapped.splitlines()


def test_what_is_made_of_patterns_is_named_by_its_members(invoke: Invoke) -> None:
    def first(pattern: str) -> str:
        kind, of = pattern.split(" ", 1)
        shape = ("--heads", "8", "--head-dim", "64", "--device", "cpu")
        return invoke("explain", *shape, "--pattern", kind, "-P", f"of={of}").stdout.splitlines()[1]

    near, few = '{kind = "local", window_size = 8}', '{kind = "global", tokens = 4}'
    assert "for     local | global attention: 8 heads" in first(f"union [{near}, {few}]")
    inner = f'{{kind = "union", of = [{near}, {few}]}}'
    assert "for     (local | global) + full attention: 8 heads" in first(f'sum [{inner}, {{kind = "full"}}]')


def test_flags_replace_what_the_file_says(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('num_heads = 4\nhead_dim = 32\nis_causal = true\npattern = {kind = "local", window_size = 8}\n')
    plan = as_json(invoke("explain", str(path), "--dtype", "bfloat16", "-P", "window_size=[4, 0]", "--json"))
    assert plan["config"]["pattern"] == {"kind": "local", "window_size": [4, 0]}
    assert (plan["config"]["dtype"], plan["config"]["is_causal"]) == ("bfloat16", True)
    plan = as_json(invoke("explain", str(path), "--no-causal", "--pattern", "full", "--json"))
    assert (plan["config"]["pattern"], plan["config"]["is_causal"]) == ({"kind": "full"}, False)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["explain"], 2, "error: give a config file, or at least --heads and --head-dim"),
        (["explain", ""], 2, "Invalid value for 'config': must be the name of a file or folder, got ''"),
        (
            ["pattern", "show", "near", "--plot", ""],
            2,
            "Invalid value for '--plot': must be the name of a file or folder,",
        ),
        (["explain", *LONGNET, "--backend", "SDPA"], 2, "unknown backend 'SDPA' (did you mean 'sdpa'?)"),
        (["explain", "no.toml"], 2, "error: cannot read the config file 'no.toml'"),
        (["explain", "--heads", "8"], 2, "at least --heads and --head-dim"),
        (["explain", "--heads", "x", "--head-dim", "8"], 2, "Invalid value for '--heads': "),
        (["explain", "--heads", "8", "--head-dim", "6x4"], 2, "'6x4'"),
        (["explain", *LONGNET, "--dropout", "half"], 2, "'half'"),
        (["pattern", "show", "near", "--layers", "0x"], 2, "'0x'"),
        (["bench", "--rounds", "-3"], 2, "-3"),
        (["explain", *LONGNET, "--dtype", "bf16"], 2, "error: dtype must be one of"),
        (["explain", *LONGNET, "--pattern", "dilatd"], 2, "did you mean 'dilated'"),
        (["explain", *LONGNET, "--pattern", ""], 2, "unknown pattern ''"),
        (["explain", *LONGNET, "-P", "offset=blocked"], 2, "did you mean 'offsets'"),
        (["explain", *LONGNET, "-P", "offsets"], 2, "must be name=value, got 'offsets'"),
        (["explain", *LONGNET[:5], "10,x"], 2, "--segment-lengths must be integers with commas between them"),
        (["explain", *LONGNET[:4], "-P", "window_size=3"], 2, "--pattern must name the pattern"),
        (["explain", *LONGNET, "--batch", "4"], 2, "error: --batch is for --ranks"),
        (["explain", *LONGNET, "--ranks", "4"], 2, "error: --ranks 4 needs --seq-len"),
        (["explain", *LONGNET, "--seq-len", "1" + "0" * 23], 2, "seq_len must be at most 1,099,511,627,776, got 100,"),
        (["explain", *LONGNET, "-P", "heads=all", "-P", "heads=split"], 2, "--pattern-option heads is given twice"),
        (["conformance", "math", "--option", "x"], 2, "error: --option must be name=value, got 'x'"),
        (["conformance", "math", "--option", "a=b"], 2, "error: backend_options['math'] has no 'a'"),
        (["conformance", "math", "-o", "a=1", "-o", "a=2"], 2, "error: --option a is given twice; give it once"),
        (["explain", *LONGNET, "-P", "dilation_rates=[1]"], 2, "given as --dilation-rates and as --pattern-option"),
        (["explain", *LONGNET, "--device", "gpu"], 2, "torch knows no device 'gpu' (did you mean 'cuda'?)"),
        (["explain", *LONGNET[:2], "--head-dim", "1" + "0" * 400, "--seq-len", "128"], 2, "head_dim must be at most"),
        (["explain", *LONGNET[:4], "--pattern", "local", "-P", "window_size=" + "1" * 5001], 2, "got '1111"),
        (["explain", *LONGNET[:4], "--pattern", "union", "-P", "of=" + "[" * 5001], 2, "values are TOML: 0.1, [8, 0]"),
        (["explain", *LONGNET[:4], "--pattern", "random", "-P", "density=.1"], 2, "TOML: 0.1, [8, 0]; got '.1': "),
        (["explain", *LONGNET[:4], "--pattern", "local", "-P", "window_size=8,0"], 2, "TOML: 0.1, [8, 0]; got '8,0'"),
        (["conformance", "math", "-p", '{kind = "local", window_size = ' + "[" * 5001], 2, "must be a TOML table"),
        (["conformance", "math", "-p", "{window_size = " + "1" * 5001 + "}"], 2, "must be a TOML table"),
        (["explian"], 2, "No such command 'explian'"),
        (["backends", "--jsn"], 2, "No such option"),
    ],
)
def test_bad_usage_is_one_message_on_stderr(invoke: Invoke, arguments: list[str], status: int, said: str) -> None:
    done = invoke(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr


@pytest.mark.parametrize("size", ["4", "[]", '"2"'])
def test_ranks_of_a_file_must_be_a_table(invoke: Invoke, tmp_path: Path, size: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(f'{{"num_heads": 2, "head_dim": 8, "seq_len": 64, "context_parallel": {size}}}')
    done = invoke("explain", str(file), "--ranks", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "context_parallel must be a table such as {size = 2}, got " in done.stderr


def test_an_error_shows_no_traceback() -> None:
    done = command(None, "explain", *LONGNET, "--dtype", "bf16")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: dtype must be one of float64,")
    assert len(done.stderr.splitlines()) == 1


def test_no_backend_that_fits_is_status_3_with_the_table(invoke: Invoke) -> None:
    asked = ("explain", *LONGNET, "--head-dim", "300", "--backend", "sdpa")
    done = invoke(*asked)
    assert done.returncode == 3
    assert "head_dims: needs head_dim=300, has 1..256" in done.stdout
    assert "-> would be usable with head_dim=256" in done.stdout
    assert as_json(invoke(*asked, "--json"))["backend"] is None


def test_doctor_names_versions_devices_and_what_is_missing(tmp_path: Path, invoke_at: Invoke) -> None:
    manifest = """
    from dilated_attention.registry import BackendSpec, hookimpl
    @hookimpl
    def dilated_attention_backends():
        return [BackendSpec(name="fa9", target="a:b", capabilities={}, requires=["flash-attn-9>=1", "attrs"])]
    """
    install_backend(tmp_path, "needy", backend="needy", extra="")
    (tmp_path / "needy.py").write_text("\n".join(line[4:] for line in manifest.splitlines()))
    data = as_json(invoke_at(tmp_path, "doctor", "--json"))
    assert data["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert data["versions"]["torch"]
    assert data["devices"][-1]["type"] == "cpu"
    found = {entry["requirement"]: entry for entry in data["libraries"]}
    assert found.keys() >= {"flash-attn-4==4.0.0b36", "xformers>=0.0.34"}
    missing, met = found["flash-attn-9>=1"], found["attrs"]
    assert (missing["requirement"], missing["met"], missing["install"]) == (
        "flash-attn-9>=1",
        False,
        "pip install 'flash-attn-9>=1'",
    )
    assert (met["requirement"], met["met"]) == ("attrs", True)
    text = invoke_at(tmp_path, "doctor").stdout
    assert "flash-attn-9>=1 for fa9: missing (no flash-attn-9 installed): pip install 'flash-attn-9>=1'" in text


def test_doctor_survives_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['doctor']\n"
        "from dilated_attention.cli import main\nmain()"
    )
    done = run(None, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be used: OSError: libcudart.so.99" in done.stdout


def test_backends_says_on_which_cards_ours_run(invoke: Invoke) -> None:
    triton = next(part for part in invoke("backends").stdout.split("\n\n") if part.startswith("triton"))
    assert "unproven_card: without it on Hopper (sm_90) alone; true: on any card from sm_80 on" in triton
    assert (PROVEN, OLDEST) == ("sm_90", (8, 0))


@pytest.mark.parametrize("arguments", [["backends"], ["plugins"], ["doctor"], ["explain", *LONGNET]])
def test_json_and_text_go_to_stdout_and_nothing_to_stderr(invoke: Invoke, arguments: list[str]) -> None:
    done = invoke(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)


def test_help_and_version() -> None:
    done = command(None, "--help")
    assert done.returncode == 0
    for name in ("backends", "plugins", "doctor", "explain", "demo", "pattern"):
        assert f"\n  {name} " in done.stdout
    commands = done.stdout.partition("Commands:")[2]
    assert "..." not in commands
    assert commands.split()[0] == "demo"  # what a newcomer tries first
    assert "Exit status: 0 done; 1 a check" in done.stdout
    assert command(None, "--version").stdout.strip() == "0.1.0"


def test_a_terminal_gets_colour_and_whole_lines() -> None:
    here, sub = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dilated_attention", "explain", *LONGNET, "--dropout", "0.1"],
        stdout=sub,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm-256color", "COLUMNS": "40"},
    )
    os.close(sub)
    printed = b""
    try:
        while chunk := os.read(here, 4096):
            printed += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(here)
    assert process.wait(timeout=60) == 0
    lines = printed.decode().splitlines()
    assert any(line.startswith("reference\x1b") or "\x1b[32m" in line for line in lines)
    assert "    dropout: needs dropout_p=0.1, has none declared" in lines


def test_a_bar_counts_only_what_somebody_counts(monkeypatch: pytest.MonkeyPatch, capsys: CaptureFixture) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes the captured stderr for a terminal then
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with progress_bar("planning") as advance:
        advance(3, 7)
    assert capsys.readouterr().err == ""  # and we do not
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("planning"):
        pass
    assert "planning" in (alone := capsys.readouterr().err)
    assert "?" not in alone.replace("\x1b[?25", "")  # but for the codes that hide the cursor
    with progress_bar("checks") as advance:
        advance(3, 7)
    assert "3/7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "closed"),
    [
        (["plugins"], 1),
        (["plugins"], 2),
        (["explain", *LONGNET], 1),
        pytest.param(["explain", *LONGNET], 2, marks=pytest.mark.slow),
    ],
)
def test_a_closed_stdout_is_no_traceback(arguments: list[str], closed: int) -> None:
    command = [sys.executable, "-m", "dilated_attention", *arguments]
    done = run(None, "-c", f"import os, sys; os.close({closed}); os.execv(sys.executable, {command!r})")
    assert (done.returncode, done.stdout == "", done.stderr) == (0, closed == 1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["plugins"], pytest.param(["bench", "--list"], marks=pytest.mark.slow), ["--version"]]
)
def test_a_full_disk_is_one_message(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dilated_attention", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")
