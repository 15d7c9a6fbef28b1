"""The module that `build_attention` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checks import require_int
from .errors import ConfigError
from .ops import attend, intern
from .pattern import LearnedPattern

if TYPE_CHECKING:
    from .config import AttentionConfig
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
        self.config = config
        self.plan = plan
        self._engine = intern(engine)
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

    def extra_repr(self) -> str:
        """Backend, kernel and the main fields of the configuration."""
        config = self.config
        return (
            f"backend={self.plan.backend!r}, kernel={self._engine.kernel.name!r}, pattern={config.pattern!r}, "
            f"num_heads={config.num_heads}, head_dim={config.head_dim}, is_causal={config.is_causal}, "
            f"dtype={config.dtype}"
        )

    def prepare(self, seq_len: int, *, kv_len: int | None = None) -> None:
        """Lower the pattern for a length ahead of its first use (before a CUDA graph is captured, say).

        Args:
            seq_len: number of queries.
            kv_len: number of keys; `seq_len` if not given. The last query stands at the last key.
        """
        kv_len = seq_len if kv_len is None else kv_len
        require_int("seq_len", seq_len, minimum=0)
        require_int("kv_len", kv_len, minimum=0)
        device = torch.get_default_device() if self.config.device is None else torch.device(self.config.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._engine.prepare(seq_len, kv_len, kv_len - seq_len, 0, device)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        return_lse: bool = False,
        q_offset: int | None = None,
        kv_offset: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: (batch, seq_len, num_heads, head_dim).
            key: (batch, kv_len, num_kv_heads, head_dim).
            value: like key.
            return_lse: also return the log-sum-exp of each row, (batch, num_heads, seq_len), natural logarithm, float32
                (float64 for float64 inputs), -inf for rows without keys. It is differentiable.
            q_offset: absolute position of the first query; default: the last query stands at the last key.
            kv_offset: absolute position of the first key.

        Returns:
            out, shaped like query, or (out, lse).

        Raises:
            ConfigError: for shapes, dtypes or devices other than those it was built for.
        """
        device = query.device
        device_type = device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                cast = [x.to(self._dtype) for x in (query, key, value)]
                return self.forward(*cast, return_lse=return_lse, q_offset=q_offset, kv_offset=kv_offset)
        config = self.config
        swap = config.tensor_layout == "bhsd"
        if swap and query.dim() == key.dim() == value.dim() == 4:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        q_shape, k_shape, dtype = query.shape, key.shape, self._dtype
        if not (
            q_shape[2:] == self._query_tail
            and k_shape[2:] == self._key_tail
            and k_shape == value.shape
            and q_shape[0] == k_shape[0]
            and query.dtype == key.dtype == value.dtype == dtype
            and key.device == device
            and value.device == device
            and device_type == self._device_type
        ):
            raise ConfigError(self._what_is_wrong(query, key, value))
        if not config.requires_grad and torch.is_grad_enabled():
            self._check_gradients(query, key, value)
        if q_offset is None:
            q_offset = kv_offset + k_shape[1] - q_shape[1]
        out, lse = attend(
            query,
            key,
            value,
            self._engine,
            q_offset=q_offset,
            kv_offset=kv_offset,
            seed=self._seed() if config.dropout_p else None,
            tables=self.gate(query, key, q_offset=q_offset, kv_offset=kv_offset) if self._has_gate else None,
            recompute=config.activation_checkpointing,
        )
        if swap:
            out = out.transpose(1, 2)
        return (out, lse) if return_lse else out

    def _seed(self) -> Tensor | None:
        """A fresh seed from torch's generator for this call's dropout; None where the module does not train."""
        return torch.randint(1 << 62, (), dtype=torch.int64) if self.training else None

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
        return message
