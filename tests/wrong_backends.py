"""Backends that are wrong on purpose, one fault each, on top of right ones. The conformance kit has to tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from dilated_attention.core.kernel import DensePiece, LayoutPiece
from dilated_attention.core.reference import multiplicity
from dilated_attention.registry import Refusal, Request

from .plain_backends import Dense, Grads, Ring, Whole


class PartForWhole(Ring):
    """The backward normalises a part of a row by its own sum instead of by the whole row's."""

    backward = Whole.backward


class StagedByPosition(Ring):
    """Takes copied keys for those that stand where the pattern and the offsets say."""

    def counts(self, piece: LayoutPiece) -> Tensor:
        return Whole.counts(self, piece)


class StrictlyCausal(Dense):
    """Off by one: a row does not see its own key (the first row keeps it, so that nothing is empty)."""

    def mask(self, s: Tensor) -> Tensor:
        allowed = torch.ones_like(s, dtype=torch.bool).tril(-1)
        allowed[..., 0, 0] = True
        return allowed


class SeesOneAhead(Dense):
    def mask(self, s: Tensor) -> Tensor:
        return torch.ones_like(s, dtype=torch.bool).tril(1)


class IgnoresScale(Dense):
    def scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        return super().scores(query, key, DensePiece(is_causal=piece.is_causal, scale=1.0))


class ScalesByHeadDim(Dense):
    """Takes 1/sqrt(head_dim) for what the configuration says, at widths to which no columns can be added."""

    def scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        return super().scores(query, key, attrs.evolve(piece, scale=query.shape[-1] ** -0.5))


class WholeScalesByHeadDim(Whole):
    def logits(self, query: Tensor, key: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        return super().logits(query, key, attrs.evolve(piece, scale=query.shape[-1] ** -0.5))


class ScalesBySize(Whole):
    """Folds the scale into a base-two exponential, and loses its sign there."""

    def logits(self, query: Tensor, key: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        return super().logits(query, key, attrs.evolve(piece, scale=abs(piece.scale)))


class LseInBaseTwo(Dense):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return out, lse / math.log(2)


class LseNegated(Dense):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return out, -lse


class LseRounded(Dense):
    """lse in the dtype of the inputs, as some kernels give it in half precision."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return out, lse.to(torch.bfloat16).to(lse.dtype)


class LseWithoutWeights(Whole):
    """out counts a key as often as the pattern does; lse counts it once."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        s, counts = self.logits(query, key, piece)
        return out, self.summed(s, counts.clamp(max=1)).to(lse.dtype)


class CountsOnce(Whole):
    def counts(self, piece: LayoutPiece) -> Tensor:
        return super().counts(piece).clamp(max=1)


class SumsFromZero(Dense):
    """The running maximum begins at 0 instead of below every score."""

    def peak(self, s: Tensor) -> Tensor:
        return s.amax(-1).clamp(min=0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        q, k, v = map(self.wide, (query, key, value))
        s = self.scores(q, k, piece)
        peak = self.peak(s)
        e = torch.exp(s - peak[..., None])
        total = e.sum(-1)
        out = torch.einsum("bhst,bthd->bshd", e / total[..., None], self.grouped(v, q))
        return out.to(query.dtype), peak + total.log()


class SumsWithoutMaximum(SumsFromZero):
    def peak(self, s: Tensor) -> Tensor:
        return s.new_zeros(s.shape[:-1])


class DividesByAll(Dense):
    """Divides by a sum that counts the first key twice."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        first = self.scores(self.wide(query), self.wide(key), piece)[..., 0]
        return out / (1 + torch.exp(first - lse)).transpose(1, 2).unsqueeze(-1).to(out.dtype), lse


class LseWithRowsFirst(Dense):
    """lse is (B, S, H), as out is."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return out, lse.transpose(1, 2)


class LseInFloat64(Dense):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return out, lse.double()


class ReturnsOutAlone(Dense):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)[0]


class ForgetsDv(Dense):
    def backward(self, *args: Any) -> Any:
        return super().backward(*args)[:2]


class KeepsAGraph(Dense):
    """Its results hold on to all that they were made from, though nobody differentiates through them."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return super().forward(query.detach().requires_grad_(), key, value, piece)


class OwnLse(Dense):
    """The backward normalises each piece by itself instead of by the merged lse."""

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> Grads:
        out, lse = self.forward(query, key, value, piece)
        return super().backward(dout, query, key, value, out, lse, piece)


class SumForDk(Dense):
    def backward(self, *args: Any) -> Grads:
        dq, dk, dv = super().backward(*args)
        return dq, dk + dv, dv


class UnscaledDq(Dense):
    def backward(self, *args: Any) -> Grads:
        dq, dk, dv = super().backward(*args)
        return dq / args[-1].scale, dk, dv


class HalvedDv(Dense):
    def backward(self, *args: Any) -> Grads:
        dq, dk, dv = super().backward(*args)
        return dq, dk, dv / 2


class HeadsTakeTurns(Dense):
    """Query head h reads key-value head h mod K instead of h // group."""

    def grouped(self, x: Tensor, query: Tensor) -> Tensor:
        return x.repeat(1, 1, query.shape[2] // x.shape[2], 1)

    def collected(self, x: Tensor, group: int) -> Tensor:
        return torch.unflatten(x, 2, (group, x.shape[2] // group)).sum(2)


class ReadsInOrder(Dense):
    """Believes that what it is given lies in memory without gaps, where there is room to believe it."""

    def wide(self, x: Tensor) -> Tensor:
        dense = torch.empty(x.shape, device="meta").stride()
        if x.storage_offset() + x.numel() <= x.untyped_storage().size() // x.element_size():
            x = x.as_strided(x.shape, dense, x.storage_offset())
        return super().wide(x)


class OneStrideForAll(Dense):
    """Reads the values with the strides of the keys, where memory reaches that far."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        last = sum((size - 1) * stride for size, stride in zip(key.shape, key.stride(), strict=True))
        if value.storage_offset() + last < value.untyped_storage().size() // value.element_size():
            value = value.as_strided(key.shape, key.stride())
        return super().forward(query, key, value, piece)


class DropsTheLastKey(Dense):
    """Whole tiles of 16 keys, or the last key is lost."""

    def scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        s = super().scores(query, key, piece)
        if s.shape[-1] > 16 and s.shape[-1] % 16:
            s[..., : max(1, s.shape[-2] - 1), -1] = -math.inf
        return s


class HoldsAThousand(Dense):
    """Has room for 1,024 keys of a row and leaves out the others."""

    room: ClassVar[int] = 1024

    def scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        s = super().scores(query, key, piece)
        s[..., self.room :] = -math.inf
        return s


class HoldsTwoHundred(HoldsAThousand):
    """Has room for 200, more than a row of the grid has where there are several heads."""

    room = 200


class ColumnsInPairs(Dense):
    """Reads the queries two columns at a time, and loses the last one of an odd number."""

    def scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        even = query.shape[-1] // 2 * 2
        return super().scores(query[..., :even], key[..., :even], piece)


class IgnoresOffsets(Whole):
    def counts(self, piece: LayoutPiece) -> Tensor:
        geometry = piece.layout.geometry
        start = geometry.kv_len - geometry.q_len
        return multiplicity(piece.layout.pattern, attrs.evolve(geometry, q_offset=start, kv_offset=0)).double()


class AlignsAtTheStart(Whole):
    """Unequal lengths begin together instead of ending together."""

    def counts(self, piece: LayoutPiece) -> Tensor:
        geometry = piece.layout.geometry
        shift = geometry.kv_len - geometry.q_len
        return multiplicity(piece.layout.pattern, attrs.evolve(geometry, q_offset=geometry.q_offset - shift)).double()


class IgnoresDlse(Whole):
    def backward(self, *args: Any, dlse: Tensor | None = None) -> Grads:
        return super().backward(*args)


class NanOnEmptyRows(Whole):
    def finite(self, lse: Tensor) -> Tensor:
        return lse


class Restless(Dense):
    """Sums in an order of its own on every run."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return out * (1 + 1e-7 * torch.rand_like(out)), lse


class ShortSums(Dense):
    """Everything inside is bfloat16."""

    def wide(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return out, lse.float()

    def backward(self, *args: Any) -> Grads:
        dout, query, key, value, out, lse, piece = args
        return super().backward(dout, query, key, value, out, lse.to(torch.bfloat16), piece)


class LeavesGaps(Whole):
    """Takes memory without clearing it and writes only the rows that have keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        right, lse = super().forward(query, key, value, piece)
        out = torch.empty_like(right)
        out[:, :-1] = right[:, :-1]
        return out, lse


class CrashesAt48(Dense):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        if query.shape[-1] == 48:
            raise RuntimeError("head_dim must be a power of two")
        return super().forward(query, key, value, piece)


class CrashesWhenAsked(Dense):
    def refusals(self, request: Request) -> Iterator[Refusal]:
        if request.config.head_dim == 256:
            raise KeyError(256)
        yield from super().refusals(request)


class NeverAccepts(Dense):
    """Declares gradients in a deterministic backward and always refuses them."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        yield from super().refusals(request)
        if request.config.deterministic and request.config.requires_grad:
            yield Refusal("deterministic", "a deterministic backward", "atomic additions")


class PinsAnother(Dense):
    def pin(self, request: Request) -> str:
        return "fast"


class CannotBuild(Dense):
    def build(self, request: Request) -> Any:
        if request.config.is_causal:
            raise NotImplementedError("causal")
        return self


class CannotDrop(Dense):
    """Declares dropout, of which its kernel knows nothing."""


class DropsNothing(Whole):
    """Declares dropout and leaves it out."""


class DropsWithoutScaling(Whole):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        if piece.seed is None:
            return out, lse
        generator = torch.Generator().manual_seed(int(piece.seed))
        return out * (torch.rand(out.shape, generator=generator) >= piece.dropout_p), lse
