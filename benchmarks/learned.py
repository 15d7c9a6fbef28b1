"""Learned attention against dense, local and random attention at 12.5 % density: recall, language, kept mass, cost.

    python -m benchmarks.learned                  both tasks, some ten minutes on one CPU core
    python -m benchmarks.learned --device cuda    the same on a card
    python -m benchmarks.learned --json

Recall: pairs of a key and a value, anywhere among other tokens, and far behind them questions that name a key and are
to be answered with its value; a model of one layer is trained with dense attention and loses or keeps its answers as
its attention is replaced. Each question begins a block, because a causal gate may look at no later query.
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
# How the recalling model is taught: how much shorter the sequences are, sequences a step, and the learning rate. The
# last rate is high to make attention sharp, which answers alone hardly ask for.
RECALL_LESSONS = ((16, 128, 5e-3), (8, 32, 5e-3), (2, 8, 5e-3), (1, 4, 2e-2))


@attrs.frozen(kw_only=True)
class Budget:
    """Steps of each phase; the defaults are those of the published figures."""

    recall_steps: tuple[int, int, int, int] = (200, 100, 60, 100)  # of each of RECALL_LESSONS
    recall_gate_steps: int = 900
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
        "learned": Learned(KEPT, BLOCK),
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
    """One layer of attention whose queries and keys know one token more, the one before; no positions.

    A sequence is a haystack of `HAYSTACK` tokens, in which pairs of a key and its value stand at any place between
    other tokens, `APART` more tokens, and one block for each question: a key and other tokens. At the key its value is
    asked for; it stands nowhere but in the haystack.
    """

    KEYS, VALUES, OTHERS = 64, 16, 32  # how many tokens there are of each kind, numbered in this order
    HEADS, HEAD_DIM = 1, 64
    PAIRS, QUESTIONS, HAYSTACK, APART = 48, 32, 704, 64

    def __init__(self, generator: torch.Generator, device: str) -> None:
        super().__init__()
        width = self.HEADS * self.HEAD_DIM
        tokens = self.KEYS + self.VALUES + self.OTHERS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
            self.embedding = nn.Embedding(tokens, 2 * width)
            self.query_key = nn.Linear(2 * width, 2 * width, bias=False)
            self.value = nn.Linear(2 * width, width, bias=False)
            self.head = nn.Linear(width, tokens)
        self.to(device)
        self.attention = attention(Full(), self.HEADS, self.HEAD_DIM, device)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) int64 to logits (B, S, tokens)."""
        embedded = self.embedding(tokens)
        own, handed_on = embedded.chunk(2, dim=-1)
        window = torch.cat([own, functional.pad(handed_on, (0, 0, 1, 0))[:, :-1]], dim=-1)
        query, key = torch.unflatten(self.query_key(window), -1, (2, self.HEADS, self.HEAD_DIM)).unbind(2)
        value = torch.unflatten(self.value(embedded), -1, (self.HEADS, self.HEAD_DIM))
        logits: Tensor = self.head(self.attention(query, key, value).flatten(2))
        return logits

    @classmethod
    def batch(cls, size: int, generator: torch.Generator, device: str, shrink: int = 1) -> tuple[Tensor, Tensor]:
        """Sequences (B, S) and the values asked for (B, questions).

        All numbers are `shrink` times smaller: short sequences teach the same faster. Drawn on the CPU, so that every
        device gets the same ones.
        """
        counts = (cls.PAIRS, cls.QUESTIONS, cls.HAYSTACK, cls.APART)
        pairs, questions, haystack, apart = (count // shrink for count in counts)
        first_other = cls.KEYS + cls.VALUES
        keys = torch.rand(size, cls.KEYS, generator=generator).argsort(dim=1)[:, :pairs]
        values = torch.randint(cls.KEYS, first_other, (size, pairs), generator=generator)
        tokens = torch.randint(
            first_other,
            first_other + cls.OTHERS,
            (size, haystack + apart + questions * BLOCK),
            generator=generator,
        )
        is_pair = torch.rand(size, haystack - pairs, generator=generator).argsort(dim=1) < pairs  # else one other token
        lengths = 1 + is_pair.long()
        places = (lengths.cumsum(dim=1) - lengths)[is_pair].view(size, pairs)
        tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
        asked = torch.rand(size, pairs, generator=generator).argsort(dim=1)[:, :questions]
        tokens[:, haystack + apart :: BLOCK] = keys.gather(1, asked)
        return tokens.to(device), values.gather(1, asked).to(device)

    @classmethod
    def asking(cls, x: Tensor, questions: int) -> Tensor:
        """Of x (B, S, ...) what belongs to the queries that are asked for a value: (B, questions, ...)."""
        return x[:, -questions * BLOCK :: BLOCK]

    def answers(self, tokens: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets of the values asked for, (N, tokens) and (N,)."""
        return self.asking(self(tokens), asked.shape[1]).flatten(0, 1), asked.flatten()


def attention(pattern: Pattern, heads: int, head_dim: int, device: str) -> Attention:
    """Causal, in float32."""
    return build_attention(
        pattern=pattern, num_heads=heads, head_dim=head_dim, is_causal=True, dtype="float32", device=device
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


def recalling_model(budget: Budget, generator: torch.Generator, device: str) -> Recall:
    """A model taught by `RECALL_LESSONS` with dense attention."""
    model = Recall(generator, device)

    def lesson(shrink: int, size: int) -> Tensor:
        return functional.cross_entropy(*model.answers(*Recall.batch(size, generator, device, shrink)))

    for steps, (shrink, size, rate) in zip(budget.recall_steps, RECALL_LESSONS, strict=True):
        train(model.parameters(), functools.partial(lesson, shrink, size), steps, rate)
    return model


def recall_rows(budget: Budget, device: str) -> dict[str, dict[str, float]]:
    """Accuracy of every contender in the place of the dense attention that the model was trained with."""
    generator = torch.Generator().manual_seed(0)
    model = recalling_model(budget, generator, device)
    tests, asked = Recall.batch(32, torch.Generator().manual_seed(1), device)
    dense, rows = model.attention, {}
    for name, pattern in contenders().items():
        new = attention(pattern, Recall.HEADS, Recall.HEAD_DIM, device)
        if isinstance(pattern, Learned):
            distil(
                [dense],
                [new],
                lambda: model(Recall.batch(4, generator, device)[0]),
                budget.recall_gate_steps,
                1e-2,
            )
        model.attention = new
        with torch.no_grad(), seen_by([new]) as seen:
            logits, targets = model.answers(tests, asked)
        rows[name] = {"accuracy": float((logits.argmax(dim=-1) == targets).float().mean())}
        if isinstance(pattern, Learned):
            mass = new.gate.kept_mass(*seen[0]).transpose(1, 2)
            rows[name]["mass"] = float(Recall.asking(mass, Recall.QUESTIONS).mean())
        model.attention = dense
    return rows


def attentions(model: ByteModel) -> list[Attention]:
    """Those of the model's blocks."""
    return [block.attention for block in model.blocks]  # type: ignore[misc]


def byte_model(config: ModelConfig, generator: torch.Generator, device: str) -> ByteModel:
    """The demo's model with dense attention in the place of its own."""
    model = ByteModel(config, generator).to(device)
    for block in model.blocks:
        block.attention = attention(Full(), config.num_heads, config.head_dim, device)
    return model


@torch.no_grad()
def bits(model: ByteModel, windows: Tensor) -> float:
    """Bits per held-out byte."""
    parts = [model.bits_per_byte(part).item() * len(part) for part in torch.split(windows, 4)]
    return sum(parts) / len(windows)


def language_rows(budget: Budget, corpus: Corpus, device: str) -> dict[str, dict[str, float]]:
    """Bits per byte of every contender, from one model trained with dense attention."""
    config = ModelConfig(seq_len=SEQ_LEN)
    generator = torch.Generator().manual_seed(0)
    start = byte_model(config, generator, device)
    train(
        start.parameters(),
        lambda: start.bits_per_byte(corpus.batch(1, SEQ_LEN, generator).to(device)),
        budget.language_steps,
        4e-3,
    )
    windows, rows = corpus.held_out_windows(budget.held_out_windows, SEQ_LEN).to(device), {}
    for name, pattern in contenders().items():
        rows[name] = _go_on(copy.deepcopy(start), config, pattern, corpus, windows, budget)
    return rows


def _go_on(
    model: ByteModel, config: ModelConfig, pattern: Pattern, corpus: Corpus, windows: Tensor, budget: Budget
) -> dict[str, float]:
    """Swap the attention in, distil its gates if it has any, and train on beside them."""
    draws, device = torch.Generator().manual_seed(2), str(windows.device)
    row: dict[str, float] = {}
    weights = list(model.parameters())
    dense = attentions(model)
    layers = [attention(pattern, config.num_heads, config.head_dim, device) for _ in dense]
    is_learned = isinstance(pattern, Learned)
    if is_learned:
        distil(
            dense,
            layers,
            lambda: model(corpus.batch(1, SEQ_LEN, draws)[:, :-1].to(device)),
            budget.language_gate_steps,
            3e-3,
        )
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
            value = model.bits_per_byte(corpus.batch(1, SEQ_LEN, order).to(device))
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


def measure(budget: Budget, device: str) -> list[Row]:
    """All rows of the table."""
    with one_thread():
        recall, language = recall_rows(budget, device), language_rows(budget, standard_library(), device)
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
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1, ...")
    args = parser.parse_args()
    rows = measure(Budget(), args.device)
    if args.json:
        print(json.dumps([attrs.asdict(row) for row in rows], indent=2))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
