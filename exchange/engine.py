"""The engine of a sharded attention: each pass an exchange with the other ranks around the rank's own computation.

Shapes: B batch, S queries of the shard (S = N / R), H query heads, K key-value heads, D head_dim, U received rows.

Selective passes move exactly the named rows (see `plan`): own keys are computed while rows are on their way, received
ones after, all merged by log-sum-exp. Received rows are kept for the backward, which then sends their
gradients home in the accumulator's dtype while the local backward runs. A `RingKernel` computes the rank's own keys by
its kernel for whole layouts.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..core.cache import ByteLRU
from ..core.composed import Composers
from ..core.context_parallel import refuse_in_ring
from ..core.counters import AttentionCounters
from ..core.empty import empty_gradients, empty_results
from ..core.engine import Engine
from ..core.errors import ConfigError
from ..core.lowering import lower
from ..core.ops import without_autocast
from ..core.tracing import span
from ..core.transforms import is_active, is_watched
from .autograd import RingAttend, refuse_traced
from .communicator import GRADIENTS, ROWS, Counters, Origin, digest_bytes
from .compute import Compute, RankProgram
from .hops import HopProgram, hop_backward, hop_forward
from .pieces import EmptyPiece, Merged, WholeRows, mergeable
from .plan import plan_rank
from .ring_kernel import RingKernel
from .rows import most_rows, survey
from .shards import Shards, shard_length

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.config import AttentionConfig
    from ..core.kernel import DenseKernel
    from ..core.layout import Layout
    from ..core.pattern import IntArray, Pattern
    from .communicator import Communicator, Pass, Posted
    from .hops import Begin

    Messages = tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]]  # to send and to receive, with the peers


@attrs.frozen(eq=False)
class _Program:
    """What is known of one length: either kind of pass, prepared when first needed."""

    shards: Shards
    digest: bytes
    selective: RankProgram | None
    hops: HopProgram | None
    pairs: int = attrs.field(init=False)  # that a batch row of the rank counts

    @pairs.default
    def _count_pairs(self) -> int:
        return sum(part.pairs for part in (self.selective, self.hops) if part is not None)

    def without_rows(self) -> _Program:
        """The same for a batch of 0, whose rows fit any buffer: ranks agree on the pass, and no kernel is asked."""
        assert self.selective is not None
        return attrs.evolve(self, selective=attrs.evolve(self.selective, local=EmptyPiece(), stages=()))

    @property
    def nbytes(self) -> int:
        return 1024 + sum(part.nbytes for part in (self.selective, self.hops) if part is not None)


class RingEngine(Engine):
    """Computes a rank's shard of one configuration's attention, together with the other ranks of its ring.

    Args:
        config: the configuration, the same on every rank.
        pattern: its pattern, resolved.
        kernel: of the local backend, for dense pieces, or a `RingKernel`.
        has_dlse: see `Engine`.
        call_axes: those of the local backend, for when it computes alone again.
        ring: its communicator, and which of the attentions over it this is.
        names: `backend` and `plan` of `Engine`.
    """

    def __init__(
        self,
        config: AttentionConfig,
        pattern: Pattern,
        kernel: DenseKernel | RingKernel,
        *,
        has_dlse: bool,
        call_axes: frozenset[str],
        ring: tuple[Communicator, Origin],
        **names: str,
    ) -> None:
        # What a call alone may ask of a backend (other lengths, offsets) it may not ask of ranks that share a sequence.
        traits: dict[str, Any] = {"has_dlse": has_dlse, "call_axes": frozenset(), **names}
        super().__init__(config, pattern, kernel, takes_layout=isinstance(kernel, RingKernel), **traits)
        if isinstance(kernel, RingKernel):
            self._composers = Composers.of(kernel.dense, self.scale, config)
        self.local_axes = call_axes
        self.communicator, self.origin = ring
        self.plan_key = self.key
        self.key += f"/{id(self.communicator)}"
        self.rings: ByteLRU[tuple[int, bool, torch.device], _Program] = ByteLRU(config.limits.pattern_cache_bytes)
        # By length, rows that no rank receives more of, and the most that one does, where that had to be found.
        self._rows: dict[int, tuple[int, int | None]] = {}
        self._judging_s = 0.0  # spent on these numbers, which is part of lowering
        self._moved = Counters()

    def counters(self) -> AttentionCounters:
        """What this rank has computed and moved by now; of pairs, tokens and calls its own."""
        own, moved, cache = super().counters(), self._moved, self.rings.counters
        return attrs.evolve(
            own,
            forward=attrs.evolve(own.forward, sent_bytes=moved.forward_sent, received_bytes=moved.forward_received),
            backward=attrs.evolve(own.backward, sent_bytes=moved.backward_sent, received_bytes=moved.backward_received),
            layouts=attrs.evolve(cache, lowering_s=cache.lowering_s + self._judging_s),
            header_bytes=moved.header_bytes,
            waited_s=moved.waited_s,
        )

    def prepare(
        self, q_len: int, kv_len: int, q_offset: int, kv_offset: int, device: torch.device, *, drops: bool = False
    ) -> Layout:
        """Plan a whole sequence of `q_len` tokens for a batch of one; returns the layout of this rank's own keys.

        No ring `drops`, as configurations see to.

        Raises:
            ConfigError: for a length that the ranks cannot share, other lengths of keys, or other offsets.
        """
        self._check_offsets(q_len, kv_len, q_offset, kv_offset)
        shards = self._shards(shard_length(q_len, self.communicator.size))
        if shards.length:
            self._ring_program(shards.length, 1, device)
        own = shards.against(self.communicator.rank, self.communicator.rank)
        return lower(self.pattern, own, limit_bytes=self.config.limits.layout_bytes)

    @torch.compiler.disable(reason="ranks exchange rows on the host")  # type: ignore[untyped-decorator, no-untyped-call]
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        q_offset: int,
        kv_offset: int,
        recompute: bool,
        origin: Origin,
    ) -> tuple[Tensor, Tensor]:
        """Differentiable attention of the shard's queries to the whole sequence; collective.

        Args:
            query: (B, S, H, D).
            key: (B, S, K, D).
            value: (B, S, K, D).
            q_offset: 0; where a shard stands follows from the rank.
            kv_offset: 0.
            recompute: keep neither results nor received rows for the backward.
            origin: of the attention that calls.

        Raises:
            ConfigError: lengths or offsets that no shard has, a transform of torch.func, or a trace.
            RingBroken: the pass failed on some rank.
        """
        self._check_offsets(query.shape[1], key.shape[1], q_offset, kv_offset)
        if is_active():
            raise ConfigError(
                "torch.func does not reach over ranks that share a sequence; use backward, or build without a mesh"
            )
        refuse_traced(query, key, value)
        with _disable_current_modes() if is_watched() else nullcontext():  # else modes would keep what is added to
            return self._attend(query, key, value, recompute, origin)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, recompute: bool, origin: Origin
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            rest = (self, recompute, origin)
            out, lse = RingAttend.apply(query, key, value, rest)  # type: ignore[no-untyped-call, unused-ignore]
            return out, lse
        return self.ring_forward(query, key, value, origin)[:2]

    def _program(self, *_: object, **__: object) -> NoReturn:
        """Whatever would compute on this rank's keys alone is an error, not a local answer."""
        refuse_in_ring(self.communicator.size)

    def _composed(self, *_: object, **__: object) -> NoReturn:
        """As `_program`."""
        self._program()

    def _check_offsets(self, q_len: int, kv_len: int, q_offset: int, kv_offset: int) -> None:
        if q_len != kv_len or q_offset or kv_offset:
            raise ConfigError(
                f"ranks that share a sequence take shards of equal lengths and no offsets (positions follow from the "
                f"rank), got {q_len} queries, {kv_len} keys, q_offset={q_offset}, kv_offset={kv_offset}"
            )

    def _shards(self, length: int) -> Shards:
        config = self.config
        return Shards(length, self.communicator.size, config.num_heads, config.kv_heads, config.is_causal)

    def _ring_program(self, length: int, batch: int, device: torch.device) -> _Program:
        config, limits, shards = self.config, self.config.limits, self._shards(length)
        row_bytes = 2 * batch * config.head_dim * getattr(torch, config.dtype).itemsize
        # The rows of no batch fit any buffer.
        hops, sent = self._judge(shards, limits.exchange_buffer_bytes // row_bytes) if batch else (False, None)
        key = (length, hops, device)
        found = self.rings.get(key)
        if found is None:
            with span(self.range_name("lower")):
                found = self.rings.get_or_make(key, lambda: self._make_ring_program(shards, hops, device, sent))
        return found if batch else found.without_rows()

    def _judge(self, shards: Shards, allowed: int) -> tuple[bool, tuple[IntArray, ...] | None]:
        """Whether some rank would receive more than `allowed` rows, and `Survey.sent`, where it was found on the way.

        All ranks must come to the same answer, so it depends on nothing that one of them has alone.
        """
        start, sent = time.perf_counter(), None
        if shards.length not in self._rows:
            self._rows[shards.length] = most_rows(self.pattern, shards), None
        bound, most = self._rows[shards.length]
        if bound > allowed and most is None:
            limit_bytes = self.config.limits.layout_bytes
            found = survey(self.pattern, shards, self.communicator.rank, limit_bytes=limit_bytes)
            self._rows[shards.length], sent = (bound, found.most), found.sent
            most = found.most
        self._judging_s += time.perf_counter() - start
        return bound > allowed and most is not None and most > allowed, sent

    def _make_ring_program(
        self, shards: Shards, hops: bool, device: torch.device, sent: tuple[IntArray, ...] | None
    ) -> _Program:
        limits, rank, kernel = self.config.limits, self.communicator.rank, self.kernel
        assert self._composers is not None
        composer = self._composers.for_call(shards.seq_len, shards.seq_len)
        compute = Compute(composer, device, getattr(torch, self.config.dtype), limits.workspace_bytes)
        if isinstance(kernel, RingKernel):
            compute = attrs.evolve(compute, layout_kernel=kernel.layout, takes_staged=kernel.takes_staged)
        selective = travelling = None
        if hops:
            travelling = HopProgram.prepare(self.pattern, shards, rank, compute, limit_bytes=limits.layout_bytes)
        else:
            plan = plan_rank(self.pattern, shards, rank, limit_bytes=limits.layout_bytes, sent=sent)
            selective = RankProgram.prepare(plan, compute)
        digest = digest_bytes(f"{self.plan_key} {shards!r} {hops}")
        return _Program(shards, digest, selective, travelling)

    def ring_forward(
        self, query: Tensor, key: Tensor, value: Tensor, origin: Origin
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """out in the inputs' dtype and lse, both contiguous, what was received, (U, 2, B, D), and the pass's number."""
        if not query.shape[1]:
            number = self._agree_on_nothing(ROWS, query, origin)
            self.forwards.add(1, 0, 0)
            return (*empty_results(query), None, number)
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        with without_autocast(query.device), torch.no_grad():
            program, received = self._ring_program(query.shape[1], query.shape[0], query.device), None
            begin = self._begin(program.digest, origin)
            with span(self._forward_name):
                if program.hops is not None:
                    out, lse, number = hop_forward(self.communicator, program.hops, begin, query, key, value)
                else:
                    assert program.selective is not None
                    out, lse, received, number = self._selective_forward(program.selective, begin, query, key, value)
                out, lse = out.to(query.dtype).contiguous(), lse.contiguous()
        self.forwards.add(1, query.shape[0] * query.shape[1], query.shape[0] * program.pairs)
        return out, lse, received, number

    def _selective_forward(
        self, program: RankProgram, begin: Begin, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        batch, _, _, head_dim = key.shape

        def own() -> tuple[Tensor, Tensor]:
            out, lse = program.local.forward(query, key, value)
            return mergeable(out, lse, once=program.once) if program.stages else (out, lse)

        def rows() -> Messages:
            receives = received.split_with_sizes(program.plan.receive_counts.tolist())
            return list(enumerate(program.pack(key, value))), list(enumerate(receives))

        with begin(ROWS, query) as current:
            received = key.new_empty((program.plan.received.size, 2, batch, head_dim))
            (out, lse), pending = _beside(current, rows, own)
            current.wait(pending)
            with span("received keys"):
                program.merge_received(out, lse, query, received)
        return out, lse, received, current.number

    def ring_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        received: Tensor | None,
        origin: Origin,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the shard in the inputs' dtype, with what all ranks' queries contribute; collective."""
        self._check_dlse(dlse)
        if not query.shape[1]:
            self._agree_on_nothing(GRADIENTS, key, origin)
            self.backwards.add(1, 0, 0)
            return empty_gradients(query, key, value)
        query, key, value, dout = (x.contiguous() for x in (query, key, value, dout))
        with without_autocast(query.device), torch.no_grad():
            program = self._ring_program(query.shape[1], query.shape[0], query.device)
            begin = self._begin(program.digest, origin)
            with span(self._backward_name):
                once = program.selective is not None and program.selective.once
                merged = Merged(WholeRows(dout, dlse if dlse is None else dlse.contiguous(), query, out, lse), once)
                if program.hops is not None:
                    dk, dv = hop_backward(self.communicator, program.hops, begin, merged, key, value)
                else:
                    assert program.selective is not None
                    assert received is not None
                    dk, dv = self._selective_backward(program.selective, begin, merged, key, value, received)
                dq = merged.dq()
        self.backwards.add(1, query.shape[0] * query.shape[1], query.shape[0] * program.pairs)
        return dq, dk.to(key.dtype).contiguous(), dv.to(value.dtype).contiguous()

    def _selective_backward(
        self, program: RankProgram, begin: Begin, merged: Merged, key: Tensor, value: Tensor, received: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape, dtype = (program.sent.numel(), 2, key.shape[0], key.shape[3]), merged.rows.dtype
        beside = Merged(merged.rows, merged.once)  # what received keys give to queries

        def own() -> tuple[Tensor, Tensor]:
            dk, dv = program.local.backward(merged, key, value)
            merged.settle()
            if program.stages:
                merged.sums()  # made here, since what is aside adds to it
            return dk.contiguous(), dv.contiguous()

        def gradients() -> Messages:
            with span("received keys"):
                grads = program.received_backward(beside, received)
            return list(enumerate(grads.split_with_sizes(program.plan.receive_counts.tolist()))), list(enumerate(home))

        with begin(GRADIENTS, key) as current:
            home = torch.empty(shape, dtype=dtype, device=key.device).split_with_sizes(program.send_counts)
            program.read(merged.rows)  # before the mark that what is aside follows
            (dk, dv), pending = _beside(current, gradients, own)
            done = current.mark()
            current.wait(pending)
            with current.aside(done):
                merged.add_sum(beside)
                merged.settle()
                with span("rows come home"):
                    program.unpack(dk, dv, home)
            current.rejoin()
        return dk, dv

    def _agree_on_nothing(self, kind: int, x: Tensor, origin: Origin) -> int:
        """A pass without tokens, which no other rank may have either; its number."""
        with self._begin(digest_bytes(self.plan_key), origin)(kind, x) as current:
            return current.number

    def _begin(self, digest: bytes, origin: Origin) -> Begin:
        return partial(self.communicator.begin, digest=digest, counters=self._moved, origin=origin)


def _beside(
    current: Pass, messages: Callable[[], Messages], own: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[tuple[Tensor, Tensor], Posted]:
    """Start an exchange of what `messages` makes, and compute the rank's own keys while rows are on their way.

    Where computing is asynchronous own keys are launched first: the device works while the host makes the messages
    beside them, and waits for the others (`Pass.post` for their headers).
    """
    if not current.launches_first:
        pending = current.post(*messages())
        with span("own keys"):
            return own(), pending
    ready = current.mark()
    with span("own keys"):
        results = own()
    with current.aside(ready):
        return results, current.post(*messages())
