"""Mappings from files turned into attrs classes: strict about keys, silent about values.

A class's own validators judge its values and name the allowed ones, so nothing is coerced on the way: `"8"` does not
become 8, nor 1 True.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, get_args, get_origin

import attrs

from .checks import did_you_mean
from .errors import ConfigError, DilatedAttentionError

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: object, *, name: str) -> T:
    """Build the attrs class `cls` from `mapping`; `name` is what messages call it.

    Raises:
        ConfigError: for an unknown key (naming the nearest right one), a missing key, or a value that does not fit.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{name} must be a mapping of names to values, got {mapping!r} ({type(mapping).__name__})")
    check_keys(mapping, keys_of(cls), name=name)
    missing = [key for key in required_keys(cls) if key not in mapping]
    if missing:
        raise ConfigError(f"{name} needs {', '.join(missing)}; got {', '.join(map(str, mapping)) or 'nothing'}")
    try:
        structured: T = _structure_function(cls)(mapping, cls)
    except DilatedAttentionError:
        raise
    except (TypeError, ValueError) as error:  # a value of another shape than the field's type, such as 3 for a list
        raise ConfigError(f"{name}: {error}, in {dict(mapping)!r}") from error
    return structured


def check_keys(mapping: Mapping[Any, object], allowed: Collection[str], *, name: str) -> None:
    """Raise `ConfigError` for a key of `mapping` that is not in `allowed`, naming the nearest one or else all."""
    for key in mapping:
        if key not in allowed:
            near = did_you_mean(str(key), allowed)
            listed = "" if near else f"; it takes {', '.join(allowed) or 'nothing'}"
            raise ConfigError(f"{name} has no {str(key)!r}{near}{listed}")


def keys_of(cls: type[object]) -> tuple[str, ...]:
    """The names that `cls` takes, in order."""
    return tuple(field.alias or field.name for field in attrs.fields(cls) if field.init)  # type: ignore[arg-type]


def required_keys(cls: type[object]) -> tuple[str, ...]:
    """The names that `cls` cannot do without."""
    fields = attrs.fields(cls)  # type: ignore[arg-type]
    return tuple(field.alias or field.name for field in fields if field.init and field.default is attrs.NOTHING)


class NamesChecked:
    """A base of attrs classes: a wrong name among the arguments is told the nearest right one, as in a file."""

    __slots__ = ()

    def __new__(cls, *args: object, **fields: object) -> Self:
        """Raise `ConfigError` for a name that the class does not take."""
        cls._check_names(fields)
        return super().__new__(cls)

    @classmethod
    def _check_names(cls, fields: Mapping[str, object]) -> None:
        known = keys_of(cls) if attrs.has(cls) else tuple(fields)
        for name in fields:
            if name not in known:
                takes = ", ".join(known) or "none"
                raise ConfigError(
                    f"{cls.__name__} has no parameter {name!r}{did_you_mean(name, known)}; it takes {takes}"
                )


_made: dict[type, Callable[[Mapping[Any, object], Any], Any]] = {}


def _structure_function(cls: type[T]) -> Callable[[Mapping[Any, object], Any], Any]:
    """Generated once a class, which takes cattrs a millisecond."""
    from cattrs.gen import make_dict_structure_fn

    if cls not in _made:
        # No detailed validation: our own ConfigErrors come through as they are instead of in a group.
        _made[cls] = make_dict_structure_fn(
            cls, _converter(), _cattrs_detailed_validation=False, _cattrs_prefer_attrib_converters=True
        )
    return _made[cls]


@functools.cache
def _converter() -> Converter:
    from cattrs import Converter

    converter = Converter(
        detailed_validation=False, prefer_attrib_converters=True, structure_fallback_factory=lambda _: _as_it_is
    )
    for plain in (bool, int, float, str):  # cattrs would coerce "8" to 8
        converter.register_structure_hook(plain, _as_it_is)
    converter.register_structure_hook_func(_is_left_to_validators, _as_it_is)
    converter.register_structure_hook_func(attrs.has, _nested)
    return converter


def _as_it_is(value: Any, _: object) -> Any:
    return value


def _nested(value: object, cls: type[Any]) -> Any:
    return value if isinstance(value, cls) else from_mapping(cls, value, name=cls.__name__)


def _is_left_to_validators(kind: Any) -> bool:
    """Anything, mappings, literals, and unions other than `X | None`."""
    if kind in (object, Any):
        return True
    origin, parts = get_origin(kind), get_args(kind)
    is_union = origin in (typing.Union, types.UnionType)
    return origin in (Mapping, dict, Literal) or (is_union and not (len(parts) == 2 and type(None) in parts))
