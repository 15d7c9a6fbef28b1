"""`benchmarks.tiles`: how tiles are written, and what it says without a card."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from benchmarks.tiles import main, parsed_tile
from dilated_attention import ConfigError
from dilated_attention.backends.fused.tiles import Tile, can_be_fed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64,32,4,3", Tile(64, 32, 4, 3)),
        ("64,32,4,3,registers=168,split", Tile(64, 32, 4, 3, 168, split=True)),
        ("ring:64,4,232", Tile.by_ring(64, 4, 232)),
        ("ring:64,4,232,parts=1,split", Tile.by_ring(64, 4, 232, parts=1, split=True)),
        ("ring:64,4,208,adds", Tile.by_ring(64, 4, 208, adds=True)),
        ("ring:64,2,232,apart", Tile.by_ring_apart(64, 2, 232)),
    ],
)
def test_tiles(text: str, expected: Tile) -> None:
    assert parsed_tile(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "64,32,4", "ring:64,4", "ring:64,4,232,registers=1", "64,32,4,x", "a:1,2,3", "64,32,4,3,adds",
     "64,32,4,3,apart", "ring:64,4,232,split,apart"],
)  # fmt: skip
def test_what_is_no_tile_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="is no tile; write ROWS,COLUMNS"):
        parsed_tile(text)


def test_unknown_cases_and_machines_without_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["longnet-127k"])
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["longnet-128k", "--tile", "ring:64,4,232,parts=1"])
    assert "serves gradients of keys alone; add --pass keys" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["longnet-128k", "--tile", "ring:64,2,232,apart"])
    assert "serves gradients of keys alone; add --pass keys" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["longnet-128k", "--tile", "ring:64,4,208,adds"])
    assert "add --pass gradients" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["longnet-128k"])
        assert "needs a CUDA card of compute capability 8.0" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(
    not can_be_fed(64, torch.bfloat16, version("triton")), reason="not tested with this release of Triton"
)
def test_it_times_gradients_in_one_launch(capsys: pytest.CaptureFixture[str]) -> None:
    main(["longnet-32k", "--pass", "gradients", "--tile", "ring:64,3,208,adds", "--rounds", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("wrong" not in line for line in lines)


@pytest.mark.gpu
def test_it_times_the_chosen_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    main(["longnet-32k", "--pass", "forward", "--tile", "64,32,4,2", "--rounds", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert sum(line.endswith("chosen") for line in lines) == 1
    assert all("wrong" not in line for line in lines)
