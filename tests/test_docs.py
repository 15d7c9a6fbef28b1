"""The pages are true: what they show runs as it stands there, names what there is, and leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from dilated_attention import AttentionConfig, Dilated, Global, Learned, Limits, Local, Random, Strided, errors

from .conftest import Invoke

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str = "python") -> list[str]:
    """What a page shows in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_sequences() -> None:
    names: dict[str, Any] = {}
    shown = blocks("docs/sequences.md")
    for block in shown:
        exec(compile(block, "docs/sequences.md", "exec"), names)
    assert len(shown) == 4
    assert names["packed"].shape == (1, 300, 4, 32)
    assert names["received"].shape == (2, 4, 300)
    assert names["received"].sum(-1).sub(300).abs().max() < 1e-3  # every query gives away one
    assert names["out"].shape == (2, 1, 4, 32)


def run(page: str) -> dict[str, Any]:
    """The names that a page's blocks of Python leave behind, run one after the other."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def test_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/guide.md")
    assert len(blocks("docs/guide.md")) == 10
    assert names["text"].shape == (2, 220)
    assert [cache.seq_len for cache in names["caches"].values()] == [219, 219]
    shares = [cache.nbytes / cache.dense_nbytes for cache in names["caches"].values()]
    assert [f"{share:.0%}" for share in shares] == ["100%", "81%"]  # as the page says
    assert (tmp_path / "patterns" / "drawn.safetensors").exists()
    build = names["build_attention"]  # the page's own test can fail: here another pattern is built than it asks for
    names["build_attention"] = lambda config, pattern: build(config, pattern=Local(62))
    with pytest.raises(AssertionError):
        names["test_my_attention"](Local(63))


def rows(page: str) -> dict[str, list[str]]:
    """The rows of all tables of a page, by each name that stands in their first two cells."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        found |= {name: cells for cell in cells[:2] for name in re.findall(r"`([A-Za-z_]+)`", cell)}
    return found


def test_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/configuration.md")
    assert names["out"].shape == (1, 1024, 8, 32)
    assert names["attention"].config.is_causal
    assert (names["plan"].backend is None) == (not torch.cuda.is_available())
    told = rows("docs/configuration.md")
    for field in attrs.fields(AttentionConfig):
        default = {"pattern": "Full()", "backend_options": "{}", "limits": "Limits()"}.get(field.name)
        if field.default is attrs.NOTHING:
            assert told[field.name][1] == "required"
        else:
            shown = default or repr(field.default).replace("'", '"')
            assert told[field.name][1] == f"`{shown}`", field.name
    for field in attrs.fields(Limits):
        number, unit = told[field.name][1].split()
        assert int(number) << {"MiB": 20, "GiB": 30}[unit] == field.default, field.name
    assert {name for name in errors.__all__ if name != "DilatedAttentionError"} <= told.keys()


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("docs/patterns.md")
    assert names["store"].list() == ("frozen", "near")
    assert names["bigbird"] == Local(32) | Global(64) | Random(4, 32)
    assert names["longformer"] == Local(256) | Global(4)
    assert names["share"].shape == (2, 4, 256)
    page = (ROOT / "docs/patterns.md").read_text(encoding="utf-8")
    for kind in (Dilated, Local, Global, Strided, Random, Learned):
        table = page[page.index(f"| `{kind.__name__}` |") :]
        for field in attrs.fields(kind):
            if field.init and field.name != "density":  # which stands beside blocks_per_row
                line = next(line for line in table.splitlines() if f"`{field.name}`" in line)
                needed = field.default in (attrs.NOTHING, None)
                shown = repr(field.default).replace("'", '"')
                assert needed or f"| `{shown}` |" in line, line


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_tables_are_tables(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        name, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            aim = (ROOT / page).parent / name if name else ROOT / page
            assert aim.exists(), target
            assert not anchor or anchor in anchors(aim), target
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, *body = ([*re.split(r"(?<!\\)\|", line)] for line in table.splitlines())
        assert body, table
        assert re.fullmatch(r"[-:| ]+", "|".join(body[0])), table[:200]
        assert {len(row) for row in body} == {len(head)}, table[:200]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "core|exchange|registry|patterns|backends|models|src|tests|docs|examples|benchmarks"
    for name in re.findall(rf"(?<![\w/.])((?:{folders})/[\w/]+\.(?:py|md|png))", text):
        assert (ROOT / name).exists(), name
    if page == "CONTRIBUTING.md":
        for name in re.findall(r"`(\w+\.py)`", text):
            assert (ROOT / "core" / name).exists() or (ROOT / "registry" / name).exists(), name


@pytest.mark.slow
def test_a_ring_under_torchrun(tmp_path: Path) -> None:
    shown, recovery = blocks("docs/context_parallel.md")
    compile(recovery, "docs/context_parallel.md", "exec")
    (tmp_path / "ring.py").write_text(shown)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "ring.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {f"rank {rank}: tokens {1024 * rank} to {1024 * rank + 1023}, out (1, 1024, 8, 64)" for rank in range(4)}
    assert {*done.stdout.splitlines()} == said


def test_readmes_configuration_is_explained_stored_and_shown(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("README.md", "toml")
    Path("attention.toml").write_text(config)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    dilated-attention (.*attention\.toml.*|pattern show [^#\n]*)", page, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        done = invoke(*line.partition("#")[0].split())
        assert done.returncode == 0, done.stderr
    assert Path("near.png").stat().st_size > 0
