"""Histories for the tests of the dashboard, and the page as a browser's parser sees it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs

from dilated_attention.bench.history import Machine, Result, Run

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '"><img src=x onerror="window.hacked = 3">',
    "<!-- <script>",
    "$$\\href{https://example.invalid}{x}$$",
    "{{ 7 * 7 }} {% raw %} @x{safe}",
    "javascript:window.hacked=4",
    "\u202ereversed \u2028 \x00 \ud7ff 🧨" + "long " * 1000,
)


def result(**fields: Any) -> Result:
    """A result whose interval is 10 % of its median, unless `fields` says otherwise."""
    median = float(fields.pop("median_ms", 100.0))
    known: dict[str, Any] = {
        "case": "longnet-16k",
        "backend": "sdpa",
        "kernel": "aten flash for CPU",
        "phase": "forward",
        "seq_len": 16_384,
        "head_dim": 64,
        "dtype": "float32",
        "is_causal": True,
        "rounds": 7,
        "median_ms": median,
        "low_ms": median * 0.95,
        "high_ms": median * 1.05,
        "tflops": 10 / median,
        "floor_share": min(1.0, 50 / median),
        "peak_bytes": 52_428_800,
        "error": 3e-7,
    }
    return Result(**known | fields)


def run_of(index: int, results: Iterable[Result], **fields: Any) -> Run:
    """The run number `index`, an hour after the one before."""
    known: dict[str, Any] = {
        "when": f"2026-{1 + index // 672:02}-{1 + index // 24 % 28:02}T{index % 24:02}:00:00Z",
        "commit": f"{index:040x}",
        "modified": False,
        "version": "0.1.0",
        "machine": Machine(device="cpu", name="AMD EPYC", cores=2, threads=2),
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "floor_tflops": 0.2,
        "results": tuple(results),
    }
    return Run(**known | fields)


def history(runs: int, cases: Iterable[str] = ("longnet-16k", "bigbird-16k")) -> list[Run]:
    """Runs of two backends and two peers in both phases; the last twentieth of sdpa's forward is a quarter slower."""
    draw = random.Random(0)
    found = []
    for index in range(runs):
        results = []
        for case in cases:
            for backend, median, peer in (
                ("sdpa", 430, False),
                ("triton", 250, False),
                ("dense", 2300, True),
                ("official", 790, True),
            ):
                for phase, factor in (("forward", 1.0), ("training", 3.5)):
                    slow = 1.25 if (backend, phase) == ("sdpa", "forward") and index >= runs * 0.95 else 1.0
                    time = median * factor * slow * draw.uniform(0.99, 1.01)
                    results.append(result(case=case, backend=backend, phase=phase, peer=peer, median_ms=time))
        found.append(run_of(index, results))
    return found


def write(path: Path, runs: Iterable[Run]) -> Path:
    """The file that `bench --save` would have made."""
    path.write_text("".join(run.to_json() + "\n" for run in runs), encoding="utf-8")
    return path


@attrs.define
class _Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""


class Page(HTMLParser):
    """The elements of a page in their order, each with the text directly inside it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[_Element] = []
        self._open: list[_Element] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = _Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in ("meta", "link", "input", "img", "br"):
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].text += data

    def all(self, tag: str) -> list[_Element]:
        """The elements with this tag."""
        return [element for element in self.elements if element.tag == tag]

    def texts(self, tag: str) -> list[str]:
        """What stands in them, without the space around."""
        return [element.text.strip() for element in self.all(tag)]
