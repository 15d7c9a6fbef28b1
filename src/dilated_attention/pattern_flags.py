"""The flags by which commands are told a pattern, and the mapping that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import typer

from .core.config import named_values
from .core.errors import ConfigError

Kind: TypeAlias = Annotated[str | None, typer.Option(help="Kind of pattern: full, dilated, local, ...")]
SegmentLengths: TypeAlias = Annotated[str | None, typer.Option(help="Of a dilated pattern: 1024,2048,4096")]
DilationRates: TypeAlias = Annotated[str | None, typer.Option(help="Of a dilated pattern: 1,2,4")]
Parameters: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--pattern-option",
        "-P",
        metavar="NAME=VALUE",
        help="Any other parameter of the pattern: window_size=128. Repeatable.",
    ),
]


def pattern_of(
    kind: str | None,
    options: Sequence[str] | None,
    segment_lengths: str | None,
    dilation_rates: str | None,
    *,
    of_file: object,
) -> Any:
    """The pattern of the flags: a new one where they name a kind, else the file's, with other parameters if any.

    Raises:
        ConfigError: parameters of no pattern, given twice, or that cannot be read.
    """
    parameters = _parameters(options or (), segment_lengths, dilation_rates)
    if kind is not None:
        return {"kind": kind, **parameters}
    if not parameters:
        return of_file
    if isinstance(of_file, dict):
        return {**of_file, **parameters}
    if {"segment_lengths", "dilation_rates"} & parameters.keys():
        return {"kind": "dilated", **parameters}
    raise ConfigError(f"--pattern must name the pattern that takes {', '.join(parameters)}")


def _parameters(options: Sequence[str], segment_lengths: str | None, dilation_rates: str | None) -> dict[str, Any]:
    """A pattern's parameters from the flags, each of them given once."""
    parameters = named_values(options, flag="--pattern-option")
    for name, text in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
        if text is None:
            continue
        if name in parameters:
            flag = name.replace("_", "-")
            raise ConfigError(f"{name} is given as --{flag} and as --pattern-option; give it once")
        parameters[name] = _integers(name, text)
    return parameters


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        flag = f"--{name.replace('_', '-')}"
        raise ConfigError(f"{flag} must be integers with commas between them, got {text!r}") from error
