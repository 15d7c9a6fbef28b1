"""Which cards our own kernels (`fused`) run on, and with which Triton. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from ..core.refusal import Refusal
from ..registry.specs import compute_capability

PROVEN: Final = "sm_90"  # on which they have passed the conformance kit
OLDEST: Final = (8, 0)  # compute capability, by Triton's own list of supported hardware
# KiB of shared memory that a program may have, by the CUDA C++ Programming Guide's table of technical specifications.
_SHARED_KIB: Final = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
ROOMY_KIB: Final = 163  # with which every tile fits
_LEAST_SHARED_KIB: Final = 99  # of all others from `OLDEST` on
# Releases of Triton that the kernels in Gluon serve: which tests they passed with each, and how fast they are with it,
# is in docs/performance_log.md, "With which Triton".
GLUON_RELEASES: Final = ("3.6", "3.7", "3.8", "3.9")


def compiled_for(arch: str) -> str:
    """The architecture whose instructions Triton takes on a card: its own, or what TRITON_OVERRIDE_ARCH names.

    So a newer card runs, for tests, what an older one would.
    """
    other = os.environ.get("TRITON_OVERRIDE_ARCH", "")
    return f"sm_{other.removeprefix('sm')}" if other else arch


def is_among(version: str, releases: tuple[str, ...]) -> bool:
    """Whether this version of Triton is of one of these releases."""
    return ".".join(version.split(".")[:2]) in releases


def age_refusals(arch: str) -> Iterator[Refusal]:
    """A card that Triton does not support."""
    if compute_capability(arch) < OLDEST:
        yield Refusal("arch", arch, f"sm_{OLDEST[0]}{OLDEST[1]} or newer, which Triton supports")


def shared_kib(arch: str) -> int:
    """KiB of shared memory that a program may have there."""
    return _SHARED_KIB.get(compute_capability(arch), _LEAST_SHARED_KIB)
