"""One training of `benchmarks.longnet_table`, and its test.

Shapes: B windows, S tokens of a window.
"""

from __future__ import annotations

import itertools
import math
import time

import attrs
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from dilated_attention.models import LongNetLM

from .source_text import SourceText, windows

CURVE_POINTS = 200
_CHECK_EVERY = 20  # steps between looks at the clock: on a GPU each waits for what was launched


@attrs.frozen
class Outcome:
    """What a training did.

    Attributes:
        steps: that it made.
        is_complete: whether these are all that were planned; otherwise time ran out.
        seconds: it took.
        peak_bytes: most memory that a GPU's allocator held, 0 on a CPU.
        curve: (step, bits per byte of the steps since the point before).
    """

    steps: int
    is_complete: bool
    seconds: float
    peak_bytes: int
    curve: list[tuple[int, float]]


@attrs.frozen
class Test:
    """Bits per byte, and by position in the window: (first position, bits) of ranges that double."""

    bits: float
    by_position: list[tuple[int, float]]


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Training:
    """A model, its optimiser and the text it reads.

    Args:
        model: on the text's device.
        text: to read.
        length: S.
        longest: of the stretches that windows are cut from.
        stretches: of each step.
        learning_rate: its peak.
    """

    def __init__(
        self, model: LongNetLM, text: SourceText, length: int, longest: int, stretches: int, learning_rate: float
    ) -> None:
        self.model, self.text, self.length, self.longest, self.stretches = model, text, length, longest, stretches
        self.device, self.learning_rate = str(text.train.device), learning_rate
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(self, generator: torch.Generator, learning_rate: float) -> Tensor:
        """Learn from the next stretches; mean bits per byte before that, not waited for."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        stretches = self.text.stretches(self.stretches, self.longest, generator)
        loss = self.bits(windows(stretches, self.length)).mean()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def bits(self, window_bytes: Tensor) -> Tensor:
        """Bits that each byte of windows (B, S + 1) after its first takes, (B, S) float32."""
        device_type, dtype = torch.device(self.device).type, compute_dtype(self.device)
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
            logits = self.model(window_bytes[:, :-1])
        nats = cross_entropy(logits.float().flatten(0, 1), window_bytes[:, 1:].flatten(), reduction="none")
        return nats.view(-1, window_bytes.shape[1] - 1) / math.log(2)

    def run(self, steps: int, seed: int, deadline: float) -> Outcome:
        """Train for `steps`, or until the clock `time.perf_counter` shows `deadline`."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        generator, losses = torch.Generator().manual_seed(seed), []
        start = time.perf_counter()
        for step in range(steps):
            losses.append(self.step(generator, self.learning_rate * schedule(step, steps)))
            if step % _CHECK_EVERY == 0:
                synchronize(self.device)
                if time.perf_counter() > deadline:
                    break
        bits = torch.stack(losses).tolist()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.device.startswith("cuda") else 0
        return Outcome(len(bits), len(bits) == steps, seconds, peak, thinned(bits))

    @torch.no_grad()
    def test(self, stretches: Tensor, length: int) -> Test:
        """Of stretches (count, longest + 1), cut into windows of `length`."""
        self.model.eval()
        total = torch.zeros(length, dtype=torch.float64, device=self.device)
        for part in torch.split(stretches, self.stretches):
            total += self.bits(windows(part, length)).double().sum(dim=0)
        self.model.train()
        mean = total.cpu() / (stretches.shape[0] * self.longest // length)
        edges = [0, *(1 << i for i in range(7, length.bit_length()) if 1 << i < length), length]
        by_position = [(low, float(mean[low:high].mean())) for low, high in itertools.pairwise(edges)]
        return Test(float(mean.mean()), by_position)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a twentieth of the steps upwards, then half a cosine down to a tenth."""
    warm_up = min(1.0, (step + 1) / max(1, steps // 20))
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def thinned(bits: list[float]) -> list[tuple[int, float]]:
    """(last step, mean) of at most `CURVE_POINTS` runs of steps."""
    run = -(-len(bits) // CURVE_POINTS)
    parts = [bits[i : i + run] for i in range(0, len(bits), run)]
    ends = itertools.accumulate(len(part) for part in parts)
    return [(end, sum(part) / len(part)) for end, part in zip(ends, parts, strict=True)]
