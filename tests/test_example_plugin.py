"""The example distribution of docs/plugins.md: built, installed with pip, found through its entry point, conforming."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from dilated_attention.registry import (
    AXES,
    Backend,
    BackendSpec,
    DenseKernel,
    DensePiece,
    KernelBackend,
    LayoutKernel,
    LayoutPiece,
    PatternSpec,
    Refusal,
    Request,
    hooks,
)
from dilated_attention.registry.conformance import Kit, KitSettings

from .conftest import Invoke
from .covering import covering
from .distributions import ROOT, as_json, command, installed, run

EXAMPLE = Path(__file__).parent / "example_plugin"
DOCS = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
FILES = ("pyproject.toml", "toy_attention/manifest.py", "toy_attention/kernel.py", "toy_attention/pattern.py")
OFFLINE = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
SOURCES = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")


def blocks(name: str, text: str = DOCS) -> list[str]:
    """The code blocks that the page gives for a file."""
    return re.findall(rf"^`{re.escape(name)}`[^\n]*:\n\n```\w+\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def pip(python: Path | str, *arguments: str) -> None:
    done = subprocess.run([python, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, folder / "source", ignore=SOURCES)  # a build leaves folders behind
    pip(sys.executable, "install", *OFFLINE, "--target", str(folder / "site"), str(folder / "source"))
    return folder / "site"


def test_the_installed_example_is_found_and_used(site: Path, invoke_at: Invoke) -> None:
    (row,) = [row for row in as_json(command(site, "plugins", "--json")) if row["distribution"] == "toy-attention"]
    assert (row["status"], row["version"]) == ("ok", "1.0")
    assert (row["backends"], row["patterns"]) == (["toy"], ["log_sparse"])
    assert row["import_seconds"] < 0.25
    flags = ("--heads", "4", "--head-dim", "24", "--pattern", "log_sparse", "-P", "base=3")
    plan = as_json(invoke_at(site, "explain", *flags, "--backend", "toy", "--json"))
    assert (plan["backend"], plan["kernel"]) == ("toy", "PyTorch's matrix products")  # what it brings is blocks
    dense = as_json(invoke_at(site, "explain", *flags[:4], "--backend", "toy", "--json"))
    assert dense["kernel"] == "toy"
    assert plan["config"]["pattern"] == {"kind": "log_sparse", "base": 3}
    refused = invoke_at(site, "explain", *flags, "--backend", "toy", "--dtype", "bfloat16")
    assert refused.returncode == 3
    assert "-> would be usable with dtype=float32" in refused.stdout


def test_the_installed_example_conforms(site: Path) -> None:
    with installed(site):
        kit = Kit("toy", KitSettings(quick=True, patterns=[{"kind": "log_sparse", "base": 3}]))
        report = covering(kit, no_few=("dilated", "local|global"))  # its kernel's are the whole pieces, the rest core's
    assert report.passed, str(report)
    lines = str(report).splitlines()
    assert lines[0].startswith("toy of toy-attention 1.0 on cpu: ")
    assert lines[-1].startswith("all 34 checks passed")
    assert any(line.startswith("manifest         ok") for line in lines)


@pytest.mark.slow
def test_in_a_fresh_environment(tmp_path: Path) -> None:
    """Both wheels built and installed side by side, without a network; torch and the rest are lent by this one."""
    environment, tree = tmp_path / "venv", tmp_path / "tree"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    (lib,) = (environment / "lib").glob("python*/site-packages")
    (lib / "lent.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    rooms = [path.name for path in (ROOT / "src" / "dilated_attention").iterdir() if path.is_symlink()]
    for name in (*rooms, "src"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=SOURCES)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(EXAMPLE, tmp_path / "example", ignore=SOURCES)
    pip(python, "uninstall", "--quiet", "--yes", "setuptools")  # older Pythons bring one that hides the lent one
    for source in (tree, tmp_path / "example"):
        pip(python, "install", *OFFLINE, str(source))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin" / "dilated-attention", "conformance", "toy", "--quick"],
        env=kept, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith("toy of toy-attention 1.0 on cpu: ")
    where = "import dilated_attention; print(dilated_attention.__file__)"
    found = subprocess.run([python, "-c", where], env=kept, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(environment))


@pytest.mark.parametrize("name", FILES)
def test_the_page_shows_exactly_this_code(name: str) -> None:
    shown = blocks(name)
    assert "\n\n\n".join(block.strip("\n") for block in shown) == (EXAMPLE / name).read_text().strip("\n")


def test_every_file_of_the_example_is_on_the_page() -> None:
    files = {str(path.relative_to(EXAMPLE)) for path in EXAMPLE.rglob("*.[pt][yo]*") if path.suffix in (".py", ".toml")}
    assert {name for name in files if (EXAMPLE / name).stat().st_size} == set(FILES)


def test_from_an_empty_folder_to_a_green_table_in_less_than_forty_lines() -> None:
    before, separator, _ = DOCS.partition("dilated-attention conformance toy")
    assert separator
    lines = [line for name in FILES for block in blocks(name, before) for line in block.splitlines() if line.strip()]
    assert len(blocks(FILES[1], before)) == len(blocks(FILES[2], before)) == 1
    assert 25 < len(lines) < 35


def test_the_whole_backend_of_the_example_is_less_than_forty_lines() -> None:
    """As it stands in its files, the pattern's hook included: neither blank nor a comment; it has no docstrings."""
    sources = [(EXAMPLE / name).read_text(encoding="utf-8") for name in FILES[:3]]
    lines = [line for source in sources for line in source.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert 30 < len(lines) < 40


def undocumented(text: str) -> list[str]:
    """Hooks, their arguments, what a spec and a request hold, and axes, as far as the page does not name them."""
    wanted = {axis: f"| `{axis}` | {words} |" for axis, words in AXES.items()}
    for name, hook in vars(hooks).items():
        if name.startswith("dilated_attention_"):
            arguments = [*inspect.signature(hook).parameters]
            wanted[name] = f"### `{name}({', '.join(arguments)})`"
            section = text.partition(wanted[name])[2].partition("\n#")[0]
            for argument in arguments:
                if f"- `{argument}`" not in section:
                    wanted[f"{name}: {argument}"] = f"- `{argument}` below {name}"
    for cls in (BackendSpec, PatternSpec, Request):
        wanted |= {f"{cls.__name__}.{field.name}": f"- `{field.name}`" for field in attrs.fields(cls)}
    return [name for name, words in wanted.items() if words not in text]


def test_every_hook_argument_field_and_axis_is_documented() -> None:
    assert undocumented(DOCS) == []


def test_what_is_missing_from_the_page_is_seen() -> None:
    assert undocumented(DOCS.replace("- `priority`", "")) == ["BackendSpec.priority"]
    assert undocumented(DOCS.replace("| `gqa` |", "")) == ["gqa"]
    assert undocumented(DOCS.replace("- `candidates`", "")) == ["dilated_attention_rank_backends: candidates"]
    gone = undocumented(DOCS.replace("### `dilated_attention_patterns()`", ""))
    assert gone == ["dilated_attention_patterns"]


def test_the_contract_is_frozen() -> None:
    """What api_version 1 promises: these names, and for what is added later a default."""
    fields = {
        BackendSpec: ("name", "target", "api_version", "priority", "capabilities", "requires"),
        PatternSpec: ("kind", "target", "api_version"),
        Request: ("config", "pattern", "device", "needs"),
        Refusal: ("code", "required", "actual", "remedy"),
        DensePiece: ("is_causal", "scale", "deterministic"),
        LayoutPiece: ("layout", "scale", "deterministic", "dropout_p", "seed"),
    }
    for cls, names in fields.items():
        found = attrs.fields_dict(cls)
        assert tuple(found)[: len(names)] == names
        assert all(field.default is not attrs.NOTHING for name, field in found.items() if name not in names)
    takes: dict[Callable[..., Any], str] = {
        hooks.dilated_attention_backends: "",
        hooks.dilated_attention_patterns: "",
        hooks.dilated_attention_rank_backends: "request candidates",
        Backend.refusals: "self request",
        Backend.pin: "self request",
        Backend.build: "self request",
        KernelBackend.refusals: "self request",
        KernelBackend.pin: "self request",
        KernelBackend.build: "self request",
        DenseKernel.forward: "self query key value piece",
        DenseKernel.backward: "self dout query key value out lse piece",
        LayoutKernel.forward: "self query key value piece",
        LayoutKernel.backward: "self dout query key value out lse piece dlse",
    }
    for function, arguments in takes.items():
        assert " ".join(inspect.signature(function).parameters) == arguments


def test_the_page_knows_the_checks_of_the_kit() -> None:
    from dilated_attention.registry.conformance.checks import CHECKS

    assert [check.name for check in CHECKS if f"| `{check.name}` | {check.title} |" not in DOCS] == []


def test_the_manifest_imports_no_torch() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import toy_attention.manifest; print('torch' in sys.modules)"
    assert run(None, "-c", code, str(EXAMPLE)).stdout.strip() == "False"
