"""The demo's parts, small; the whole of it runs under `-m slow`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dilated_attention import ConfigError, Dilated, DilatedAttentionError, Pattern
from dilated_attention import demo as demo_package
from dilated_attention.bench.cases import CASES, BenchCase
from dilated_attention.bench.peers import Peer, dense_sdpa
from dilated_attention.bench.timing import peak_bytes
from dilated_attention.demo import compare, pictures, text
from dilated_attention.demo.model import ByteModel, ModelConfig, rotary_table, rotate
from dilated_attention.demo.training import Budget, Mark, Training, learning_rate, train

TRAINED = Training(
    parameters=1, bytes_read=300, seconds=1.0, bits=(8.0, 6.0, 5.0),
    marks=(Mark(0, 0.0, 8.0, 8.0), Mark(3, 1.0, 5.0, 5.5)),
)  # fmt: skip
SMALL = ModelConfig(layers=1, num_heads=4, head_dim=8, seq_len=64, segment_lengths=(16, 64), dilation_rates=(1, 4))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Forty files of Python, and three that are not the library itself."""
    for number in range(40):
        (tmp_path / f"module_{number:02}.py").write_text(f"def f(x):\n    return x + {number}\n" * 20)
    for left_out in ("test", "site-packages", "encodings"):
        (tmp_path / left_out).mkdir()
        (tmp_path / left_out / "noise.py").write_bytes(b"\xff" * 1000)
    return tmp_path


def test_a_twentieth_of_the_files_is_held_out(library: Path) -> None:
    corpus = text.standard_library(library)
    whole = sum(path.stat().st_size for path in library.glob("*.py"))
    assert corpus.files == 40
    assert corpus.train.numel() + corpus.held_out.numel() == whole
    assert bytes(corpus.held_out.tolist()).count(b"x + 10\n") == 20
    assert b"x + 10\n" not in bytes(corpus.train.tolist())
    assert 255 not in corpus.train
    assert 255 not in corpus.held_out


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("pass\n")
    with pytest.raises(DilatedAttentionError, match="holds 1 of them"):
        text.standard_library(tmp_path)


def test_windows_come_from_the_text(library: Path) -> None:
    corpus = text.standard_library(library)
    batch = corpus.batch(3, 50, torch.Generator().manual_seed(1))
    assert batch.shape == (3, 51)
    assert all(bytes(row.tolist()) in bytes(corpus.train.tolist()) for row in batch)
    held_out = corpus.held_out_windows(2, 50)
    assert bytes(held_out[0].tolist()) == bytes(corpus.held_out[:51].tolist())
    assert 0 < corpus.compressed_bits_per_byte() < 8


def test_rotation_depends_on_the_distance_alone() -> None:
    table = rotary_table(32, 8)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(query.expand(1, 32, 1, 8), table), rotate(key.expand(1, 32, 1, 8), table)
    scores = torch.einsum("bshd,bthd->st", *turned)
    torch.testing.assert_close(scores[5, 2], scores[25, 22])
    assert not math.isclose(scores[5, 2].item(), scores[5, 4].item(), rel_tol=1e-3)


def test_the_model_sees_no_future() -> None:
    model = ByteModel(SMALL, torch.Generator().manual_seed(0))
    tokens = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40], after[:, 40])


def run_training(library: Path, steps: int) -> Training:
    return train(
        text.standard_library(library),
        SMALL,
        Budget(steps=steps, marks=2),
        on_step=lambda spent, bits: None,
        on_mark=lambda mark: None,
    )


def test_training_learns_repeats_itself_and_leaves_no_trace(library: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = run_training(library, 25), run_training(library, 25)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert first.bits == second.bits
    assert len(first.bits) == 25
    assert first.bytes_read == 25 * SMALL.seq_len
    assert [mark.step for mark in first.marks][0::2] == [0, 25]
    assert first.marks[0].held_out == pytest.approx(8, abs=0.3)
    assert first.marks[-1].held_out < first.marks[0].held_out - 1


def test_no_step_is_marked_twice(library: Path) -> None:
    for steps in (1, 2, 3):
        marks = run_training(library, steps).marks
        assert [mark.step for mark in marks] == sorted({mark.step for mark in marks})
        assert marks[-1].step == steps


def test_a_budget_of_time_ends() -> None:
    assert Budget(steps=None, seconds=10).spent(step=1_000_000, seconds=5) == 0.5
    assert Budget(steps=4).spent(step=1, seconds=1_000_000) == 0.25
    assert learning_rate(0, 0.0) < learning_rate(100, 0.0)
    assert learning_rate(1000, 1.0) == pytest.approx(learning_rate(1000, 0.0) / 10)


def test_peak_memory_is_exact() -> None:
    mebibyte = 1 << 20

    def two_then_one() -> torch.Tensor:
        a = torch.empty(mebibyte, dtype=torch.uint8)
        b = torch.empty(mebibyte, dtype=torch.uint8)
        del a, b
        return torch.empty(mebibyte, dtype=torch.uint8)

    assert peak_bytes(two_then_one) == 2 * mebibyte


def test_both_are_compared_with_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "CASE", CASES["longnet-1k"])
    longnet, dense = compare.compare()
    for result in (longnet, dense):
        assert result.error is not None
        assert 0 < result.error < 1e-6
        assert result.seconds > 0
    assert longnet.peak_bytes > 4 * 1024 * 8 * 64  # the output alone


@pytest.mark.parametrize(("factor", "said"), [(1.001, "dense SDPA: .* is off .* by 1.0e-03"), (math.nan, "by inf")])
def test_a_wrong_result_is_no_result(factor: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: BenchCase, device: str) -> Peer | None:
        right = dense_sdpa(case, device)
        assert right is not None
        return attrs.evolve(right, attend=lambda q, k, v: right.attend(q, k, v) * factor)

    monkeypatch.setattr(compare, "CASE", CASES["longnet-1k"])
    monkeypatch.setattr(compare, "dense_sdpa", wrong)
    with pytest.raises(DilatedAttentionError, match=said):
        compare.compare()


def test_the_explanation_holds_a_near_miss() -> None:
    lines: list[str] = []
    demo_package.explain(lines.append)
    assert "would be usable with seq_len=4096" in lines[0]


def test_the_table_is_aligned() -> None:
    rows = compare.Result("short", 1.5, 1 << 20, 1e-7), compare.Result("much longer", 10.25, 1 << 30, 2e-7)
    header, first, second = compare.table(rows).splitlines()
    assert header.index("relative") == first.index("1.0e-07") == second.index("2.0e-07")
    assert second.split() == ["much", "longer", "10.25", "s", "1024", "MiB", "2.0e-07"]


def test_counts_are_those_of_the_pattern() -> None:
    seen = pictures.counts(Dilated((4, 8), (1, 2)), 8, 2, head=1)
    assert np.all(seen[np.triu_indices(8, 1)] == -1)
    assert seen[3].tolist() == [1, 2, 1, 2, -1, -1, -1, -1]
    assert seen[7].tolist() == [0, 1, 0, 1, 1, 2, 1, 2]
    assert seen[4].tolist() == [0, 0, 0, 0, 1, -1, -1, -1]


def test_means_stand_in_the_middle_of_what_they_are_of() -> None:
    places, means = pictures.smooth([4.0, 2.0, 6.0, 6.0], 2)
    assert (places.tolist(), means.tolist()) == ([0.5, 1.5, 2.5], [3.0, 4.0, 6.0])
    places, means = pictures.smooth([4.0, 2.0], 1)
    assert (places.tolist(), means.tolist()) == ([0.0, 1.0], [4.0, 2.0])


@pytest.mark.parametrize(("steps", "label"), [(9, "training batches"), (300, "training batches, mean of 20")])
def test_the_mean_of_few_steps_does_not_level_them_out(
    steps: int, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, option: drawn.append(figure))
    bits = tuple(8 - 4 * step / steps for step in range(steps))
    training = Training(parameters=1, bytes_read=1, seconds=1.0, bits=bits, marks=(Mark(0, 0.0, 8.0, 8.0),))
    pictures.draw_loss(training, 2.0, tmp_path / "loss.png")
    lines = {str(line.get_label()): line for line in drawn[0].axes[0].lines}
    x, y = (np.asarray(data, dtype=float) for data in lines[label].get_data())
    np.testing.assert_allclose(y, 8 - 4 * x / steps)  # a straight line stays where it is


def test_the_picture_is_of_the_models_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, object] = {}

    def keep(pattern: Pattern, title: str, path: Path, **sizes: int) -> None:
        drawn.update(pattern=pattern, title=title, **sizes)

    monkeypatch.setattr(pictures, "draw_pattern", keep)
    demo_package.draw(lambda line: None, tmp_path, ModelConfig(), TRAINED, 2.0)
    title = "Who attends to whom in the model: segments 256, 512, 1024, dilation rates 1, 2, 4"
    assert drawn == {
        "pattern": Dilated((16, 32, 64), (1, 2, 4)), "seq_len": 64, "num_heads": 4,
        "title": f"{title} (drawn with 1/16 of the lengths)",
    }  # fmt: skip


def test_the_processor_is_named_as_explain_names_it() -> None:
    lines: list[str] = []
    demo_package.explain(lines.append)
    assert f"on cpu ({demo_package.machine()['processor']})" in lines[0]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    from matplotlib import image

    lines: list[str] = []
    files = demo_package.draw(lines.append, tmp_path, ModelConfig(), TRAINED, 2.0)
    assert files == [tmp_path / "loss.png", tmp_path / "pattern.png"]
    assert lines == []
    for path in files:
        pixels = image.imread(path)
        assert pixels.shape[0] > 500
        assert len(np.unique((pixels * 255).astype(np.uint8).view(np.uint32))) > 5  # colours, of four bytes each


def test_without_matplotlib_the_demo_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines: list[str] = []
    assert demo_package.draw(lines.append, tmp_path, ModelConfig(), TRAINED, 2.0) == []
    assert "pip install 'dilated-attention[plot]'" in lines[0]


def test_steps_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps"):
        demo_package.run(tmp_path, steps=0)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dilated_attention", "demo", "--steps", "30", "--json", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"machine", "plan", "comparison", "training", "files"}
    fast, dense = report["comparison"]
    assert fast["seconds"] < dense["seconds"]
    assert report["training"]["marks"][-1]["held_out"] < 6
    assert all(Path(path).stat().st_size > 10_000 for path in report["files"])
    assert len(report["files"]) == 2
