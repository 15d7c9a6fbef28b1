"""The table of dense, sparse and dilated models: its text, its plan, and all nine trainings for a few steps."""

from __future__ import annotations

import json
import math
import sysconfig
import time
from pathlib import Path

import attrs
import pytest
import torch

from benchmarks.longnet_report import markdown
from benchmarks.longnet_table import Shape, Table, gate, main, planned_steps
from benchmarks.longnet_training import schedule, thinned
from benchmarks.source_text import LARGEST_FILE, SourceText, read, windows
from dilated_attention import Full, Local
from dilated_attention.demo.training import one_thread

TINY = Shape(lengths=(32, 64, 128), layers=1, width=32, heads=4, stretches=1, test_bytes=512)
OPTIONS = [
    "--lengths",
    "32,64,128",
    "--layers",
    "1",
    "--width",
    "32",
    "--heads",
    "4",
    "--stretches",
    "1",
    "--test-bytes",
    "512",
]


@pytest.fixture(scope="module")
def roots() -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    return [library / name for name in ("email", "unittest", "asyncio", "json", "xml", "concurrent", "tkinter")]


@pytest.fixture(scope="module")
def text() -> SourceText:
    return SourceText(2, *(torch.randint(97, 123, (4000,), dtype=torch.uint8) for _ in range(2)))


def test_nine_models_are_trained_tested_and_written(
    roots: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Directories of one tree: only then are there some on either side.
    tree = tmp_path / "tree"
    for number, root in enumerate(roots * 8):
        folder = tree / f"part{number}"
        folder.mkdir(parents=True)
        for path in root.glob("*.py"):
            (folder / path.name).write_bytes(b"#%d\n" % number + path.read_bytes()[:4000])
    with one_thread():
        main([*OPTIONS, "--steps", "3", "--roots", str(tree), "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "longnet_table.json").read_text())
    assert report["tokens"] == 3 * 128
    assert report["test_bytes"] == 512
    assert [(row["trained_at"], row["name"]) for row in report["rows"]] == [
        (length, name) for length in (128, 64, 32) for name in ("dense", "sparse", "dilated")
    ]
    for row in report["rows"]:
        assert row["is_complete"]
        assert list(row["bits"]) == ["32", "64", "128"]
        assert all(4 < bits < 9 for bits in row["bits"].values())
        assert row["curve"][-1][0] == 3
        by_position = [bits for _, bits in row["bits_by_position"]]
        assert all(map(math.isfinite, by_position))
        assert sum(by_position) / len(by_position) == pytest.approx(row["bits"]["128"], abs=1)
    # Nine models, not one.
    assert len({row["bits"]["32"] for row in report["rows"]}) == 9
    assert (tmp_path / "out" / "longnet_table.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert markdown(report) in printed
    assert printed.count("to the oracle") == 9


def test_the_same_bytes_are_predicted_at_every_length(text: SourceText) -> None:
    stretches = text.held_out_stretches(5, 128)
    targets = {n: windows(stretches, n)[:, 1:].flatten() for n in (32, 64, 128)}
    assert torch.equal(targets[32], targets[128])
    assert torch.equal(targets[64], stretches[:, 1:].flatten().long())
    assert torch.equal(windows(stretches, 32)[:, :-1].flatten(), stretches[:, :-1].flatten().long())
    one, two = (text.stretches(3, 128, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    with pytest.raises(SystemExit, match="fewer than a stretch"):
        text.stretches(1, 5000, torch.Generator())
    with pytest.raises(SystemExit, match="fewer than 40 stretches"):
        text.held_out_stretches(40, 128)


def test_text_is_split_by_directory_and_without_doubles(tmp_path: Path) -> None:
    for number in range(100):
        folder = tmp_path / f"package{number}"
        (folder / "site-packages").mkdir(parents=True)
        for name in ("a.py", "b.h", "c.pyx"):
            (folder / name).write_text(f"<{number}:{name}>")
        (folder / "copy.py").write_text(f"<{number}:a.py>")
        (folder / "notes.txt").write_text("<text>")
        (folder / "site-packages" / "d.py").write_text("<elsewhere>")
    (tmp_path / "package0" / "table.py").write_text("<large>" * (LARGEST_FILE // 7 + 1))
    found = read([tmp_path, tmp_path], 1 << 30)
    train, held_out = (bytes(x.tolist()).decode() for x in (found.train, found.held_out))
    assert found.files == 300
    for side, other in ((train, held_out), (held_out, train)):
        directories = {part.split(":")[0] for part in side.strip("<>").split("><")}
        assert directories
        assert all(f"<{number}:" not in other for number in directories)
        assert all(side.count(f"<{n}:{name}>") == 1 for n in directories for name in ("a.py", "b.h", "c.pyx"))
    assert not any(word in train + held_out for word in ("<text>", "<elsewhere>", "<large>"))
    assert read([tmp_path], 100).train.numel() + read([tmp_path], 100).held_out.numel() <= 100


def test_sparse_sees_as_many_keys_as_dilated() -> None:
    shape = Shape()
    for length in shape.lengths:
        patterns = shape.patterns(length)
        seen = {name: shape.keys_seen(pattern, length) for name, pattern in patterns.items()}
        assert seen["dense"] == (length + 1) / 2
        assert 0.99 * seen["dilated"] < seen["sparse"] <= seen["dilated"] < 0.5 * seen["dense"]


def test_the_gate_sees_another_attention() -> None:
    model = TINY.model(Local((8, 0)), "cpu")
    assert gate(TINY, model, "cpu") < 1e-5
    model.config = attrs.evolve(model.config, pattern=Full())
    with pytest.raises(SystemExit, match="differs from the oracle"):
        gate(TINY, model, "cpu")


def test_steps_are_planned_from_the_time_left() -> None:
    assert planned_steps(100, 0.5, 30) == 150
    with pytest.raises(SystemExit, match="--minutes"):
        planned_steps(100, 10, 30)


def test_without_time_what_is_there_is_written(text: SourceText, tmp_path: Path) -> None:
    table = Table(TINY, text, tmp_path, time.perf_counter())
    table.fill(10)
    assert table.report["rows"] == []
    with one_thread():
        outcome = TINY.training(Full(), 64, text).run(10, 0, time.perf_counter())
    assert (outcome.steps, outcome.is_complete) == (1, False)


def test_models_differ_in_nothing_but_attention(text: SourceText) -> None:
    one, two = (TINY.model(pattern, "cpu") for pattern in TINY.patterns(64).values() if pattern != Full())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_schedule_and_curve() -> None:
    assert schedule(0, 100) == pytest.approx(0.2, rel=1e-3)
    assert schedule(4, 100) > 0.99
    assert schedule(99, 100) == pytest.approx(0.1, rel=1e-2)
    assert thinned([1.0, 3.0]) == [(1, 1.0), (2, 3.0)]
    assert thinned([2.0] * 199 + [4.0] * 199 + [6.0])[-1] == (399, 6.0)
