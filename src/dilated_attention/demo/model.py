"""A small causal transformer over bytes whose attention is the library's own.

Shapes: B batch, S sequence, H heads, D head_dim, C channels (H·D).
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu

from .. import Dilated, build_attention

BYTES = 256


@attrs.frozen(kw_only=True)
class ModelConfig:
    """The size of the demo's model; `segment_lengths` and `dilation_rates` are those of LongNet's branches."""

    layers: int = 2
    num_heads: int = 4
    head_dim: int = 32
    seq_len: int = 1024
    segment_lengths: tuple[int, ...] = (256, 512, 1024)
    dilation_rates: tuple[int, ...] = (1, 2, 4)

    @property
    def channels(self) -> int:
        """C."""
        return self.num_heads * self.head_dim


def rotary_table(seq_len: int, head_dim: int) -> Tensor:
    """cos and sin of each position's angles, (2, S, 1, D/2) float32 (RoFormer, arXiv 2104.09864)."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(seq_len)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def rotate(x_BSHD: Tensor, table: Tensor) -> Tensor:
    """Turn the two halves of the last dimension by their position's angles."""
    cos, sin = table[:, : x_BSHD.shape[1]]
    a, b = x_BSHD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and a gated feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.channels
        self.config = config
        self.attention = build_attention(
            pattern=Dilated(segment_lengths=config.segment_lengths, dilation_rates=config.dilation_rates),
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            is_causal=True,
        )
        self.attention_norm, self.mlp_norm = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.mix = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c, bias=False)
        self.up, self.down = nn.Linear(c, 6 * c, bias=False), nn.Linear(3 * c, c, bias=False)

    def forward(self, x_BSC: Tensor, table: Tensor) -> Tensor:
        """(B, S, C) to (B, S, C)."""
        qkv = self.qkv(self.attention_norm(x_BSC))
        query, key, value = qkv.unflatten(-1, (3, self.config.num_heads, self.config.head_dim)).unbind(2)
        seen = self.attention(rotate(query, table), rotate(key, table), value)
        x_BSC = x_BSC + self.mix(seen.flatten(2))
        gate, up = self.up(self.mlp_norm(x_BSC)).chunk(2, dim=-1)
        result: Tensor = x_BSC + self.down(silu(gate) * up)
        return result


class ByteModel(nn.Module):
    """Embedding, blocks, and a head that shares the embedding's weights."""

    table: Tensor

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        # The constructors draw initial weights from the global generator; put it back as it was.
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(BYTES, config.channels)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.channels)
        self.register_buffer("table", rotary_table(config.seq_len, config.head_dim), persistent=False)
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            last = name.endswith(("mix.weight", "down.weight"))
            deviation = 0.02 if name.startswith("embedding") else weight.shape[1] ** -0.5
            # What is added to the residual stream starts small, so that depth does not blow it up.
            nn.init.normal_(
                weight, std=deviation / (2 * len(self.blocks)) ** 0.5 if last else deviation, generator=generator
            )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Bytes (B, S) int64 to logits of the next byte, (B, S, 256)."""
        x_BSC = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSC = block(x_BSC, self.table)
        return linear(self.norm(x_BSC), self.embedding.weight)

    def bits_per_byte(self, windows: Tensor) -> Tensor:
        """Mean bits needed per byte of `windows` (B, S + 1) after its first."""
        logits = self(windows[:, :-1])
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)
