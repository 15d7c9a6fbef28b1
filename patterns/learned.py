"""Learned attention: a trained gate chooses key blocks for each block of queries."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

import attrs

from ..core.checks import MOST_IN_BLOCK, MOST_POSITIONS, an_int, keep_number
from ..core.errors import ConfigError
from ..core.pattern import LearnedPattern

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.config import AttentionConfig
    from ..core.gate import Gate

_FINEST = 10**9  # of densities, so that a block count times numerator or denominator stays an int64


def _density(instance: Learned, attribute: attrs.Attribute[float | None], value: object) -> None:
    if value is None:
        return
    number = keep_number(instance, attribute, value)
    if number is None or not 1 / _FINEST <= number <= 1:
        raise ConfigError(f"Learned.density must be a number from {1 / _FINEST:g} to 1, got {value!r}")


@attrs.frozen
class Learned(LearnedPattern):
    """Each head and block of queries keeps the key blocks that a gate scores highest, for each batch row anew.

    `build_attention` makes the gate, an `nn.Module`, as `attention.gate`; it is trained by
    `attention.gate.distillation_loss(query, key)` beside or after the model, and frozen to a fixed pattern by
    `attention.gate.freeze(query, key)`. Attention over the kept blocks is exact, with gradients to queries, keys and
    values; the choice is not differentiated. So a model's own loss gives the gate no gradient: DistributedDataParallel
    needs `static_graph=True` where the gate's loss is added outside of the module that it wraps, and
    `find_unused_parameters=True` only where the gate does not learn.

    Causal: a block of queries is judged by its first query and by the keys of blocks that end before it, so that no
    later token moves the choice; blocks that the diagonal cuts are always kept. Not causal: by the mean of its queries
    and all keys. Query heads that share a key-value head share its pooled keys and choose for themselves.

    Choosing forms one score for each head and pair of blocks, a block_size²-th of full attention's, and two projections
    of the keys.

    Blocks count from the first query and the first key of a call. Pieces of a sequence that begin at multiples of
    block_size are therefore treated as the whole sequence is; a causal piece that begins elsewhere keeps the two blocks
    that the diagonal cuts.

    Attributes:
        blocks_per_row: key blocks a row of queries keeps, those on the diagonal included; all that it may see where
            those are fewer.
        block_size: queries and keys in a block.
        density: instead of blocks_per_row, the fraction of the blocks it may see, rounded up; read as the decimal
            number that it is written as, to nine places.

    Raises:
        ConfigError: not exactly one of blocks_per_row and density, or a value out of its range.
    """

    kind: ClassVar[str] = "learned"

    blocks_per_row: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(an_int(1, MOST_POSITIONS))
    )
    block_size: int = attrs.field(default=64, validator=an_int(1, MOST_IN_BLOCK))
    density: float | None = attrs.field(default=None, kw_only=True, validator=_density)
    # As numerator and denominator, made here because torch.compile traces through `take` and knows no fractions.
    _ratio: tuple[int, int] = attrs.field(init=False, repr=False, eq=False, default=(1, 1))

    def __attrs_post_init__(self) -> None:
        if (self.blocks_per_row is None) == (self.density is None):
            raise ConfigError(
                f"Learned takes either blocks_per_row or density, got blocks_per_row={self.blocks_per_row} and "
                f"density={self.density}"
            )
        share = Fraction(str(self.density or 1)).limit_denominator(_FINEST)
        object.__setattr__(self, "_ratio", (share.numerator, share.denominator))

    def take(self, visible: Tensor) -> Tensor:
        """As `LearnedPattern.take`."""
        if self.blocks_per_row is not None:
            return visible.clamp(max=self.blocks_per_row)
        numerator, denominator = self._ratio
        return -(-visible * numerator // denominator)

    def _most(self, blocks: int) -> int:
        """What a row that may see `blocks` key blocks takes of them."""
        if self.blocks_per_row is not None:
            return min(blocks, self.blocks_per_row)
        numerator, denominator = self._ratio
        return -(-blocks * numerator // denominator)

    def make_gate(self, config: AttentionConfig) -> Gate:
        """A gate that begins with the products of queries and pooled keys."""
        from ._gate import BlockGate

        return BlockGate(self, config, self._most)

    def to_dict(self) -> dict[str, object]:
        """The fields that are given, with `kind`."""
        fields = {"blocks_per_row": self.blocks_per_row, "density": self.density}
        return {"kind": self.kind, "block_size": self.block_size} | {k: v for k, v in fields.items() if v is not None}
