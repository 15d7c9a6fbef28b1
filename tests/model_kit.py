"""What the tests of models share: golden files, inputs, ragged batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """A small model of an original implementation: its weights, inputs and outputs, and its arguments."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self._tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under `name/`, by the rest of their keys."""
        return {key.removeprefix(f"{name}/"): t for key, t in self._tensors.items() if key.startswith(f"{name}/")}


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def padding(*lengths: int, length: int, left: bool = False) -> Tensor:
    """True where a row of so many tokens is padding, (rows, length)."""
    places = torch.arange(length)
    real = torch.tensor(lengths)[:, None]
    return places < length - real if left else places >= real


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Gradients for a fixed random gradient of `out`; zeros where a leaf has no part in it."""
    made = torch.autograd.grad(out, leaves, data(*out.shape, seed=9, dtype=out.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(made, leaves, strict=True)]
