"""What Triton needs of a machine: where it is not there, what is compiled by Triton is refused."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from dilated_attention import Local
from dilated_attention.backends import libraries
from dilated_attention.registry.discovery import default_registry
from dilated_attention.registry.selection import judge

from .kernel_kit import request


@pytest.mark.parametrize("missing", ["triton", "compiler", "headers", None])
def test_what_triton_compiles_with(missing: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    folder = tmp_path / "none" if missing == "headers" else tmp_path
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    paths = {"posix_local": tmp_path / "local", "posix_prefix": folder}
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(paths[scheme])})
    monkeypatch.setattr(shutil, "which", lambda name: None if missing == "compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if missing == "triton" else object())
    assert libraries.can_compile.__wrapped__() is (missing is None)


@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_without_it_they_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, listed = request(pattern=Local(64)), default_registry().backends[backend]
    monkeypatch.setattr(libraries, "can_compile", lambda: True)
    assert judge(listed, asked).accepts
    monkeypatch.setattr(libraries, "can_compile", lambda: False)
    (refusal,) = judge(listed, asked).refusals
    assert refusal.code == "not_installed"
    assert "gcc or clang" in str(refusal)
