"""Layers and models: drop-in multi-head attention, LongNet, converters of existing checkpoints, Hugging Face.

Names are imported when they are first used, so that nothing here costs what is not asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gigapath import SlideEncoder, SlideEncoderConfig, load_gigapath
    from .huggingface import register_with_transformers
    from .layers import LongNetDecoderLayer, LongNetEncoderLayer
    from .longnet import LongNetDecoder, LongNetEncoder, LongNetLM
    from .longnet_config import LongNetConfig
    from .longvit import LongViT, LongViTConfig, load_longvit
    from .multihead import MultiheadAttention
    from .predecessors import load_dilated_attention_pytorch
    from .torchscale import load_torchscale

# By the module of this folder that has them.
_NAMES: dict[str, tuple[str, ...]] = {
    "gigapath": ("SlideEncoder", "SlideEncoderConfig", "load_gigapath"),
    "huggingface": ("register_with_transformers",),
    "layers": ("LongNetDecoderLayer", "LongNetEncoderLayer"),
    "longnet": ("LongNetDecoder", "LongNetEncoder", "LongNetLM"),
    "longnet_config": ("LongNetConfig",),
    "longvit": ("LongViT", "LongViTConfig", "load_longvit"),
    "multihead": ("MultiheadAttention",),
    "predecessors": ("load_dilated_attention_pytorch",),
    "torchscale": ("load_torchscale",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = [
    "LongNetConfig",
    "LongNetDecoder",
    "LongNetDecoderLayer",
    "LongNetEncoder",
    "LongNetEncoderLayer",
    "LongNetLM",
    "LongViT",
    "LongViTConfig",
    "MultiheadAttention",
    "SlideEncoder",
    "SlideEncoderConfig",
    "load_dilated_attention_pytorch",
    "load_gigapath",
    "load_longvit",
    "load_torchscale",
    "register_with_transformers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
