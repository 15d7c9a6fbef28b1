"""Give a dense Hugging Face model dilated attention, and say honestly what that costs and what training buys back.

    python examples/convert_huggingface.py text/*.txt --model path/or/name --steps 200
    python examples/convert_huggingface.py text/*.txt                # trains a small dense model of bytes first

Prints held-out perplexity of the dense model, of the same weights under the pattern, of those after a short fine-tune,
and of the dense model after the same fine-tune, without which the gain could not be told from what any training gives.
The first and last layers stay full and the first tokens are seen by all (attention sinks): so little is lost.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor

from dilated_attention import Dilated, DilatedAttentionError, Full, Global, Pattern
from dilated_attention.models import register_with_transformers

HELD_OUT = 0.1


def byte_model() -> Any:
    """A small dense Llama over bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 20,
        bos_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def windows(tokens: Tensor, length: int) -> Tensor:
    """(windows, length) of a stream of tokens."""
    count = tokens.numel() // length
    if count < 1:
        raise typer.BadParameter(f"the files hold {tokens.numel():,} tokens, too few for a window of {length:,}")
    return tokens[: count * length].view(count, length)


def perplexity(model: Any, held_out: Tensor, most: int = 16) -> float:
    """exp of the mean loss over windows spread over the held-out text."""
    chosen = held_out[:: -(-len(held_out) // most)]
    model.eval()
    with torch.no_grad():
        losses = [model(row[None], labels=row[None], use_cache=False).loss.item() for row in chosen]
    return math.exp(sum(losses) / len(losses))


def train(model: Any, text: Tensor, steps: int, learning_rate: float, batch: int = 4) -> None:
    """AdamW over random windows, the same ones for the same number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 20)
        rows = text[torch.randint(len(text), (batch,), generator=generator)]
        torch.autograd.backward(model(rows, labels=rows, use_cache=False).loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def sparse_pattern(length: int, sinks: int) -> Pattern:
    """LongNet's branches up to the whole length, and global first tokens."""
    widths = tuple(max(32, length >> shift) for shift in (3, 2, 1, 0))
    return Dilated(segment_lengths=widths, dilation_rates=(1, 2, 4, 8)) | Global(sinks)


def main(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    model: Annotated[str | None, typer.Option(help="a model's folder or name; a model of bytes if left out")] = None,
    seq_len: Annotated[int, typer.Option(min=1)] = 1024,
    steps: Annotated[int, typer.Option(min=0, help="of the fine-tune")] = 100,
    dense_steps: Annotated[
        int, typer.Option(min=0, help="of the dense training that a model of bytes gets first")
    ] = 300,
    sinks: Annotated[int, typer.Option(min=1, help="first tokens that all see")] = 4,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Measure before and after."""
    torch.manual_seed(0)
    text = b"\n".join(path.read_bytes() for path in sorted(files))
    if model is None:
        dense, tokens = byte_model().to(device), torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    else:
        dense = transformers.AutoModelForCausalLM.from_pretrained(model).to(device)
        tokens = transformers.AutoTokenizer.from_pretrained(model)(text.decode(), return_tensors="pt").input_ids[0]
    cut = int(tokens.numel() * (1 - HELD_OUT))
    learned, held_out = (windows(part.to(device), seq_len) for part in (tokens[:cut], tokens[cut:]))
    if model is None:
        train(dense, learned, dense_steps, 1e-3)
    print(f"dense                                  {perplexity(dense, held_out):8.3f}")
    sparse = copy.deepcopy(dense)
    last = sparse.config.get_text_config().num_hidden_layers - 1
    register_with_transformers(sparse, sparse_pattern(seq_len, sinks), layers={0: Full(), last: Full()})
    print(f"converted, before any training         {perplexity(sparse, held_out):8.3f}")
    for name, tuned in (("converted", sparse), ("dense", dense)):
        train(tuned, learned, steps, 2e-4)
        print(f"{name + f', after {steps} steps':38} {perplexity(tuned, held_out):8.3f}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (DilatedAttentionError, OSError) as error:  # transformers' word for a model that is not there
        sys.exit(f"error: {error}")
