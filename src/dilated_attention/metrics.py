"""Counters of attentions for Prometheus, through its own client library (extra `metrics`).

from prometheus_client import REGISTRY
from dilated_attention.metrics import Collector

REGISTRY.register(Collector())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from .core.model_counters import counters_of

try:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector as BaseCollector
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dilated_attention.metrics needs prometheus-client: pip install 'dilated-attention[metrics]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from torch import nn

    from .core.counters import AttentionCounters, PassCounters

_PLAN: Final = ("plan", "backend")
# Name, help, and the value of a plan's counters.
_TOTALS: Final[tuple[tuple[str, str, Callable[[AttentionCounters], float]], ...]] = (
    ("layout_cache_hits", "Passes that found their length lowered.", lambda c: c.layouts.hits),
    ("layout_cache_misses", "Layouts that were lowered.", lambda c: c.layouts.misses),
    ("layout_cache_evictions", "Layouts dropped to make room for others.", lambda c: c.layouts.evictions),
    ("lowering_seconds", "Time spent lowering patterns.", lambda c: c.layouts.lowering_s),
    ("exchange_header_bytes", "Headers sent to other ranks.", lambda c: c.header_bytes),
    ("exchange_wait_seconds", "Time spent waiting for other ranks' rows.", lambda c: c.waited_s),
)
_GAUGES: Final[tuple[tuple[str, str, Callable[[AttentionCounters], float]], ...]] = (
    ("layout_cache_bytes", "Layouts that are kept, in bytes.", lambda c: c.layouts.nbytes),
    ("layout_cache_entries", "Layouts that are kept.", lambda c: c.layouts.entries),
)
_OF_A_PASS: Final[tuple[tuple[str, str, Callable[[PassCounters], float]], ...]] = (
    ("calls", "Forward and backward passes.", lambda p: p.calls),
    ("tokens", "Queries of these passes, padding left out.", lambda p: p.tokens),
    ("flops", "Floating-point operations that the layouts needed.", lambda p: p.flops),
)


class Collector(BaseCollector):
    """Reads the counters whenever Prometheus asks for them; nothing is kept or added up here.

    Args:
        modules: models or attentions to report; none: all attentions that are alive in this process at that time.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules

    def collect(self) -> Iterator[Metric]:
        """One family a counter, labelled with the plan's digest and its backend, and the pass where there are two."""
        known = counters_of(*self._modules)
        for name, text, of_pass in _OF_A_PASS:
            family = CounterMetricFamily(f"dilated_attention_{name}", text, labels=(*_PLAN, "pass"))
            for which, counters, labels in _passes(known):
                family.add_metric((*labels, which), of_pass(counters))
            yield family
        moved = CounterMetricFamily(
            "dilated_attention_exchange_bytes",
            "Rows of keys, values and gradients moved between ranks.",
            labels=(*_PLAN, "pass", "direction"),
        )
        for which, counters, labels in _passes(known):
            moved.add_metric((*labels, which, "sent"), counters.sent_bytes)
            moved.add_metric((*labels, which, "received"), counters.received_bytes)
        yield moved
        for name, text, of_plan in _TOTALS:
            yield _filled(CounterMetricFamily(f"dilated_attention_{name}", text, labels=_PLAN), known, of_plan)
        for name, text, of_plan in _GAUGES:
            yield _filled(GaugeMetricFamily(f"dilated_attention_{name}", text, labels=_PLAN), known, of_plan)


def _passes(known: Sequence[AttentionCounters]) -> Iterator[tuple[str, PassCounters, tuple[str, str]]]:
    """Both passes of each plan, with its labels."""
    for counters in known:
        labels = counters.plan, counters.backend
        yield "forward", counters.forward, labels
        yield "backward", counters.backward, labels


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily,
    known: Sequence[AttentionCounters],
    of_plan: Callable[[AttentionCounters], float],
) -> Metric:
    for counters in known:
        family.add_metric((counters.plan, counters.backend), of_plan(counters))
    return family
