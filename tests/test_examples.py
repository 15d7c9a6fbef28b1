"""The examples, run as their users run them."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--seq-len", "64", "--batch", "2", "--layers", "1", "--width", "32", "--heads", "4", "--warm-up", "1"]


def load_example(name: str) -> ModuleType:
    """The script as a module; its commands then run in this process, which has torch already."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(app: typer.Typer, *arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_longnet_lm_resumes_exactly(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(f"{i} bottles of beer on the wall\n".encode() for i in range(200)))
    app = load_example("longnet_lm").app
    train: list[str | Path] = ["train", text, *TINY, "--device", "cpu"]
    whole = run(app, *train, "--output", tmp_path / "whole", "--steps", "30", "--save-every", "30")
    run(app, *train, "--output", tmp_path / "parts", "--steps", "17")
    resumed = run(app, *train, "--output", tmp_path / "parts", "--steps", "30")
    assert "resumed at step 17" in resumed
    losses = [float(x) for x in re.findall(r"held out ([\d.]+)", whole + resumed)]
    assert losses[0] == losses[1] < 6
    for name in ("model", "training"):
        one, two = (
            load_file(tmp_path / run_name / "checkpoint" / f"{name}.safetensors") for run_name in ("whole", "parts")
        )
        assert one.keys() == two.keys()
        assert all(bool((one[key] == two[key]).all()) for key in one)
    assert len(run(app, "sample", tmp_path / "whole", "--prompt", "7 bot", "--length", "20", "--device", "cpu")) >= 20


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("longnet_lm", ["train", "TEXT", "--seq-len", "-1"], "Invalid value for '--seq-len'"),
        ("longnet_lm", ["train", "TEXT", "--steps", "0"], "Invalid value for '--steps'"),
        ("longnet_lm", ["sample", "RUN", "--prompt", ""], "a prompt has at least one byte"),
        (
            "longnet_lm",
            ["train", "TEXT", "--width", "30", "--output", "RUN/new"],
            "error: embed_dim must be a multiple",
        ),
        ("longnet_lm", ["sample", "RUN"], "error: there is no checkpoint "),
        ("longnet_ring", ["--steps", "-1"], "--steps must be at least 1, got -1"),
        ("longnet_ring", ["--seq-len", "0"], "--seq-len must be at least 8, got 0"),
        ("longnet_ring", ["--resume", "RUN/none"], "--resume must be the folder of a checkpoint"),
        ("convert_huggingface", ["TEXT", "--seq-len", "0"], "Invalid value for '--seq-len'"),
        ("convert_huggingface", ["TEXT", "--model", "RUN/none"], "error: "),
    ],
)
def test_wrong_input_is_one_message(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "text.txt").write_bytes(b"99 bottles of beer on the wall\n" * 600)
    command = [part.replace("TEXT", str(tmp_path / "text.txt")).replace("RUN", str(tmp_path)) for part in arguments]
    script = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *command])
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr()
    # A code that is no number is what Python prints as it ends, with 1.
    code, told = (1, ended.value.code) if isinstance(ended.value.code, str) else (ended.value.code, printed.err)
    assert code in (1, 2)
    assert (printed.out, said in told, "Traceback" in told) == ("", True, False), told
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_dense_model_is_converted(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(f"{i} bottles of beer on the wall\n".encode() for i in range(60)))
    example = load_example("convert_huggingface")
    app = typer.Typer()
    app.command()(example.main)
    printed = run(app, text, "--seq-len", "64", "--steps", "3", "--dense-steps", "3", "--device", "cpu")
    figures = [float(line.split()[-1]) for line in printed.splitlines()]
    assert len(figures) == 4
    assert all(1 < figure < 500 for figure in figures)
    assert figures[2] < figures[1]
    assert figures[1] != figures[0]
