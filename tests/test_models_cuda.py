"""Modules moved to a GPU after they were made, and back: what the CPU computes, to the dtype's precision."""

from __future__ import annotations

import copy

import pytest
import torch

from dilated_attention import Dilated
from dilated_attention.models import LongNetConfig, LongNetLM, MultiheadAttention, load_gigapath

from .model_kit import Golden, data, padding
from .support import error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DILATED = Dilated((32, 64), (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_moves(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = MultiheadAttention(64, 4, batch_first=True, pattern=DILATED, positions="rotary")
    x, mask = data(2, 100, 64), padding(100, 70, length=100)
    with torch.no_grad():
        expected = attention(x, x, x, mask, is_causal=True)[0]
        moved = copy.deepcopy(attention).cuda().to(dtype)
        y = x.cuda().to(dtype)
        actual = moved(y, y, y, mask.cuda(), is_causal=True)[0]
        assert error(actual.cpu()[~mask], expected[~mask]) < (1e-3 if dtype == torch.float32 else 0.03)
        assert error(moved.cpu().float()(x, x, x, mask, is_causal=True)[0], expected) < 0.03


def test_a_language_model_trains_and_generates() -> None:
    torch.manual_seed(0)
    config = LongNetConfig(embed_dim=64, num_layers=2, num_heads=4, vocab_size=50, pattern=DILATED, positions="rotary")
    model, tokens = LongNetLM(config), torch.randint(50, (2, 100))
    expected = model(tokens)
    model.cuda().train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(tokens.cuda())
    assert error(logits.cpu(), expected) < 0.03
    torch.autograd.backward(logits.float().square().mean())
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert model.eval().to(torch.bfloat16).generate(tokens.cuda(), 8).shape == (2, 108)


@pytest.mark.parametrize("tiles", [127, 999])
def test_gigapath_is_the_original(tiles: int) -> None:
    golden = Golden("gigapath_slide_encoder")
    model = load_gigapath(
        golden.part("weights"),
        num_heads=4,
        segment_lengths=tuple(golden.config["segment_length"]),
        grid_size=40,
        compatibility="torchscale_zero_padding",
    )
    given = [golden.part("input")[f"{name}_{tiles}"].cuda() for name in ("x", "coords")]
    expected = golden.part("output")[f"y_{tiles}"]
    with torch.no_grad():
        assert error(model.cuda().layer_embeddings(*given)[-1].cpu(), expected) < 1e-3
        half = model.to(torch.bfloat16).layer_embeddings(given[0].bfloat16(), given[1])[-1]
    assert error(half.cpu(), expected) < 0.05
