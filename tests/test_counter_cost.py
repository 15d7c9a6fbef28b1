"""`python -m benchmarks.counter_cost`: what it strips computes the same and counts no more, and what it times."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.counter_cost import strip, timed_watching, within
from benchmarks.detection import copied_checkout
from dilated_attention import Dilated, build_attention
from dilated_attention.core import composer, tracing
from dilated_attention.core.counters import Tally


def step() -> list[float]:
    """A gradient's norm and what was counted, by the code that is imported; a copy's process is given this text."""
    import torch

    from dilated_attention import Dilated, Local, build_attention

    query = torch.linspace(-1, 1, 64 * 2 * 16).view(1, 64, 2, 16).requires_grad_()
    attention = build_attention(pattern=Dilated((16, 64), (1, 4)) | Local(3), like=query, is_causal=True)
    attention(query, query, query).square().sum().backward()
    counters = attention.counters()
    calls = [counters.forward.calls, counters.backward.calls, counters.forward.flops, counters.layouts.hits]
    assert query.grad is not None
    return [float(query.grad.norm()), *calls]


def step_of(tree: Path) -> list[float]:
    """What `step` returns, computed by the code of `tree`."""
    code = f"import json\n{inspect.getsource(step)}\nprint(json.dumps(step()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[float] = json.loads(done.stdout)
    return found


def test_a_stripped_copy_computes_the_same_and_counts_nothing(tmp_path: Path) -> None:
    tree = copied_checkout(tmp_path)
    norm, *counted = step()
    assert all(counted)
    assert strip(tree) > 10
    assert strip(tree) == 0
    assert step_of(tree) == [norm, 0, 0, 0, 0]


def test_every_entry_into_the_watching_code_of_a_pass_is_timed() -> None:
    query = torch.randn(1, 64, 2, 16, requires_grad=True)
    attention = build_attention(pattern=Dilated((16, 64), (1, 4)), like=query, is_causal=True)
    plain = (tracing.span, vars(composer)["span"], Tally.add)
    with timed_watching() as spent:
        attention(query, query, query).sum().backward()
    # Counted both ways; ranges of lowering, the backward and two branches each way, each made, entered and left.
    assert len(spent) == 2 + 3 * (1 + 1 + 2 + 2)
    assert min(spent) > 0
    assert (tracing.span, vars(composer)["span"], Tally.add) == plain
    row = within(lambda: attention(query, query, query), 3)
    assert row["entries"] == 1 + 3 * 2
    assert 0 < row["watching_us"] < row["pass_s"] * 1e6
    assert 0 < row["largest_share"] < 1
