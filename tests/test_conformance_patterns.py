"""The conformance kit against patterns that say something wrong about themselves: what an author is told to run."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

from dilated_attention import Pattern
from dilated_attention.core.geometry import Geometry
from dilated_attention.registry import PatternSpec, hookimpl
from dilated_attention.registry.conformance import Kit, KitSettings, Outcome

from .registries import registry_with

Ints = NDArray[np.int64]


@attrs.frozen
class Near(Pattern):
    """Right: five tokens to either side."""

    kind: ClassVar[str] = "near"
    heads_alike: ClassVar[bool] = True

    def multiplicity(self, query: Ints, key: Ints, head: Ints, geometry: Geometry) -> Ints:
        near: Ints = np.abs(query - key) <= 5 + 0 * head
        return near.astype(np.int64)

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind}


@attrs.frozen
class Thirds(Near):
    """Says that blocks at one distance are equal, though every third key is left out wherever a block begins."""

    kind: ClassVar[str] = "thirds"

    def multiplicity(self, query: Ints, key: Ints, head: Ints, geometry: Geometry) -> Ints:
        kept: Ints = (key % 3 != 0).astype(np.int64)
        return super().multiplicity(query, key, head, geometry) * kept

    def block_signature(self, query_low: Ints, key_low: Ints, block_size: int, head: int, geometry: Geometry) -> Ints:
        return (query_low - key_low)[:, None]


@attrs.frozen
class Forgetful(Near):
    """Says that later queries reach two tokens back, and they see five."""

    kind: ClassVar[str] = "forgetful"

    def reachable(self, key: Ints, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        return key >= position - 2


KINDS = (Near, Thirds, Forgetful)


class Plugin:
    @hookimpl
    def dilated_attention_patterns(self) -> list[PatternSpec]:
        return [PatternSpec(kind=cls.kind, target=f"{__name__}:{cls.__name__}") for cls in KINDS]


def kit_with(cls: type[Near]) -> Kit:
    registry = registry_with("nears", Plugin)
    return Kit("sdpa", KitSettings(device="cpu", quick=True, registry=registry, patterns=[{"kind": cls.kind}]))


def outcomes(cls: type[Near], check: str) -> list[Outcome]:
    """What comes of a check on the cases of the pattern that was added."""
    trials = [trial for trial in kit_with(cls).trials() if trial.check.name == check]
    return [trial.run() for trial in trials if trial.case and trial.case.pattern_name == cls.kind]


@pytest.mark.parametrize(("cls", "check"), [(Thirds, "out"), (Forgetful, "decoding")])
def test_the_quick_grid_finds_what_is_wrong(cls: type[Near], check: str) -> None:
    assert all(outcome.passed for outcome in outcomes(Near, check))
    assert not all(outcome.passed for outcome in outcomes(cls, check))
