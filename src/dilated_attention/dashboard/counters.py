"""A run's counters from a JSON file: numbers by name, flat or nested by plan, whatever their names are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import attrs

from ..core.errors import ConfigError
from ..core.explain import amount
from .series import short

LIMIT_BYTES: Final = 1 << 20
_DEPTH: Final = 8
_LARGEST: Final = 1 << 63


@attrs.frozen
class Counter:
    """One number.

    Attributes:
        group: the names of the mappings that it is in, joined; empty at the top.
        name: its own.
        value: as it is in the file.
    """

    group: str
    name: str
    value: float | str | None

    @property
    def title(self) -> str:
        """Its name as words, without the unit that the value carries."""
        words = self.name.replace("_", " ")
        return short(words.removesuffix(" s").removesuffix(" seconds"))

    @property
    def text(self) -> str:
        """Its value for people, with the unit that its name ends in."""
        if self.value is None or isinstance(self.value, str | bool):
            return "-" if self.value is None else short(str(self.value))
        words = self.name.lower().split("_")
        if {"bytes", "nbytes"} & {*words}:
            return amount(self.value, "B")
        if "flops" in words:
            return amount(self.value, "FLOP")
        if words[-1] in ("s", "seconds"):
            return f"{self.value:.4g} s"
        return self.exact

    @property
    def exact(self) -> str:
        """Its value with all digits."""
        return f"{self.value:,}" if isinstance(self.value, int | float) else short(str(self.value))


@attrs.frozen
class Counters:
    """A file of counters.

    Attributes:
        rows: every number.
        plans: the objects that counters of one plan are.
    """

    rows: tuple[Counter, ...]
    plans: tuple[Mapping[str, Any], ...]

    def groups(self) -> list[tuple[str, list[Counter]]]:
        """The rows by the mappings that they are in, in the order of the file."""
        found: dict[str, list[Counter]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return list(found.items())


def read_counters(path: Path) -> Counters:
    """The counters of a file: one object, as `json.dumps(attention.counters().to_dict())` writes it, or several.

    Raises:
        ConfigError: a file that cannot be read, is larger than `LIMIT_BYTES`, or is no JSON object of numbers, words
            and further such objects, and no list of those.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the counters {str(path)!r}: {error.strerror or error}") from error
    if len(content) > LIMIT_BYTES:
        raise ConfigError(f"the counters {str(path)!r} are larger than {LIMIT_BYTES:,} bytes, the most that is read")
    try:
        found: object = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the counters {str(path)!r} are no JSON: {error}") from error
    plans: list[Any] = found if isinstance(found, list) else [found]
    for plan in plans:
        if not isinstance(plan, dict):
            raise ConfigError(
                f"the counters {str(path)!r} must be a JSON object or a list of such, got a {type(plan).__name__}"
            )
    named = [(plan, (_plan_name(plan, index),) if isinstance(found, list) else ()) for index, plan in enumerate(plans)]
    return Counters(tuple(row for plan, name in named for row in _walk(plan, name, str(path))), tuple(plans))


def _plan_name(plan: Mapping[str, Any], index: int) -> str:
    """By its own words where it has such."""
    words = [word[:12] for word in (plan.get("backend"), plan.get("plan")) if isinstance(word, str)]
    return " ".join([f"{index + 1}.", *words])


def _walk(found: Mapping[str, Any], inside: tuple[str, ...], path: str) -> Iterator[Counter]:
    if len(inside) > _DEPTH:
        raise ConfigError(f"the counters {path!r} are nested deeper than {_DEPTH} objects")
    group = " › ".join(short(name) for name in inside)
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*inside, name), path)
        elif value is None or isinstance(value, str) or _is_number(value):
            yield Counter(group, name, value)
        else:
            shown = short(repr(value)[:200])
            raise ConfigError(
                f"the counters {path!r} must hold finite numbers below 2**63 and objects of such, got {shown} at "
                f"{short(name)!r}"
            )


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return True
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < _LARGEST


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
