"""Learned attention against dense, local and random attention at 12.5 % density: recall, language, kept mass, cost.

    python -m benchmarks.learned            both tasks, a few minutes on one CPU core
    python -m benchmarks.learned --json

Recall: a sequence of records, far ahead of blocks that each begin with the key of one of them and repeat its values; a
model of one layer is trained with dense attention and loses or keeps its answers as its attention is replaced.
Language: the demo's byte model on the standard library's sources, trained with dense attention; then every contender
goes on from there with its own attention for the same number of steps.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from dilated_attention import Attention, Full, Learned, Local, Pattern, Random, build_attention
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.demo.model import ByteModel, ModelConfig
from dilated_attention.demo.text import Corpus, standard_library
from dilated_attention.demo.training import one_thread

SEQ_LEN, BLOCK, KEPT = 1024, 8, 8  # 8 of at most 128 key blocks: 12.1 % of the causal blocks, 11.5 % of the pairs


@attrs.frozen(kw_only=True)
class Budget:
    """Steps of each phase; the defaults are those of the published figures."""

    recall_steps: tuple[int, int, int] = (500, 300, 200)  # on an eighth, half and the whole of the length
    recall_gate_steps: int = 350
    language_steps: int = 1500
    language_gate_steps: int = 150
    language_more_steps: int = 200
    held_out_windows: int = 48


@attrs.frozen(kw_only=True)
class Row:
    """What one attention reached; None where it was not measured.

    Attributes:
        density: pairs counted over all causal pairs.
        accuracy: of recalled tokens.
        mass: share of the dense model's attention, at the queries that recall, in the kept blocks.
        swapped_bits: bits per byte right after its attention replaced the dense one.
        bits: bits per byte after training on.
        language_mass: share of the dense language model's attention in the kept blocks.
        seconds: of training on.
    """

    name: str
    density: float
    accuracy: float | None = None
    mass: float | None = None
    swapped_bits: float | None = None
    bits: float | None = None
    language_mass: float | None = None
    seconds: float | None = None


def contenders() -> dict[str, Pattern]:
    """All sparse ones count as many pairs as `Learned`, `Local` the most that are not more."""
    return {
        "dense": Full(),
        "learned": Learned(BLOCK, KEPT),
        "local": Local((_window(pairs_of(Random(KEPT, BLOCK))), 0)),
        "random": Random(KEPT, BLOCK),
    }


def pairs_of(pattern: Pattern) -> int:
    """Pairs of one causal head; a learned pattern counts as many as a random one."""
    if isinstance(pattern, Learned):
        pattern = Random(pattern.blocks_per_row, pattern.block_size)
    return int(lower(pattern, Geometry.self_attention(SEQ_LEN, 1, is_causal=True)).pairs)


def _window(pairs: int) -> int:
    return max(left for left in range(SEQ_LEN) if pairs_of_window(left) <= pairs)


def pairs_of_window(left: int) -> int:
    """Pairs of a causal window that reaches `left` positions back."""
    return sum(min(position, left) + 1 for position in range(SEQ_LEN))


class Recall(nn.Module):
    """One layer of attention over tokens that know their two predecessors; no positions."""

    KEYS, VALUES, HEADS, HEAD_DIM = 128, 128, 1, 64
    RECORDS, ASKED, FAR = 96, 32, 64  # blocks of records, of questions, and the first records, which are asked for

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        width = self.HEADS * self.HEAD_DIM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
            self.embedding = nn.Embedding(self.KEYS + self.VALUES, 3 * width)
            self.qkv = nn.Linear(3 * width, 3 * width, bias=False)
            self.head = nn.Linear(width, self.KEYS + self.VALUES)
        self.attention = attention(Full(), self.HEADS, self.HEAD_DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) int64 to logits (B, S, tokens)."""
        parts = self.embedding(tokens).chunk(3, dim=-1)
        shifted = [functional.pad(part, (0, 0, back, 0))[:, : tokens.shape[1]] for back, part in enumerate(parts)]
        q, k, v = torch.unflatten(self.qkv(torch.cat(shifted, dim=-1)), -1, (3, self.HEADS, self.HEAD_DIM)).unbind(2)
        logits: Tensor = self.head(self.attention(q, k, v).flatten(2))
        return logits

    @classmethod
    def batch(cls, size: int, generator: torch.Generator, shrink: int = 1) -> Tensor:
        """Sequences (B, S): records of a key and its values in a block each, then questions that repeat some.

        All numbers are `shrink` times smaller: short sequences teach the same faster.
        """
        n = cls.RECORDS // shrink
        keys = torch.rand(size, cls.KEYS, generator=generator).argsort(dim=1)[:, :n, None]
        values = torch.randint(cls.KEYS, cls.KEYS + cls.VALUES, (size, n, BLOCK - 1), generator=generator)
        records = torch.cat([keys, values], dim=2)
        asked = torch.rand(size, cls.FAR // shrink, generator=generator).argsort(dim=1)[:, : cls.ASKED // shrink]
        questions = records.gather(1, asked[:, :, None].expand(-1, -1, BLOCK))
        return torch.cat([records, questions], dim=1).flatten(1)

    def answers(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets of the values in the questions, (N, tokens) and (N,)."""
        first = tokens.shape[1] // BLOCK * self.RECORDS // (self.RECORDS + self.ASKED)
        logits = torch.unflatten(self(tokens), 1, (-1, BLOCK))[:, first:, :-1]
        return logits.flatten(0, 2), torch.unflatten(tokens, 1, (-1, BLOCK))[:, first:, 1:].flatten()

    @classmethod
    def asking(cls, x: Tensor) -> Tensor:
        """Of (B, H, S) the queries that are asked for a value."""
        return torch.unflatten(x, 2, (-1, BLOCK))[:, :, cls.RECORDS :, :-1]


def attention(pattern: Pattern, heads: int, head_dim: int) -> Attention:
    """Causal, on the CPU, in float32."""
    return build_attention(
        pattern=pattern, num_heads=heads, head_dim=head_dim, is_causal=True, dtype="float32", device="cpu"
    )


@contextmanager
def seen_by(layers: list[Attention]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The queries and keys that `layers` are called with, one pair a layer and call."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append((args[0].detach(), args[1].detach())))
        for layer in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def train(parameters: Iterator[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """AdamW with a short warm-up and half a cosine down to a tenth."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)

    def factor(step: int) -> float:
        along = torch.tensor(step / max(steps, 1) * torch.pi)
        return min(1.0, (step + 1) / 20) * float(0.55 + 0.45 * along.cos())

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()


def distil(layers: list[Attention], gated: list[Attention], run: Callable[[], object], steps: int, rate: float) -> None:
    """Train the gates of `gated` on what the frozen `layers` see while `run` runs them."""

    def loss() -> Tensor:
        with torch.no_grad(), seen_by(layers) as seen:
            run()
        losses = [new.gate.distillation_loss(q, k) for new, (q, k) in zip(gated, seen, strict=True)]
        return torch.stack(losses).sum()

    train((p for new in gated for p in new.parameters()), loss, steps, rate)


def _recall_loss(model: Recall, draw: Callable[[], Tensor]) -> Tensor:
    return functional.cross_entropy(*model.answers(draw()))


def recall_rows(budget: Budget) -> dict[str, dict[str, float]]:
    """Accuracy of every contender in the place of the dense attention that the model was trained with."""
    generator = torch.Generator().manual_seed(0)
    model = Recall(generator)

    for steps, size, shrink, rate in zip(budget.recall_steps, (32, 8, 4), (8, 2, 1), (1e-2, 1e-2, 5e-3), strict=True):
        draw = functools.partial(Recall.batch, size, generator, shrink)
        train(model.parameters(), functools.partial(_recall_loss, model, draw), steps, rate)
    tests = Recall.batch(32, torch.Generator().manual_seed(1))
    dense, rows = model.attention, {}
    for name, pattern in contenders().items():
        new = attention(pattern, Recall.HEADS, Recall.HEAD_DIM)
        if isinstance(pattern, Learned):
            distil([dense], [new], lambda: model(Recall.batch(4, generator)), budget.recall_gate_steps, 1e-2)
        model.attention = new
        with torch.no_grad(), seen_by([new]) as seen:
            logits, targets = model.answers(tests)
        rows[name] = {"accuracy": float((logits.argmax(dim=-1) == targets).float().mean())}
        if isinstance(pattern, Learned):
            rows[name]["mass"] = float(Recall.asking(new.gate.kept_mass(*seen[0])).mean())
        model.attention = dense
    return rows


def attentions(model: ByteModel) -> list[Attention]:
    """Those of the model's blocks."""
    return [block.attention for block in model.blocks]  # type: ignore[misc]


def replace(model: ByteModel, config: ModelConfig, pattern: Pattern) -> list[Attention]:
    """Give every block of the model an attention of its own; returns them."""
    for block in model.blocks:
        block.attention = attention(pattern, config.num_heads, config.head_dim)
    return attentions(model)


@torch.no_grad()
def bits(model: ByteModel, windows: Tensor) -> float:
    """Bits per held-out byte."""
    parts = [model.bits_per_byte(part).item() * len(part) for part in torch.split(windows, 4)]
    return sum(parts) / len(windows)


def language_rows(budget: Budget, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Bits per byte of every contender, from one model trained with dense attention."""
    config = ModelConfig(seq_len=SEQ_LEN)
    generator = torch.Generator().manual_seed(0)
    start = ByteModel(config, generator)
    replace(start, config, Full())
    train(
        start.parameters(),
        lambda: start.bits_per_byte(corpus.batch(1, SEQ_LEN, generator)),
        budget.language_steps,
        4e-3,
    )
    windows, rows = corpus.held_out_windows(budget.held_out_windows, SEQ_LEN), {}
    for name, pattern in contenders().items():
        rows[name] = _go_on(copy.deepcopy(start), config, pattern, corpus, windows, budget)
    return rows


def _go_on(
    model: ByteModel, config: ModelConfig, pattern: Pattern, corpus: Corpus, windows: Tensor, budget: Budget
) -> dict[str, float]:
    """Swap the attention in, distil its gates if it has any, and train on beside them."""
    draws = torch.Generator().manual_seed(2)
    row: dict[str, float] = {}
    weights = list(model.parameters())
    dense = attentions(model)
    layers = [attention(pattern, config.num_heads, config.head_dim) for _ in dense]
    is_learned = isinstance(pattern, Learned)
    if is_learned:
        distil(dense, layers, lambda: model(corpus.batch(1, SEQ_LEN, draws)[:, :-1]), budget.language_gate_steps, 3e-3)
        with torch.no_grad(), seen_by(dense) as seen:
            model(windows[:8, :-1])
        masses = [new.gate.kept_mass(q, k).mean() for new, (q, k) in zip(layers, seen, strict=True)]
        row["language_mass"] = float(torch.stack(masses).mean())
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attention = layer
    row["swapped_bits"] = bits(model, windows)
    order = torch.Generator().manual_seed(3)

    def loss() -> Tensor:
        with seen_by(layers) as seen:
            value = model.bits_per_byte(corpus.batch(1, SEQ_LEN, order))
        if is_learned:  # every gate goes on learning from its own layer; its loss reaches nothing else
            value = value + sum(new.gate.distillation_loss(q, k) for new, (q, k) in zip(layers, seen, strict=True))
        return value

    begin = time.perf_counter()
    train(
        iter([*weights, *(p for layer in layers for p in layer.parameters())]), loss, budget.language_more_steps, 1e-3
    )
    row["seconds"] = time.perf_counter() - begin
    row["bits"] = bits(model, windows)
    return row


def measure(budget: Budget) -> list[Row]:
    """All rows of the table."""
    with one_thread():
        recall, language = recall_rows(budget), language_rows(budget, standard_library())
    everything = pairs_of(Full())
    return [
        Row(name=name, density=pairs_of(pattern) / everything, **recall[name], **language[name])
        for name, pattern in contenders().items()
    ]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    header = ("", "density", "recall", "mass", "bits/byte", "to dense", "as swapped", "mass", "train on")
    dense = rows[0].bits or 1.0

    def cells(row: Row) -> tuple[str, ...]:
        return (
            row.name,
            f"{row.density:.1%}",
            *(("-" if x is None else f"{x:.1%}") for x in (row.accuracy, row.mass)),
            *(("-" if x is None else f"{x:.3f}") for x in (row.bits,)),
            "-" if row.bits is None else f"{row.bits / dense - 1:+.2%}",
            "-" if row.swapped_bits is None else f"{row.swapped_bits:.3f}",
            "-" if row.language_mass is None else f"{row.language_mass:.1%}",
            "-" if row.seconds is None else f"{row.seconds:.0f} s",
        )

    lines = [header, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    rows = measure(Budget())
    if parser.parse_args().json:
        print(json.dumps([attrs.asdict(row) for row in rows], indent=2))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
