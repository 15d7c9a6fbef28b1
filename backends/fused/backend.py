"""The `triton` backend: what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import torch

from ...core.errors import ConfigError
from ...core.lowering import split, table_block_size
from ...core.pattern import LearnedPattern
from ...core.refusal import Refusal
from ..cards import PROVEN, ROOMY_KIB, age_refusals, compiled_for, shared_kib
from ..libraries import compiler_refusals, labelled
from .kernel import FusedKernel
from .tiles import WIDEST_FLOAT32, TileSizes
from .walks import MAX_PERIOD, period_of

MIN_BLOCK: Final = 16  # what a product of tiles takes

if TYPE_CHECKING:
    from ...core.pattern import Branch
    from ...registry.specs import Request


class TritonBackend:
    """All branches, or all blocks, in one launch of our own kernels.

    They have passed the conformance kit on Hopper, and are refused on other cards unless the user says that they have
    passed it there: `backend_options={"triton": {"unproven_card": True}}`.
    """

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """No compiler; dilation rates whose classes of positions repeat too late; blocks that no tile divides; cards.

        Raises:
            ConfigError: for an option that there is not, or that is no bool.
        """
        yield from _card_refusals(request)
        yield from compiler_refusals()
        branches, size = _shape(request)
        period = period_of(branches)
        if period > MAX_PERIOD:
            required = f"dilation rates with the least common multiple {period}"
            yield Refusal("dilation_rates", required, f"up to {MAX_PERIOD}", "use rates that divide one another")
        if 0 < size < MIN_BLOCK or size & (size - 1):
            yield Refusal("block_sizes", str(size), f"powers of two from {MIN_BLOCK}", "choose such a block_size")

    def pin(self, request: Request) -> str:
        """The kernel and the compiler."""
        name = "fused"
        if _is_fed(request):
            name += " in Gluon, dropout in Triton" if request.config.dropout_p else " in Gluon"
        return f"{name} ({labelled('triton')})"

    def build(self, request: Request) -> FusedKernel:
        """The kernel for `request`; it compiles at its first launch."""
        dropping = _tiles(request, drops=True) if request.config.dropout_p else None
        return FusedKernel(self.pin(request), _tiles(request), dropping=dropping)


def _tiles(request: Request, *, drops: bool = False) -> TileSizes:
    config, arch = request.config, compiled_for(request.device.arch)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if drops:
        return TileSizes.dropping(arch, config.head_dim, dtype, is_causal=config.is_causal)
    return TileSizes.chosen(arch, config.head_dim, dtype, is_causal=config.is_causal, version=version("triton"))


def _is_fed(request: Request) -> bool:
    """Whether any of it is computed by the kernels for Hopper."""
    tiles, (branches, size) = _tiles(request), _shape(request)
    found = ([tiles.branches] if branches else []) + ([tiles.within(size)] if size else [])
    return any(each.forward.parts > 0 for each in found)


def _card_refusals(request: Request) -> Iterator[Refusal]:
    """Why the kernels are not for this card."""
    is_allowed = request.options("triton").get("unproven_card", False)
    if not isinstance(is_allowed, bool):
        spelt = "True or False (true or false in TOML, JSON and on the command line)"
        raise ConfigError(f"backend_options['triton']['unproven_card'] must be {spelt}, got {is_allowed!r}")
    config, arch = request.config, compiled_for(request.device.arch)
    if is_old := [*age_refusals(arch)]:
        yield from is_old
    elif arch != PROVEN and not is_allowed:
        kit = "dilated-attention conformance triton --device cuda --option unproven_card=true"
        allowing = "backend_options={'triton': {'unproven_card': True}}"
        remedy = f"run `{kit}` on such a card; if it passes, allow it by {allowing}"
        yield Refusal("arch", arch, f"{PROVEN}, where it passed the conformance kit", remedy)
    elif config.dtype == "float32" and config.head_dim > WIDEST_FLOAT32 and shared_kib(arch) < ROOMY_KIB:
        yield Refusal(
            "head_dims",
            f"head_dim={config.head_dim} in float32",
            f"up to {WIDEST_FLOAT32} with the {shared_kib(arch)} KiB of shared memory of {arch}",
            "use bfloat16",
        )


def _shape(request: Request) -> tuple[tuple[Branch, ...], int]:
    """The branches of a layout, and how large its blocks are, or 0."""
    pattern, geometry = request.pattern.unwrap(), request.config.one_token
    if isinstance(pattern, LearnedPattern):
        return (), pattern.block_size
    branches, rest = split(request.pattern, geometry)
    return branches, 0 if rest is None else table_block_size(request.pattern, geometry)
