"""LongNet layers and models: ragged batches, what broke predecessors, gradients checkpointed, compiled, sharded."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention import ConfigError, Dilated, Learned, build_attention
from dilated_attention.models import (
    LongNetConfig,
    LongNetDecoder,
    LongNetDecoderLayer,
    LongNetEncoder,
    LongNetEncoderLayer,
    LongNetLM,
)
from dilated_attention.models.layers import DropPath

from .model_kit import data, gradients, padding
from .support import error

E, S, VOCAB = 32, 24, 19
DILATED = Dilated(segment_lengths=(8, 16), dilation_rates=(1, 2))


def config(**fields: Any) -> LongNetConfig:
    return LongNetConfig(
        **{"embed_dim": E, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "pattern": DILATED, **fields}
    )


def language_model(dtype: torch.dtype = torch.float32, **fields: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(config(vocab_size=VOCAB, positions="rotary", **fields), dtype=dtype)


def tokens(batch: int = 2, length: int = S, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("positions", ["none", "xpos"])
def test_ragged_batches_are_each_sequence_alone(positions: str, is_causal: bool, left: bool) -> None:
    torch.manual_seed(0)
    model = LongNetEncoder(config(positions=positions), is_causal=is_causal, dtype=torch.float64)
    x, lengths = data(3, S, E, dtype=torch.float64).requires_grad_(), (S, 1, 17)
    mask = padding(*lengths, length=S, left=left)
    alone = []
    for row, length in enumerate(lengths):
        mine = x[row : row + 1, S - length :] if left else x[row : row + 1, :length]
        alone.append(model(mine).squeeze(0))
    actual, expected = model(x, mask)[~mask], torch.cat(alone)
    leaves = [x, *model.parameters()]
    pairs = zip([actual, *gradients(actual, *leaves)], [expected, *gradients(expected, *leaves)], strict=True)
    assert max(error(a, e) for a, e in pairs) < 1e-11


def test_the_hundredth_forward_is_the_first() -> None:
    model, seen = language_model(), tokens()
    with torch.no_grad():
        first = model(seen)
        for _ in range(99):
            again = model(seen)
        assert torch.equal(first, again)
        assert torch.equal(model(tokens(1, 11)), model(tokens(1, 11)))  # another length on the way
        assert torch.equal(model(seen), first)


def test_copies_and_state_dicts() -> None:
    model, seen = language_model(), tokens()
    expected = model(seen)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(seen), expected)
    with torch.no_grad():
        twin.embedding.weight.add_(1.0)
    assert torch.equal(model(seen), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = LongNetLM(model.config)
    assert not torch.equal(other(seen), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(seen), expected)
    assert LongNetConfig.from_dict(model.config.to_dict()) == model.config


def test_dtypes_change_after_construction() -> None:
    model, seen = language_model(torch.float64), tokens()
    weights, expected = copy.deepcopy(model.state_dict()), model(seen)
    assert error(model.to(torch.float32)(seen), expected) < 1e-5
    assert error(model.to(torch.bfloat16)(seen), expected) < 0.05
    assert model(seen).dtype == torch.bfloat16
    meta = LongNetLM(model.config, device="meta")
    meta.to_empty(device="cpu").load_state_dict(weights)
    assert error(meta(seen), expected) < 1e-5


def test_training_and_evaluation_mode() -> None:
    model, seen = language_model(dropout=0.3, drop_path=0.5, activation_dropout=0.2), tokens()
    torch.manual_seed(3)
    assert not torch.equal(model(seen), model(seen))
    model.eval()
    assert torch.equal(model(seen), model(seen))
    assert not torch.equal(model.train()(seen), model(seen))
    kept = DropPath(0.5).train()(torch.ones(4000, 1, 1))
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert abs(float(kept.mean()) - 1) < 0.1


@pytest.mark.parametrize("norm", ["pre", "sub", "deep"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", [True, "pointwise"])
def test_checkpointed_layers_have_the_same_gradients(checkpointing: bool | str, dropout: float, norm: str) -> None:
    model, seen = language_model(torch.float64, dropout=dropout, activation_dropout=dropout, norm=norm), tokens()
    again = LongNetLM(
        LongNetConfig.from_dict(model.config.to_dict() | {"activation_checkpointing": checkpointing}),
        dtype=torch.float64,
    )
    again.load_state_dict(model.state_dict())
    grads = []
    for m in (model, again):
        torch.manual_seed(7)
        grads.append(gradients(m(seen), *m.parameters()))
    assert max(error(a, e) for a, e in zip(*grads, strict=True)) < 1e-12


def saved_bytes(model: nn.Module, seen: Tensor) -> int:
    """Bytes that a forward keeps for its backward, parameters aside."""
    held: dict[int, int] = {}
    known = {p.data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in known:
            held[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = model(seen)
    assert kept.requires_grad
    return sum(held.values())


def test_checkpointing_saves_memory() -> None:
    plain = language_model(num_layers=4)
    lean = language_model(num_layers=4, activation_checkpointing=True)
    assert saved_bytes(lean, tokens()) < saved_bytes(plain, tokens()) / 3
    lean.eval()
    with torch.no_grad():
        assert torch.equal(lean(tokens()), plain.eval()(tokens()))


def kept_by_a_layer(folder: Path, checkpointing: bool | str) -> float:
    """Bytes that each layer of a stack without positions leaves allocated after a forward with gradients."""
    held: list[int] = []
    outs: list[Tensor] = []  # what is released while another forward is recorded would count
    for layers in (2, 4):
        fields: dict[str, Any] = {"num_layers": layers, "activation_checkpointing": checkpointing, "ffn_dim": 4 * E}
        model = LongNetLM(config(vocab_size=VOCAB, **fields))
        model(tokens())  # builds the attention
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            outs.append(model(tokens()))
        record.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        held.append(sum(event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"))
    return (held[1] - held[0]) / 2


def test_pointwise_checkpointing_halves_what_a_layer_keeps(tmp_path: Path) -> None:
    a_number = 4 * 2 * S  # for each token
    vector, lse = E * a_number, 4 * a_number
    # The input, query, key, value, attention's output, the second residual, four of the inner part.
    assert kept_by_a_layer(tmp_path, "pointwise") == 10 * vector + lse
    # Besides, what four norms and the activation put out, and each norm's mean and deviation.
    assert kept_by_a_layer(tmp_path, checkpointing=False) == 21 * vector + lse + 4 * 2 * a_number


def test_pointwise_checkpointing_multiplies_no_matrices_again() -> None:
    def products(**fields: Any) -> int:
        model = language_model(**fields).train()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(model(tokens()).square().mean())
        return int(counter.get_total_flops())

    assert products(activation_checkpointing="pointwise") == products() < products(activation_checkpointing=True)


def test_pointwise_checkpointing_changes_no_weights_and_nothing_in_evaluation_mode() -> None:
    model, plain = language_model(activation_checkpointing="pointwise"), language_model()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert saved_bytes(model, tokens()) < saved_bytes(plain, tokens())
    assert saved_bytes(model.eval(), tokens()) == saved_bytes(plain.eval(), tokens())


def test_compiled_without_graph_breaks() -> None:
    for is_checkpointed, mask in ((False, padding(S, 9, length=S)), (True, None), ("pointwise", None)):
        model, seen = language_model(num_layers=1, activation_checkpointing=is_checkpointed), tokens()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, actual = model(seen, mask), compiled(seen, mask)
        leaves = list(model.parameters())
        pairs = zip([actual, *gradients(actual, *leaves)], [expected, *gradients(expected, *leaves)], strict=True)
        assert max(error(a, e) for a, e in pairs) < 1e-5


def test_one_compiled_graph_serves_every_length() -> None:
    torch.compiler.reset()
    model, count = language_model(num_layers=1), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (S, 9, 23):
        seen = tokens(length=length)
        assert torch.equal(compiled(seen), model(seen))
    assert count.frame_count == 1


def test_causal_models_do_not_see_the_future() -> None:
    model, seen = language_model(torch.float64), tokens(1)
    changed = seen.clone()
    changed[0, 13] = (changed[0, 13] + 1) % VOCAB
    difference = (model(seen) - model(changed)).abs().amax(-1)[0]
    assert difference[:13].max() == 0
    assert difference[13] > 0
    both = LongNetLM(model.config, is_causal=False, dtype=torch.float64)
    assert (both(seen) - both(changed)).abs().amax(-1)[0, :13].max() > 0


def test_decoders_read_a_memory() -> None:
    torch.manual_seed(0)
    decoder = LongNetDecoder(config(norm="sub"), has_memory=True, dtype=torch.float64)
    x, memory = data(2, S, E, dtype=torch.float64), data(2, 7, E, seed=1, dtype=torch.float64)
    mask = padding(7, 4, length=7)
    both = decoder(x, None, memory, mask)
    assert error(both[1:], decoder(x[1:], None, memory[1:, :4])) < 1e-12
    assert error(both[:1], decoder(x[:1], None, memory[:1])) < 1e-12
    assert error(both[:1], decoder(x[:1], None, memory[:1] + 1)) > 1e-3
    with pytest.raises(ConfigError, match="has_memory=True and called without a memory"):
        decoder(x)
    layer = LongNetDecoderLayer(config(), has_memory=True)
    assert layer(x.float(), memory_BME=memory.float()).shape == x.shape
    assert LongNetEncoderLayer(config())(x.float()).shape == x.shape


@pytest.mark.parametrize("norm", ["pre", "sub", "deep"])
def test_first_weights_keep_signals_in_bounds(norm: str) -> None:
    torch.manual_seed(0)
    model = LongNetEncoder(config(num_layers=12, norm=norm))
    x = data(2, S, E)
    out = model(x)
    assert 0.5 < float(out.detach().std()) < 2
    (grad,) = gradients(out, model.get_parameter("layers.0.ffn.up.weight"))
    assert 0 < float(grad.norm()) < 1e3
    scales = {layer.residual_scale for layer in model.layers}
    assert scales == ({24**0.25} if norm == "deep" else {1.0})


def test_it_learns() -> None:
    model, seen = language_model(tie_embeddings=True), tokens(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = cross_entropy(model(seen[:, :-1]).flatten(0, 1), seen[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert "output.weight" not in model.state_dict()


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [True, "pointwise"])
def test_sharded_with_fsdp(checkpointing: bool | str) -> None:
    plain, sharded, seen = language_model(), language_model(activation_checkpointing=checkpointing), tokens()
    mesh = init_device_mesh("cpu", (1,))
    for layer in (*sharded.stack.layers, sharded.output):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    grads = []
    for model in (plain, sharded):
        loss = cross_entropy(model(seen[:, :-1]).flatten(0, 1), seen[:, 1:].flatten())
        torch.autograd.backward(loss)
        grads.append([getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()])
    assert max(error(a, e) for a, e in zip(*grads, strict=True)) < 1e-5


@pytest.mark.usefixtures("one_process")
def test_distributed_tensors_are_told_of_their_local_part() -> None:
    attention = build_attention(num_heads=2, head_dim=8)
    x = torch.randn(1, 6, 2, 8)
    whole = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(2)])
    with pytest.raises(ConfigError, match=r"got DTensor; pass to_local\(\)"):
        attention(whole, whole, whole)
    local = whole.to_local()
    assert torch.equal(attention(local, local, local), attention(x, x, x))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"embed_dim": 30}, "multiple of num_heads"),
        ({"embed_dim": 12, "positions": "xpos"}, "xpos positions turn pairs of components"),
        ({"norm": "post"}, "norm must be one of pre, sub, deep"),
        ({"dropout": 1.0}, "from 0 to below 1"),
        ({"attention": {"pattern": DILATED}}, "field of LongNetConfig"),
        ({"attention": {"backnd": "sdpa"}}, "did you mean 'backend'"),
        ({"attention": {"backend": "spda"}}, "unknown backend 'spda' .did you mean 'sdpa'"),
        ({"pattern": {"kind": "dilatd"}}, "did you mean 'dilated'"),
        ({"xpos_base": 0.0}, "positive number"),
        ({"final_norm": "no"}, "final_norm must be True or False, got 'no'"),
        ({"tie_embeddings": 1}, "tie_embeddings must be True or False, got 1"),
        ({"attention": "sdpa"}, "attention must be a mapping of fields of AttentionConfig, got 'sdpa'"),
        ({"activation_checkpointing": "layer"}, "False, True or 'pointwise', got 'layer'"),
    ],
)
def test_bad_configurations_say_so(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**fields)


def test_bad_calls_say_so() -> None:
    for made in (LongNetLM, LongNetEncoder, LongNetDecoder):
        plain: Any = {"embed_dim": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 8}
        with pytest.raises(ConfigError, match=r"config must be a LongNetConfig, got a dict; .*from_dict"):
            made(plain)
    with pytest.raises(ConfigError, match=r"x must be \(batch, seq_len, 32\), got \(2, 24, 5\)"):
        LongNetEncoder(config())(data(2, S, 5))
    with pytest.raises(ConfigError, match="vocab_size"):
        LongNetLM(config())
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        LongNetConfig.from_dict({"num_layer": 3})


def test_a_learned_pattern_is_not_made_on_the_meta_device() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="make the module on the device that it is to run on"):
        language_model(pattern=Learned(block_size=8, blocks_per_row=2))


def test_a_learned_pattern_trains_under_autocast() -> None:
    model, seen = language_model(pattern=Learned(block_size=8, blocks_per_row=2)), tokens()
    expected = model(seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(seen)
    assert error(out.float(), expected) < 0.05
    leaves = list(model.parameters())
    for a, e in zip(gradients(out.float(), *leaves), gradients(expected, *leaves), strict=True):
        assert error(a, e) < 0.1


def test_the_output_projection_is_called() -> None:
    model, seen = language_model(), tokens()
    assert model.output is not None
    expected = 2 * model(seen)
    handle = model.output.register_forward_hook(lambda _, __, out: 2 * out)
    assert torch.equal(model(seen), expected)
    handle.remove()
    model.output = nn.Sequential(model.output, nn.Identity())  # type: ignore[assignment]
    assert torch.equal(2 * model(seen), expected)


def test_masks_and_tokens_of_other_types() -> None:
    model, mask = language_model(), padding(S, 9, length=S)
    expected = model(tokens(), mask)
    assert torch.equal(model(tokens().int(), torch.zeros(mask.shape).masked_fill(mask, -torch.inf)), expected)
    with pytest.raises(ConfigError, match="must be 0 or -inf everywhere"):
        model(tokens(), mask.float())
    with pytest.raises(ConfigError, match=r"tokens must be a tensor of int64 or int32, got torch\.float32"):
        model(tokens().float())
    with pytest.raises(ConfigError, match="tokens must be a tensor of int64 or int32, got list"):
        model([[1, 2]])
