"""Bits per byte of source code by dense, sparse and dilated models, trained at three lengths, each tested at all.

    python -m benchmarks.longnet_table --device cuda --minutes 8 --output longnet-table
    python -m benchmarks.longnet_table --lengths 64,128,256 --layers 1 --width 32 --heads 4 --test-bytes 2048 --steps 4

The kind of table that LongNet's paper has (arXiv 2307.02486, table 2), at a size that one H100 trains in minutes. The
nine models have one shape, one seed, one optimiser and read the same bytes in the same order: a step is some stretches
of text of the longest length, cut into windows of the model's own. So is the test: the same held-out bytes, cut three
ways. `sparse` is a window and random blocks (BigBird) that show a query as many distinct keys as `dilated` at the
length it is trained at. Positions are xPos', as there.

What it costs: a token of training takes 6 FLOP a weight and 14 · width a pair and layer. With 4 layers of 512 (12.6 M
weights) that is 75 MFLOP, and for attention at 32K 470 dense, 29 dilated, 24 sparse; over all nine trainings 1.4 GFLOP,
half of them for dense attention: at 300 TFLOP/s 4.7 ns, at the 150 that small matrices and float32 norms leave, 40 M
tokens for each model in 400 s. How many it becomes is planned from a timing of every model at the start.

Each attention is held against the float64 oracle first. Results are written after every training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import torch

from dilated_attention import Dilated, Full, Local, Pattern, Random
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.oracle import truth
from dilated_attention.bench.timing import difference
from dilated_attention.core.attention import Attention
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower
from dilated_attention.demo.pictures import can_draw
from dilated_attention.models import LongNetConfig, LongNetLM

from .longnet_report import draw, markdown
from .longnet_training import Outcome, Training, compute_dtype, synchronize
from .source_text import SourceText, installed_roots, read, xz_bits_per_byte

GATE_TOKENS = 1024
SPARE = 0.9  # of the time that is left, what trainings are planned to take


@attrs.frozen(kw_only=True)
class Shape:
    """What all models have in common.

    Attributes:
        lengths: tokens of a window, ascending, each a divisor of the last.
        stretches: of the longest length that a step reads.
        test_bytes: that each model predicts at each length.
    """

    lengths: tuple[int, ...] = (2048, 8192, 32768)
    layers: int = 4
    width: int = 512
    heads: int = 8
    stretches: int = 2
    test_bytes: int = 2 << 20
    positions: str = "xpos"
    learning_rate: float = 1.5e-3
    seed: int = 0

    @property
    def longest(self) -> int:
        """The last of the lengths."""
        return self.lengths[-1]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.stretches * self.longest

    @property
    def test_stretches(self) -> int:
        """Stretches of the longest length in the test."""
        return max(1, self.test_bytes // self.longest)

    def check(self) -> None:
        """Exit where the lengths cannot be cut from one another."""
        if list(self.lengths) != sorted(set(self.lengths)) or any(self.longest % n for n in self.lengths):
            sys.exit(f"--lengths must ascend and divide the last of them, got {self.lengths}")
        if self.longest < 64:
            sys.exit(f"the longest of --lengths must be at least 64, got {self.longest}")

    def patterns(self, length: int) -> dict[str, Pattern]:
        """The contenders; `sparse` is made for models trained at `length`."""
        longest = self.longest
        dilated = Dilated((longest // 64, longest // 16, longest // 4, longest), (1, 2, 4, 8))
        return {"dense": Full(), "sparse": self._sparse(length, self.keys_seen(dilated, length)), "dilated": dilated}

    def _sparse(self, length: int, keys: float) -> Pattern:
        """A window and, for each row of blocks, two random ones besides its own: at most `keys` a query on average."""
        random = Random(3, max(16, self.longest // 256))
        low, high = 0, length
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.keys_seen(Local((middle, 0)) | random, length) <= keys
            low, high = (middle, high) if fits else (low, middle)
        return Local((low, 0)) | random

    def keys_seen(self, pattern: Pattern, length: int) -> float:
        """Distinct keys that a query sees, on average over heads and positions."""
        geometry = Geometry.self_attention(length, self.heads, is_causal=True)
        pairs = lower(pattern, geometry).distinct_pairs
        assert pairs is not None
        return pairs / (length * self.heads)

    def model(self, pattern: Pattern, device: str) -> LongNetLM:
        """A byte model, the same weights for each pattern."""
        config = LongNetConfig(
            embed_dim=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            vocab_size=256,
            pattern=pattern,
            positions=self.positions,
            norm="pre",
            tie_embeddings=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return LongNetLM(config).to(device)

    def training(self, pattern: Pattern, length: int, text: SourceText) -> Training:
        """A fresh model and its optimiser."""
        device = str(text.train.device)
        return Training(self.model(pattern, device), text, length, self.longest, self.stretches, self.learning_rate)


def attention_of(model: LongNetLM, device: str) -> Attention:
    """The attention that the model's layers compute with on `device`."""
    built = model.stack.layers[0].self_attn.attention  # type: ignore[union-attr]
    attention: Attention = built.attention_for(compute_dtype(device), torch.device(device).type, is_causal=True)  # type: ignore[operator, union-attr]
    return attention


def gate(shape: Shape, model: LongNetLM, device: str) -> float:
    """Relative error of the model's attention against the oracle, out and gradients; exits where it is too large."""
    attention, dtype = attention_of(model, device), compute_dtype(device)
    generator = torch.Generator().manual_seed(1)
    size = (1, min(GATE_TOKENS, shape.longest), shape.heads, shape.width // shape.heads)
    q, k, v, dout = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, dout)]
    pattern = model.config.pattern  # what the model says, not what was built
    assert isinstance(pattern, Pattern)
    expected = truth((q, k, v, dout), pattern, is_causal=True)
    error = max(difference(a, e) for a, e in zip(actual, expected, strict=True))
    bound = BOUNDS[str(dtype).removeprefix("torch.")]
    if not error < bound:
        sys.exit(f"attention over {pattern!r} differs from the oracle by {error:.1e}, more than {bound:.0e}: no table")
    return error


def seconds_a_step(training: Training, device: str) -> float:
    """Of one training step, compiled and warm."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        training.step(generator, 0.0)
    synchronize(device)
    start, timed = time.perf_counter(), 3
    for _ in range(timed):
        training.step(generator, 0.0)
    synchronize(device)
    return (time.perf_counter() - start) / timed


def planned_steps(seconds: float, seconds_a_step_of_all: float, test_steps: float) -> int:
    """Steps for each training.

    Args:
        seconds: left for all trainings and tests.
        seconds_a_step_of_all: one step of every training, added up.
        test_steps: what one model's tests cost over, at each length, in training steps at that length.
    """
    steps = int(SPARE * seconds / seconds_a_step_of_all - test_steps)
    if steps < 1:
        sys.exit(
            f"{seconds:.0f} s are left for training; one step of all models takes {seconds_a_step_of_all:.2f} s and "
            f"their tests as long as {test_steps:.0f} of them: raise --minutes, or lower --test-bytes or the size"
        )
    return steps


def say(line: str) -> None:
    """Print at once: what kills a long run shall not take its lines along."""
    print(line, flush=True)


class Table:
    """The trainings, their plan and what came of them."""

    def __init__(self, shape: Shape, text: SourceText, output: Path, deadline: float) -> None:
        self.shape, self.text, self.output, self.deadline = shape, text, output, deadline
        self.device = str(text.train.device)
        # The longest first: if time runs out, what is missing is what matters least.
        self.cases = [
            (length, name, pattern)
            for length in reversed(shape.lengths)
            for name, pattern in shape.patterns(length).items()
        ]
        sample = text.held_out_stretches(shape.test_stretches, shape.longest)
        self.report: dict[str, Any] = {
            "shape": attrs.asdict(shape),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device.startswith("cuda") else self.device,
            "text": {"files": text.files, "train": text.train.numel(), "held_out": text.held_out.numel()},
            "test_bytes": sample[:, 1:].numel(),
            "xz_bits_per_byte": xz_bits_per_byte(sample[:, 1:]),
            "rows": [],
        }

    def plan(self, steps: int | None) -> int:
        """Check every attention, time every model, and choose the number of steps where it is not given."""
        total = 0.0
        for length, name, pattern in self.cases:
            training = self.shape.training(pattern, length, self.text)
            error = gate(self.shape, training.model, self.device)
            seconds = seconds_a_step(training, self.device) if steps is None else 0.0
            total += seconds
            backend = attention_of(training.model, self.device).plan.backend
            say(f"{name:8}{length:>7,}  {backend}, {error:.1e} to the oracle, {seconds * 1e3:.1f} ms a step")
        if steps is None:
            tests = self.shape.test_stretches / self.shape.stretches  # forward only, but for three models each
            steps = planned_steps(self.deadline - time.perf_counter(), total, tests)
        self.report |= {"steps": steps, "tokens": steps * self.shape.step_tokens, "seconds_a_step_of_all": total}
        say(f"{steps:,} steps of {self.shape.step_tokens:,} tokens each, {steps * self.shape.step_tokens:,} in all")
        return steps

    def fill(self, steps: int) -> None:
        """Train and test each model; results are written after each."""
        for length, name, pattern in self.cases:
            if time.perf_counter() > self.deadline:
                say(f"no time left for {name} at {length:,}")
                continue
            training = self.shape.training(pattern, length, self.text)
            outcome = training.run(steps, self.shape.seed, self.deadline)
            self.report["rows"].append(self._row(length, name, pattern, training, outcome))
            self.write()
            row = self.report["rows"][-1]
            tested = ", ".join(f"{bits:.3f} at {n}" for n, bits in row["bits"].items())
            say(f"{name:8}{length:>7,}  {outcome.steps:,} steps in {outcome.seconds:.1f} s; bits per byte {tested}")

    def _row(self, length: int, name: str, pattern: Pattern, training: Training, outcome: Outcome) -> dict[str, object]:
        shape = self.shape
        stretches = self.text.held_out_stretches(shape.test_stretches, shape.longest)
        tests = {n: training.test(stretches, n) for n in shape.lengths}
        return {
            "name": name,
            "trained_at": length,
            "pattern": pattern.to_dict(),
            "backend": attention_of(training.model, self.device).plan.backend,
            "keys_seen": {str(n): shape.keys_seen(pattern, n) for n in shape.lengths},
            "parameters": sum(p.numel() for p in training.model.parameters()),
            **attrs.asdict(outcome),
            "tokens_a_second": outcome.steps * shape.step_tokens / outcome.seconds,
            "bits": {str(n): test.bits for n, test in tests.items()},
            "bits_by_position": tests[shape.longest].by_position,
        }

    def write(self) -> None:
        """The report so far."""
        (self.output / "longnet_table.json").write_text(json.dumps(self.report, indent=1))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Shape]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Shape()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, from start to end")
    parser.add_argument("--steps", type=int, help="of each training, instead of what --minutes allow")
    parser.add_argument("--output", type=Path, default=Path("longnet-table"))
    parser.add_argument("--roots", type=Path, nargs="+", help="folders of sources; by default what is installed")
    parser.add_argument("--text-bytes", type=int, default=512 << 20, help="most that is read")
    parser.add_argument("--lengths", type=_numbers, default=default.lengths)
    parser.add_argument("--positions", choices=("rotary", "xpos"), default=default.positions)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    for name in ("layers", "width", "heads", "stretches", "test_bytes", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    args = parser.parse_args(arguments)
    shape = Shape(**{field.name: getattr(args, field.name) for field in attrs.fields(Shape)})
    shape.check()
    return args, shape


def numbers(text: str) -> tuple[int, ...]:
    """The integers of "1,2,4"."""
    return tuple(int(part) for part in text.split(","))


def main(arguments: list[str] | None = None) -> None:
    """Plan, train, test, draw, print."""
    start = time.perf_counter()
    args, shape = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    text = read(args.roots or installed_roots(), args.text_bytes).to(args.device)
    say(f"{text.files:,} files, {text.train.numel():,} bytes to learn from, {text.held_out.numel():,} held out")
    table = Table(shape, text, args.output, start + 60 * args.minutes)
    table.fill(table.plan(args.steps))
    if can_draw():
        draw(table.report, args.output / "longnet_table.png")
    else:
        say("no picture: matplotlib is not installed")
    say(f"{time.perf_counter() - start:.0f} s in all; results are in {args.output}\n")
    say(markdown(table.report))


if __name__ == "__main__":
    main()
