"""`dilated-attention pattern ...`: what is stored, shown and refused, with which exit status."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dilated_attention.core.geometry import Geometry
from dilated_attention.pattern_map import UNICODE
from dilated_attention.pattern_plot import _bars
from dilated_attention.patterns.dilated import Dilated
from dilated_attention.patterns.local import Local
from dilated_attention.patterns.store import PatternStore
from dilated_attention.quality import Quality, measure

from .conftest import Invoke
from .disk import room_for
from .distributions import ROOT, as_json, command

LOCAL = 'num_heads = 4\nis_causal = true\npattern = {kind = "local", window_size = 8}\n'
DRAWN = 'num_heads = 2\npattern = {kind = "random", blocks_per_row = 2, block_size = 16, seed = 3}\n'


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with two config files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("local.toml").write_text(LOCAL)
    Path("drawn.toml").write_text(DRAWN)
    return tmp_path


def save(invoke: Invoke, name: str, config: str, *flags: str, root: str = "store") -> None:
    done = invoke("pattern", "save", name, "--config", config, "--seq-len", "200", "--root", root, *flags)
    assert (done.returncode, done.stderr) == (0, "")


def test_flags_are_a_pattern_or_replace_what_a_file_says(invoke: Invoke, work: Path) -> None:
    longnet = ("--segment-lengths", "32,64", "--dilation-rates", "1,2", "--heads", "2", "--seq-len", "64")
    assert invoke("pattern", "save", "longnet", *longnet, "--root", "store").returncode == 0
    save(invoke, "wider", "local.toml", "-P", "window_size=16")
    store = PatternStore("store")
    assert [store.load(name) for name in ("longnet", "wider")] == [Dilated((32, 64), (1, 2)), Local(16)]


def test_what_is_saved_is_listed_loaded_and_verified(invoke: Invoke, work: Path) -> None:
    save(invoke, "near", "local.toml")
    save(invoke, "far", "drawn.toml")
    assert PatternStore("store").load("near") == Local(8)
    listed = as_json(invoke("pattern", "list", "--root", "store", "--json"))
    assert [row["name"] for row in listed] == ["far", "near"]
    assert listed[0]["nbytes"] == Path("store/far.safetensors").stat().st_size
    assert [line.split()[0] for line in invoke("pattern", "list", "--root", "store").stdout.splitlines()] == [
        "far",
        "near",
    ]
    loaded = as_json(invoke("pattern", "load", "near", "--root", "store", "--json"))
    assert loaded["parameters"] == {"kind": "local", "window_size": [8, 8]}
    assert (loaded["seq_len"], loaded["num_heads"], loaded["is_causal"]) == (200, 4, True)
    text = invoke("pattern", "load", "far", "--root", "store").stdout
    assert "fits            only this length, these heads and this causality" in text
    assert "blocks_per_row  2" in text
    verified = as_json(invoke("pattern", "verify", "--root", "store", "--json"))
    assert [(row["name"], row["status"], row["kind"]) for row in verified] == [
        ("far", "ok", "random, as blocks"),
        ("near", "ok", "local, as parameters"),
    ]


def test_flags_replace_what_the_file_says(invoke: Invoke, work: Path) -> None:
    save(invoke, "p", "local.toml", "--num-heads", "3", "--no-causal")
    info = PatternStore("store").verify("p")
    assert (info.seq_len, info.num_heads, info.is_causal) == (200, 3, False)
    Path("whole.toml").write_text(f"seq_len = 64\n{LOCAL}")
    assert invoke("pattern", "save", "q", "--config", "whole.toml", "--root", "store").returncode == 0
    assert PatternStore("store").verify("q").seq_len == 64


def test_a_taken_name_is_kept_unless_told_otherwise(invoke: Invoke, work: Path) -> None:
    save(invoke, "p", "local.toml")
    again = ("pattern", "save", "p", "--config", "drawn.toml", "--seq-len", "200", "--root", "store")
    done = invoke(*again)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: 'p' exists already in 'store'; --overwrite replaces it\n"
    assert PatternStore("store").load("p") == Local(8)
    assert invoke(*again, "--overwrite").returncode == 0
    assert PatternStore("store").verify("p").form == "blocks"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["load", "neer"], 4, "no stored pattern 'neer' in 'store' (did you mean 'near'?)"),
        (["verify", "neer"], 4, "no stored pattern 'neer'"),
        (["show", "neer"], 4, "no stored pattern 'neer'"),
        (["load", "../near"], 4, "a pattern's name is 1 to 120"),
        (["show", "con"], 4, "the name of a device"),
        (["load", "out"], 4, "outside the store"),
        (["load", "bad"], 4, "'store/bad.safetensors' is damaged"),
        (["show", "bad"], 4, "is damaged"),
        (["save", "a/b", "--config", "local.toml", "--seq-len", "8"], 4, "a pattern's name is"),
        (["save", "x", "--config", "none.toml", "--seq-len", "8"], 2, "cannot read the config file"),
        (["save", "x", "--config", "local.toml"], 2, "give --seq-len: 'local.toml' has no seq_len"),
        (["save", "x", "--config", "empty.toml", "--seq-len", "8"], 2, "give --pattern: 'empty.toml' has no pattern"),
        (["save", "x", "--seq-len", "8"], 2, "give --pattern: no --config is given"),
        (["save", "x", "--pattern", "local", "--seq-len", "8"], 2, "give --heads: no --config is given"),
        (["save", "x", "--config", "headless.toml", "--seq-len", "8"], 2, "give --heads: 'headless.toml' has no"),
        (["save", "x", "--config", "typo.toml", "--seq-len", "8"], 2, "did you mean 'local'"),
        (["save", "x", "--config", "key.toml", "--seq-len", "8"], 2, "did you mean 'is_causal'"),
        (["save", "x", "--config", "local.toml", "--seq-len", "0"], 2, "seq_len must be at least 1"),
        (["show", "near", "--head", "4"], 2, "--head must be 0 to 3, got 4"),
        (["show", "near", "--seq-len", "0"], 2, "--seq-len"),
        (["show", "near", "--layers", "0"], 2, "--layers"),
        (["show", "near", "--layers", "100000000"], 2, "--layers"),
        (["show", "far", "--seq-len", "300"], 4, "was drawn for seq_len=200"),
        (["show", "all", "--seq-len", "100000000"], 2, "allowed are 536,870,912; show fewer tokens"),
        (["save", "x", "--config", "tight.toml"], 2, "allowed are 40; set a larger limits = {layout_bytes ="),
        (["show", "near", "--plot", "a.pdf"], 2, "--plot writes a file ending in .png or .svg, got 'a.pdf'"),
        (["show", "near", "--plot", "nowhere/a.png"], 2, "--plot must be a file in a folder that exists"),
        (["verfy"], 2, "No such command 'verfy'"),
    ],
)
def test_wrong_input_is_one_message_and_a_status(
    invoke: Invoke, work: Path, arguments: list[str], status: int, said: str
) -> None:
    save(invoke, "near", "local.toml")
    save(invoke, "far", "drawn.toml")
    shutil.copy("store/far.safetensors", "elsewhere.safetensors")
    Path("store/out.safetensors").symlink_to(work / "elsewhere.safetensors")
    damaged = bytearray(Path("store/far.safetensors").read_bytes())
    damaged[-1] ^= 1
    Path("store/bad.safetensors").write_bytes(damaged)
    Path("empty.toml").write_text("num_heads = 2\n")
    Path("headless.toml").write_text('pattern = {kind = "full"}\n')
    Path("typo.toml").write_text('num_heads = 2\npattern = {kind = "locl", window_size = 1}\n')
    Path("tight.toml").write_text(f"seq_len = 200\nlimits = {{layout_bytes = 40}}\n{DRAWN}")
    save(invoke, "all", "local.toml", "--pattern", "full")
    Path("key.toml").write_text(f"is_casual = true\n{LOCAL}")
    before = sorted(str(path) for path in work.rglob("*"))
    options = [] if arguments[0] == "verfy" else ["--root", "store"]
    done = invoke("pattern", *arguments, *options)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert sorted(str(path) for path in work.rglob("*")) == before


def test_verify_says_which_file_is_bad_and_goes_on(invoke: Invoke, work: Path) -> None:
    save(invoke, "near", "local.toml")
    Path("store/bad.safetensors").write_bytes(b"PK\x03\x04")
    done = invoke("pattern", "verify", "--root", "store")
    assert (done.returncode, done.stderr) == (4, "")
    bad, cause, near = done.stdout.splitlines()
    assert bad.split() == ["bad", "bad"]
    assert "is no safetensors file: it has 4 bytes" in cause
    assert near.split()[:2] == ["near", "ok"]
    rows = as_json(invoke("pattern", "verify", "--root", "store", "--json"))
    assert [row["status"] for row in rows] == ["bad", "ok"]
    assert invoke("pattern", "verify", "near", "--root", "store").returncode == 0


def test_what_cannot_be_read_is_said_and_the_rest_goes_on(
    invoke: Invoke, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        save(invoke, name, "local.toml")
    listed = PatternStore.list
    monkeypatch.setattr(PatternStore, "list", lambda store: (*listed(store), "gone"))
    done = invoke("pattern", "list", "--root", "store")
    assert (done.returncode, [line.split()[0] for line in done.stdout.splitlines()]) == (1, ["a", "b", "c"])
    assert done.stderr == "error: cannot read 'store/gone.safetensors': No such file or directory\n"
    opened = os.open

    def refuse(path: str, *rest: Any, **fields: Any) -> int:
        if str(path).endswith("b.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *rest, **fields)

    monkeypatch.setattr(os, "open", refuse)
    done = invoke("pattern", "verify", "--root", "store", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    rows = json.loads(done.stdout)
    assert [row["status"] for row in rows] == ["ok", "unreadable", "ok", "unreadable"]
    assert "b.safetensors': Permission denied" in rows[1]["cause"]
    assert invoke("pattern", "verify", "b", "--root", "store").returncode == 1
    assert invoke("pattern", "verify", "gone", "--root", "store").returncode == 4
    Path("store/a.safetensors").write_bytes(b"PK")
    assert invoke("pattern", "verify", "--root", "store").returncode == 4


def test_a_named_store_must_be_there_and_the_default_one_need_not(invoke: Invoke, work: Path) -> None:
    for arguments in (["list"], ["verify"], ["verify", "p"], ["list", "--json"]):
        for root in ("none", "pattern-store"):
            done = invoke("pattern", *arguments, "--root", root)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr == f"error: --root must be a folder, but there is no {root!r}; save makes one\n"
    for arguments in (["list"], ["verify"]):
        done = invoke("pattern", *arguments)
        assert (done.returncode, done.stdout) == (0, "no patterns are stored in 'pattern-store'\n")
    assert as_json(invoke("pattern", "list", "--json")) == []
    Path("empty").mkdir()
    assert invoke("pattern", "verify", "--root", "empty").stdout == "no patterns are stored in 'empty'\n"


def test_a_store_that_cannot_be_is_an_error(invoke: Invoke, work: Path) -> None:
    done = invoke("pattern", "load", "p", "--root", "local.toml/store")
    assert (done.returncode, done.stderr) == (2, "error: cannot use the store 'local.toml/store': Not a directory\n")
    for arguments in (["list"], ["load", "p"], ["save", "p", "--config", "local.toml", "--seq-len", "64"]):
        done = invoke("pattern", *arguments, "--root", "local.toml")
        said = "error: --root must be a folder, but 'local.toml' is none; choose another\n"
        assert (done.returncode, done.stderr) == (2, said)


def shown(invoke: Invoke, *arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = as_json(invoke("pattern", "show", *arguments, "--root", "store", "--json"))
    return data


def test_show_draws_a_map_with_the_report_beside_it(invoke: Invoke, work: Path) -> None:
    save(invoke, "near", "local.toml")
    done = invoke("pattern", "show", "near", "--root", "store", "--seq-len", "1000")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "near: local, as parameters, 1,000 tokens, 4 heads, causal"
    assert lines[1] == "every head sees the same"
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[-1] == "999"
    inside = [line[1:45] for line in lines[4:26]]
    for row, line in enumerate(inside):  # a band along the diagonal, nothing in the future
        assert set(line[: max(0, 2 * row - 1)]) <= {"·"}
        assert line[2 * row] in UNICODE[1:]
        assert line[2 * row + 2 :].strip() == ""
    quality = measure(Local(8), Geometry.self_attention(1000, 4, is_causal=True))
    assert f"density               {quality.density:.3%}" in lines[3]
    assert "queries without keys  0" in done.stdout
    seen = next(i for i, line in enumerate(lines) if line.endswith("keys that a query sees"))
    assert lines[seen - 1].split()[-3:] == ["least", "mean", "most"]
    assert lines[seen + 1].split()[-3:] == ["1", "9.0", "9"]
    assert "blocks (of 128 tokens) reached" in done.stdout
    assert f"busiest block row  {quality.load_imbalance:.2f} x mean" in done.stdout
    data = shown(invoke, "near", "--seq-len", "1000")
    assert data["quality"]["density"] == quality.density
    assert data["map"][0][-1] is None
    assert data["map"][5][0] == 0.0


@pytest.mark.parametrize("seq_len", ["1", "3", "44", "63", "1000", "1000000"])
def test_any_length_fits_80_columns(invoke: Invoke, work: Path, seq_len: str) -> None:
    save(invoke, "near", "local.toml")
    done = invoke("pattern", "show", "near", "--root", "store", "--seq-len", seq_len)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_terminal_without_unicode_gets_ascii(invoke: Invoke, work: Path) -> None:
    saved = invoke("pattern", "save", "p", "--config", "local.toml", "--seq-len", "50")
    assert (saved.returncode, saved.stderr) == (0, "")
    plain = command(None, "pattern", "show", "p", PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert plain.stdout.isascii()
    assert "|##" in plain.stdout
    assert "│██" in command(None, "pattern", "show", "p", PYTHONIOENCODING="utf-8").stdout


def test_heads_that_differ_have_maps_of_their_own(invoke: Invoke, work: Path) -> None:
    save(invoke, "far", "drawn.toml")
    maps = [shown(invoke, "far", "--head", head)["map"] for head in ("0", "1")]
    assert maps[0] != maps[1]
    assert "head 1\n" in invoke("pattern", "show", "far", "--root", "store", "--head", "1").stdout


PNG, SVG = b"\x89PNG\r\n\x1a\n", b"<?xml"


@pytest.mark.parametrize(("name", "file", "starts"), [("near", "a.png", PNG), ("far", "b.SVG", SVG)])
def test_plot_writes_a_picture(invoke: Invoke, work: Path, name: str, file: str, starts: bytes) -> None:
    save(invoke, "near", "local.toml")
    save(invoke, "far", "drawn.toml")
    done = invoke("pattern", "show", name, "--root", "store", "--plot", file)
    assert (done.returncode, done.stderr) == (0, f"drawn: {file}\n")
    assert done.stdout == invoke("pattern", "show", name, "--root", "store").stdout
    assert Path(file).read_bytes().startswith(starts)
    assert Path(file).stat().st_size > 10_000


def test_a_picture_says_what_its_colours_outside_the_ramp_mean(invoke: Invoke, work: Path) -> None:
    for name, config, is_causal in (("near", "local.toml", True), ("far", "drawn.toml", False)):
        save(invoke, name, config)
        assert invoke("pattern", "show", name, "--root", "store", "--plot", "a.svg").returncode == 0
        drawn = Path("a.svg").read_text()  # where a comment holds each text
        assert ("not seen" in drawn, "in the future" in drawn) == (True, is_causal)


def test_a_picture_names_its_scale_however_alike_the_counts_are() -> None:
    for pattern in (Local(8), Dilated((64, 256, 1024), (1, 4, 16))):
        quality = measure(pattern, Geometry.self_attention(2048, 4, is_causal=False))
        axis = Figure().subplots()
        _bars(axis, quality)
        low, high = axis.get_ylim()
        assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 2
        assert min(bar.get_height() for bar in axis.patches if isinstance(bar, Rectangle) and bar.get_height()) > low


def test_a_picture_that_cannot_be_written_is_no_fault_of_the_length(invoke: Invoke, work: Path) -> None:
    save(invoke, "near", "local.toml")
    Path("a.svg").symlink_to("nowhere/a.svg")
    done = invoke("pattern", "show", "near", "--root", "store", "--plot", "a.svg")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --plot must be a file in a folder that exists, got 'a.svg'\n"


def test_a_picture_takes_the_place_of_another_whole_or_not_at_all(invoke: Invoke, work: Path) -> None:
    save(invoke, "near", "local.toml")
    Path("a.png").write_bytes(b"before")
    before = sorted(work.iterdir())
    with room_for(1000):
        done = invoke("pattern", "show", "near", "--root", "store", "--plot", "a.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --plot: cannot write 'a.png': File too large\n"
    assert (Path("a.png").read_bytes(), sorted(work.iterdir())) == (b"before", before)


def test_every_figure_is_explained_on_the_page(invoke: Invoke, work: Path) -> None:
    table = (ROOT / "docs/patterns.md").read_text(encoding="utf-8").partition("| figure | in JSON |")[2]
    told = {
        tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.partition("\n\n")[0].splitlines()[2:]
    }
    assert {f"`{field.name}`" for field in attrs.fields(Quality)} == {name for _, name in told}
    save(invoke, "near", "local.toml")
    lines = invoke("pattern", "show", "near", "--root", "store").stdout.splitlines()
    shown = " ".join(line[46:] for line in lines).replace("(of 128 tokens) ", "")
    assert all(name in shown for label, _ in told for name in label.split(", ")[:1]), shown


def test_layers_are_listed_until_all_is_reached(invoke: Invoke, work: Path) -> None:
    save(invoke, "near", "local.toml")
    few, many = (
        invoke("pattern", "show", "near", "--root", "store", "--seq-len", "20", "--layers", n).stdout for n in "39"
    )
    assert few == many
    assert len(shown(invoke, "near", "--seq-len", "20", "--layers", "9")["quality"]["receptive_field"]) == 9


def test_plot_without_matplotlib_names_the_install_line(
    invoke: Invoke, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(invoke, "near", "local.toml")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    done = invoke("pattern", "show", "near", "--root", "store", "--plot", "a.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --plot needs matplotlib: pip install 'dilated-attention[plot]'\n"
    assert not Path("a.png").exists()


def test_json_has_no_nan(invoke: Invoke, work: Path) -> None:
    save(invoke, "near", "local.toml")
    text = invoke("pattern", "show", "near", "--root", "store", "--json").stdout
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
