"""Train the byte model for a given time or number of steps, and keep what is needed to judge it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from .model import ByteModel, ModelConfig
from .text import Corpus

BATCH = 1
WARM_UP_STEPS = 20
PEAK_LEARNING_RATE = 4e-3
HELD_OUT_WINDOWS = 12


@attrs.frozen
class Mark:
    """Where training stands: after `step` steps and `seconds`, bits per byte lately seen and on held-out files."""

    step: int
    seconds: float
    seen: float
    held_out: float


@attrs.frozen(kw_only=True)
class Training:
    """What a training run did.

    Attributes:
        bits: bits per byte of each step's own batch, before it was learned from.
        marks: the held-out results, the first one before any training.
    """

    parameters: int
    bytes_read: int
    seconds: float
    bits: tuple[float, ...]
    marks: tuple[Mark, ...]


@attrs.frozen(kw_only=True)
class Budget:
    """When training ends: after `steps`, or where that is None after `seconds`; `marks` held-out results on the way."""

    steps: int | None
    seconds: float = 60.0
    marks: int = 8

    def spent(self, step: int, seconds: float) -> float:
        """The share that is used up; training ends at 1."""
        return step / self.steps if self.steps is not None else seconds / self.seconds


def learning_rate(step: int, spent: float) -> float:
    """A short warm-up, then half a cosine down to a tenth, along the budget."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * warm_up * (0.55 + 0.45 * math.cos(math.pi * min(spent, 1.0)))


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread inside.

    The model's operations take microseconds. On cores that do other work too, two threads wait for each other at the
    end of each of them, and a step takes up to twenty times as long; on idle cores one thread loses little.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(
    corpus: Corpus,
    config: ModelConfig,
    budget: Budget,
    *,
    on_step: Callable[[float, float], None],
    on_mark: Callable[[Mark], None],
    seed: int = 0,
) -> Training:
    """Train a fresh model on one thread; `on_step` gets the share of the budget spent and the batch's bits per byte."""
    generator = torch.Generator().manual_seed(seed)
    model = ByteModel(config, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    windows = corpus.held_out_windows(HELD_OUT_WINDOWS, config.seq_len)
    bits: list[float] = []
    marks: list[Mark] = []
    start = time.perf_counter()

    def mark() -> None:
        lately = bits[-20:] or [math.log2(256)]
        marks.append(Mark(len(bits), time.perf_counter() - start, sum(lately) / len(lately), evaluate(model, windows)))
        on_mark(marks[-1])

    with one_thread():
        mark()
        while (spent := budget.spent(len(bits), time.perf_counter() - start)) < 1:
            bits.append(_step(model, optimizer, corpus.batch(BATCH, config.seq_len, generator), len(bits), spent))
            on_step(spent, bits[-1])
            if spent >= (len(marks) / budget.marks) ** 2:  # closer together at the start, where most happens
                mark()
        if marks[-1].step < len(bits):
            mark()
    return Training(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes_read=len(bits) * BATCH * config.seq_len,
        seconds=time.perf_counter() - start,
        bits=tuple(bits),
        marks=tuple(marks),
    )


def _step(model: ByteModel, optimizer: torch.optim.Optimizer, windows: Tensor, step: int, spent: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, spent)
    loss = model.bits_per_byte(windows)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: ByteModel, windows: Tensor) -> float:
    """Mean bits per byte over `windows` (W, S + 1), a few at a time."""
    parts = [model.bits_per_byte(part).item() * len(part) for part in windows.chunk(3)]
    return sum(parts) / len(windows)
