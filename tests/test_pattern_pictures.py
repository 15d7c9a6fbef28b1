"""The picture of patterns in the README: what its titles say is what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

import dilated_attention
from benchmarks.pattern_pictures import SQUARES, main


def test_titles_are_the_patterns() -> None:
    names = {name: getattr(dilated_attention, name) for name in dilated_attention.__all__}
    written = [(title, pattern) for title, pattern, _ in SQUARES if title.endswith(")")]
    assert len(written) == len(SQUARES) - 1
    for title, pattern in written:
        assert eval(title, names) == pattern


def test_it_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    main([str(tmp_path / "patterns.png")])
    assert (tmp_path / "patterns.png").read_bytes().startswith(b"\x89PNG")
    assert (Path(__file__).parents[1] / "docs" / "patterns.png").is_file()
