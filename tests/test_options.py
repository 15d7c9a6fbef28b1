"""`python -m benchmarks.options` has a row for every option, docs/performance_log.md for both machines."""

from __future__ import annotations

import attrs
import pytest

from dilated_attention import AttentionConfig, Limits

from .distributions import ROOT

# What is computed, and where: no options that cost or give anything beside it.
COMPUTED = {"num_heads", "head_dim", "num_kv_heads", "pattern", "is_causal", "scale", "dtype", "device"}
# What other tables are about: `bench` (backends and kernels) and `bench --scaling` (ranks).
ELSEWHERE = {"backend", "backend_options", "context_parallel", "limits"}
OPTIONS = {field.name for field in attrs.fields(AttentionConfig)} - COMPUTED - ELSEWHERE


@pytest.mark.parametrize("path", ["benchmarks/option_rows.py", "docs/performance_log.md"])
def test_every_option_and_limit_has_a_row(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    tables = 2 if path.endswith(".md") else 1
    assert {
        "dropout_p", "tensor_layout", "seq_len", "requires_grad", "deterministic", "activation_checkpointing", "varlen",
    } == OPTIONS  # fmt: skip
    for name in OPTIONS:
        assert text.count(f"`{name}=") >= tables, name
    for field in attrs.fields(Limits):
        assert text.count(f"`Limits.{field.name}`") >= tables, field.name
