"""docs/observability.md is true: its blocks of Python run, one after the other, and say what they promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dilated_attention.core.counters import AttentionCounters, CacheCounters, PassCounters

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "observability.md").read_text()


def test_the_page_runs() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/observability.md", "exec"), names)
    assert len(blocks) == 4
    counters = names["counters"]
    assert (counters.forward.calls, counters.forward.tokens, counters.backward.calls) == (3, 3 * 1024, 3)
    assert (counters.layouts.hits, counters.layouts.misses) == (5, 1)
    plan = names["attention"].plan
    assert plan.explain().splitlines()[3].endswith(f"; plan {counters.plan}")
    assert len(names["counters_of"](names["model"])) == 1
    assert counters.plan in {each.plan for each in names["everything"]}
    for which in ("forward", "backward"):
        assert f"dilated_attention sdpa {which} (plan {plan.digest})" in names["names"]
    assert {"branch w=256 r=1", "branch w=512 r=2"} <= names["names"]


def test_the_page_names_every_metric_and_counter() -> None:
    from dilated_attention.metrics import Collector

    for metric in Collector().collect():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        short = re.sub(r"^dilated_attention_(layout_cache_)?", "", name)
        assert name in PAGE or f"..._{short}" in PAGE, name
    for kind in (AttentionCounters, CacheCounters, PassCounters):
        for field in vars(kind)["__slots__"]:
            assert field.startswith("_") or re.search(rf"[`.]{field}[`.]", PAGE), field
