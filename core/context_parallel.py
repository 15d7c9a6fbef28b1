"""The request to shard a sequence over ranks, as a value. Needs no torch."""

from __future__ import annotations

from typing import Final, NoReturn

import attrs

from .checks import keep_plain, positive_int, require_choice, require_positive
from .errors import ConfigError
from .structure import NamesChecked

TRANSPORTS: Final = {"gloo_cpu": "cpu", "ring_nccl": "cuda"}  # what moves the rows, by the device type that it serves
LONGEST_WAIT_S: Final = 7 * 24 * 3600  # of stores and sockets some can wait for 24 days, and none for ever


def refuse_in_ring(size: int, *given: str) -> NoReturn:
    """Raise `ConfigError` for what `size` ranks that share a sequence cannot compute, whatever their backend."""
    what = "".join(f"{name}: " for name in given)
    raise ConfigError(
        f"{what}a ring of {size} ranks computes whole calls of one sequence only: no padding masks, packed documents, "
        "caches, steps of decoding or other reads of a single rank's keys; build without context_parallel for those"
    )


def _transport(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    require_choice("ContextParallel.transport", value, ("auto", *TRANSPORTS))


def require_wait(name: str, value: object) -> float:
    """Return `value` as seconds to wait, or raise `ConfigError` unless it is above 0 and at most a week."""
    seconds = require_positive(name, value)
    if seconds > LONGEST_WAIT_S:
        raise ConfigError(f"{name} must be at most {LONGEST_WAIT_S:,} seconds (a week), got {value!r}")
    return seconds


def _wait(instance: object, attribute: attrs.Attribute[float], value: object) -> None:
    keep_plain(instance, attribute, require_wait(f"ContextParallel.{attribute.name}", value))


@attrs.frozen(kw_only=True)
class ContextParallel(NamesChecked):
    """One sequence over several ranks, each holding a contiguous shard of queries, keys and values.

    Attributes:
        size: ranks that share a sequence; 1 shards nothing. It must divide the mesh it is built with.
        transport: "gloo_cpu" or "ring_nccl", which move rows between CPUs and between CUDA devices; "auto": by device.
        timeout_s: seconds, at most a week. Longest wait for another rank: until it builds, enters a pass, or sends the
            rows that are due next; then the ring is broken. It does not bound a pass, which takes as long as it needs.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    size: int = attrs.field(validator=positive_int)
    transport: str = attrs.field(default="auto", validator=_transport)
    timeout_s: float = attrs.field(default=60.0, validator=_wait)

    def transport_for(self, device_type: str) -> str:
        """The transport for a type of device, as torch calls it.

        Raises:
            ConfigError: where none, or not the one asked for, serves it.
        """
        fitting = [name for name, served in TRANSPORTS.items() if served == device_type]
        wanted = fitting if self.transport == "auto" else [self.transport]
        if not wanted or wanted[0] not in fitting:
            served = ", ".join(f"{name} serves {kind}" for name, kind in TRANSPORTS.items())
            raise ConfigError(
                f"context_parallel has no transport {self.transport!r} for device {device_type!r}: {served}"
            )
        return wanted[0]
