"""Reading other projects' checkpoints: tensors only, and every key accounted for."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError

# Where training programs put the state_dict among other things.
_NESTED = ("model", "state_dict", "module")
# What torch.load makes of bytes that are no pickle but begin like one.
_JUNK = (LookupError, TypeError, AttributeError, AssertionError, struct.error)


def read_tensors(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Args:
        source: a `.safetensors` file, a file of `torch.save` (read with weights_only=True, so that nothing in it
            runs), or a state_dict. One level of "model", "state_dict" or "module" around the tensors is taken off.

    Raises:
        ConfigError: for a file that is missing, damaged, or holds more than tensors where they should be.
    """
    if not isinstance(source, str | Path | Mapping):
        raise ConfigError(f"a checkpoint is a file's path or a state_dict, got {source!r} ({type(source).__name__})")
    found = _read_file(Path(source)) if isinstance(source, str | Path) else dict(source)
    for name in _NESTED:
        if isinstance(inner := found.get(name), Mapping):
            found = dict(inner)
            break
    foreign = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if foreign or not found:
        raise ConfigError(
            f"a state_dict maps names to tensors; {', '.join(map(repr, foreign[:5])) or 'this one'} "
            f"{'are none' if foreign else 'is empty'}; pass the state_dict itself"
        )
    return found


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint file {str(path)!r}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, OSError, *_JUNK) as error:
        raise _unreadable(path, error) from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"the checkpoint {str(path)!r} holds a {type(loaded).__name__}, not a mapping of tensors")
    return dict(loaded)


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot read the checkpoint {str(path)!r} as tensors alone ({type(error).__name__}{_cause(str(error))}); if "
        f"it holds other objects, save its state_dict as safetensors in an environment that you trust"
    )


def _cause(said: str) -> str:
    """What `torch.load` found, without its advice to run what is in the file, which nothing here does."""
    if "weights_only" in said:
        found = re.search(r"WeightsUnpickler error:\s*(.+?)\.?(?: Please |\n|$)", said)
        said = found[1] if found else ""
    return said and f": {said}"


class Tensors:
    """A checkpoint's tensors, each of which must be taken exactly once.

    Args:
        tensors: by name.
        source: what messages call the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self._left = dict(tensors)
        self._source = source

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> list[str]:
        """The names not yet taken."""
        return list(self._left)

    def take(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            ConfigError: there is none, or it was taken before.
        """
        if name not in self._left:
            raise ConfigError(f"{self._source} has no tensor {name!r}; left are {', '.join(self.names()[:8])}")
        return self._left.pop(name)

    def shape(self, name: str) -> torch.Size:
        """The shape of the tensor of that name, which stays to be taken."""
        tensor = self.take(name)
        self._left[name] = tensor
        return tensor.shape

    def move(self, into: dict[str, Tensor], names: Mapping[str, str], old: str = "", new: str = "") -> None:
        """Take each `old + name` and put it into `into` as `new + names[name]`."""
        for name, renamed in names.items():
            into[new + renamed] = self.take(old + name)

    def require_empty(self) -> None:
        """Raise `ConfigError` when tensors are left that nothing has a place for."""
        if self._left:
            names = self.names()
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            raise ConfigError(
                f"{self._source} has tensors that no part of this model takes: {', '.join(names[:12])}{more}"
            )


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state_dict that must fit name by name and shape by shape.

    Raises:
        ConfigError: it does not; the message names what differs.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"{source} does not fit the model made for it: {error}") from error
