"""The demo: what this machine can do, measured, trained and drawn in about two minutes on two CPU cores."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import rich.console
import rich.progress
import torch
import typer

from .. import Dilated
from ..console import make_folder
from ..core.checks import require_int
from ..registry.build import explain as plan_of
from ..registry.device import describe_device
from ..report import is_terminal
from . import compare, pictures, text
from .model import ModelConfig
from .training import Budget, Mark, Training, train

Say = Callable[[str], None]

# Two minutes, less what starting Python and drawing take; a slow machine spends more of them on the comparison.
SECONDS = 105.0
LONGEST_TRAINING = 65.0
SHORTEST_TRAINING = 20.0
SMALLER = 16  # a picture of the pattern has this part of its lengths, so that single keys are seen


def run(output: Path, *, steps: int | None = None, json_output: bool = False) -> dict[str, object]:
    """Explain, measure, train, draw.

    Args:
        output: folder for the pictures, created where it is missing.
        steps: training steps; None trains for about a minute, less where the machine is slow.
        json_output: one JSON object on stdout; what is said on the way goes to stderr.

    Returns:
        What the JSON object holds.

    Raises:
        ConfigError: `steps` is not a positive integer.
        DilatedAttentionError: a result that differs from the oracle, or no text to train on.
    """

    def say(line: str = "") -> None:
        typer.echo(line, err=json_output)

    if steps is not None:
        require_int("steps", steps, minimum=1)
    start = time.perf_counter()
    make_folder(output, pictures.FILES if pictures.can_draw() else ())
    report: dict[str, object] = {"machine": machine()}
    say("1. This machine: " + ", ".join(f"{key} {value}" for key, value in machine().items()) + "\n")
    report["plan"] = explain(say)
    report["comparison"] = measure(say)
    left = SECONDS - (time.perf_counter() - start)
    budget = Budget(steps=steps, seconds=max(SHORTEST_TRAINING, min(left, LONGEST_TRAINING)))
    report["training"], files = learn(say, output, budget)
    report["files"] = [str(path) for path in files]
    finish(say, files)
    if json_output:
        typer.echo(json.dumps(report, indent=2))
    return report


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": describe_device("cpu").name or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def explain(say: Say) -> object:
    """What the registry chose for LongNet's configuration, and why."""
    plan = plan_of(compare.CASE.config("auto", device="cpu"))
    say(plan.explain() + "\n")
    return json.loads(plan.to_json())


def measure(say: Say) -> object:
    """Time, memory and error of LongNet's attention and of dense attention."""
    say(f"2. {compare.CASE}\n")
    longnet, dense = compare.compare()
    say(compare.table((longnet, dense)))
    say(
        f"\n   forward: median of {compare.REPEATS}. Memory: the most that PyTorch's allocator held above the inputs,\n"
        "   the output included. Error: to the float64 oracle, the worst of output and gradients, at\n"
        f"   {compare.CASE.gate_len:,} tokens. LongNet is {dense.seconds / longnet.seconds:.1f} times as fast here "
        "because it looks at fewer\n   pairs, not because it rounds.\n"
    )
    return [attrs.asdict(longnet), attrs.asdict(dense)]


def learn(say: Say, output: Path, budget: Budget) -> tuple[object, list[Path]]:
    """Train the byte model and draw what came of it."""
    corpus, config = text.standard_library(), ModelConfig()
    say(
        f"3. A byte model ({config.layers} layers, {config.num_heads} heads, {config.seq_len:,} bytes at a time) reads "
        f"{corpus.files} files of\n   {corpus.root}, every twentieth held out ({corpus.held_out.numel():,} bytes)\n"
    )
    training = train_with_progress(say, corpus, config, budget)
    xz_bits = corpus.compressed_bits_per_byte()
    last = training.marks[-1]
    say(
        f"\n   {training.parameters:,} weights, {last.step} steps, {training.seconds:.0f} s: "
        f"{last.held_out:.2f} bits per byte on files never seen\n"
        f"   (8 when guessing; xz -9 needs {xz_bits:.2f} with all of them before it)\n"
    )
    result = attrs.asdict(training) | {"xz_bits_per_byte": xz_bits, "corpus": str(corpus.root), "files": corpus.files}
    return result, draw(say, output, config, training, xz_bits)


def train_with_progress(say: Say, corpus: text.Corpus, config: ModelConfig, budget: Budget) -> Training:
    """Train; a bar on a terminal's stderr, the marks as lines."""
    columns = (
        rich.progress.TextColumn("   training"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[bits]:.2f} bits per byte"),
    )
    # Lines are only routed around the bar where both share a terminal; a redirected stdout stays as it is.
    bar = rich.progress.Progress(
        *columns,
        console=rich.console.Console(stderr=True),
        transient=True,
        disable=not is_terminal(sys.stderr),
        redirect_stdout=is_terminal(sys.stdout),
    )

    def on_mark(mark: Mark) -> None:
        say(
            f"   step {mark.step:5}   {mark.seconds:4.0f} s   bits per byte: {mark.seen:.2f} seen, "
            f"{mark.held_out:.2f} held out"
        )

    with bar:
        task = bar.add_task("training", total=1.0, bits=8.0)
        return train(
            corpus,
            config,
            budget,
            on_step=lambda spent, bits: bar.update(task, completed=spent, bits=bits),
            on_mark=on_mark,
        )


def draw(say: Say, output: Path, config: ModelConfig, training: Training, xz_bits: float) -> list[Path]:
    """Draw the loss curve and the model's pattern, or say what is missing for it."""
    if not pictures.can_draw():
        say("   No pictures: matplotlib is missing. python -m pip install 'dilated-attention[plot]'\n")
        return []
    loss, pattern = (output / name for name in pictures.FILES)
    pictures.draw_loss(training, xz_bits, loss)
    lengths = tuple(length // SMALLER for length in config.segment_lengths)
    segments, rates = (", ".join(map(str, numbers)) for numbers in (config.segment_lengths, config.dilation_rates))
    title = (
        f"Who attends to whom in the model: segments {segments}, dilation rates {rates} "
        f"(drawn with 1/{SMALLER} of the lengths)"
    )
    small = Dilated(segment_lengths=lengths, dilation_rates=config.dilation_rates)
    pictures.draw_pattern(small, title, pattern, seq_len=config.seq_len // SMALLER, num_heads=config.num_heads)
    return [loss, pattern]


def finish(say: Say, files: list[Path]) -> None:
    """Where things are, and where to go from here."""
    say("4. Written: " + (", ".join(str(path) for path in files) or "nothing") + "\n")
    say("   Next: dilated-attention doctor             what is installed, and the line that installs the rest")
    say("         dilated-attention explain --help     the same choice for your own heads, length and device")
    say("         README.md                            the patterns, and the lines that use them")
