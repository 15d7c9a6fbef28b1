"""The file that `bench --save` appends to: one run a line, as JSON. Needs no torch.

Whatever reads such a file may have got it from anybody, so nothing in it is believed: its size is bounded before it is
read, and every field is judged before anyone sees it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import attrs

from ..core.errors import ConfigError
from ..core.structure import from_mapping

SCHEMA: Final = 1
LIMIT_BYTES: Final = 64 << 20
_LARGEST: Final = (1 << 63) - 1

Phase = Literal["forward", "training"]
PHASES: Final[tuple[Phase, ...]] = ("forward", "training")


def _refuse(instance: object, attribute: attrs.Attribute[Any], wanted: str, value: object) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise ConfigError(f"{type(instance).__name__}.{attribute.name} must be {wanted}, got {shown}")


def _text(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str):
        _refuse(instance, attribute, "text", value)


def _flag(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        _refuse(instance, attribute, "true or false", value)


def _count(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
        _refuse(instance, attribute, "an integer from 1 to 2**63 - 1", value)


def _bytes(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        _refuse(instance, attribute, "an integer from 0 to 2**63 - 1", value)


def _is_number(value: object) -> bool:
    """Whether `value` is a number that a float holds, and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


def _not_negative(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not _is_number(value) or value < 0:
        _refuse(instance, attribute, "a finite number, not negative", value)


def _positive(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not _is_number(value) or value <= 0:
        _refuse(instance, attribute, "a finite number above 0", value)


def _moment(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    try:
        if isinstance(value, str) and value.endswith("Z") and datetime.fromisoformat(value):
            return
    except ValueError:
        pass
    _refuse(instance, attribute, 'a time in UTC such as "2026-11-23T01:02:03Z"', value)


def _versions(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(word, str) for pair in value.items() for word in pair):
        _refuse(instance, attribute, "a mapping of names to versions", value)


def _one_of(*allowed: str) -> Any:
    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in allowed:
            _refuse(instance, attribute, f"one of {', '.join(allowed)}", value)

    return check


def _optional(check: Any) -> Any:
    return attrs.validators.optional(check)


@attrs.frozen(kw_only=True)
class Machine:
    """Where a run was measured.

    Attributes:
        device: "cpu" or "cuda".
        name: of the processor or card.
        cores: of the host.
        threads: that PyTorch used.
    """

    device: str = attrs.field(validator=_one_of("cpu", "cuda"))
    name: str = attrs.field(validator=_text)
    cores: int = attrs.field(validator=_count)
    threads: int = attrs.field(validator=_count)


@attrs.frozen(kw_only=True)
class Result:
    """One way to compute one case in one phase; it has passed the gate.

    Attributes:
        case: name of the case.
        backend: of ours, or the peer's name.
        kernel: the sub-kernel, or an empty string.
        phase: "forward", or "training" for forward and backward.
        seq_len: tokens.
        head_dim: width of a head.
        dtype: of the tensors.
        is_causal: whether later keys are hidden.
        rounds: how many times it was timed.
        median_ms, low_ms, high_ms: median and quartiles, milliseconds.
        tflops: of the pairs that the pattern counts, with multiplicity; training counts 3.5 times the forward.
        distinct_tflops: the same, each pair once.
        floor_share: `tflops` over the rate of a matrix product of the same run, at most about 1; None where that was
            not measured.
        peak_bytes: most memory during a call above what was held before; None where it was not measured.
        error: distance to the float64 oracle over the oracle's norm; None for a peer that computes something else.
        peer: whether it is what ours are compared with.
    """

    case: str = attrs.field(validator=_text)
    backend: str = attrs.field(validator=_text)
    kernel: str = attrs.field(validator=_text)
    phase: Phase = attrs.field(validator=_one_of(*PHASES))
    seq_len: int = attrs.field(validator=_count)
    head_dim: int = attrs.field(validator=_count)
    dtype: str = attrs.field(validator=_text)
    is_causal: bool = attrs.field(validator=_flag)
    rounds: int = attrs.field(validator=_count)
    median_ms: float = attrs.field(validator=_positive)
    low_ms: float = attrs.field(validator=_positive)
    high_ms: float = attrs.field(validator=_positive)
    tflops: float | None = attrs.field(default=None, validator=_optional(_not_negative))
    distinct_tflops: float | None = attrs.field(default=None, validator=_optional(_not_negative))
    floor_share: float | None = attrs.field(default=None, validator=_optional(_not_negative))
    peak_bytes: int | None = attrs.field(default=None, validator=_optional(_bytes))
    error: float | None = attrs.field(default=None, validator=_optional(_not_negative))
    peer: bool = attrs.field(default=False, validator=_flag)

    def __attrs_post_init__(self) -> None:
        if not self.low_ms <= self.median_ms <= self.high_ms:
            raise ConfigError(
                f"Result.median_ms must lie between low_ms and high_ms, got {self.median_ms} beside {self.low_ms} and "
                f"{self.high_ms}"
            )


@attrs.frozen(kw_only=True)
class Run:
    """One call of `bench`: a line of the file.

    Attributes:
        when: UTC, ISO 8601, ending in Z.
        commit: of the checkout that was measured; None where it is none.
        modified: whether that checkout had changes besides.
        version: of this package.
        machine: where.
        versions: of Python and the libraries that take part.
        floor_tflops: rate of a large matrix product of the same run; None where it was not measured.
        results: one a case, backend and phase.
        schema: of the file format.
    """

    when: str = attrs.field(validator=_moment)
    commit: str | None = attrs.field(validator=_optional(_text))
    modified: bool = attrs.field(validator=_flag)
    version: str = attrs.field(validator=_text)
    machine: Machine
    versions: Mapping[str, str] = attrs.field(validator=_versions, hash=False)
    floor_tflops: float | None = attrs.field(default=None, validator=_optional(_not_negative))
    results: tuple[Result, ...] = attrs.field(factory=tuple)
    schema: int = attrs.field(default=SCHEMA)

    def to_json(self) -> str:
        """The run as one line, without its end."""
        fields = attrs.asdict(self)
        return json.dumps({"schema": fields.pop("schema"), **fields}, ensure_ascii=False, allow_nan=False)


def read_history(path: Path | str) -> list[Run]:
    """The runs of a file, oldest first as they were appended; empty lines are nothing.

    Raises:
        ConfigError: a file that cannot be read, is larger than `LIMIT_BYTES`, or has a line that is no run of this
            schema; the message names file, line and cause.
    """
    path = Path(path)
    lines = _content(path).split(b"\n")
    return [_run(line, f"line {number} of {str(path)!r}") for number, line in enumerate(lines, 1) if line.strip()]


def check_appendable(path: Path) -> None:
    """Raise `ConfigError` where `append_run` could not write; what is there stays as it is, and nothing is left."""
    is_new = not (path.exists() or path.is_symlink())
    try:
        with path.open("a+b", buffering=0) as file:
            _check_end(file, path)
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"cannot append to {str(path)!r}: {error.strerror or error}") from error


def _check_end(file: FileIO, path: Path) -> None:
    """Raise `ConfigError` where what is appended would continue a line."""
    file.seek(max(0, file.seek(0, 2) - 1))
    if file.read(1) not in (b"", b"\n"):
        raise ConfigError(f"{str(path)!r} ends in the middle of a line; mend or move it first")


def append_run(path: Path | str, run: Run) -> None:
    """Add `run` to the file, in one write so that two who append at once do not mix; a missing file is made.

    Raises:
        ConfigError: the file cannot be written, would outgrow `LIMIT_BYTES`, or ends in the middle of a line. It is
            left as it was.
    """
    path, line = Path(path), (run.to_json() + "\n").encode()
    try:
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, 2)
            if size + len(line) > LIMIT_BYTES:
                raise ConfigError(
                    f"{str(path)!r} holds {size:,} bytes, and with this run would outgrow the {LIMIT_BYTES:,} that are "
                    "read again; begin a new file"
                )
            _check_end(file, path)
            written = file.write(line)
            if written < len(line):  # as a disk does that becomes full; half a line would make all runs unreadable
                end = file.tell()
                if file.seek(0, 2) == end:  # and nobody has appended since
                    file.truncate(end - written)
                raise ConfigError(f"cannot append to {str(path)!r}: only {written:,} of {len(line):,} bytes had room")
    except OSError as error:
        raise ConfigError(f"cannot append to {str(path)!r}: {error.strerror or error}") from error


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT_BYTES + 1)  # not the size it claims: a device or a pipe claims none
    except OSError as error:
        raise ConfigError(f"cannot read the history {str(path)!r}: {error.strerror or error}") from error
    if len(content) > LIMIT_BYTES:
        raise ConfigError(f"the history {str(path)!r} is larger than {LIMIT_BYTES:,} bytes, the most that is read")
    return content


def _run(line: bytes, where: str) -> Run:
    try:
        fields: object = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8, and of nesting without end
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is no JSON object but a {type(fields).__name__}")
    if type(fields.get("schema")) is not int or fields["schema"] != SCHEMA:  # neither true nor 1.0 is the schema 1
        found = repr(fields["schema"])[:40] if "schema" in fields else "none"
        raise ConfigError(f"{where} must be of schema {SCHEMA}, which is what this release reads; it has {found}")
    try:
        return from_mapping(Run, fields, name="the run")
    except ConfigError as error:
        text = str(error)
        raise ConfigError(f"{where}: {text if len(text) <= 400 else text[:397] + '...'}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
