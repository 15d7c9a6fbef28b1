"""What a ring will cost, before anything runs: bytes, FLOPs, imbalance and memory of every rank of any number.

For patterns of branches nothing is listed, so a thousand ranks and a billion tokens take seconds; tables of blocks are
lowered, within `Limits.layout_bytes`. The bytes are those that the counters of a run show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from ..core.checks import require_int
from ..core.counting import branch_pairs
from ..core.errors import ConfigError
from ..core.explain import amount, columns, counted
from ..core.lowering import lower
from ..core.pattern import LearnedPattern, Pattern
from .rows import RowCounter
from .shards import Shards, shard_length

if TYPE_CHECKING:
    from ..core.config import AttentionConfig

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


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
        loads: one a rank.
    """

    ranks: int
    seq_len: int
    batch: int
    mode: str
    budget_bytes: int
    full_ring_bytes: int
    loads: tuple[RankLoad, ...]

    @property
    def imbalance(self) -> float:
        """The largest share of FLOPs over the mean; 1 where there are none."""
        flops = [load.flops for load in self.loads]
        return max(flops) * len(flops) / sum(flops) if sum(flops) else 1.0

    @property
    def saving(self) -> float | None:
        """How many times fewer bytes than a full ring's the busiest rank receives; None where it receives none."""
        most = max(load.forward_received for load in self.loads)
        return self.full_ring_bytes / most if most else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return attrs.asdict(self) | {"imbalance": self.imbalance, "saving": self.saving}

    def __str__(self) -> str:
        saving = "" if self.saving is None else f", {self.saving:.4g} times fewer than"
        head = (
            f"{counted(self.seq_len, 'token')} over {counted(self.ranks, 'rank')}, batch {self.batch}, {self.mode}; "
            f"the busiest rank computes {self.imbalance:.3f} times the mean\n"
            f"  a forward pass brings at most {max(load.forward_received for load in self.loads):,} bytes to a rank"
            f"{saving or '; all is local;'} a full ring's {self.full_ring_bytes:,}\n"
            "  peak memory is of the tensors that the attention holds, without the workspace of its kernels\n"
        )
        header = ("rank", "fwd received", "fwd sent", "bwd received", "bwd sent", "fwd FLOP", "peak memory")
        return head + "\n".join(columns([header, *(_cells(load) for load in self._shown())]))

    def _shown(self) -> list[RankLoad]:
        """All ranks, or of many the first, the last, and those with the most of something."""
        if self.ranks <= 16:
            return list(self.loads)
        keys = ("forward_received", "forward_sent", "flops", "peak_bytes")
        found = {self.loads[0].rank, self.loads[-1].rank}
        found |= {max(self.loads, key=lambda load: getattr(load, key)).rank for key in keys}
        return [self.loads[rank] for rank in sorted(found)]


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
        ranks: any number that divides the length.
        batch: batch size.

    Raises:
        ConfigError: no seq_len, one that `ranks` does not divide, a learned pattern, or tables beyond
            `Limits.layout_bytes`.
    """
    require_int("ranks", ranks, minimum=1)
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
    counter = RowCounter(pattern, shards, limit_bytes=config.limits.layout_bytes)
    received = np.zeros(ranks, dtype=np.int64)
    sent = np.zeros(ranks, dtype=np.int64)
    for rank in range(ranks):
        rows = counter.received(rank)
        received[rank] = rows.sum()
        sent += rows
    item, wide = _ITEM_BYTES[config.dtype], 8 if config.dtype == "float64" else 4
    row = 2 * batch * config.head_dim
    shard_rows = length * config.kv_heads
    hops = int(received.max()) * row * item > config.limits.exchange_buffer_bytes
    if hops:
        received = sent = np.full(ranks, (ranks - 1) * shard_rows)
    loads = []
    for rank, flops in enumerate(_flops(counter, config.head_dim)):
        forward_in, forward_out = int(received[rank]) * row * item, int(sent[rank]) * row * item
        if hops:
            gradients = ranks * shard_rows * row * wide
            backward_in = backward_out = forward_in + gradients
        else:
            backward_in, backward_out = int(sent[rank]) * row * wide, int(received[rank]) * row * wide
        loads.append(
            RankLoad(
                rank=rank,
                forward_received=forward_in,
                forward_sent=forward_out,
                backward_received=backward_in,
                backward_sent=backward_out,
                flops=batch * flops,
                peak_bytes=_peak(config, length, batch, forward_in, backward_in, backward_out, hops=hops),
            )
        )
    return Preflight(
        ranks=ranks,
        seq_len=config.seq_len,
        batch=batch,
        mode="hop by hop" if hops else "selective",
        budget_bytes=config.limits.exchange_buffer_bytes,
        full_ring_bytes=(ranks - 1) * shard_rows * row * item,
        loads=tuple(loads),
    )


def _flops(counter: RowCounter, head_dim: int) -> Iterator[int]:
    """Of each rank's forward pass, for one batch row."""
    shards = counter.shards
    known: dict[tuple[int, int], int] = {}
    for rank in range(shards.size):
        whole = shards.geometry(rank, 0, shards.seq_len)
        if counter.branches is None:
            layout = lower(counter.pattern, whole, limit_bytes=counter.limit_bytes)
            yield 4 * head_dim * int(layout.pairs)
            continue
        pairs = 0
        for index, branch in enumerate(counter.branches.branches):
            width, key = branch.segment_length, (index, -rank)
            if width is not None and -(-(whole.q_offset + shards.length) // width) * width <= shards.seq_len:
                key = (index, whole.q_offset % width)  # whole segments: the same wherever they stand
            if key not in known:
                known[key] = branch_pairs(branch, whole)
            pairs += known[key]
        yield 4 * head_dim * pairs


def _peak(
    config: AttentionConfig, length: int, batch: int, received: int, back_in: int, back_out: int, *, hops: bool
) -> int:
    """`RankLoad.peak_bytes`."""
    item, wide = _ITEM_BYTES[config.dtype], 8 if config.dtype == "float64" else 4
    rows = batch * length * config.head_dim
    inputs = rows * item * (3 * config.num_heads + 2 * config.kv_heads)  # q, out, dout; k, v
    sums = rows * wide * (config.num_heads + 2 * config.kv_heads)  # dq; dk, dv
    row_sums = 2 * batch * length * config.num_heads * wide  # lse, delta
    shard = 2 * rows * config.kv_heads
    exchange = shard * (2 * item + 3 * wide) if hops else 2 * received + back_in + 2 * back_out
    return inputs + sums + row_sums + exchange
