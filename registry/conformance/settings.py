"""What the kit is asked to do, beside which backend it is asked about."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from ...core.checks import non_negative_int
from ...core.errors import ConfigError

if TYPE_CHECKING:
    from ...core.pattern import Pattern
    from ..discovery import Registry


@attrs.frozen(kw_only=True, eq=False)
class KitSettings:
    """How to test a backend.

    Attributes:
        registry: where it is registered; by default the process's own registry.
        device: the one to test on; by default one of each type that is declared and is here.
        quick: a smaller grid, of seconds instead of minutes.
        patterns: further patterns to test with, or mappings of them (`{"kind": ...}`), beside the kit's own.
        options: of the backend, as `backend_options` has them.
        large: also try tensors of more than 2**31 elements, which takes several GB.
        drawn: so many cases more, whose pattern, lengths, heads and dtype are drawn at random; those that the backend
            does not take fall away.
        seed: of what is drawn. A seed and a number give the same case, however many are drawn.
    """

    registry: Registry | None = None
    device: str | None = None
    quick: bool = False
    patterns: Sequence[Pattern | Mapping[str, Any]] = ()
    options: Mapping[str, Any] | None = None
    large: bool = False
    drawn: int = attrs.field(default=0, validator=non_negative_int)
    seed: int = attrs.field(default=0, validator=non_negative_int)


DEFAULTS: Final = KitSettings()


def read_pattern(text: str, *, flag: str) -> dict[str, Any]:
    """A pattern as a TOML table in one line.

    Raises:
        ConfigError: it is none; `flag` is how the caller was given it.
    """
    shown = text if len(text) <= 200 else f"{text[:197]}..."
    wanted = f'{flag} must be a TOML table such as {{kind = "full"}}, got {shown!r}'
    try:
        found = tomllib.loads(f"pattern = {text}")["pattern"]
    except (ValueError, RecursionError) as error:  # as of `read_mapping`
        raise ConfigError(f"{wanted}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(wanted)
    return found
