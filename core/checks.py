"""Validation shared by the value classes: each check raises `ConfigError` with the actual and the allowed value."""

from __future__ import annotations

import copy
import difflib
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from .errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What patterns may be told: more positions than any sequence has, of which sums and products with strides stay within
# 64 bits; and blocks, of which a mask still finds room.
MOST_POSITIONS: Final = 1 << 40
MOST_IN_BLOCK: Final = 1 << 16
MOST_NESTED: Final = 64  # mappings and lists in each other; Python itself ends at some hundreds


def is_int(value: object) -> bool:
    """True for a plain integer; `True` and `False` are not counts."""
    return isinstance(value, int) and not isinstance(value, bool)


def plain_int(value: object) -> object:
    """An integer of another type, such as numpy's, as an `int`; anything else, `True` and `False` too, as it is."""
    if type(value) is int or isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return value
    return int(value)


def as_number(value: object) -> float | None:
    """A number as an `int` or `float`, None for what is none; `np.float32(0.1)` is 0.1, as it is written."""
    if isinstance(value, numbers.Real) and not isinstance(value, float | numbers.Rational):
        return float(str(value))
    plain = float(value) if isinstance(value, float) else plain_int(value)
    return plain if isinstance(plain, int | float) and not isinstance(plain, bool) else None


def copied_plainly(value: Any, depth: int = 0) -> Any:
    """A deep copy for JSON, in which numbers of numpy are plain, and paths text; mappings become dicts."""
    if depth > MOST_NESTED:
        raise ConfigError(f"mappings and lists in a config may be nested {MOST_NESTED} deep, these are deeper")
    if isinstance(value, Mapping):
        return {key: copied_plainly(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        found = [copied_plainly(each, depth + 1) for each in value]
        return found if isinstance(value, list) else tuple(found)
    if (number := as_number(value)) is not None:
        return number
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if type(value).__module__ == "numpy" else copy.deepcopy(value)


def keep_plain(instance: object, attribute: attrs.Attribute[Any], plain: object) -> None:
    """For attrs validators: put a plain number where numpy's was given, which neither prints like it nor goes to JSON.

    Not by a converter, whose argument type would take the place of the field's in the signature of the class.
    """
    if plain is not getattr(instance, attribute.name):
        object.__setattr__(instance, attribute.name, plain)


def keep_number(instance: object, attribute: attrs.Attribute[Any], value: object) -> float | None:
    """For attrs validators: `as_number` of the attribute, which is kept."""
    number = as_number(value)
    if number is not None:
        keep_plain(instance, attribute, number)
    return number


def require_int(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return `value` as an int, or raise `ConfigError` when it is no integer, below `minimum` or above `maximum`."""
    plain = plain_int(value)
    if not isinstance(plain, int) or isinstance(plain, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if plain < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, got {plain}")
    if maximum is not None and plain > maximum:
        raise ConfigError(f"{name} must be at most {maximum:,}, got {plain:,}")
    return plain


def an_int(minimum: int, maximum: int | None = None) -> Callable[[object, attrs.Attribute[int], object], None]:
    """An attrs validator: `require_int` of the attribute, which is kept."""

    def check(instance: object, attribute: attrs.Attribute[int], value: object) -> None:
        name = f"{type(instance).__name__}.{attribute.name}"
        keep_plain(instance, attribute, require_int(name, value, minimum=minimum, maximum=maximum))

    return check


positive_int: Final = an_int(1)
non_negative_int: Final = an_int(0)


def require_choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """Return `value` when it is one of `allowed`, else raise `ConfigError` that names the nearest one."""
    choices = tuple(allowed)
    if isinstance(value, str) and value in choices:
        return value
    raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}{did_you_mean(str(value), choices)}")


def one_of(*allowed: str) -> Callable[[object, attrs.Attribute[str], object], None]:
    """An attrs validator: `require_choice` of the attribute."""

    def check(_: object, attribute: attrs.Attribute[str], value: object) -> None:
        require_choice(attribute.name, value, allowed)

    return check


def require_counts(kind: str, counts: NDArray[Any], shape: tuple[int, ...], most: int) -> None:
    """Raise `ConfigError` unless what a pattern's `multiplicity` gave for positions of `shape` is 0 to `most` times."""
    name = f"multiplicity of a {kind} pattern"
    if counts.dtype != "int64":  # fractions would be cut off, and sums of other dtypes are not those of their numbers
        raise ConfigError(f"{name} must be int64, how often a query counts a key; got {counts.dtype}")
    if len(counts.shape) > len(shape) or any(
        n not in (1, m) for n, m in zip(counts.shape[::-1], shape[::-1], strict=False)
    ):
        raise ConfigError(f"{name} must have the shape of its positions, {shape}, got {counts.shape}")
    if counts.size and counts.min() < 0:
        raise ConfigError(f"{name} must be at least 0, got {counts.min()}")
    if counts.size and counts.max() > most:
        raise ConfigError(
            f"{name} must be at most {most}, which its max_multiplicity says, got {counts.max()}; have that property "
            f"return the largest number"
        )


def promises(of: object, name: str) -> bool:
    """Whether its very class promises that by an attribute: one derived from it may do otherwise."""
    return bool(vars(type(of)).get(name, False))


def require_positive(name: str, value: object) -> float:
    """Return `value` as an int or float, or raise `ConfigError` unless it is a finite number above 0."""
    number = as_number(value)
    if number is None or not 0 < number < math.inf:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
    return number


def positive_number(instance: object, attribute: attrs.Attribute[float], value: object) -> None:
    """An attrs validator: `require_positive` of the attribute, which is kept."""
    keep_plain(instance, attribute, require_positive(attribute.name, value))


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the candidate nearest to `word`, or an empty string."""
    near = nearest(word, candidates)
    return "" if near is None else f" (did you mean {near!r}?)"


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate nearest to `word`, if one is near, whether in capitals or not."""
    spelt = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.lower(), list(spelt), n=1, cutoff=0.6)  # at 0.5 "rope" is near "none"
    return spelt[near[0]] if near else None
