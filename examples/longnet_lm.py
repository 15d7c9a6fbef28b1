"""Train a LongNet language model over the bytes of text files, and go on where a run stopped.

    python examples/longnet_lm.py train corpus/*.txt --output run --seq-len 16384 --steps 2000
    python examples/longnet_lm.py train corpus/*.txt --output run --seq-len 16384 --steps 4000   # resumes
    python examples/longnet_lm.py sample run --prompt "Once upon a time"

A checkpoint is a folder of safetensors and JSON: weights, optimiser state, random state and the step. Batches follow
from seed and step alone, so a resumed run sees the data, and ends with the weights, of one that never stopped.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler

from dilated_attention import ConfigError, DilatedAttentionError
from dilated_attention.models import LongNetConfig, LongNetLM

HELD_OUT = 0.05  # of each file, at its end
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Windows(Dataset[Tensor]):
    """Windows of `length` + 1 bytes, one behind the other; the last byte of each is the first of the next.

    Args:
        text: uint8.
        length: bytes that a window predicts.
    """

    def __init__(self, text: np.ndarray[Any, np.dtype[np.uint8]], length: int) -> None:
        self.text, self.length = text, length
        if len(self) < 1:
            raise typer.BadParameter(f"the files hold {len(text):,} bytes, too few for a window of {length + 1:,}")

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.length
        return torch.from_numpy(self.text[start : start + self.length + 1].astype(np.int64))


class ResumableSampler(Sampler[list[int]]):
    """Batches of window numbers, reshuffled each epoch; batch `step` depends on seed and step alone."""

    def __init__(self, windows: int, batch: int, seed: int, first_step: int, last_step: int) -> None:
        self.windows, self.batch, self.seed = windows, min(batch, windows), seed
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.windows // self.batch
        for step in self.steps:
            epoch, place = divmod(step, per_epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.windows)
            yield order[place * self.batch : (place + 1) * self.batch].tolist()


def read(paths: list[Path]) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """The files' bytes to learn from, and those held out."""
    texts = [np.fromfile(path, dtype=np.uint8) for path in sorted(paths)]
    ends = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    kept = np.concatenate([text[:end] for text, end in zip(texts, ends, strict=True)])
    return kept, np.concatenate([text[end:] for text, end in zip(texts, ends, strict=True)])


def bits_per_byte(model: LongNetLM, windows: Tensor) -> Tensor:
    """Mean bits per byte of (batch, length + 1) int64 windows, but for their first bytes."""
    logits = model(windows[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten()) / math.log(2)


def save(folder: Path, model: LongNetLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint beside the last one and put it in its place, so that a crash leaves one of the two."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, fresh / "model.safetensors")
    names = {id(p): name for name, p in model.named_parameters()}
    state = {f"{names[id(p)]}|{key}": value for p, held in optimizer.state.items() for key, value in held.items()}
    state["random_state"] = torch.get_rng_state()
    save_file(state, fresh / "training.safetensors")
    (fresh / "config.json").write_text(json.dumps({"step": step, "model": model.config.to_dict()}, indent=1))
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, device: torch.device | str) -> tuple[LongNetLM, int]:
    """The model of a checkpoint and the step it was saved at."""
    if not folder.exists() and (old := folder.with_name(folder.name + ".old")).exists():
        folder = old  # a save was cut off between its two renames
    if not (folder / "config.json").is_file():
        raise ConfigError(f"there is no checkpoint {str(folder)!r}; give the folder that `train --output` wrote")
    described = json.loads((folder / "config.json").read_text())
    model = LongNetLM(LongNetConfig.from_dict(described["model"]), device=device)
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
    return model, described["step"]


def load_training(folder: Path, model: LongNetLM, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimiser and the random generator back where the checkpoint left them."""
    state = load_file(folder / "training.safetensors")
    torch.set_rng_state(state.pop("random_state"))
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, entry = key.partition("|")
        place = value if entry == "step" else value.to(parameters[name].device)
        optimizer.state[parameters[name]][entry] = place


@app.command()
def train(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="folder of the checkpoint")] = Path("longnet-run"),
    steps: Annotated[int, typer.Option(min=1, help="in all, those before a resumption included")] = 1000,
    seq_len: Annotated[int, typer.Option(min=1)] = 4096,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    layers: Annotated[
        int, typer.Option(min=1, help="of a new model, as width and heads; a resumed one has its own")
    ] = 4,
    width: Annotated[int, typer.Option(min=1)] = 256,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: float = 1e-3,
    warm_up: Annotated[int, typer.Option(min=1)] = 50,
    save_every: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
    checkpointing: Annotated[
        bool, typer.Option(help="of a new model: keep only each layer's input for the backward")
    ] = False,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train, from the checkpoint in --output if there is one, until --steps in all."""
    learned, held_out = read(files)
    checkpoint = output / "checkpoint"
    torch.manual_seed(seed)
    first = 0
    if checkpoint.exists() or checkpoint.with_name("checkpoint.old").exists():
        model, first = load(checkpoint, device)
    else:
        widths = [max(64, seq_len >> shift) for shift in (4, 3, 2, 1, 0)]
        pattern = {"kind": "dilated", "segment_lengths": widths, "dilation_rates": [1, 2, 4, 8, 16]}
        shape: dict[str, Any] = {"embed_dim": width, "num_layers": layers, "num_heads": heads, "vocab_size": 256}
        config = LongNetConfig(
            pattern=pattern, positions="rotary", tie_embeddings=True, activation_checkpointing=checkpointing, **shape
        )
        model = LongNetLM(config, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    if first:
        load_training(checkpoint, model, optimizer)
        print(f"resumed at step {first}")
    windows = Windows(learned, seq_len)
    sampler = ResumableSampler(len(windows), batch, seed, first, steps)
    # A generator of its own: by default a loader draws from torch's, which would then differ after a resumption.
    loader = DataLoader(windows, batch_sampler=sampler, generator=torch.Generator())
    for step, rows in enumerate(loader, start=first):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / warm_up)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = bits_per_byte(model, rows.to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(checkpoint, model, optimizer, step + 1)
            print(
                f"step {step + 1}: {loss.item():.3f} bits per byte, held out {evaluate(model, held_out, seq_len):.3f}"
            )


def evaluate(model: LongNetLM, text: np.ndarray[Any, np.dtype[np.uint8]], seq_len: int, most: int = 8) -> float:
    """Bits per byte of held-out text; NaN where there is less than a window of it."""
    if len(text) <= seq_len:
        return math.nan
    windows, device = Windows(text, seq_len), model.embedding.weight.device
    chosen = [windows[i][None].to(device) for i in range(0, len(windows), -(-len(windows) // most))]
    model.eval()
    with torch.no_grad():
        result = sum(bits_per_byte(model, rows).item() for rows in chosen) / len(chosen)
    model.train()
    return result


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="folder of `train --output`")],
    prompt: Annotated[str, typer.Option(show_default="a line break")] = "\n",
    length: Annotated[int, typer.Option(min=1)] = 200,
    temperature: float = 0.8,
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Continue a prompt."""
    if not prompt:
        raise typer.BadParameter("a prompt has at least one byte, got ''; leave --prompt out for a line break")
    model, _ = load(run / "checkpoint", device)
    tokens = torch.tensor([list(prompt.encode())], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    text = model.eval().generate(tokens, length, temperature=temperature, generator=generator)
    print(bytes(text[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    try:
        app()
    except DilatedAttentionError as error:
        sys.exit(f"error: {error}")
