"""What the page says of this machine and of a configuration: the plan, the ring's costs, the pictures of patterns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from ..core.config import AttentionConfig
from ..core.errors import ConfigError
from ..core.pattern import Full, Pattern
from ..core.plan import AttentionPlan
from ..exchange.preflight import Preflight
from ..registry.build import explain, preflight
from ..registry.discovery import Registry
from ..registry.patterns import resolve_pattern
from .tiles import Picture, picture

RANKS: Final = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# LongNet at the length at which it is measured on cards.
DEFAULT_CONFIG: Final[Mapping[str, Any]] = {
    "num_heads": 8,
    "head_dim": 64,
    "is_causal": True,
    "seq_len": 131_072,
    "pattern": {
        "kind": "dilated",
        "segment_lengths": [2048, 4096, 8192, 16_384, 32_768],
        "dilation_rates": [1, 2, 4, 8, 16],
    },
}
GALLERY_LENGTH: Final = 4096


@attrs.frozen
class RingCost:
    """What a ring of some size costs, or why it was not simulated.

    Attributes:
        ranks: how many.
        cost: of a forward and a backward pass.
        cause: why there is none.
    """

    ranks: int
    cost: Preflight | None
    cause: str = ""

    def most(self, name: str) -> int:
        """The largest of all ranks' loads."""
        assert self.cost is not None
        return max(int(getattr(load, name)) for load in self.cost.loads)


def make_plan(fields: Mapping[str, Any], registry: Registry) -> AttentionPlan:
    """The plan of a configuration on this machine.

    Raises:
        ConfigError: for a configuration that no backend could honour.
    """
    return explain(dict(fields), registry=registry)


def ring_costs(fields: Mapping[str, Any], registry: Registry) -> Iterator[RingCost]:
    """The costs of every number of ranks in `RANKS`, batch 1."""
    alone = {name: value for name, value in fields.items() if name != "context_parallel"}
    for ranks in RANKS:
        try:
            yield RingCost(ranks, preflight(alone, ranks=ranks, registry=registry))
        except ConfigError as error:
            yield RingCost(ranks, None, str(error))


def pictures(plan: AttentionPlan, registry: Registry) -> Iterator[Picture | tuple[str, str]]:
    """The configured pattern at its length, then well-known ones; a name and a cause where one cannot be drawn."""
    config = AttentionConfig.from_dict(plan.config)
    pattern = resolve_pattern(config.pattern, registry)
    yield _tried("This configuration", pattern, config, config.seq_len or GALLERY_LENGTH)
    for name, known in _gallery():
        yield _tried(name, known, config, GALLERY_LENGTH)


def _tried(name: str, pattern: Pattern, config: AttentionConfig, length: int) -> Picture | tuple[str, str]:
    try:
        return picture(name, pattern, length=length, num_heads=config.num_heads, is_causal=config.is_causal)
    except ConfigError as error:
        return name, str(error)


def _gallery() -> Iterator[tuple[str, Pattern]]:
    from .. import Dilated, Global, Local, Random, Strided
    from ..presets import bigbird, longformer

    yield "Full()", Full()
    yield "Local(256)", Local(256)
    yield "Local(256) | Global(128)", Local(256) | Global(128)
    yield "Strided(64)", Strided(64)
    yield "Dilated((512, 1024, 2048, 4096), (1, 2, 4, 8))", Dilated((512, 1024, 2048, 4096), (1, 2, 4, 8))
    yield "Random(8, 64)", Random(8, 64)
    yield "presets.longformer()", longformer()
    yield "presets.bigbird()", bigbird()
