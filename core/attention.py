"""The module that `build_attention` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checks import require_int
from .errors import ConfigError
from .ops import attend, intern

if TYPE_CHECKING:
    from .config import AttentionConfig
    from .engine import Engine
    from .plan import AttentionPlan


class Attention(nn.Module):
    """Attention as planned: `out = attention(query, key, value)`.

    Inputs are (batch, seq_len, num_heads, head_dim), or (batch, num_heads, seq_len, head_dim) with
    `tensor_layout="bhsd"`; keys and values have num_kv_heads heads. Under autocast they are cast to the dtype that the
    attention was built for; otherwise they must have it. No parameters, so nothing in the state_dict.

    Attributes:
        config: what it was built from.
        plan: which backend and kernel, and why; `plan.explain()` prints it.
    """

    def __init__(self, config: AttentionConfig, plan: AttentionPlan, engine: Engine) -> None:
        super().__init__()
        self.config = config
        self.plan = plan
        self._engine = intern(engine)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._heads = (config.num_heads, config.num_kv_heads or config.num_heads)

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
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = query.to(self._dtype), key.to(self._dtype), value.to(self._dtype)
        if self.config.tensor_layout == "bhsd":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        self._check(query, key, value)
        if q_offset is None:
            q_offset = kv_offset + key.shape[1] - query.shape[1]
        out, lse = attend(
            query, key, value, self._seed(), self._engine.key, q_offset, kv_offset, self.config.activation_checkpointing
        )
        if self.config.tensor_layout == "bhsd":
            out = out.transpose(1, 2)
        return (out, lse) if return_lse else out

    def _seed(self) -> Tensor | None:
        """A fresh seed from torch's generator for this call's dropout, or None without dropout."""
        if self.config.dropout_p == 0.0 or not self.training:
            return None
        return torch.randint(1 << 62, (), dtype=torch.int64)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        config = self.config
        heads, kv_heads = self._heads
        for name, x, count in (("query", query, heads), ("key", key, kv_heads), ("value", value, kv_heads)):
            if x.dim() != 4 or x.shape[2] != count or x.shape[3] != config.head_dim:
                raise ConfigError(self._shape_message(name, x, count))
            if x.dtype != self._dtype:
                raise ConfigError(
                    f"{name} is {x.dtype}, but the attention was built for {self._dtype}; cast it, or rebuild"
                )
            if x.device != query.device:
                raise ConfigError(f"{name} is on {x.device}, query on {query.device}; move them to one device")
        if key.shape != value.shape or key.shape[0] != query.shape[0]:
            raise ConfigError(
                f"query, key and value need equal batch sizes, key and value equal lengths; got "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} as (batch, seq_len, heads, head_dim)"
            )
        if (
            not config.requires_grad
            and torch.is_grad_enabled()
            and (query.requires_grad or key.requires_grad or value.requires_grad)
        ):
            raise ConfigError(
                "an input requires a gradient, but the attention was built with requires_grad=False; rebuild"
            )

    def _shape_message(self, name: str, x: Tensor, heads: int) -> str:
        bhsd = self.config.tensor_layout == "bhsd"
        shape = list(x.shape)
        expected = f"(batch, seq_len, {heads}, {self.config.head_dim})"
        if bhsd:
            expected = f"(batch, {heads}, seq_len, {self.config.head_dim})"
            if x.dim() > 2:
                shape[1], shape[2] = shape[2], shape[1]
        message = f"{name} must be {expected} under tensor_layout={self.config.tensor_layout!r}, got {tuple(shape)}"
        if x.dim() == 4 and x.shape[1] == heads and x.shape[3] == self.config.head_dim:
            other = "bshd" if bhsd else "bhsd"
            message += f"; it looks like a {other} tensor: transpose it, or build with tensor_layout={other!r}"
        return message
