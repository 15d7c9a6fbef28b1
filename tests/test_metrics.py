"""The collector: what Prometheus reads are the counters, under names that follow its conventions."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dilated_attention import Dilated, build_attention, counters_of
from dilated_attention.metrics import Collector


def samples(collector: Collector) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the text by its name and labels."""
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    read = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in read}
    assert len(found) == len(read)  # no series twice
    for family in families:
        assert family.documentation
        assert family.type == "counter" or not family.name.endswith("_total")
    return found


def test_the_text_says_what_the_counters_say() -> None:
    attention = build_attention(pattern=Dilated((32, 64), (1, 2)), num_heads=2, head_dim=16, scale=0.123)
    attention(*torch.randn(3, 2, 128, 2, 16).requires_grad_()).sum().backward()
    counters = attention.counters()
    found = samples(Collector(attention))
    labels = {("plan", attention.plan.digest), ("backend", "sdpa")}

    def value(name: str, **more: str) -> float:
        return found.pop((f"dilated_attention_{name}", frozenset(labels | set(more.items()))))

    for which, of_pass in (("forward", counters.forward), ("backward", counters.backward)):
        more = {"pass": which}
        assert value("calls_total", **more) == of_pass.calls == 1
        assert value("tokens_total", **more) == of_pass.tokens == 256
        assert value("flops_total", **more) == of_pass.flops > 0
        assert value("exchange_bytes_total", direction="sent", **more) == 0
        assert value("exchange_bytes_total", direction="received", **more) == 0
    assert value("layout_cache_hits_total") == counters.layouts.hits == 1
    assert value("layout_cache_misses_total") == counters.layouts.misses == 1
    assert value("layout_cache_evictions_total") == 0
    assert value("layout_cache_bytes") == counters.layouts.nbytes > 0
    assert value("layout_cache_entries") == 1
    assert value("lowering_seconds_total") == counters.layouts.lowering_s > 0
    assert value("exchange_header_bytes_total") == 0
    assert value("exchange_wait_seconds_total") == 0
    assert found == {}


def test_without_modules_it_reports_every_living_attention() -> None:
    attention = build_attention(num_heads=2, head_dim=16, scale=0.456)
    attention(*torch.randn(3, 1, 8, 2, 16))
    plans = {dict(labels)["plan"] for _, labels in samples(Collector())}
    assert plans == {counters.plan for counters in counters_of()}
    assert attention.plan.digest in plans


def test_without_the_client_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "prometheus_client"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dilated_attention.metrics")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dilated-attention\[metrics\]'"):
        importlib.import_module("dilated_attention.metrics")
