"""Fixtures that several files of tests use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dilated_attention.cli import main

from .distributions import installed

Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run the command in this process, which has torch already; what only a process shows is run in one."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["dilated-attention", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return call


@pytest.fixture
def invoke_at(invoke: Invoke) -> Invoke:
    """`invoke` where the distributions in a folder are installed too, as a new process would find them."""

    def call(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        with installed(site):
            return invoke(*arguments)

    return call
