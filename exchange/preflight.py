"""What a ring will cost, before anything runs: bytes, FLOPs, imbalance and memory of every rank of any number.

For patterns of branches nothing is listed and all ranks are counted at once, so a million of them take seconds; tables
of blocks are lowered, within `Limits.layout_bytes`, once for ranks that are alike, else for many ranks together. The
bytes are those that counters of a run show. R ranks.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from ..core.checks import require_int
from ..core.errors import ConfigError
from ..core.explain import amount, columns, counted
from ..core.lowering import layout_kinds
from ..core.pattern import LearnedPattern, Pattern
from .alike import block_totals
from .census import branch_totals, pair_counts
from .progressions import BranchRows
from .shards import Shards, shard_length

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..core.config import AttentionConfig
    from ..core.pattern import IntArray

    Figures = NDArray[Any]  # int64, or Python's integers where 64 bits do not hold them

MOST_RANKS: Final = 1 << 20  # whose loads are some 100 MB
_ITEM_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@attrs.frozen(kw_only=True)
class RankLoad:
    """One rank's share of one forward and one backward pass.

    Attributes:
        rank: whose.
        forward_received, forward_sent: bytes of keys and values.
        backward_received, backward_sent: bytes of gradients (and, hop by hop, of keys and values again).
        flops: of the forward pass, 4 * head_dim a counted pair; the backward has 2.5 times as many.
        peak_bytes: tensors that the attention holds at the fullest moment of its backward, its inputs and results
            included; the workspace of its kernels not, which depends on the backend (core's block product takes up to
            `Limits.workspace_bytes`).
    """

    rank: int
    forward_received: int
    forward_sent: int
    backward_received: int
    backward_sent: int
    flops: int
    peak_bytes: int


@attrs.frozen(kw_only=True, eq=False)
class RankLoads:
    """The loads of all ranks: of each number in `RankLoad` an array (R,)."""

    forward_received: Figures
    forward_sent: Figures
    backward_received: Figures
    backward_sent: Figures
    flops: Figures
    peak_bytes: Figures

    def __getitem__(self, rank: int) -> RankLoad:
        return RankLoad(rank=rank, **{name: int(figures[rank]) for name, figures in self._named()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RankLoads):
            return NotImplemented
        return all(np.array_equal(figures, getattr(other, name)) for name, figures in self._named())

    def __hash__(self) -> int:
        return hash(tuple(figures.size for _, figures in self._named()))

    def to_dicts(self) -> list[dict[str, int]]:
        """One mapping a rank, of plain integers."""
        names, columns = zip(*self._named(), strict=True)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [{"rank": rank, **dict(zip(names, row, strict=True))} for rank, row in enumerate(rows)]

    def _named(self) -> list[tuple[str, Figures]]:
        return [(field.name, getattr(self, field.name)) for field in attrs.fields(RankLoads)]


@attrs.frozen(kw_only=True)
class Preflight:
    """The costs of a ring.

    Attributes:
        ranks: how many share the sequence.
        seq_len: of the whole sequence.
        batch: batch size.
        mode: "selective", each rank getting the rows that its queries name, or "hop by hop".
        budget_bytes: `Limits.exchange_buffer_bytes`, beyond which it is hop by hop.
        full_ring_bytes: what every rank would receive in a forward pass if all keys and values travelled.
        totals: the loads of all ranks, as arrays.
    """

    ranks: int
    seq_len: int
    batch: int
    mode: str
    budget_bytes: int
    full_ring_bytes: int
    totals: RankLoads

    @cached_property
    def loads(self) -> tuple[RankLoad, ...]:
        """One a rank."""
        return tuple(RankLoad(**fields) for fields in self.totals.to_dicts())

    @property
    def imbalance(self) -> float:
        """The largest share of FLOPs over the mean; 1 where there are none."""
        flops = self.totals.flops.tolist()
        total = sum(flops)
        return max(flops) * len(flops) / total if total else 1.0

    @property
    def saving(self) -> float | None:
        """How many times fewer bytes than a full ring's the busiest rank receives; None where it receives none."""
        most = int(self.totals.forward_received.max())
        return self.full_ring_bytes / most if most else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {field.name: getattr(self, field.name) for field in attrs.fields(Preflight) if field.name != "totals"}
        return own | {"loads": self.totals.to_dicts(), "imbalance": self.imbalance, "saving": self.saving}

    def __str__(self) -> str:
        if self.saving is None:
            would = (
                f"; a full ring would bring {self.full_ring_bytes:,} bytes to a rank" if self.full_ring_bytes else ""
            )
            travels = f"nothing travels{would}"
        else:
            travels = (
                f"a forward pass brings at most {int(self.totals.forward_received.max()):,} bytes to a rank, "
                f"{self.saving:.4g} times fewer than a full ring's {self.full_ring_bytes:,}"
            )
        shown = self._shown()
        few = f"{len(shown)} of {self.ranks:,} ranks: the first, the last, and those with the most in a column"
        lines = [
            f"{counted(self.seq_len, 'token')} over {counted(self.ranks, 'rank')}, batch {self.batch}, {self.mode}; "
            f"the busiest rank computes {self.imbalance:.3f} times the mean",
            f"  {travels}",
            "  peak memory is of the tensors that the attention holds, without the workspace of its kernels",
            *([f"  {few}"] if len(shown) < self.ranks else []),
        ]
        header = ("rank", "fwd received", "fwd sent", "bwd received", "bwd sent", "fwd FLOP", "peak memory")
        return "\n".join([*lines, *columns([header, *(_cells(load) for load in shown)])])

    def _shown(self) -> list[RankLoad]:
        """All ranks, or of many the first, the last, and those with the most of something."""
        totals = self.totals
        if self.ranks <= 16:
            return [totals[rank] for rank in range(self.ranks)]
        most = (totals.forward_received, totals.forward_sent, totals.flops, totals.peak_bytes)
        return [totals[rank] for rank in sorted({0, self.ranks - 1, *(int(figures.argmax()) for figures in most)})]


def _cells(load: RankLoad) -> tuple[str, ...]:
    moved = (load.forward_received, load.forward_sent, load.backward_received, load.backward_sent)
    return (
        str(load.rank),
        *(f"{number:,}" for number in moved),
        amount(load.flops, "FLOP"),
        amount(load.peak_bytes, "B"),
    )


def preflight(config: AttentionConfig, pattern: Pattern, ranks: int, *, batch: int = 1) -> Preflight:
    """Simulate the exchange of `ranks` ranks.

    Args:
        config: with a seq_len, of the whole sequence.
        pattern: its pattern, resolved.
        ranks: any number up to `MOST_RANKS` that divides the length.
        batch: batch size.

    Raises:
        ConfigError: more than `MOST_RANKS`, no seq_len, one that `ranks` does not divide, a learned pattern, or tables
            beyond `Limits.layout_bytes`.
    """
    require_int("ranks", ranks, minimum=1, maximum=MOST_RANKS)
    require_int("batch", batch, minimum=1)
    if config.seq_len is None:
        raise ConfigError("give seq_len: what ranks exchange depends on the length of the sequence")
    if isinstance(pattern.unwrap(), LearnedPattern):
        raise ConfigError(
            f"a {pattern.kind} pattern chooses its blocks from the whole sequence, which no rank of a "
            "context_parallel ring has; use what attention.gate.freeze(query, key) returns"
        )
    length = shard_length(config.seq_len, ranks)
    shards = Shards(length, ranks, config.num_heads, config.kv_heads, config.is_causal)
    received, sent, pairs = _counted(pattern, shards, config)
    item, wide = _ITEM_BYTES[config.dtype], 8 if config.dtype == "float64" else 4
    row = 2 * batch * config.head_dim
    everything = (ranks - 1) * length * config.kv_heads
    hops = int(received.max()) * row * item > config.limits.exchange_buffer_bytes
    if hops:
        received = sent = np.full(ranks, everything)
    if 64 * row * (config.seq_len * config.num_heads + int(received.max()) + int(sent.max())) >= 1 << 63:
        received, sent = received.astype(object), sent.astype(object)
    forward_in, forward_out = received * (row * item), sent * (row * item)
    if hops:
        backward_in = backward_out = forward_in + ranks * length * config.kv_heads * row * wide
    else:
        backward_in, backward_out = sent * (row * wide), received * (row * wide)
    return Preflight(
        ranks=ranks,
        seq_len=config.seq_len,
        batch=batch,
        mode="hop by hop" if hops else "selective",
        budget_bytes=config.limits.exchange_buffer_bytes,
        full_ring_bytes=everything * row * item,
        totals=RankLoads(
            forward_received=forward_in,
            forward_sent=forward_out,
            backward_received=backward_in,
            backward_sent=backward_out,
            flops=_weighted([(4 * config.head_dim * batch * times, found) for times, found in pairs], ranks),
            peak_bytes=_peak(config, length, batch, forward_in, backward_in, backward_out, hops=hops),
        ),
    )


def _counted(
    pattern: Pattern, shards: Shards, config: AttentionConfig
) -> tuple[IntArray, IntArray, list[tuple[int, IntArray]]]:
    """Rows that each rank receives and sends, and the pairs of its queries as weighted addends; (R,) int64."""
    branches = BranchRows(pattern, shards)
    rows, pairs = branch_totals(branches), list(pair_counts(branches))
    if "block" not in layout_kinds(pattern, shards.whole):
        return rows.received, rows.sent, pairs
    blocks = block_totals(pattern, branches, limit_bytes=config.limits.layout_bytes)
    return rows.received + blocks.received, rows.sent + blocks.sent, [*pairs, (1, blocks.pairs)]


def _weighted(terms: list[tuple[int, IntArray]], ranks: int) -> Figures:
    """The sum of all times * numbers, (R,)."""
    bound = sum(times * int(numbers.max()) for times, numbers in terms)
    total: Figures = np.zeros(ranks, dtype=np.int64 if bound < 1 << 63 else object)
    for times, numbers in terms:
        total += numbers.astype(total.dtype) * times
    return total


def _peak(
    config: AttentionConfig,
    length: int,
    batch: int,
    received: Figures,
    back_in: Figures,
    back_out: Figures,
    *,
    hops: bool,
) -> Figures:
    """`RankLoad.peak_bytes`."""
    item, wide = _ITEM_BYTES[config.dtype], 8 if config.dtype == "float64" else 4
    rows = batch * length * config.head_dim
    inputs = rows * item * (3 * config.num_heads + 2 * config.kv_heads)  # q, out, dout; k, v
    sums = rows * wide * (config.num_heads + 2 * config.kv_heads)  # dq; dk, dv
    row_sums = 2 * batch * length * config.num_heads * wide  # lse, delta
    shard = 2 * rows * config.kv_heads
    if hops:
        exchange: Figures = np.full_like(received, shard * (2 * item + 3 * wide))
    else:
        exchange = 2 * received + back_in + 2 * back_out
    return exchange + (inputs + sums + row_sums)
