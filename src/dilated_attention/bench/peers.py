"""What ours are compared with: dense attention of PyTorch's, and whatever `--peer MODULE:ATTR` names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import attrs
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..core.errors import ConfigError
from ..core.pattern import Full, Pattern
from .cases import BenchCase


@attrs.frozen(eq=False)
class Peer:
    """Another way to compute attention.

    Attributes:
        name: as shown.
        attend: query (B, S, H, D), key and value (B, S, K, D), to out; differentiable.
        kernel: what it runs on, in words.
        computes: its pattern where that is another than the case's; its results are then not compared with ours.
        has_exact_gradients: whether its gradients are those of the definition; else they are timed, not compared.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    kernel: str = ""
    computes: Pattern | None = None
    has_exact_gradients: bool = True


# A peer for a case on a device, or None where it does not compute that case.
PeerMaker: TypeAlias = Callable[[BenchCase, str], Peer | None]


def dense_sdpa(case: BenchCase, device: str) -> Peer | None:
    """PyTorch's own dense attention over the same tensors; causal where the case is."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        grouped = case.num_kv_heads < case.num_heads
        return scaled_dot_product_attention(query, key, value, is_causal=case.is_causal, enable_gqa=grouped).transpose(
            1, 2
        )

    return Peer("dense SDPA", attend, kernel="PyTorch's choice", computes=Full())


def load_peer(text: str) -> PeerMaker:
    """The callable that `MODULE:ATTR` names; modules are also looked for in the current directory.

    Raises:
        ConfigError: no such module or attribute, or one that cannot be called.
    """
    module_name, colon, attribute = text.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"--peer must be MODULE:ATTR, got {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"--peer {text!r}: the module cannot be imported: {error}") from error
    maker: PeerMaker | None = getattr(module, attribute, None)
    if not callable(maker):
        raise ConfigError(f"--peer {text!r}: the module has no callable {attribute!r}")
    return maker
