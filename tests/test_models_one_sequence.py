"""Whether queries and keys of `MultiheadAttention` are one sequence: nothing that a copy of a tensor changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dilated_attention import ConfigError, Full
from dilated_attention.models import LongNetEncoder, MultiheadAttention

from .model_kit import data, gradients, padding
from .support import error
from .test_models_longnet import config
from .test_models_multihead import DILATED, B, E, H, S, assert_close, pair


def copies(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What FSDP, hooks and reentrant checkpoints do."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in given)


FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"is_self": True},
    {"is_causal": True},
    {"pattern": DILATED},
    {"positions": "rotary"},
    {"num_kv_heads": 2, "vdim": 20},
)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("is_padded", [False, True])
def test_copies_of_the_tokens_are_the_tokens(is_padded: bool, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **fields)
    x = data(B, S, E, dtype=torch.float64).requires_grad_()
    value = x[..., :20] if "vdim" in fields else x
    mask = padding(S, 9, 17, length=S) if is_padded else None
    leaves = [x, *ours.parameters()]
    out = ours(x, x, value, mask)[0]
    expected = [out, *gradients(out, *leaves)]
    out = checkpoint(ours, x, x, value, mask, use_reentrant=True)[0]
    out.backward(data(*out.shape, seed=9, dtype=out.dtype))
    found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    assert_close([out, *found], expected, 1e-11)
    ours.register_forward_pre_hook(copies)
    out = ours(x, x, x[..., :20] if "vdim" in fields else x, mask)[0]
    assert_close([out, *gradients(out, *leaves)], expected, 1e-11)


@pytest.mark.parametrize("norm", ["sub", "pre", "deep"])
@pytest.mark.parametrize("pattern", [Full(), DILATED], ids=str)
def test_layers_whose_attention_is_handed_copies(pattern: Any, norm: str) -> None:
    torch.manual_seed(0)
    checkpointing = {"pattern": pattern, "norm": norm, "activation_checkpointing": "pointwise"}
    model: Any = LongNetEncoder(config(**checkpointing), dtype=torch.float64)
    x, mask = data(B, S, E, dtype=torch.float64).requires_grad_(), padding(S, 9, 17, length=S)
    leaves = [x, *model.parameters()]

    def run() -> list[Tensor]:
        out = model(x, mask)
        return [out, *gradients(out, *leaves)]

    expected = run()
    for hook in (lambda _, given: (given[0].clone(), *given[1:]), copies):  # of the query alone, then of each
        for layer in model.layers:
            layer.self_attn.register_forward_pre_hook(hook)
        assert_close(run(), expected, 1e-11)


def test_padding_under_full_is_torchs_whether_or_not_it_is_one_sequence() -> None:
    ours, theirs = pair(batch_first=True)
    x, mask = data(B, S, E), padding(S, 9, 9, length=S)
    expected, _ = theirs(x, x, x, key_padding_mask=mask, need_weights=False)
    assert_close([ours(x, x, x, mask)[0], ours(x, x.clone(), x.clone(), mask)[0]], [expected] * 2)
    ours.is_self = True
    own = ours(x, x.clone(), x.clone(), mask)[0]
    assert_close([own[~mask]], [expected[~mask]])
    assert error(own[mask], ours.out_proj(torch.zeros(E)).expand_as(own[mask])) < 1e-6
    assert ours(x[0:0], x[0:0], x[0:0], mask[0:0])[0].shape == (0, S, E)
    with pytest.raises(ConfigError, match=r"query has 24 tokens and key 20.*is_self=True"):
        ours(x, x[:, :20], x[:, :20])


@pytest.mark.parametrize("left", [False, True])
def test_keys_of_rows_of_equal_and_of_no_length(left: bool) -> None:
    ours, theirs = pair(batch_first=True)
    query, memory = data(6, S, E), data(6, 10, E, seed=1).requires_grad_()
    mask = padding(4, 10, 4, 0, 10, 1, length=10, left=left)
    mask[0] = mask[0].roll(3)  # keys need be no run
    some = [0, 1, 2, 4, 5]
    expected, _ = theirs(query[some], memory[some], memory[some], key_padding_mask=mask[some], need_weights=False)
    out = ours(query, memory, memory, mask)[0]
    assert_close([out[some], *gradients(out[some], memory)], [expected, *gradients(expected, memory)])
    assert error(out[3], ours.out_proj(torch.zeros(E)).expand_as(out[3])) < 1e-6  # torch's are NaN
