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


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def anywhere(text: str) -> str:
    return OF_THE_MACHINE.sub("", text)


@pytest.mark.skipif(
    torch.cuda.is_available() or any(map(find_spec, ("xformers", "flash_attn", "flash_attn_interface"))),
    reason="other backends fit here than on the machine that is shown",
)
def test_the_example_prints_what_is_shown() -> None:
    (example,), shown = blocks("python"), blocks("text")
    assert len(shown) == 2
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert anywhere(printed.getvalue()) == anywhere("".join(shown))  # the first lines, and the rest, which is folded
    assert "chosen" in anywhere(printed.getvalue())


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("https://") or (Path(__file__).resolve().parents[1] / target).exists()
