"""Prov-GigaPath's slide encoder (Nature 630, 2024; github.com/prov-gigapath/prov-gigapath): tiles to a slide embedding.

No flash-attn, any dtype, CPU or GPU. The position of a tile is computed where it stands instead of looked up in a table
of a million rows (3 GB at 768 wide).

Shapes: B slides, L tiles, C tile features, E embed_dim, S = L + 1 with the class token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..core.checks import positive_int
from ..core.errors import ConfigError
from ..core.structure import NamesChecked
from .checkpoints import Tensors, load_exactly, read_tensors
from .longnet import LongNetEncoder
from .longnet_config import Checkpointing, LongNetConfig
from .multihead import as_padding
from .requirements import require
from .torchscale import dilated_pattern, layer_count, take_stack

_RATES = (1, 2, 4, 8, 16)
_SHORTEST_SEGMENT = 1024


@attrs.frozen(kw_only=True)
class SlideEncoderConfig(NamesChecked):
    """The slide encoder's shape.

    Attributes:
        encoder: the LongNet.
        tile_features: C; 1536 for GigaPath's tile encoder.
        grid_size: tiles along a side of the grid that positions count in.
        tile_size: pixels along a side of a tile, the unit of coordinates.
        norm_eps: of the last LayerNorm.
        global_pool: average the tiles instead of reading the class token.
    """

    encoder: LongNetConfig = attrs.field(validator=attrs.validators.instance_of(LongNetConfig))
    tile_features: int = attrs.field(default=1536, validator=positive_int)
    grid_size: int = attrs.field(default=1000, validator=positive_int)
    tile_size: int = attrs.field(default=256, validator=positive_int)
    norm_eps: float = 1e-6
    global_pool: bool = False

    def __attrs_post_init__(self) -> None:
        if self.encoder.embed_dim % 4:
            raise ConfigError(
                f"the grid's positions need embed_dim to be a multiple of 4, got {self.encoder.embed_dim}"
            )


def gigapath_segment_lengths(max_slide_pixels: int = 262_144, tile_size: int = 256) -> tuple[int, ...]:
    """The original's five segment lengths: from 1024 to all tiles of the largest slide, evenly in the exponent."""
    last = int(math.log2((max_slide_pixels // tile_size) ** 2))
    first = math.log2(_SHORTEST_SEGMENT)
    return (*(int(2.0 ** (first + (last - first) * i / 4)) for i in range(4)), 2**last)


class SlideEncoder(nn.Module):
    """A LongNet over a slide's tiles; `load_gigapath` fills it.

    Args:
        config: its shape.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: SlideEncoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        width = config.encoder.embed_dim
        self.tile_projection = nn.Linear(config.tile_features, width, **made)
        self.class_token = nn.Parameter(torch.empty(1, 1, width, **made))
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.encoder = LongNetEncoder(config.encoder, **made)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, **made)
        nn.init.xavier_uniform_(self.tile_projection.weight)
        nn.init.zeros_(self.tile_projection.bias)
        nn.init.normal_(self.class_token, std=0.02)

    def forward(self, tiles_BLC: Tensor, coordinates_BL2: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Embed slides.

        Args:
            tiles_BLC: the tile encoder's features.
            coordinates_BL2: of each tile's corner, in pixels, at least 0 and inside the grid.
            key_padding_mask: (B, L) bool, True for padding behind the tiles; slides of different sizes in one batch.

        Returns:
            (B, E).
        """
        x_BSE, padding = self._tokens(tiles_BLC, coordinates_BL2, key_padding_mask)
        return self._pool(self.encoder(x_BSE, padding), padding)

    def layer_embeddings(
        self, tiles_BLC: Tensor, coordinates_BL2: Tensor, key_padding_mask: Tensor | None = None
    ) -> list[Tensor]:
        """The slide embedding read before the first layer and after each: num_layers + 1 tensors (B, E).

        As the original's all_layer_embed: the encoder's own last norm is not applied.
        """
        x_BSE, padding = self._tokens(tiles_BLC, coordinates_BL2, key_padding_mask)
        return [self._pool(x, padding) for x in self.encoder.hidden_states(x_BSE, padding)]

    def _tokens(self, tiles: Tensor, coordinates: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Class token and tiles with their positions, (B, S, E), and their mask."""
        features = self.config.tile_features
        if tiles.dim() != 3 or tiles.shape[2] != features or coordinates.shape != (*tiles.shape[:2], 2):
            raise ConfigError(
                f"tiles must be (slides, tiles, {features}) and coordinates (slides, tiles, 2), got "
                f"{tuple(tiles.shape)} and {tuple(coordinates.shape)}"
            )
        padding = as_padding(padding)
        if padding is not None:
            if padding.shape != tiles.shape[:2]:
                raise ConfigError(
                    f"key_padding_mask must be (slides, tiles) {tuple(tiles.shape[:2])}, got {tuple(padding.shape)}"
                )
            in_order = (padding[:, 1:] >= padding[:, :-1]).all()
            require(in_order, "key_padding_mask: the padding of a slide stands behind its tiles, which are one run")
            coordinates = coordinates.masked_fill(padding.unsqueeze(-1), 0)  # whatever stands there is no place
        x_BLE = self.tile_projection(tiles)
        x_BLE = x_BLE + self.positions(coordinates).to(x_BLE.dtype)
        class_token = self.class_token.to(x_BLE.dtype).expand(x_BLE.shape[0], -1, -1)
        x_BSE = self.dropout(torch.cat([class_token, x_BLE], dim=1))
        if padding is not None:
            padding = torch.cat([padding.new_zeros(padding.shape[0], 1), padding], dim=1)
        return x_BSE, padding

    def positions(self, coordinates_BL2: Tensor) -> Tensor:
        """Sines and cosines of each tile's row and column, (B, L, E) float32: the original's table, row by row.

        Raises:
            ConfigError: a coordinate outside the grid.
        """
        grid = self.config.grid_size
        place_BL2 = torch.floor(coordinates_BL2 / self.config.tile_size).long()
        # The table's first axis is the first coordinate; its embedding puts the second one first.
        require(
            ((place_BL2 >= 0) & (place_BL2 < grid)).all(),
            f"coordinates must lie in a grid of {grid} x {grid} tiles of {self.config.tile_size} pixels, from 0 to "
            f"below {grid * self.config.tile_size}",
        )
        quarter = self.config.encoder.embed_dim // 4
        index = torch.arange(quarter, dtype=torch.float64, device=coordinates_BL2.device)
        angles = place_BL2.flip(-1).unsqueeze(-1) * 10_000.0 ** -(index / quarter)  # (B, L, 2, E / 4) float64
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2).float()

    def _pool(self, x_BSE: Tensor, padding: Tensor | None) -> Tensor:
        if not self.config.global_pool:
            return self.norm(x_BSE[:, 0])  # type: ignore[no-any-return]
        tiles = x_BSE[:, 1:]
        if padding is None:
            return self.norm(tiles.mean(dim=1))  # type: ignore[no-any-return]
        absent = padding[:, 1:].unsqueeze(-1)
        real = (~absent).sum(dim=1).clamp(min=1)
        return self.norm(tiles.masked_fill(absent, 0).sum(dim=1) / real)  # type: ignore[no-any-return]


def load_gigapath(
    source: str | Path | Mapping[str, Any],
    *,
    num_heads: int = 16,
    segment_lengths: tuple[int, ...] | None = None,
    dilation_rates: tuple[int, ...] = _RATES,
    grid_size: int = 1000,
    global_pool: bool = False,
    dropout: float = 0.25,
    drop_path: float = 0.1,
    compatibility: str | None = None,
    activation_checkpointing: Checkpointing = False,
    attention: Mapping[str, Any] | None = None,
) -> SlideEncoder:
    """Prov-GigaPath's slide encoder with its weights; width, depth and tile features are read off the checkpoint.

    Args:
        source: slide_encoder.pth, a safetensors file, or a state_dict.
        num_heads: 16 in all published configurations.
        segment_lengths: the original's for slides of 262,144 pixels by default.
        dilation_rates: as many.
        grid_size: the original's slide_ngrids.
        global_pool: average the tiles instead of reading the class token.
        dropout: while fine-tuning.
        drop_path: while fine-tuning.
        compatibility: "torchscale_zero_padding" reproduces the published embeddings, which attend to the zeros that
            lengths are padded with. None attends to tiles alone, which is what was meant and what the weights were not
            trained with.
        activation_checkpointing: as in `LongNetConfig`.
        attention: further fields of `AttentionConfig` (backend, deterministic, ...).

    Returns:
        The model in evaluation mode, in the checkpoint's dtype, on the CPU.

    Raises:
        ConfigError: a tensor without a place, or one missing.
    """
    tensors = Tensors(read_tensors(source), "the GigaPath checkpoint")
    # Some files keep the fixed table of positions, which is computed here.
    if "pos_embed" in tensors:
        tensors.take("pos_embed")
    state: dict[str, Tensor] = {"class_token": tensors.take("cls_token")}
    names = {f"patch_embed.proj.{kind}": f"tile_projection.{kind}" for kind in ("weight", "bias")}
    tensors.move(state, names | {f"norm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")})
    encoder = LongNetConfig(
        embed_dim=state["class_token"].shape[-1],
        num_layers=layer_count(tensors, "encoder."),
        num_heads=num_heads,
        ffn_dim=tensors.shape("encoder.layers.0.ffn.fc1.weight")[0],
        pattern=dilated_pattern(segment_lengths or gigapath_segment_lengths(), dilation_rates),
        dropout=dropout,
        drop_path=drop_path,
        compatibility=compatibility,
        activation_checkpointing=activation_checkpointing,
        attention=attention or {},
    )
    take_stack(tensors, encoder, state, old="encoder.", new="encoder.")
    tensors.require_empty()
    weight = state["tile_projection.weight"]
    config = SlideEncoderConfig(
        encoder=encoder, tile_features=weight.shape[1], grid_size=grid_size, global_pool=global_pool
    )
    model = SlideEncoder(config, dtype=weight.dtype)
    load_exactly(model, state, "the GigaPath checkpoint")
    return model.eval()
