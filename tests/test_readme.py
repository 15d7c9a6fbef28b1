"""README's first screen is true: its example runs and prints what is shown."""

from __future__ import annotations

import contextlib
import io
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
# The machine and the installed releases are the reader's own.
OF_THE_MACHINE = re.compile(r" on cpu.*?, with|^  with .*$", re.MULTILINE)


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def anywhere(text: str) -> str:
    return OF_THE_MACHINE.sub("", text)


@pytest.mark.skipif(
    torch.cuda.is_available() or any(map(find_spec, ("xformers", "flash_attn", "flash_attn_interface"))),
    reason="other backends fit here than on the machine that is shown",
)
def test_the_example_prints_what_is_shown() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block("python"), "README.md", "exec"), {})
    assert anywhere(printed.getvalue()) == anywhere(block("text"))
    assert "chosen" in anywhere(printed.getvalue())


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("https://") or (Path(__file__).resolve().parents[1] / target).exists()
