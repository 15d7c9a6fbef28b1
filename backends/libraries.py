"""What backends share: their options, their versions, what Triton compiles with, and inputs fit for bulk copies."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from ..core.refusal import Refusal

if TYPE_CHECKING:
    from torch import Tensor

# What Hopper's bulk copies (TMA) and 128-bit loads need of addresses and strides.
ALIGNMENT_BYTES: Final = 16
# Given at every launch of a Triton kernel of ours: Triton 3.9 warns where it is not, and 3.10 then rounds twice.
FP_FUSION: Final = {"enable_fp_fusion": True}


@cache
def can_compile() -> bool:
    """Triton, and as it looks for them a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()  # Debian's names /usr/local, where there are no headers
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    header = Path(paths["include"], "Python.h")
    return find_spec("triton") is not None and compiler is not None and header.is_file()


def compiler_refusals() -> Iterator[Refusal]:
    """What Triton would say at the first launch, where it cannot compile."""
    if not can_compile():
        yield Refusal(
            "not_installed",
            "Triton with a C compiler and Python's headers, for its launchers",
            "not all of them",
            "install gcc or clang (or name one in CC) and the headers (python3-dev)",
        )


def installed(distribution: str) -> str:
    """The version of what is installed, or nothing where there is no metadata of it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def labelled(distribution: str) -> str:
    """`distribution version` as installed, or `distribution` alone."""
    return f"{distribution} {installed(distribution)}".rstrip()


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a row of a table."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def aligned(*tensors: Tensor) -> Iterator[Tensor]:
    """Each tensor as it is where its address and strides are multiples of 16 bytes, else a compact copy of it.

    Only a caller's own unusual views are ever copied: what core makes of aligned tensors is aligned.
    """
    for x in tensors:
        size, places = x.element_size(), x.data_ptr()
        for step in x.stride()[:-1]:
            places |= step * size  # has a low bit where any of them has
        yield x.clone(memory_format=torch.contiguous_format) if places % ALIGNMENT_BYTES else x
