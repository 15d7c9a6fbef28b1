"""Attention token by token: a cache of the keys and values that a later query can still reach, and the steps over it.

Shapes: B batch, C new tokens, H query heads, K key-value heads, G = H / K, D head_dim, R rows that the cache has room
for, W columns of scores. Which rows a head keeps depends on the head, so each has positions of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from torch import Tensor

from .checks import require_int
from .decoding_checks import check_request, check_rows
from .errors import ConfigError
from .merging import accumulator_dtype
from .products import bmm, exponentials, widened
from .reach import Reach
from .tracing import span

if TYPE_CHECKING:
    from .engine import Engine
    from .gate import Gate
    from .pattern import IntArray

_SLACK = 16  # rows of room that an eviction leaves, and a 64th of what it keeps: so many tokens until the next
_PAIRS_AT_ONCE = 1 << 22  # multiplicities evaluated in one step: some tens of megabytes of temporaries


class DecodingCache:
    """The keys and values that later tokens can still see. `attention.make_cache` makes one, `attention.step` fills it.

    Rows are dropped as segments close and windows pass, a few at a time: what is held exceeds what is needed by 16 rows
    and a 64th at most, and by the `max_crop` last tokens.

    Attributes:
        batch_size: B.
        max_seq_len: most tokens that it may see, or None.
        max_crop: how many of the last tokens `crop` can surely take back.
        seq_len: tokens that it has seen.
        engine: of the attention that it belongs to.
        reach: what later tokens can see.
    """

    def __init__(
        self, engine: Engine, gate: Gate | None, device: torch.device, batch: int, most: int | None, max_crop: int
    ) -> None:
        config = engine.config
        check_request(engine, batch, most, max_crop)
        self.batch_size, self.max_seq_len, self.seq_len = int(batch), None if most is None else int(most), 0
        self.max_crop = int(max_crop)
        self.engine = engine
        self.reach = Reach(config, engine.pattern)
        self._gate = gate
        self._config = config
        self._heads = config.kv_heads
        room = most if most is not None and self.reach.keeps_all else 0
        shape = (batch, self._heads, room, config.head_dim)
        self._keys = torch.empty(shape, dtype=getattr(torch, config.dtype), device=device)
        self._values = torch.empty_like(self._keys)
        self._positions = np.full((self._heads, 0 if self.reach.keeps_all else room), -1, dtype=np.int64)
        self._used = np.zeros(self._heads, dtype=np.int64)
        self._least = 0  # what queries from there on can see is held
        self._block_query: Tensor | None = None  # of a learned pattern: the first query of the block that is not full

    def __repr__(self) -> str:
        return (
            f"DecodingCache(batch_size={self.batch_size}, seq_len={self.seq_len}, rows={self.rows}, "
            f"nbytes={self.nbytes:,}, dense_nbytes={self.dense_nbytes:,})"
        )

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that each key-value head holds, those included that are out of reach and not yet dropped."""
        return tuple(int(used) for used in self._used)

    @property
    def nbytes(self) -> int:
        """Memory that it occupies: keys, values and their positions, unused room included."""
        query = 0 if self._block_query is None else self._block_query.nbytes
        return self._keys.nbytes + self._values.nbytes + self._positions.nbytes + query

    @property
    def dense_nbytes(self) -> int:
        """Memory that the keys and values of all tokens seen would occupy, without room for more."""
        row = self._config.head_dim * self._keys.itemsize
        return 2 * self.batch_size * self._heads * self.seq_len * row

    def require_engine(self, engine: Engine) -> None:
        """Raise `ConfigError` unless it was made for `engine`."""
        if engine is self.engine:
            return
        mine, other = (attrs.asdict(config, recurse=False) for config in (self._config, engine.config))
        differs = "; ".join(f"{name} {mine[name]}, here {other[name]}" for name in mine if mine[name] != other[name])
        raise ConfigError(
            f"the cache was made by an attention of another configuration ({differs}); make one with make_cache"
        )

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The next tokens' out (B, C, H, D), and what they leave behind; see `Attention.step`.

        Args:
            query: (B, C, H, D).
            key: (B, C, K, D).
            value: (B, C, K, D).

        Raises:
            ConfigError: another batch size, unequal lengths, or more tokens than `max_seq_len`.
        """
        if query.shape[1] != key.shape[1]:
            raise ConfigError(
                f"a step takes query, key and value of the same new tokens, got {query.shape[1]} queries and "
                f"{key.shape[1]} keys"
            )
        self._check_room(key)
        if self.reach.keeps_all:
            return self._attend_to_all(query, key, value)
        reaches = self.seq_len and query.shape[1]
        out = self._attend_to_reachable(query, key, value) if reaches else self._run(query, key, value)
        self._append_reachable(key, value)
        return out

    def _check_room(self, key: Tensor) -> None:
        """Raise `ConfigError` where new tokens do not fit."""
        if key.shape[0] != self.batch_size:
            raise ConfigError(f"the cache was made for batch_size={self.batch_size}, got {key.shape[0]} batch rows")
        if self.max_seq_len is not None and self.seq_len + key.shape[1] > self.max_seq_len:
            raise ConfigError(
                f"the cache was made for max_seq_len={self.max_seq_len} and has seen {self.seq_len} tokens; "
                f"{key.shape[1]} more do not fit; make a larger cache"
            )

    def _run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The backend's own way, for the last tokens of a sequence and all of its keys."""
        shift = key.shape[1] - query.shape[1]
        tables = None if self._gate is None else self._gate(query, key, q_offset=shift)
        return self.engine.forward(query, key, value, shift, 0, None, tables)[0]

    def _attend_to_all(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """New tokens against every key; they count as seen only once that has succeeded, so that it can be repeated."""
        end = self.seq_len + key.shape[1]
        self._place(key, value, end)
        keys, values = (x[:, :, :end].transpose(1, 2) for x in (self._keys, self._values))
        query, lead, block_query = self._completed(query, end)
        out = self._run(query, keys, values)[:, lead:]
        self._block_query = block_query
        self._used[:] = self.seq_len = end
        return out

    def _completed(self, query: Tensor, end: int) -> tuple[Tensor, int, Tensor | None]:
        """A learned pattern's queries up to `end` from the first of their block, which alone chooses for it.

        Returns them, how many are before the new ones, and the first of the block that is not full at `end`.
        """
        size = self.engine.pattern.block_size
        if self._gate is None or size is None:
            return query, 0, None
        lead, begun = self.seq_len % size, end % size
        if lead:
            assert self._block_query is not None
            between = query.new_zeros(query.shape[0], lead - 1, *query.shape[2:])
            query = torch.cat([self._block_query, between, query], dim=1)
        first = query.shape[1] - begun
        return query, lead, query[:, first : first + 1].clone() if begun else None

    def select(self, rows: Tensor) -> None:
        """Hold the sequences `rows` of the batch from now on, in that order: beams, or what has not ended yet.

        Args:
            rows: (N,) int32 or int64, each from 0 to batch_size - 1, as often as it is wanted. N is the new batch_size.

        Raises:
            ConfigError: anything else, which changes nothing.
        """
        check_rows(rows, self.batch_size)
        index, width, query = rows.to(self._keys.device), int(self._used.max(initial=0)), self._block_query
        query = None if query is None else query.index_select(0, index)
        held = [self._keys, self._values]
        parts = [x[:, :, :width].index_select(0, index) for x in held]
        if len(rows) != self.batch_size:
            held = [x.new_zeros(len(rows), *x.shape[1:]) for x in held]
        for x, part in zip(held, parts, strict=True):
            x[:, :, :width] = part
        (self._keys, self._values), self._block_query, self.batch_size = held, query, len(rows)

    def crop(self, seq_len: int) -> None:
        """Forget all tokens but the first `seq_len`, as if they had not been given.

        Where rows are dropped it goes back by `max_crop` from the most tokens that it has seen: what was out of reach
        then is lost. A learned pattern goes back to where a block begins, or within the last one if it is not full.

        Raises:
            ConfigError: more tokens than it has seen, or fewer than it can go back to; nothing is changed then.
        """
        seq_len = require_int("seq_len", seq_len, minimum=0)
        if not self._least <= seq_len <= self.seq_len:
            raise ConfigError(
                f"cannot crop to {seq_len} tokens: the cache has seen {self.seq_len} and holds what tokens from "
                f"{self._least} on can see (max_crop={self.max_crop}); give a length from {self._least} to "
                f"{self.seq_len}, or make it with a larger max_crop"
            )
        query = self._block_query_at(seq_len)
        if self.reach.keeps_all:
            self._used[:] = seq_len
        else:
            self._positions[self._positions >= seq_len] = -1
            self._used = (self._positions >= 0).sum(axis=1)
        self.seq_len, self._block_query = seq_len, query

    def _block_query_at(self, seq_len: int) -> Tensor | None:
        """What `_block_query` has to be after `crop`."""
        size, seen = self.engine.pattern.block_size, self.seq_len
        if self._gate is None or size is None or seq_len % size == 0:
            return None
        begun = seen - seen % size + 1
        if seq_len < min(begun, seen):
            within = f", or from {begun} to {seen}" if begun <= seen else ""
            raise ConfigError(
                f"cannot crop to {seq_len} tokens: the first query of the block that they end in, which chooses for "
                f"it, is no longer held; crop to a multiple of {size}{within}"
            )
        return self._block_query

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Take in new tokens whose output is not asked for, as far as later ones can reach them.

        Args:
            key: (B, C, K, D), or (B, K, C, D) as `tensor_layout` says, of the attention's dtype.
            value: like key.

        Raises:
            ConfigError: other tensors or another batch size, inputs that require gradients, more tokens than
                `max_seq_len`, or a learned pattern, whose choice for the tokens after these depends on queries.
        """
        key, value = self._taken(key, value)
        self._check_room(key)
        if self._gate is not None:
            raise ConfigError(
                f"a {self.engine.pattern.kind} pattern chooses blocks by queries, not given to extend(): call step()"
            )
        if self.reach.keeps_all:
            end = self.seq_len + key.shape[1]
            self._place(key, value, end)
            self._used[:] = self.seq_len = end
        else:
            self._append_reachable(key, value)

    def _taken(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of `extend` as (B, C, K, D); `ConfigError` for what is not as those of the cache are."""
        if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
            raise ConfigError(f"key and value must be tensors, got {type(key).__name__}, {type(value).__name__}")
        held, heads_first = self._keys, self._config.tensor_layout == "bhsd"
        if torch.is_autocast_enabled(held.device.type):
            key, value = key.to(held.dtype), value.to(held.dtype)
        heads, width = self._heads, self._config.head_dim
        fits = key.dim() == 4 and (key.shape[1 if heads_first else 2], key.shape[3]) == (heads, width)
        if not fits or any((x.shape, x.dtype, x.device) != (key.shape, held.dtype, held.device) for x in (key, value)):
            wanted = f"{heads}, new_tokens, {width}" if heads_first else f"new_tokens, {heads}, {width}"
            found = " and ".join(f"{tuple(x.shape)} of {x.dtype} on {x.device}" for x in (key, value))
            raise ConfigError(f"key and value must be (batch, {wanted}) of {held.dtype} on {held.device}, got {found}")
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ConfigError("a cache records no gradient, but an input requires one; decode under torch.no_grad()")
        return (key.transpose(1, 2), value.transpose(1, 2)) if heads_first else (key, value)

    def _place(self, key: Tensor, value: Tensor, end: int) -> None:
        """Write new rows, which do not count yet, behind those of all tokens seen."""
        every = [np.arange(self.seq_len)] * self._heads
        self._keys, self._values, self._positions = self._with_room(every, key.shape[1])
        for held, x in ((self._keys, key), (self._values, value)):
            held[:, :, self.seq_len : end] = x.transpose(1, 2)

    def _append_reachable(self, key: Tensor, value: Tensor) -> None:
        """Keep of new tokens what later ones can reach; where room is short, what no longer is in reach is dropped."""
        end = self.seq_len + key.shape[1]
        least = max(self._least, end - self.max_crop)
        positions = np.arange(self.seq_len, end, dtype=np.int64)
        taken = [np.flatnonzero(kept) for kept in self.reach.kept([positions] * self._heads, least)]
        counts = np.array([tokens.size for tokens in taken])
        heads, tokens = np.repeat(np.arange(self._heads), counts), np.concatenate(taken)
        head, token = (torch.from_numpy(x).to(self._keys.device) for x in (heads, tokens))
        rows = [x[:, token, head] for x in (key, value)]  # before anything is dropped: memory may not suffice
        room, used = (self._keys, self._values, self._positions), self._used
        if (used + counts).max(initial=0) > self._positions.shape[1]:
            old = [places[:own] for places, own in zip(self._positions, used, strict=True)]
            kept = [np.flatnonzero(keep) for keep in self.reach.kept(old, least)]
            used = np.array([own.size for own in kept])
            room = self._with_room(kept, int((used + counts).max()) - int(used.max()))
        slots = np.concatenate([own + np.arange(n) for own, n in zip(used, counts, strict=True)])
        slot = torch.from_numpy(slots).to(self._keys.device)
        for held, x in zip(room[:2], rows, strict=True):
            held[:, head, slot] = x
        # Only now, when nothing can fail any more: a step that does is taken again over what was held before.
        self._keys, self._values, self._positions = room
        self._positions[heads, slots] = positions[tokens]
        self._used, self._least, self.seq_len = used + counts, least, end

    def _with_room(self, kept: list[IntArray], new: int) -> tuple[Tensor, Tensor, IntArray]:
        """Keys, values and positions of the rows `kept` of each head, in that order, with room for `new` more."""
        most = max(rows.size for rows in kept)
        if self.reach.keeps_all:
            if most + new <= self._keys.shape[2]:
                return self._keys, self._values, self._positions
            room, positions = max(most + new, 2 * most), self._positions
        else:
            room = most + new + _SLACK + most // 64
            positions = np.full((self._heads, room), -1, dtype=np.int64)
            for head, rows in enumerate(kept):
                positions[head, : rows.size] = self._positions[head, rows]
        indices = [torch.from_numpy(rows).to(self._keys.device) for rows in kept]
        # All at once, at the end: there may be memory for one and not for both.
        return _moved(self._keys, indices, room), _moved(self._values, indices, room), positions

    def _attend_to_reachable(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """New tokens against the rows held and themselves: out (B, C, H, D).

        Every pair is counted as the pattern's multiplicity says, so that rows held too long do not matter.

        Args:
            query: (B, C, H, D).
            key: (B, C, K, D), of the new tokens, which are not yet in the cache.
            value: as key.
        """
        width = int(self._used.max(initial=0))
        keys = [widened(x).flatten(0, 1) for x in (self._keys[:, :, :width], key.transpose(1, 2))]
        values = [widened(x).flatten(0, 1) for x in (self._values[:, :, :width], value.transpose(1, 2))]
        new = np.arange(self.seq_len, self.seq_len + query.shape[1], dtype=np.int64)
        positions = np.concatenate([self._positions[:, :width], np.tile(new, (self._heads, 1))], axis=1)
        batch, count, heads, _ = query.shape
        columns = positions.shape[1]
        itemsize = accumulator_dtype(query.dtype).itemsize
        step = self._config.limits.workspace_bytes // (3 * itemsize * max(batch, 1) * heads * columns)
        step = max(1, min(step, _PAIRS_AT_ONCE // (heads * columns)))
        with span(self.engine.range_name("step")):
            out = [
                self._attend(query[:, i : i + step], keys, values, new[i : i + step], positions)
                for i in range(0, count, step)
            ]
        self.engine.forwards.add(1, batch * count, 0)
        return torch.cat(out, dim=1)

    def _attend(
        self, query: Tensor, keys: list[Tensor], values: list[Tensor], places: IntArray, positions: IntArray
    ) -> Tensor:
        """Queries (B, C, H, D) at `places` (C,) against the rows held and the new ones, at `positions` (K, W).

        `keys` and `values` are both parts, (B * K, rows, D) each, of which the larger is a view.
        """
        batch, count, heads, head_dim = query.shape
        dtype, columns = accumulator_dtype(query.dtype), positions.shape[1]
        counts = self._counts(places, positions)
        self.engine.forwards.add(0, 0, batch * int(counts.sum()))
        bias = torch.from_numpy(counts).to(query.device, dtype).log_()
        q = widened(query).transpose(1, 2).reshape(batch * self._heads, heads // self._heads * count, head_dim)
        scores = torch.cat([bmm(q, key.mT) for key in keys], dim=-1).mul_(self.engine.scale)
        scores = scores.view(batch, heads, count, columns).add_(bias)
        weights, total, _ = exponentials(scores)
        shares = weights.view(*q.shape[:2], columns).to(q.dtype)
        held = values[0].shape[1]
        out = bmm(shares[..., :held], values[0]) + bmm(shares[..., held:], values[1])
        out = out.view(batch, heads, count, head_dim) / torch.where(total == 0, 1.0, total)  # 0 where nothing is seen
        return out.transpose(1, 2).to(query.dtype)

    def _counts(self, places: IntArray, positions: IntArray) -> IntArray:
        """How often each query counts each row, (H, C, W); unused room counts 0."""
        heads = self._config.num_heads
        end = self.seq_len + 1 if not places.size else int(places[-1]) + 1
        geometry = self._config.geometry(places.size, end)
        query = places[None, :, None]
        key = np.repeat(positions, heads // self._heads, axis=0)[:, None, :]
        return self.reach.multiplicity(query, key, np.arange(heads)[:, None, None], geometry)


def _moved(held: Tensor, rows: list[Tensor], room: int) -> Tensor:
    """The rows of each head (B, K, R, D) in a tensor with `room` for more; room is 0, since 0 * NaN would be NaN."""
    new = held.new_zeros(held.shape[0], held.shape[1], room, held.shape[3])
    for head, index in enumerate(rows):
        new[:, head, : index.shape[0]] = held[:, head].index_select(1, index)
    return new
