"""Which backend `auto` prefers, by what was measured: docs/performance.md, "What `auto` picks".

On cards that are no Hopper it is the same rule, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import inf
from typing import Final

import attrs

from ..core.bands import Band, bands_of, only_window
from ..core.blocking import lower_blocks
from ..core.config import AttentionConfig
from ..core.geometry import Geometry
from ..core.lowering import split, table_block_size
from ..core.pattern import Branch
from ..registry.specs import BackendSpec, Request
from . import cards, libraries
from .manifest import FA3, FA4, FLEX, TRITON

_HALVES: Final = ("bfloat16", "float16")
_OUTDONE: Final = -40  # behind every dense kernel
_AFTER_FA3: Final = FA3.priority - 2  # and before `sdpa`
_SHORT: Final = 1 << 13  # tokens below which `sdpa`'s launches of a window take longer than `triton`'s in float32
_SHORT_DENSE: Final = 1 << 11  # tokens below which launches are what dense attention takes
_LONG_DENSE: Final = 1 << 14  # tokens from which dense attention takes longer than anything around it
_LONG: Final = 1 << 15  # tokens from which `fa4` is faster than `triton` in calls that follow each other
_FEW_ROWS: Final = 1 << 11  # of a segment, up to which cuDNN's kernel gains less than its launches lose
_BLOCK_OF_FA4: Final = 128  # the only one that it takes
_FINEST_OF_FLEX: Final = 64  # smaller blocks make masks of nearly all of its 128 x 128, more than fit


@attrs.frozen
class _Asked:
    """What is asked for, as far as it decides."""

    request: Request

    @property
    def config(self) -> AttentionConfig:
        return self.request.config

    @property
    def is_half(self) -> bool:
        return self.config.dtype in _HALVES

    @property
    def is_ring(self) -> bool:
        """Whether several ranks share the sequence."""
        return "context_parallel" in self.request.needs

    @property
    def is_learned(self) -> bool:
        """Whether a gate names the blocks at every call."""
        return "dynamic_tables" in self.request.needs

    @property
    def has_blocks(self) -> bool:
        return "block" in self.request.needs["layouts"]

    @cached_property
    def is_hopper(self) -> bool:
        return cards.compiled_for(self.request.device.arch) == cards.PROVEN

    @cached_property
    def has_rings(self) -> bool:
        """Whether there are kernels with a ring for every head_dim, which depends on the Triton that compiles them."""
        return self.is_hopper and cards.is_among(libraries.installed("triton"), cards.GLUON_RELEASES)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """Those of a pattern that is branches alone."""
        if self.request.needs["layouts"] != ("branch",):
            return ()
        return split(self.request.pattern, self.config.one_token)[0]

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """Those of a pattern that dense kernels compute in a few calls: not once for each length, nor over a ring."""
        if self.config.varlen or self.is_ring:
            return ()
        return bands_of(self.request.pattern) or ()

    @property
    def is_window(self) -> bool:
        """Whether it is one sliding window and nothing else, in half precision."""
        return self.is_half and only_window(self.bands) is not None

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key (causal ones every earlier one) of one length."""
        found = [(branch.segment_length, branch.stride) for branch in self.branches]
        return found == [(None, 1)] and not self.config.varlen

    @property
    def is_long_and_dense(self) -> bool:
        """Whether it is, on a Hopper card, of many tokens."""
        return self.is_hopper and self.is_half and not self.is_ring and self.has(_LONG_DENSE) and self.is_dense

    def has(self, tokens: int) -> bool:
        """Whether it is known that there are so many at least."""
        return self.config.seq_len is not None and self.config.seq_len >= tokens

    def has_fewer_than(self, tokens: int) -> bool:
        """Whether it is known that there are fewer."""
        return self.config.seq_len is not None and self.config.seq_len < tokens


def ranked(request: Request, candidates: Sequence[BackendSpec]) -> list[str]:
    """Names, the first the most preferred: by priority, which for some depends on what they would compute."""
    asked = _Asked(request)
    own = {TRITON.name: _of_triton, FA4.name: _of_fa4, FLEX.name: _of_flex}
    priorities = {}
    for spec in candidates:
        rule = own.get(spec.name)
        priorities[spec.name] = spec.priority if rule is None else rule(asked)
    return sorted(priorities, key=lambda name: (-priorities[name], name))


def _of_triton(asked: _Asked) -> int:
    """First where its fused kernels are the fastest; behind `fa3` where that has the faster kernel and few launches."""
    head_dim = asked.config.head_dim
    if asked.config.dropout_p and asked.is_half:
        return TRITON.priority if _fuses_drops(asked) else _OUTDONE
    if asked.is_long_and_dense:  # against cuDNN's up to head_dim 128, and FlashAttention-2 beyond
        is_wide = 64 < head_dim <= 96 or head_dim > 128
        return _AFTER_FA3 if 32 < head_dim <= 64 or (is_wide and asked.has_rings) else _OUTDONE
    if not _fuses(asked):
        return _OUTDONE
    is_of_few = 0 < len(asked.branches) < (2 if head_dim <= 64 else 3) and not asked.config.varlen
    return _AFTER_FA3 if is_of_few or asked.is_window else TRITON.priority


def _of_fa4(asked: _Asked) -> int:
    """Low, since its backward is the slowest to launch; but not where it was the fastest, or next to `fa3`."""
    head_dim, trains = asked.config.head_dim, asked.config.requires_grad
    if _has_tables_for_fa4(asked):
        return TRITON.priority + 1
    if asked.is_long_and_dense and head_dim in (64, 128):
        return FA3.priority + (1 if trains else -1)
    if asked.is_window and (head_dim == 128 or (head_dim == 64 and trains)):
        return FA3.priority - 1
    return FA4.priority


def _of_flex(asked: _Asked) -> int:
    """Before the dense kernels for blocks alone, not too small ones. Its rings have not run over several cards."""
    request = asked.request
    has_blocks_alone = request.needs["layouts"] == ("block",)  # it looks at every block that a strided branch touches
    if asked.is_ring or asked.is_learned or not (has_blocks_alone and asked.is_half):
        return FLEX.priority
    if bands_of(request.pattern) is not None:  # which dense kernels have, of documents too
        return FLEX.priority
    size = table_block_size(request.pattern, asked.config.one_token)
    return TRITON.priority - 1 if size >= _FINEST_OF_FLEX else FLEX.priority


def _fuses(asked: _Asked) -> bool:
    """Whether the fused kernels are faster than `sdpa`.

    By docs/performance_log.md: "What `auto` picked", and for cards that are no Hopper, whose windows are faster as
    FlashAttention-2's, "Other cards".
    """
    config, head_dim = asked.config, asked.config.head_dim
    if asked.is_learned:
        return asked.is_half or head_dim <= 128  # a block product that sorts and gathers at every call is far behind
    if asked.has_blocks:
        if asked.is_half:
            return (asked.is_hopper and (head_dim <= 128 or asked.has_rings)) or not asked.bands
        if head_dim > 64 or "branch" in asked.request.needs["layouts"]:  # branches lose more than blocks gain
            return False
        return asked.has_fewer_than(_SHORT) or not asked.bands  # few tokens: launches are what takes the time
    # Without a ring heads are padded to a power of two, which from 129 to 192 costs more than the dense kernels' calls
    # where gradients are computed.
    is_suited = head_dim <= 64 or (
        asked.is_hopper and (head_dim <= 128 or head_dim > 192 or not config.requires_grad or asked.has_rings)
    )
    return asked.is_half and is_suited and len(asked.branches) >= _fewest_branches(asked)


def _fewest_branches(asked: _Asked) -> int:
    """From how many on branches in half precision are faster in one launch than as the calls of `sdpa`'s kernels.

    Those are cuDNN's up to head_dim 128, at which it is the fastest, and FlashAttention-2's beyond.
    """
    config = asked.config
    if config.varlen:
        return 1  # of several lengths, whose launches are many else
    if not asked.is_hopper or (config.head_dim > 64 and not asked.has_rings):
        return 3
    if asked.is_ring:
        return 2 if config.head_dim <= 64 else 3
    if 96 < config.head_dim <= 128:
        return 2 if config.is_causal and _rows_of_a_segment(asked.branches) <= _FEW_ROWS else 3
    is_short = config.head_dim <= 128 or asked.has_fewer_than(_SHORT_DENSE)
    return 2 if is_short and asked.is_dense else 1


def _rows_of_a_segment(branches: Sequence[Branch]) -> float:
    """The most that one keeps."""
    return max((inf if b.segment_length is None else b.segment_length / b.stride for b in branches), default=inf)


def _fuses_drops(asked: _Asked) -> bool:
    """Whether they are with dropout, in half precision, faster than FlashAttention-2 and core's product.

    By docs/performance.md, "Dropout".
    """
    if asked.has_blocks or asked.is_learned:
        return not asked.is_window
    return asked.config.head_dim <= 128 and (asked.has(_LONG_DENSE) or not asked.is_dense)


def _has_tables_for_fa4(asked: _Asked) -> bool:
    """Whether `fa4` beats the fused kernels: whole blocks at head_dim 128, so many that its launches do not count.

    Where it is asked for the mask of every third block or more it is slower. Bands are no tables to it.
    """
    request, config = asked.request, asked.config
    if config.head_dim != 128 or config.is_causal or config.varlen or not asked.is_half:
        return False
    if request.needs["layouts"] != ("block",) or asked.is_ring or asked.is_learned:
        return False
    if config.seq_len is None or config.seq_len < _LONG or bands_of(request.pattern) is not None:
        return False
    # Whether blocks are whole shows in a few rows of them. Those of the middle meet both edges of a window, however
    # long it is; and of the very sequence, since some patterns fit no other. Its end need not be that of a block.
    in_blocks = config.seq_len // _BLOCK_OF_FA4
    geometry = Geometry(
        q_len=8 * _BLOCK_OF_FA4,
        kv_len=in_blocks * _BLOCK_OF_FA4,
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        is_causal=False,
        q_offset=in_blocks // 2 * _BLOCK_OF_FA4,
        whole_len=config.seq_len,
    )
    blocks = lower_blocks(request.pattern, geometry, limit_bytes=config.limits.layout_bytes)
    is_whole = not len(blocks.masks) and bool((blocks.weights == 1).all())
    return is_whole and blocks.block_size == _BLOCK_OF_FA4
