"""LongViT (arXiv 2312.03558; torchscale's examples/longvit): a LongNet over the patches of a large image.

Shapes: B images, C channels, Y and X pixels, P patches, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.checks import positive_int
from ..core.errors import ConfigError
from ..core.structure import NamesChecked
from .checkpoints import Tensors, load_exactly, read_tensors
from .longnet import LongNetEncoder
from .longnet_config import Checkpointing, LongNetConfig
from .torchscale import dilated_pattern, layer_count, take_stack

# The original's segment lengths by image size, at rates 1, 2, 4, 8, 16; other sizes take the first.
_SEGMENT_LENGTHS = {
    None: (64, 128, 256, 512, 1024),
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}


@attrs.frozen(kw_only=True)
class LongViTConfig(NamesChecked):
    """The shape of a LongViT.

    Attributes:
        encoder: the LongNet.
        image_size: pixels along a side, of the images that the learned positions were made for.
        patch_size: pixels along a side of a patch.
        channels: of the images.
    """

    encoder: LongNetConfig = attrs.field(validator=attrs.validators.instance_of(LongNetConfig))
    image_size: int = attrs.field(validator=positive_int)
    patch_size: int = attrs.field(default=16, validator=positive_int)
    channels: int = attrs.field(default=3, validator=positive_int)

    def __attrs_post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )


class LongViT(nn.Module):
    """Images to patch embeddings; `load_longvit` fills it.

    Args:
        config: its shape.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: LongViTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        width, side = config.encoder.embed_dim, config.image_size // config.patch_size
        size = config.patch_size
        self.patches = nn.Conv2d(config.channels, width, kernel_size=size, stride=size, **made)
        self.positions = nn.Parameter(torch.empty(1, side * side, width, **made))
        self.encoder = LongNetEncoder(config.encoder, **made)
        nn.init.trunc_normal_(self.positions, std=0.02, a=-0.02, b=0.02)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Embed images.

        Args:
            images_BCYX: sides that are multiples of the patch size. Other sizes than the configured one have the
                learned positions interpolated (bicubic), as in the original.

        Returns:
            (B, P, E), patches row by row.
        """
        size, channels = self.config.patch_size, self.config.channels
        shape = images_BCYX.shape
        if len(shape) != 4 or shape[1] != channels or shape[2] % size or shape[3] % size:
            raise ConfigError(
                f"images must be (batch, {channels}, height, width) with sides that are multiples of {size}, got "
                f"{tuple(shape)}"
            )
        x_BPE = self.patches(images_BCYX).flatten(2).transpose(1, 2)
        x_BPE = x_BPE + self._positions(shape[2] // size, shape[3] // size)
        return self.encoder(x_BPE)  # type: ignore[no-any-return]

    def _positions(self, rows: int, columns: int) -> Tensor:
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return self.positions
        grid = torch.unflatten(self.positions, 1, (side, side)).permute(0, 3, 1, 2)
        # The original asks for a tenth of a patch more, so that rounding cannot lose one; it scales by that too.
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        resized = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        return resized.flatten(2).transpose(1, 2)


def load_longvit(
    source: str | Path | Mapping[str, Any],
    *,
    image_size: int,
    num_heads: int = 12,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] = (1, 2, 4, 8, 16),
    drop_path: float = 0.0,
    compatibility: str | None = None,
    activation_checkpointing: Checkpointing = False,
    attention: Mapping[str, Any] | None = None,
) -> LongViT:
    """LongViT's encoder with its weights; width, depth and patches are read off the checkpoint.

    Args:
        source: a checkpoint of its class LongViT: safetensors, a file of torch.save, or a state_dict.
        image_size: the img_size it was made with.
        num_heads: of every layer.
        segment_lengths: by default what the original takes for that image size.
        dilation_rates: as many.
        drop_path: while fine-tuning.
        compatibility: "torchscale_zero_padding" to attend to the zeros that ragged lengths are padded with.
        activation_checkpointing: as in `LongNetConfig`.
        attention: further fields of `AttentionConfig`.

    Returns:
        The model in evaluation mode, in the checkpoint's dtype, on the CPU.

    Raises:
        ConfigError: a tensor without a place, or one missing.
    """
    tensors = Tensors(read_tensors(source), "the LongViT checkpoint")
    state: dict[str, Tensor] = {}
    names = {f"patch_embed.proj.{kind}": f"patches.{kind}" for kind in ("weight", "bias")}
    tensors.move(state, names | {"pos_embed": "positions"})
    weight = state["patches.weight"]
    encoder = LongNetConfig(
        embed_dim=weight.shape[0],
        num_layers=layer_count(tensors, "encoder."),
        num_heads=num_heads,
        ffn_dim=tensors.shape("encoder.layers.0.ffn.fc1.weight")[0],
        pattern=dilated_pattern(
            segment_lengths or _SEGMENT_LENGTHS.get(image_size, _SEGMENT_LENGTHS[None]), dilation_rates
        ),
        final_norm="encoder.layer_norm.weight" in tensors,
        drop_path=drop_path,
        compatibility=compatibility,
        activation_checkpointing=activation_checkpointing,
        attention=attention or {},
    )
    take_stack(tensors, encoder, state, old="encoder.", new="encoder.")
    tensors.require_empty()
    config = LongViTConfig(encoder=encoder, image_size=image_size, patch_size=weight.shape[2], channels=weight.shape[1])
    model = LongViT(config, dtype=weight.dtype)
    load_exactly(model, state, "the LongViT checkpoint")
    return model.eval()
