"""Prov-GigaPath's slide encoder: ours against the same model with the original's algorithm in its attention.

    python -m benchmarks.gigapath                                       a small case on this CPU
    python -m benchmarks.gigapath --device cuda --dtype bfloat16 --tiles 10000
    python -m benchmarks.gigapath --device cuda --dtype bfloat16 --tiles 100000 --layers 12

Two parts: one layer's attention, and the whole model, each forward and as a training step (forward and backward). The
original attends to the zeros that lengths are padded with, so ours is checked in its compatibility mode against it, and
timed in that mode and in the exact one; what disagrees prints no time. Ours computes norms and activations again in the
backward (activation_checkpointing="pointwise"); "all kept" is ours without that, as the original does it. The original
keeps a table of positions of 3 GB besides, which is not counted here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.timing import difference, extra_bytes, in_turns
from dilated_attention.models import LongNetConfig, SlideEncoder, SlideEncoderConfig
from dilated_attention.models.built import ZERO_PADDING, BuiltAttention
from dilated_attention.models.gigapath import gigapath_segment_lengths
from dilated_attention.models.longnet_config import Checkpointing

from .torchscale_algorithm import aten_kernel, dilated_attention

RATES = (1, 2, 4, 8, 16)


@attrs.frozen
class Case:
    """GigaPath's shape but for what the command line changes."""

    tiles: int
    layers: int
    dtype: str
    device: str
    width: int = 768
    heads: int = 16
    backend: str = "auto"

    def model(self, compatibility: str | None, checkpointing: Checkpointing) -> SlideEncoder:
        """The slide encoder with weights that depend on nothing but its shape."""
        torch.manual_seed(0)
        pattern = {
            "kind": "dilated",
            "segment_lengths": gigapath_segment_lengths(),
            "dilation_rates": RATES,
            "offsets": "blocked",
        }
        encoder = LongNetConfig(
            embed_dim=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            pattern=pattern,
            compatibility=compatibility,
            activation_checkpointing=checkpointing,
            attention={"backend": self.backend},
        )
        dtype: torch.dtype = getattr(torch, self.dtype)
        return SlideEncoder(SlideEncoderConfig(encoder=encoder), device=self.device, dtype=dtype)

    def slide(self) -> tuple[Tensor, Tensor]:
        """Random features of distinct tiles, (1, L, 1536), and where they lie, (1, L, 2)."""
        generator = torch.Generator(self.device).manual_seed(1)
        dtype: torch.dtype = getattr(torch, self.dtype)
        tiles = torch.randn(1, self.tiles, 1536, generator=generator, dtype=dtype, device=self.device)
        place = torch.arange(self.tiles, device=self.device)
        return tiles, torch.stack([place // 1000, place % 1000], dim=-1)[None] * 256.0


class Original(BuiltAttention):
    """The official algorithm in the place of `BuiltAttention`, over our dense kernel, else FlashAttention-2."""

    def __init__(self, ours: BuiltAttention, case: Case) -> None:
        super().__init__(ours.config.to_dict())
        attention = ours.attention_for(getattr(torch, case.dtype), torch.device(case.device).type, is_causal=False)
        on_cpu = case.device == "cpu"
        self._kernel = aten_kernel("cpu" if on_cpu else "cudnn" if attention.plan.kernel == "cudnn" else "flash")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """(B, S, H, D), non-causal, zero padding attended."""
        return dilated_attention(
            query, key, value, gigapath_segment_lengths(), RATES, is_causal=False, kernel=self._kernel
        )


def original(case: Case) -> SlideEncoder:
    """The model with the official algorithm in every layer."""
    model = case.model(ZERO_PADDING, checkpointing=False)
    for layer in model.encoder.layers:
        layer.self_attn.attention = Original(layer.self_attn.attention, case)  # type: ignore[union-attr, arg-type]
    return model


Calls = dict[str, dict[str, Callable[[], object]]]


def attention_calls(case: Case) -> tuple[Calls, float]:
    """One layer's attention by contender, and how far ours is from the original's result."""
    generator = torch.Generator(case.device).manual_seed(2)
    dtype: torch.dtype = getattr(torch, case.dtype)
    shape = (1, case.tiles + 1, case.heads, case.width // case.heads)
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=dtype, device=case.device) for _ in range(4))
    modules: dict[str, nn.Module] = {}
    for name, model in models(attrs.evolve(case, layers=1)).items():
        if name == "ours, all kept":
            continue  # the same attention
        modules[name] = model.get_submodule("encoder.layers.0.self_attn.attention")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    calls: Calls = {}
    for name, module in modules.items():
        calls[name] = {
            "forward": partial(module, q, k, v),
            "training": partial(attention_training, module, leaves, dout),
        }
    return calls, difference(modules["ours, zero padding"](q, k, v), modules["original"](q, k, v))


def attention_training(module: nn.Module, leaves: list[Tensor], dout: Tensor) -> object:
    """Forward and backward of one attention."""
    return torch.autograd.grad(module(*leaves), leaves, dout)


def model_calls(case: Case) -> tuple[Calls, float]:
    """The whole model by contender, and how far ours is from the original's result."""
    slide, built = case.slide(), models(case)

    def forward(model: SlideEncoder) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(*slide)
            return out

    def training(model: SlideEncoder) -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(model(*slide).float().square().mean())

    calls: Calls = {
        name: {"forward": partial(forward, model), "training": partial(training, model)}
        for name, model in built.items()
    }
    return calls, difference(forward(built["ours, zero padding"]), forward(built["original"]))


def models(case: Case) -> dict[str, SlideEncoder]:
    """The contenders, ours first."""
    return {
        "ours": case.model(None, "pointwise"),
        "ours, all kept": case.model(None, checkpointing=False),
        "ours, zero padding": case.model(ZERO_PADDING, "pointwise"),
        "original": original(case),
    }


def measure(case: Case, calls: Calls, rounds: int) -> list[dict[str, object]]:
    """Interleaved medians and peak memory; ratios of the original to each."""
    each = {(name, kind): call for name, kinds in calls.items() for kind, call in kinds.items()}
    times = in_turns(each, rounds, case.device, warm_up=1)
    medians = {key: statistics.median(found) for key, found in times.items()}
    memory = {key: extra_bytes(call, case.device) for key, call in each.items()}
    return [
        {
            "name": name,
            **{f"{kind}_ms": medians[name, kind] for kind in kinds},
            **{f"{kind}_speedup": medians["original", kind] / medians[name, kind] for kind in kinds},
            **{f"{kind}_bytes": memory[name, kind] for kind in kinds},
        }
        for name, kinds in calls.items()
    ]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="float32", choices=sorted(BOUNDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    case = Case(args.tiles, args.layers, args.dtype, args.device, backend=args.backend)
    # Layers add their roundings up; what is wrong is off by far more than this.
    bounds = {"attention": BOUNDS[case.dtype], "model": 4 * BOUNDS[case.dtype]}
    report: dict[str, object] = {"case": attrs.asdict(case), "torch": torch.__version__}
    for part, make in (("attention", attention_calls), ("model", model_calls)):
        calls, error = make(case)
        if not error < bounds[part]:
            sys.exit(f"{part}: ours differs from the original by {error:.1e}, more than {bounds[part]:.0e}: no times")
        report[part] = rows = measure(case, calls, args.rounds)
        if args.json:
            continue
        print(f"{part}, {case.tiles:,} tiles; ours with zero padding differs from the original by {error:.1e}")
        print(f"{'':22}{'forward ms':>12}{'speed-up':>10}{'training ms':>13}{'speed-up':>10}{'peak MiB':>10}")
        for row in rows:
            print(
                f"{row['name']:22}{row['forward_ms']:12.2f}{row['forward_speedup']:10.2f}{row['training_ms']:13.2f}"
                f"{row['training_speedup']:10.2f}{row['training_bytes'] / 2**20:10.1f}"  # type: ignore[operator]
            )
    if args.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
