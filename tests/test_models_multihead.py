"""`MultiheadAttention` against `torch.nn.MultiheadAttention`, against the oracle, and inside torch's own layers."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dilated_attention import ConfigError, Dilated, Full, NoBackendError, reference
from dilated_attention.models import MultiheadAttention

from .model_kit import data, gradients, padding
from .support import error

E, H, S, B = 32, 4, 24, 3
DILATED = Dilated(segment_lengths=(8, 16), dilation_rates=(1, 2))


def pair(**fields: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with equal weights, biases that are not zero included."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **fields)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(E, H, **fields)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_close(actual: list[Tensor], expected: list[Tensor], limit: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    assert max(error(a, e) for a, e in zip(actual, expected, strict=True)) < limit


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_full_is_torchs(batch_first: bool, is_causal: bool) -> None:
    ours, theirs = pair(batch_first=batch_first)
    x = data(B, S, E).requires_grad_() if batch_first else data(S, B, E).requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(S) if is_causal else None
    expected, _ = theirs(x, x, x, need_weights=False, attn_mask=mask, is_causal=is_causal)
    actual, weights = ours(x, x, x, attn_mask=mask, is_causal=is_causal)
    assert weights is None
    named = dict(ours.named_parameters())
    ordered = [named[name] for name, _ in theirs.named_parameters()]
    assert_close([actual, *gradients(actual, x, *ordered)], [expected, *gradients(expected, x, *theirs.parameters())])


def test_state_dicts_are_exchanged() -> None:
    for fields in ({}, {"bias": False}, {"kdim": 12, "vdim": 20}):
        ours, theirs = pair(**fields)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.manual_seed(5)
    first = MultiheadAttention(E, H)
    torch.manual_seed(5)
    second = nn.MultiheadAttention(E, H)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_padding_on_either_side_is_torchs() -> None:
    ours, theirs = pair(batch_first=True)
    x = data(B, S, E).requires_grad_()
    for mask in (padding(S, 9, 17, length=S), padding(S, 9, 17, length=S, left=True)):
        for given in (mask, torch.zeros(mask.shape).masked_fill(mask, -torch.inf)):
            expected, _ = theirs(x, x, x, key_padding_mask=mask, need_weights=False)
            actual, _ = ours(x, x, x, given)
            assert_close(
                [actual[~mask], *gradients(actual[~mask], x)], [expected[~mask], *gradients(expected[~mask], x)]
            )


def test_weights_may_be_parametrized() -> None:
    """As pruning and weight norms do, which take a parameter's name and change the order of the others."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, vdim=20, batch_first=True)
    ours = MultiheadAttention(E, H, vdim=20, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        prune.l1_unstructured(module, "q_proj_weight", 0.5)  # type: ignore[no-untyped-call]
        parametrizations.weight_norm(module, "k_proj_weight")
    query, key, value = data(B, S, E), data(B, S, E, seed=1), data(B, S, 20, seed=2)
    assert error(ours(query, key, value)[0], theirs(query, key, value, need_weights=False)[0]) < 1e-5


def test_cross_attention_is_torchs() -> None:
    ours, theirs = pair(batch_first=True, kdim=12, vdim=20)
    query, key, value = data(B, S, E), data(B, 10, 12, seed=1), data(B, 10, 20, seed=2)
    for mask in (None, padding(10, 1, 7, length=10)):
        expected, _ = theirs(query, key, value, key_padding_mask=mask, need_weights=False)
        assert_close([ours(query, key, value, mask)[0]], [expected])
    single, _ = ours(query[0], key[0], value[0])
    assert_close([single], [theirs(query[0], key[0], value[0])[0]])
    # Of equal lengths too, where the mask speaks of the keys and not of the queries.
    ours, theirs = pair(batch_first=True)
    key = data(B, S, E, seed=3)
    mask = padding(S, 2, 7, length=S)
    assert_close(
        [ours(query, key, key, mask)[0]], [theirs(query, key, key, key_padding_mask=mask, need_weights=False)[0]]
    )


def test_two_sequences_of_equal_lengths_are_two_sequences() -> None:
    """As torch's decoder layers call: one tensor for key and value, another for the queries."""
    x, memory = data(B, S, E), data(B, S, E, seed=1)
    for fields in ({"pattern": DILATED}, {"is_causal": True}, {"positions": "rotary"}):
        ours = MultiheadAttention(E, H, batch_first=True, **fields)
        for query, other in ((x, memory), (x[0], memory[0])):
            with pytest.raises(ConfigError, match=r"key and value are one tensor and query another.* is Full\(\) only"):
                ours(query, other, other)
    full = MultiheadAttention(E, H, batch_first=True)
    assert full(x, memory, memory)[0].shape == x.shape
    with pytest.raises(ConfigError, match="is_causal=True"):
        full(x, memory, memory, is_causal=True)


def test_tokens_with_and_without_positions_are_one_sequence() -> None:
    """As in DETR: positions are added to queries and keys, and not to values."""
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, batch_first=True, pattern=DILATED)
    x, places = data(B, S, E), data(B, S, E, seed=1)
    placed = x + places
    expected, _ = ours(placed, placed, x)
    assert error(ours(x + places, x + places, x)[0], expected) < 1e-6
    assert error(ours(placed, placed, placed)[0], expected) > 1e-3


def test_a_pattern_is_the_oracles() -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, batch_first=True, pattern=DILATED, num_kv_heads=2, dtype=torch.float64)
    x = data(B, S, E, dtype=torch.float64)
    assert ours.in_proj_weight is not None
    parts = nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).split_with_sizes([E, E // 2, E // 2], -1)
    q, k, v = (torch.unflatten(part, -1, (-1, E // H)) for part in parts)
    out, _ = reference.attention(q, k, v, pattern=DILATED, is_causal=True)
    assert_close([ours(x, x, x, is_causal=True)[0]], [ours.out_proj(out.flatten(2))], 1e-12)


@pytest.mark.parametrize("positions", ["none", "rotary", "xpos"])
@pytest.mark.parametrize("left", [False, True])
def test_ragged_rows_are_each_sequence_alone(positions: str, left: bool) -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(
        E, H, batch_first=True, pattern=DILATED, positions=positions, sub_norm=True, gain=1.2, dtype=torch.float64
    )
    x, lengths = data(B, S, E, dtype=torch.float64).requires_grad_(), (S, 9, 17)
    mask = padding(*lengths, length=S, left=left)
    batched, _ = ours(x, x, x, mask, is_causal=True)
    alone = []
    for row, length in enumerate(lengths):
        mine = x[row : row + 1, S - length :] if left else x[row : row + 1, :length]
        alone.append(ours(mine, mine, mine, is_causal=True)[0].squeeze(0))
    actual, expected = batched[~mask], torch.cat(alone)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    assert_close([actual, *gradients(actual, x, *parameters)], [expected, *gradients(expected, x, *parameters)], 1e-11)


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
def test_positions_count_distance_alone(positions: str) -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, batch_first=True, positions=positions, dtype=torch.float64)
    x = data(1, S, E, dtype=torch.float64)
    q, k = data(2, 1, S, H, E // H, dtype=torch.float64)
    from dilated_attention.models.positions import make_rotation, rotate

    scores = []
    for first in (0, 1000):
        rotation = make_rotation(positions, torch.arange(first, first + S), E // H, dtype=q.dtype, centre=first)
        turned = rotate(q, k, rotation)
        scores.append(torch.einsum("bshd,bthd->bhst", *turned))
    assert error(scores[1], scores[0]) < 1e-11
    plain = torch.einsum("bshd,bthd->bhst", q, k)
    assert error(scores[0].diagonal(dim1=2, dim2=3), plain.diagonal(dim1=2, dim2=3)) < 1e-12
    assert error(scores[0], plain) > 0.1
    permuted = ours(x.flip(1), x.flip(1), x.flip(1))[0].flip(1)
    assert error(permuted, ours(x, x, x)[0]) > 1e-3


def test_torchs_layers_take_it() -> None:
    """The swap of README: ten lines in an ordinary transformer, in training and in evaluation mode."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    x, mask = data(B, S, E), padding(S, 9, 17, length=S)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    with torch.no_grad():
        expected = model.train()(x, src_key_padding_mask=mask)[~mask]
        expected_causal = model(x, mask=causal, is_causal=True)
    for layer in model.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        replacement = MultiheadAttention(E, H, batch_first=True)
        replacement.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = replacement  # type: ignore[assignment]
    for is_training in (True, False):
        with torch.no_grad():
            model.train(is_training)
            assert error(model(x, src_key_padding_mask=mask)[~mask], expected) < 1e-5
            assert error(model(x, mask=causal, is_causal=True), expected_causal) < 1e-5
    # The pattern holds in evaluation mode too: torch's own dense path does not step in.
    layer.self_attn = MultiheadAttention(E, H, batch_first=True, pattern=DILATED)
    with torch.no_grad():
        assert error(model.eval()(x), model.train()(x)) < 1e-6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"embed_dim": 30}, "multiple of num_heads, got 30 and 4"),
        ({"add_bias_kv": True}, "add_bias_kv must be False"),
        ({"head_dim": 8}, "'head_dim'; it follows from embed_dim"),
        ({"patern": Full()}, "did you mean 'pattern'"),
        ({"positions": "rotery"}, "did you mean 'rotary'"),
        ({"positions": "rope"}, "must be one of none, rotary, xpos; got 'rope'$"),
        ({"positions": "rotary", "embed_dim": 3 * H}, 'need an even head_dim, got 3; .* or positions="none"'),
        ({"backend": "nosuch"}, "unknown backend 'nosuch'; registered are .*sdpa"),
        ({"backend": "spda"}, r"unknown backend 'spda' \(did you mean 'sdpa'\?\)"),
        ({"backend_options": {"spda": {}}}, "backend_options: unknown backend 'spda'"),
        ({"kdim": 0}, "kdim must be at least 1, got 0"),
        ({"vdim": 20.5}, "vdim must be an integer, got 20.5"),
        ({"gain": float("nan")}, "gain must be a positive number, got nan"),
        ({"rotary_base": "10000"}, "rotary_base must be a positive number, got '10000'"),
        ({"compatibility": "torchscale"}, "torchscale_zero_padding"),
        (
            {"compatibility": "torchscale_zero_padding", "pattern": {"kind": "local", "window_size": 3}},
            "dilated patterns",
        ),
    ],
)
def test_what_cannot_be_built_says_so(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H, **fields})


def test_what_cannot_be_called_says_so() -> None:
    ours = MultiheadAttention(E, H, batch_first=True, pattern=DILATED)
    x, mask = data(B, S, E), padding(S, 9, 17, length=S)
    ragged = torch.nested.nested_tensor([x[0], x[1, :9]], layout=torch.jagged)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("need_weights must be False", (x, x, x), {"need_weights": True}),
        ("attn_mask is taken only beside is_causal", (x, x, x), {"attn_mask": torch.zeros(S, S)}),
        (r"\(batch, kv_len\) \(3, 24\), got \(3, 23\)", (x, x, x, mask[:, 1:]), {}),
        ("0 or -inf everywhere", (x, x, x, torch.full(mask.shape, 0.5)), {}),
        ("must be bool", (x, x, x, mask.long()), {}),
        ("key_padding_mask must be a tensor, got list", (x, x, x, mask.tolist()), {}),
        ("query has 24 tokens and key 20", (x, x[:, :20], x[:, :20]), {}),
        ("last of 32; got", (x, x, x[..., :5]), {}),
        ("query, key and value must be tensors, got Tensor, list, NoneType", (x, [x], None), {}),
        ("make the encoder with enable_nested_tensor=False", (ragged, ragged, ragged), {}),
    ]
    for words, arguments, fields in calls:
        with pytest.raises(ConfigError, match=words):
            ours(*arguments, **fields)
    with pytest.raises(NoBackendError, match="dropout"):
        MultiheadAttention(E, H, dropout=0.1, backend="fa3")(x, x, x)
    far = MultiheadAttention(E, H, batch_first=True, positions="xpos", dtype=torch.float16)
    with pytest.raises(ConfigError, match="xPos scales the keys"):
        far.rotation(torch.empty(1, 10_000, 0, dtype=torch.float16))
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ConfigError, match=r"more than torch.float16 bears"):
        far.float().rotation(torch.empty(1, 10_000, 0))
    assert far.double().rotation(torch.empty(1, 10_000, 0, dtype=torch.float64)).key_cos.dtype == torch.float64


def test_other_dtypes_and_autocast() -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, batch_first=True, pattern=DILATED)
    x = data(B, S, E)
    expected, _ = ours(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(ours(x, x, x)[0], expected) < 0.03
        # As torch's attention: the heads may be wider, as rotary positions make them, and float64 stays.
        heads = torch.unflatten(data(3, B, S, E), -1, (H, -1))
        for given, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float64,) * 2):
            q, k, v = heads.to(given)
            dense = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            assert ours.attention(q, k, v).dtype == dense.dtype == dtype
    half = ours.to(torch.bfloat16)
    assert error(half(*[x.bfloat16()] * 3)[0], expected) < 0.03
    back = half.double()
    assert back(*[x.double()] * 3)[0].dtype == torch.float64
    assert "sdpa" in repr(back.attention)


@pytest.mark.parametrize("fields", [{"pattern": DILATED, "positions": "rotary"}, {"is_self": True}], ids=str)
def test_compiled_without_graph_breaks(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, batch_first=True, **fields)
    x = data(B, S, E).requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mask = padding(S, 9, 17, length=S)
    for given, is_causal in ((None, True), (mask, True), (mask, False)):
        expected, actual = (run(x, x, x, given, is_causal=is_causal)[0] for run in (ours, compiled))
        assert_close([actual, *gradients(actual, x)], [expected, *gradients(expected, x)])


def test_dropout_may_be_set_as_torchs_is() -> None:
    module, x = MultiheadAttention(E, H, dropout=0.5, batch_first=True), data(B, S, E)
    still = MultiheadAttention(E, H, batch_first=True)
    still.load_state_dict(module.state_dict())
    assert module.dropout == 0.5
    assert not torch.equal(module(x, x, x)[0], still(x, x, x)[0])
    module.dropout = 0.0
    assert torch.equal(module(x, x, x)[0], still(x, x, x, average_attn_weights=False)[0])
    still.dropout = 0.5
    assert not torch.equal(module(x, x, x)[0], still(x, x, x)[0])
    with pytest.raises(ConfigError, match="dropout_p"):
        module.dropout = 1.5
    assert module.dropout == 0.0


def test_dropout_is_for_training_only() -> None:
    module, x = MultiheadAttention(E, H, dropout=0.5, batch_first=True), data(B, S, E)
    assert error(module(x, x, x)[0], module(x, x, x)[0]) > 1e-2
    module.eval()
    plain = MultiheadAttention(E, H, batch_first=True)
    plain.load_state_dict(module.state_dict())
    assert error(module(x, x, x)[0], plain(x, x, x)[0]) < 1e-6


def test_layers_compiled_one_by_one_share_a_graph() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    layers = [MultiheadAttention(E, H, pattern=DILATED) for _ in range(10)]
    x = data(S, B, E)
    for layer in layers:
        layer.compile(backend="eager", fullgraph=True)
        layer(x, x, x)
    assert counters["stats"]["unique_graphs"] == 1


def test_copies_build_for_themselves() -> None:
    module = MultiheadAttention(E, H, pattern=DILATED)
    x = data(S, B, E)
    expected, copy = module(x, x, x)[0], deepcopy(module)
    assert error(copy.double()(*[x.double()] * 3)[0], expected.double()) < 1e-5
    again = pickle.loads(pickle.dumps(module))
    del module, copy
    assert torch.equal(again(x, x, x)[0], expected)
