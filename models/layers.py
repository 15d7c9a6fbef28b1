"""LongNet's layers: attention and a feed-forward part around a residual stream.

Shapes: B batch, S sequence, M memory length, E embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.decoding import DecodingCache
from ..core.errors import ConfigError
from .longnet_config import LongNetConfig
from .multihead import MultiheadAttention
from .positions import Rotation
from .recomputing import chained


class DropPath(nn.Module):
    """Leaves out what a part adds, for whole sequences at random while training (arXiv 1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def extra_repr(self) -> str:
        """The probability."""
        return f"probability={self.probability}"

    def forward(self, x_BSE: Tensor) -> Tensor:
        """(B, S, E) to (B, S, E); what is kept is scaled up so that the mean stays."""
        if not self.training or self.probability == 0:
            return x_BSE
        kept = torch.rand((x_BSE.shape[0], 1, 1), device=x_BSE.device) >= self.probability
        return x_BSE * (kept / (1 - self.probability)).to(x_BSE.dtype)


class FeedForward(nn.Module):
    """Two linear layers around an activation, with MAGNETO's LayerNorm between them where norm is "sub"."""

    def __init__(self, config: LongNetConfig, *, gain: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.up = nn.Linear(config.embed_dim, config.inner_dim, **made)
        self.down = nn.Linear(config.inner_dim, config.embed_dim, **made)
        is_sub = config.norm == "sub"
        self.norm = nn.LayerNorm(config.inner_dim, eps=config.layer_norm_eps, **made) if is_sub else None
        self.activation = functional.gelu if config.activation == "gelu" else functional.relu
        self.dropout = nn.Dropout(config.activation_dropout)
        self.gain = gain
        self.recompute = config.activation_checkpointing == "pointwise"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: Xavier-normal times the gain."""
        for layer in (self.up, self.down):
            nn.init.xavier_normal_(layer.weight, gain=self.gain)
            nn.init.zeros_(layer.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x_BSE: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, S, E) to (B, S, E); `norm` is applied to x first."""
        recompute, draws = self.recompute and self.training, self.dropout.p > 0
        inner = chained(x_BSE, norm, self.up, recompute=recompute and norm is not None)
        return chained(inner, self.activation, self.dropout, self.norm, self.down, recompute=recompute, draws=draws)


class _Layer(nn.Module):
    """What encoder and decoder layers share; `memory_attn` is None where there is no memory to attend to."""

    memory_attn: MultiheadAttention | None

    def __init__(
        self,
        config: LongNetConfig,
        *,
        depth: int,
        is_causal: bool,
        has_memory: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        gain = config.gain(has_memory=has_memory)
        shared: dict[str, Any] = {"batch_first": True, "dropout": config.attention_dropout, **made}
        self.self_attn = MultiheadAttention(
            config.embed_dim,
            config.num_heads,
            is_self=True,
            positions=config.positions,
            rotary_base=config.rotary_base,
            xpos_base=config.xpos_base,
            sub_norm=config.norm == "sub",
            gain=gain,
            layer_norm_eps=config.layer_norm_eps,
            compatibility=config.compatibility,
            recompute=config.activation_checkpointing == "pointwise",
            **shared,
            **config.attention_fields(is_causal=is_causal),
        )
        self.self_attn_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, **made)
        self.memory_attn = self.memory_attn_norm = None
        if has_memory:
            # As in MAGNETO, without a norm of its own and without the gain.
            fields = {"num_kv_heads": config.num_kv_heads, **config.attention}
            self.memory_attn = MultiheadAttention(config.embed_dim, config.num_heads, gain=1.0, **shared, **fields)
            self.memory_attn_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, **made)
        self.ffn = FeedForward(config, gain=gain, **made)
        self.ffn_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps, **made)
        self.norm_first = config.norm != "deep"
        self.residual_scale = config.residual_scale(has_memory=has_memory)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path * depth / max(1, config.num_layers - 1))

    def _before(self, x_BSE: Tensor, norm: nn.Module) -> Tensor:
        """What a part reads."""
        return norm(x_BSE) if self.norm_first else x_BSE

    def _after(self, x_BSE: Tensor, added_BSE: Tensor, norm: nn.Module) -> Tensor:
        """The residual stream with what a part adds."""
        added_BSE = self.drop_path(self.dropout(added_BSE))
        x_BSE = x_BSE + added_BSE if self.residual_scale == 1 else x_BSE * self.residual_scale + added_BSE
        return x_BSE if self.norm_first else norm(x_BSE)

    def _self_attention(
        self, x_BSE: Tensor, padding: Tensor | None, rotation: Rotation | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        norm = self.self_attn_norm if self.norm_first else None
        added, _ = self.self_attn(x_BSE, x_BSE, x_BSE, padding, cu_seqlens=cu_seqlens, rotation=rotation, norm=norm)
        return self._after(x_BSE, added, self.self_attn_norm)

    def step(self, x_BSE: Tensor, cache: DecodingCache, rotation: Rotation | None) -> Tensor:
        """The next tokens (B, S, E) while decoding, without a memory; see `MultiheadAttention.step`."""
        added = self.self_attn.step(self._before(x_BSE, self.self_attn_norm), cache, rotation)
        return self._feed_forward(self._after(x_BSE, added, self.self_attn_norm))

    def _feed_forward(self, x_BSE: Tensor) -> Tensor:
        return self._after(x_BSE, self.ffn(x_BSE, self.ffn_norm if self.norm_first else None), self.ffn_norm)


class LongNetEncoderLayer(_Layer):
    """Self-attention under the pattern, then a feed-forward part.

    Args:
        config: the model's shape.
        depth: the layer's number, counted from 0; drop_path grows with it.
        is_causal: no position sees a later one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        depth: int = 0,
        is_causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, depth=depth, is_causal=is_causal, has_memory=False, device=device, dtype=dtype)

    def forward(
        self,
        x_BSE: Tensor,
        key_padding_mask: Tensor | None = None,
        rotation: Rotation | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, S, E) to (B, S, E).

        Args:
            x_BSE: the residual stream.
            key_padding_mask: (B, S) bool, True for padding.
            rotation: of `MultiheadAttention.rotation`, where positions were worked out before.
            cu_seqlens: (documents + 1,) cumulative lengths of documents packed in one row.
        """
        return self._feed_forward(self._self_attention(x_BSE, key_padding_mask, rotation, cu_seqlens))


class LongNetDecoderLayer(_Layer):
    """Causal self-attention under the pattern, full attention to a memory where it has one, a feed-forward part.

    Args:
        config: the model's shape.
        depth: the layer's number, counted from 0; drop_path grows with it.
        has_memory: attend to an encoder's output too.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        depth: int = 0,
        has_memory: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, depth=depth, is_causal=True, has_memory=has_memory, device=device, dtype=dtype)

    def forward(
        self,
        x_BSE: Tensor,
        key_padding_mask: Tensor | None = None,
        rotation: Rotation | None = None,
        memory_BME: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, S, E) to (B, S, E).

        Args:
            x_BSE: the residual stream.
            key_padding_mask: (B, S) bool, True for padding.
            rotation: of `MultiheadAttention.rotation`, where positions were worked out before.
            memory_BME: the encoder's output, exactly where the layer has a memory.
            memory_padding_mask: (B, M) bool, True for padding.
            cu_seqlens: (documents + 1,) cumulative lengths of documents packed in one row; not beside a memory.
        """
        if cu_seqlens is not None and self.memory_attn is not None:
            raise ConfigError("cu_seqlens cannot be given beside a memory, which is of one sequence; give padded rows")
        x_BSE = self._self_attention(x_BSE, key_padding_mask, rotation, cu_seqlens)
        if self.memory_attn is not None and self.memory_attn_norm is not None:
            read = self._before(x_BSE, self.memory_attn_norm)
            added, _ = self.memory_attn(read, memory_BME, memory_BME, memory_padding_mask)
            x_BSE = self._after(x_BSE, added, self.memory_attn_norm)
        return self._feed_forward(x_BSE)
