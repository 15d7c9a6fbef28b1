"""Checkpoints of torchscale's LongNet, LongViT, Prov-GigaPath and dilated-attention-pytorch, against golden outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dilated_attention import ConfigError, Dilated, Local
from dilated_attention.core.geometry import Geometry
from dilated_attention.models import LongNetEncoder, LongNetLM, SlideEncoder, load_gigapath, load_torchscale
from dilated_attention.models.gigapath import gigapath_segment_lengths
from dilated_attention.models.zero_keys import with_zero_keys, zero_keys_seen

from .model_kit import Golden, data, gradients, padding
from .support import error

ENCODER = Golden("torchscale_longnet_encoder")
ZERO_PADDING = "torchscale_zero_padding"


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of an element; infinite where it is no number."""
    difference = float((actual - expected).detach().abs().max())
    return difference if difference == difference else float("inf")


@pytest.mark.parametrize("length", [128, 64, 100, 37])
def test_torchscales_encoder(length: int) -> None:
    x, y = ENCODER.part("input")[f"x_{length}"], ENCODER.part("output")[f"y_{length}"]
    exact = load_torchscale(ENCODER.part("weights"), ENCODER.config)
    assert isinstance(exact, LongNetEncoder)
    original = load_torchscale(ENCODER.part("weights"), ENCODER.config, compatibility=ZERO_PADDING)
    assert worst(original(x), y) < 1e-5
    # Without the mode the padding is not attended: equal where nothing is padded, visibly different elsewhere.
    assert worst(exact(x), y) < 1e-5 if length % 64 == 0 else worst(exact(x), y) > 0.1


@pytest.mark.parametrize("name", ["torchscale_longnet_decoder", "torchscale_longnet_decoder_xpos"])
@pytest.mark.parametrize("compatibility", [None, ZERO_PADDING])
def test_torchscales_decoder(name: str, compatibility: str | None) -> None:
    golden = Golden(name)
    model = load_torchscale(golden.part("weights"), golden.config, compatibility=compatibility)
    assert isinstance(model, LongNetLM)
    for length in (128, 64, 100):
        logits = model(golden.part("input")[f"tokens_{length}"])
        assert worst(logits, golden.part("output")[f"logits_{length}"]) < 1e-5


def slide_encoder(golden: Golden, **fields: Any) -> SlideEncoder:
    config = golden.config
    return load_gigapath(
        golden.part("weights"),
        num_heads=config["heads"],
        segment_lengths=tuple(config["segment_length"]),
        dilation_rates=tuple(config["dilated_ratio"]),
        grid_size=config["slide_ngrids"],
        **fields,
    )


@pytest.mark.parametrize("tiles", [127, 255, 100, 999])
def test_gigapaths_slide_encoder(tiles: int) -> None:
    golden = Golden("gigapath_slide_encoder")
    given = [golden.part("input")[f"{name}_{tiles}"] for name in ("x", "coords")]
    wanted = [golden.part("output")[f"{name}_{tiles}"] for name in ("layer1", "y")]
    model = slide_encoder(golden, compatibility=ZERO_PADDING)
    layers = model.layer_embeddings(*given)
    assert len(layers) == 3
    assert max(worst(a, e) for a, e in zip(layers[1:], wanted, strict=True)) < 1e-5
    if (tiles + 1) % 128 == 0:
        assert worst(slide_encoder(golden).layer_embeddings(*given)[-1], wanted[-1]) < 1e-5
    state = model.encoder.hidden_states(model._tokens(given[0], given[1], None)[0])[-1]
    assert model.encoder.norm is not None
    assert worst(model(*given), model.norm(model.encoder.norm(state))[:, 0]) < 1e-6


def test_slides_of_several_sizes_in_one_batch() -> None:
    golden = Golden("gigapath_slide_encoder")
    tiles, places = (golden.part("input")[f"{name}_255"] for name in ("x", "coords"))
    mask = padding(255, 1, 60, length=255)
    for fields in ({}, {"global_pool": True}):
        model = slide_encoder(golden, **fields)
        batched = model(tiles.expand(3, -1, -1), places.expand(3, -1, -1), mask)
        alone = [model(tiles[:, :n], places[:, :n]) for n in (255, 1, 60)]
        assert worst(batched, torch.cat(alone)) < 1e-5
        torn = mask.unsqueeze(-1)
        filled = tiles.expand(3, -1, -1).masked_fill(torn, torch.nan), places.expand(3, -1, -1).masked_fill(torn, -1)
        assert torch.equal(model(*filled, mask), batched)
        assert torch.equal(model(*filled, torch.zeros(mask.shape).masked_fill(mask, -torch.inf)), batched)
    assert model.train().half().eval().bfloat16()(tiles.bfloat16(), places).dtype == torch.bfloat16


def test_gigapaths_constants() -> None:
    assert gigapath_segment_lengths() == (1024, 5792, 32768, 185363, 1048576)
    assert list(gigapath_segment_lengths(16384)) == Golden("gigapath_slide_encoder").config["segment_length"]
    model = slide_encoder(Golden("gigapath_slide_encoder"))
    with pytest.raises(ConfigError, match="40 x 40 tiles"):
        model(data(1, 2, 48), torch.tensor([[[0.0, 0.0], [0.0, 40 * 256.0]]]))
    with pytest.raises(ConfigError, match=r"coordinates \(slides, tiles, 2\)"):
        model(data(1, 2, 48), data(1, 3, 2))
    with pytest.raises(ConfigError, match=r"\(slides, tiles, 48\) .* got \(1, 2, 40\)"):
        model(data(1, 2, 40), torch.zeros(1, 2, 2))
    with pytest.raises(ConfigError, match=r"key_padding_mask must be \(slides, tiles\) \(1, 2\), got \(1, 3\)"):
        model(data(1, 2, 48), torch.zeros(1, 2, 2), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="padding of a slide stands behind its tiles"):
        model(data(1, 2, 48), torch.zeros(1, 2, 2), torch.tensor([[True, False]]))


def zero_padded(q: Tensor, k: Tensor, v: Tensor, pattern: Dilated) -> Tensor:
    """torchscale's definition, pair by pair: each branch over its own zero-padded segments, mixed by denominators."""
    n, heads = q.shape[1], q.shape[2]
    numerator, denominator = torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=q.dtype)
    for width, rate in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        width = min(width, n)
        segments = -(-n // width)
        places = -(-width // rate) * rate
        for h in range(heads):
            offset = h // -(-heads // rate)
            for s in range(segments):
                kept = [p for p in range(s * width, min(n, (s + 1) * width)) if (p - s * width) % rate == offset]
                total = len(range(offset, places, rate))
                weights = (torch.einsum("bsd,btd->bst", q[:, kept, h], k[:, kept, h]) * q.shape[-1] ** -0.5).exp()
                numerator[:, kept, h] += weights @ v[:, kept, h]
                denominator[:, kept, h] += weights.sum(-1) + (total - len(kept))
    return numerator / denominator.unsqueeze(-1)


@pytest.mark.parametrize("length", [5, 7, 12, 13, 21])
@pytest.mark.parametrize("heads", [4, 3])
def test_zero_keys_are_torchscales_padding(length: int, heads: int) -> None:
    from dilated_attention import build_attention

    pattern = Dilated((6, 8, 24), (1, 2, 5), offsets="blocked")
    q, k, v = (data(2, length, heads, 8, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    out, lse = build_attention(pattern=pattern, like=q)(q, k, v, return_lse=True)
    actual, expected = with_zero_keys(out, lse, pattern, heads), zero_padded(q, k, v, pattern)
    pairs = zip([actual, *gradients(actual, q, k, v)], [expected, *gradients(expected, q, k, v)], strict=True)
    assert max(error(a, e) for a, e in pairs) < 1e-12
    assert error(out, expected) > 1e-3


def test_what_the_zero_padding_mode_refuses() -> None:
    pattern = Dilated((5, 8), (2, 1), offsets="blocked")
    geometry = Geometry.self_attention(11, 4)
    branches = pattern.branches(geometry)
    with pytest.raises(ConfigError, match="segment length 5 is no multiple of its rate 2 and 11 tokens"):
        zero_keys_seen(branches, 11, torch.device("cpu"))
    whole = Dilated((8, 16), (1, 2)).branches(geometry)
    assert zero_keys_seen(whole, 32, torch.device("cpu")) is None
    model = load_torchscale(ENCODER.part("weights"), ENCODER.config, compatibility=ZERO_PADDING)
    x = ENCODER.part("input")["x_37"]
    with pytest.raises(ConfigError, match="takes no key_padding_mask"):
        model(x, padding(37, 20, length=37))


def test_files_and_nesting(tmp_path: Path) -> None:
    weights, x = ENCODER.part("weights"), ENCODER.part("input")["x_64"]
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "b.pth")
    expected = load_torchscale(weights, ENCODER.config)(x)
    for name in ("a.safetensors", "b.pth"):
        assert torch.equal(load_torchscale(tmp_path / name, ENCODER.config)(x), expected)
    torch.save({"model": weights, "code": Local}, tmp_path / "c.pth")
    (tmp_path / "d.safetensors").write_bytes(b"no tensors")
    torch.save([1], tmp_path / "e.pth")
    torch.save({"epoch": 3}, tmp_path / "f.pth")
    (tmp_path / "g.pth").write_bytes(b"junk" * 100)  # torch.load raises KeyError
    (tmp_path / "i.pth").write_bytes(b"nothing")
    (tmp_path / "h.pth").write_bytes(b"junk")  # and struct.error where a number is cut off
    for name, words in (
        ("h.pth", "as tensors alone"),
        (
            "c.pth",
            r"as tensors alone \(UnpicklingError: Unsupported global: GLOBAL [\w.]+Local was not [^\n]*default\); if",
        ),
        ("d.safetensors", "as tensors alone"),
        (
            "i.pth",
            r"as tensors alone \(UnpicklingError: Unsupported operand 110\); if it holds other objects, save its",
        ),
        ("e.pth", "holds a list"),
        ("f.pth", "'epoch' are none"),
        ("g.pth", "as tensors alone"),
        ("missing.pth", "there is no checkpoint file"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_torchscale(tmp_path / name, ENCODER.config)
    nothing: Any = None
    with pytest.raises(ConfigError, match="a checkpoint is a file's path or a state_dict, got None"):
        load_torchscale(nothing, ENCODER.config)
    with pytest.raises(ConfigError, match="torchscale's arguments are a mapping"):
        load_torchscale(weights, nothing)


def test_every_key_is_accounted_for() -> None:
    weights = ENCODER.part("weights")
    with pytest.raises(ConfigError, match=r"no part of this model takes: layers\.0\.extra"):
        load_torchscale(weights | {"layers.0.extra": torch.zeros(1)}, ENCODER.config)
    with pytest.raises(ConfigError, match=r"no tensor 'layers\.1\.ffn\.fc1\.bias'"):
        load_torchscale({k: v for k, v in weights.items() if k != "layers.1.ffn.fc1.bias"}, ENCODER.config)
    with pytest.raises(ConfigError, match="does not fit"):
        load_torchscale(weights | {"layer_norm.bias": torch.zeros(3)}, ENCODER.config)
    gigapath = Golden("gigapath_slide_encoder").part("weights")
    with pytest.raises(ConfigError, match="decoder_embed"):
        load_gigapath(gigapath | {"decoder_embed.weight": torch.zeros(1)}, num_heads=4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"moe_freq": 2}, "moe_freq must be 0"),
        ({"encoder_wings": 2}, "encoder_wings=2 is not known"),
        ({"subln": False, "pre_norm": False}, "post-norm"),
        ({"dilated_ratio": "[1,2]"}, "2"),
        ({"segment_length": "[print(1)]"}, r"segment_length must be a list of integers such as '\[1024,2048\]', got"),
        ({"dilated_ratio": [1, 2.5, 4]}, "dilated_ratio must be a list of integers"),
        ({"dilated_ratio": 4}, "dilated_ratio must be a list of integers"),
    ],
)
def test_arguments_without_a_place(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_torchscale(ENCODER.part("weights"), ENCODER.config | arguments)
    lacking = {k: v for k, v in ENCODER.config.items() if k != "segment_length"}
    with pytest.raises(ConfigError, match="lack segment_length"):
        load_torchscale(ENCODER.part("weights"), lacking)


def test_embeddings_scaled_and_shared() -> None:
    golden = Golden("torchscale_longnet_decoder")
    weights, seen = golden.part("weights"), golden.part("input")["tokens_64"]
    plain = load_torchscale(weights, golden.config)
    scaled = load_torchscale(weights, golden.config | {"no_scale_embedding": False})
    smaller = load_torchscale(weights | {"embed_tokens.weight": weights["embed_tokens.weight"] * 8.0}, golden.config)
    assert worst(scaled(seen), smaller(seen)) < 1e-6
    assert worst(scaled(seen), plain(seen)) > 1e-2
    shared = golden.config | {"share_decoder_input_output_embed": True}
    with pytest.raises(ConfigError, match="differ, though its arguments share them"):
        load_torchscale(weights, shared)
    tied = load_torchscale(weights | {"output_projection.weight": weights["embed_tokens.weight"]}, shared)
    assert "output.weight" not in tied.state_dict()
    bad = golden.part("weights") | {"layers.0.self_attn.xpos.scale": torch.zeros(8)}
    with pytest.raises(ConfigError, match="xPos' own"):
        load_torchscale(bad, Golden("torchscale_longnet_decoder_xpos").config)
