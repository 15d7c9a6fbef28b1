"""The module that `build_attention` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never

import torch
from torch import Tensor, nn

from .checks import require_int
from .config import refuse_arguments
from .decoding import DecodingCache
from .document_ops import attend_documents, received_in_documents
from .documents import check_arguments, check_documents
from .dropping import draw_seed
from .errors import ConfigError
from .flops import register_flops
from .merging import accumulator_dtype
from .ops import attend, intern, without_autocast
from .outside import outside_graphs
from .pattern import LearnedPattern

if TYPE_CHECKING:
    from .config import AttentionConfig
    from .counters import AttentionCounters
    from .engine import Engine
    from .gate import Gate
    from .plan import AttentionPlan


class Attention(nn.Module):
    """Attention as planned: `out = attention(query, key, value)`.

    Inputs are (batch, seq_len, num_heads, head_dim), or (batch, num_heads, seq_len, head_dim) with
    `tensor_layout="bhsd"`; keys and values have num_kv_heads heads. Under autocast they are cast to the dtype that the
    attention was built for; otherwise they must have it. No parameters, so nothing in the state_dict,
    unless its pattern is learned: then `attention.gate` has them.

    Attributes:
        config: what it was built from.
        plan: which backend and kernel, and why; `plan.explain()` prints it.
        gate: chooses the blocks of a learned pattern and is trained by itself; other attentions have none.
    """

    gate: Gate

    def __init__(self, config: AttentionConfig, plan: AttentionPlan, engine: Engine) -> None:
        super().__init__()
        self._rebind(config, plan, engine)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._device_type = torch.device(plan.device["torch_name"]).type
        learned = engine.pattern.unwrap()
        self._has_gate = isinstance(learned, LearnedPattern)
        if isinstance(learned, LearnedPattern):
            self.gate = learned.make_gate(config)
        self._query_tail = (config.num_heads, config.head_dim)
        self._key_tail = (config.kv_heads, config.head_dim)

    def _rebind(self, config: AttentionConfig, plan: AttentionPlan, engine: Engine) -> None:
        """Compute with another engine from now on; heads, widths and dtype are as before."""
        self.config, self.plan, self._engine = config, plan, intern(engine)
        self._origin = getattr(engine, "origin", None)  # its own, also where it shares an engine with others
        register_flops()
        # Not made in extra_repr: torch.func.vmap asks a module for its repr, and torch.compile cannot trace attrs' own.
        self._words = (
            f"backend={plan.backend!r}, kernel={plan.kernel!r}, pattern={config.pattern!r}, "
            f"num_heads={config.num_heads}, head_dim={config.head_dim}, is_causal={config.is_causal}, "
            f"dtype={config.dtype}" + (f", dropout_p={config.dropout_p:g}" if config.dropout_p else "")
        )

    def extra_repr(self) -> str:
        """Backend, kernel and the main fields of the configuration."""
        return self._words

    @outside_graphs
    def prepare(self, seq_len: int, *, kv_len: int | None = None) -> None:
        """Lower the pattern for a length ahead of its first use (before a CUDA graph is captured, say).

        With dropout for what is computed in training, or after `eval()` for what is computed then.

        Args:
            seq_len: number of queries.
            kv_len: number of keys; `seq_len` if not given. The last query stands at the last key.
        """
        seq_len = require_int("seq_len", seq_len, minimum=0)
        kv_len = seq_len if kv_len is None else require_int("kv_len", kv_len, minimum=0)
        drops = self.training and self.config.dropout_p > 0
        self._engine.prepare(seq_len, kv_len, kv_len - seq_len, 0, self._device(), drops=drops)

    def _device(self) -> torch.device:
        """Where inputs are expected, with its index; a CPU has none, as its tensors say."""
        device = torch.get_default_device() if self.config.device is None else torch.device(self.config.device)
        if device.type == "cpu":
            return torch.device("cpu")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        return_lse: bool = False,
        q_offset: int | None = None,
        kv_offset: int = 0,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **unknown: Never,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        With `key_padding_mask` or `cu_seqlens` a call holds several sequences of different lengths. Each is attended to
        as it would be alone: by its own length, with positions from 0, left padding included. Tokens that belong to no
        sequence are neither attended to nor attend: their rows are 0, lse -inf, and their gradients 0.

        Args:
            query: (batch, seq_len, num_heads, head_dim).
            key: (batch, kv_len, num_kv_heads, head_dim).
            value: like key.
            return_lse: also return the log-sum-exp of each row, (batch, num_heads, seq_len), natural logarithm, float32
                (float64 for float64 inputs), -inf for rows without keys. It is differentiable.
            q_offset: absolute position of the first query; default: the last query stands at the last key.
            kv_offset: absolute position of the first key.
            key_padding_mask: (batch, kv_len) bool, True where a key is padding, as `torch.nn.MultiheadAttention` takes
                it. The tokens of a row are one run, with padding on either side. Queries are tokens of the same
                sequences: query i is the token of key i + kv_len - seq_len, so that decoding takes the mask of its
                cache, and a query is padding where that key is.
            cu_seqlens: (documents + 1,) int32 or int64, the cumulative lengths of documents packed one behind the other
                in a batch of one row: 0 first, the row's length last. A document may be empty.
            **unknown: none; told where they belong.

        Returns:
            out, shaped like query, or (out, lse).

        Raises:
            ConfigError: for shapes, dtypes or devices other than those it was built for, for padding within a row's
                tokens, lengths that do not add up, or a backend that does not declare varlen.
            TypeError: for other arguments, such as is_causal, which is fixed when an attention is built.
        """
        if unknown:
            refuse_arguments(unknown)
        q_offset, kv_offset = check_arguments(query, key, value, q_offset, kv_offset)
        device_type = self._device_type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                cast = [x.to(self._dtype) for x in (query, key, value)]
                return self.forward(
                    *cast, return_lse=return_lse, q_offset=q_offset, kv_offset=kv_offset,
                    key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens,
                )  # fmt: skip
        config = self.config
        swap = config.tensor_layout == "bhsd"
        if swap and query.dim() == key.dim() == value.dim() == 4:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        self._check(query, key, value)
        if not config.requires_grad and torch.is_grad_enabled():
            self._check_gradients(query, key, value)
        has_documents = key_padding_mask is not None or cu_seqlens is not None
        seed = None
        if config.dropout_p and self.training:
            seed = draw_seed(self._engine.kernel, query.device, has_documents=has_documents)
        if has_documents:
            check_documents(key_padding_mask, cu_seqlens, query, key, q_offset, kv_offset, is_causal=config.is_causal)
            out, lse = attend_documents(
                query, key, value, self._engine, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, seed=seed,
                gate=self.gate if self._has_gate else None, recompute=config.activation_checkpointing,
            )  # fmt: skip
        else:
            if q_offset is None:
                q_offset = kv_offset + key.shape[1] - query.shape[1]
            out, lse = attend(
                query,
                key,
                value,
                self._engine,
                q_offset=q_offset,
                kv_offset=kv_offset,
                seed=seed,
                tables=self.gate(query, key, q_offset=q_offset, kv_offset=kv_offset) if self._has_gate else None,
                recompute=config.activation_checkpointing,
                origin=self._origin,
            )
        if swap:
            out = out.transpose(1, 2)
        return (out, lse) if return_lse else out

    @outside_graphs
    @torch.no_grad()
    def received(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        *,
        q_offset: int | None = None,
        kv_offset: int = 0,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """How much attention each key receives: the sum of its weights over all queries, each as often as it counts.

        Costs what the scores of the pattern's pairs cost, in tiles within `Limits.workspace_bytes`; for any backend,
        undropped, and without a gradient.

        Args:
            query: as given to the attention.
            key: as given to the attention.
            lse: (batch, num_heads, seq_len), what the attention returned with `return_lse=True`.
            q_offset: as given to the attention.
            kv_offset: as given to the attention.
            key_padding_mask: as given to the attention.
            cu_seqlens: as given to the attention.

        Returns:
            (batch, num_heads, kv_len), one row a query head, float32 (float64 for float64 inputs). Its sum over the
            keys is the number of queries that see a key.

        Raises:
            ConfigError: as the attention, and for an lse of another shape.
        """
        q_offset, kv_offset = check_arguments(query, key, lse, q_offset, kv_offset)
        if torch.is_autocast_enabled(self._device_type):
            query, key = query.to(self._dtype), key.to(self._dtype)
        if self.config.tensor_layout == "bhsd" and query.dim() == key.dim() == 4:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        self._check(query, key, key)
        if query.stride(3) != 1 or key.stride(3) != 1:
            query, key = query.contiguous(), key.contiguous()
        batch, q_len, heads, _ = query.shape
        if lse.shape != (batch, heads, q_len):
            raise ConfigError(
                f"lse must be (batch, num_heads, seq_len) = {(batch, heads, q_len)}, as the attention returns it, got "
                f"{tuple(lse.shape)}"
            )
        lse = lse.to(accumulator_dtype(self._dtype))
        gate = self.gate if self._has_gate else None
        with without_autocast(query.device):
            if key_padding_mask is not None or cu_seqlens is not None:
                check_documents(
                    key_padding_mask, cu_seqlens, query, key, q_offset, kv_offset, is_causal=self.config.is_causal
                )
                return received_in_documents(
                    query, key, lse, self._engine, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, gate=gate
                )
            if q_offset is None:
                q_offset = kv_offset + key.shape[1] - q_len
            tables = None if gate is None else gate(query, key, q_offset=q_offset, kv_offset=kv_offset)
            return self._engine.received(query, key, lse, q_offset, kv_offset, tables)

    @outside_graphs
    def counters(self) -> AttentionCounters:
        """What this attention, and those that were built alike, have done in this process.

        Taken inside the operator that `torch.compile` sees, so that compiled calls and recomputed passes are counted as
        often as they run. Replays of a CUDA graph are not seen: its calls are counted once, when they are captured.
        """
        return self._engine.counters()

    @outside_graphs
    def make_cache(self, batch_size: int, max_seq_len: int | None = None, *, max_crop: int = 0) -> DecodingCache:
        """An empty cache for `step`, one for each sequence (or batch of them) that is decoded.

        It keeps the keys and values that a later token can still reach, for each head by itself: the last window of
        `Local`, what `Global` tokens hold, of `Dilated` the kept places of the segments that are still open (once,
        however many branches share them). `Full`, `Strided`, `Random` and `Learned` keep all.

        Args:
            batch_size: sequences decoded together, all of one length.
            max_seq_len: most tokens that it may see; a cache that keeps all then takes its memory at once.
            max_crop: how many of the last tokens `cache.crop` must be able to take back; what they could see is kept so
                much longer.

        Raises:
            ConfigError: attention that is not causal or that ranks share, a pattern kept as blocks of one length, or a
                backend that does not declare unequal_lengths.
        """
        gate = self.gate if self._has_gate else None
        return DecodingCache(self._engine, gate, self._device(), batch_size, max_seq_len, max_crop)

    @outside_graphs
    def step(self, query: Tensor, key: Tensor, value: Tensor, cache: DecodingCache) -> Tensor:
        """The next tokens of a sequence: what `forward` over the whole sequence gives for them.

        The first step may be a prompt of any length, which runs as `forward` does; later ones are meant for one token
        or a few: they form the scores of all rows held. No gradient is recorded.

        Args:
            query: (batch, new_tokens, num_heads, head_dim), as `tensor_layout` says.
            key: (batch, new_tokens, num_kv_heads, head_dim).
            value: like key.
            cache: what `make_cache` made and earlier steps filled; it takes the new tokens in.

        Returns:
            out, shaped like query.

        Raises:
            ConfigError: tensors that the attention was not built for, a cache of another attention or full, inputs that
                require gradients, or dropout in training.
        """
        check_arguments(query, key, value)
        if torch.is_autocast_enabled(self._device_type):
            query, key, value = (x.to(self._dtype) for x in (query, key, value))
        swap = self.config.tensor_layout == "bhsd"
        if swap and query.dim() == key.dim() == value.dim() == 4:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        self._check(query, key, value)
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise ConfigError("a step records no gradient, but an input requires one; decode under torch.no_grad()")
        if self.training and self.config.dropout_p:
            raise ConfigError(f"a step drops nothing, but dropout_p={self.config.dropout_p:g}; call eval() to decode")
        if not isinstance(cache, DecodingCache):
            raise ConfigError(f"cache must be what make_cache made, got {cache!r} ({type(cache).__name__})")
        cache.require_engine(self._engine)
        with torch.no_grad(), without_autocast(query.device):
            out = cache.step(query, key, value)
        return out.transpose(1, 2) if swap else out

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise `ConfigError` unless the tensors are what the attention was built for."""
        k_shape, dtype, device = key.shape, self._dtype, query.device
        if not (
            query.shape[2:] == self._query_tail
            and k_shape[2:] == self._key_tail
            and k_shape == value.shape
            and query.shape[0] == k_shape[0]
            and query.dtype == key.dtype == value.dtype == dtype
            and key.device == device
            and value.device == device
            and device.type == self._device_type
        ):
            raise ConfigError(self._what_is_wrong(query, key, value))

    def _check_gradients(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.requires_grad or key.requires_grad or value.requires_grad:
            raise ConfigError(
                "an input requires a gradient, but the attention was built with requires_grad=False; rebuild"
            )

    def _what_is_wrong(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        """The first thing that differs from what the attention was built for, in words."""
        tails = (self._query_tail, self._key_tail, self._key_tail)
        for name, x, tail in zip(("query", "key", "value"), (query, key, value), tails, strict=True):
            if x.dim() != 4 or x.shape[2:] != tail:
                return self._shape_message(name, x, tail[0])
            if x.dtype != self._dtype:
                return f"{name} is {x.dtype}, but the attention was built for {self._dtype}; cast it, or rebuild"
            if x.device.type != self._device_type:
                return (
                    f"{name} is on {x.device}, but the attention was built for {self._device_type}; move it, or rebuild"
                )
            if x.device != query.device:
                return f"{name} is on {x.device}, query on {query.device}; move them to one device"
        return (
            f"query, key and value need equal batch sizes, key and value equal lengths; got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} as (batch, seq_len, heads, head_dim)"
        )

    def _fits(self, kv_heads: int) -> bool:
        """Whether the query heads could share so many key-value heads."""
        return kv_heads > 0 and self.config.num_heads % kv_heads == 0

    def _shape_message(self, name: str, x: Tensor, heads: int) -> str:
        layout, head_dim = self.config.tensor_layout, self.config.head_dim
        shape = list(x.shape)
        expected = f"(batch, seq_len, {heads}, {head_dim})"
        if layout == "bhsd":
            expected = f"(batch, {heads}, seq_len, {head_dim})"
            if x.dim() == 4:
                shape[1], shape[2] = shape[2], shape[1]
        message = f"{name} must be {expected} under tensor_layout={layout!r}, got {tuple(shape)}"
        if x.dim() == 4 and x.shape[1] == heads and x.shape[3] == head_dim:
            other = "bshd" if layout == "bhsd" else "bhsd"
            message += f"; it looks like a {other} tensor: transpose it, or build with tensor_layout={other!r}"
        elif name != "query" and x.dim() == 4 and shape[-1] == head_dim and self._fits(found := x.shape[2]):
            message += f"; for {found} key-value heads build with num_kv_heads={found}"
        return message
