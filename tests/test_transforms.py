"""torch.func over attentions: gradients and vmap against plain calls, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from dilated_attention import Attention, ConfigError, Dilated, Learned, Local, Pattern, build_attention
from dilated_attention.core import reference

LONGNET = Dilated(segment_lengths=(8, 16), dilation_rates=(1, 2))
MASK = torch.arange(20) < torch.tensor([[0], [3]])


def build(pattern: Pattern = LONGNET, **fields: Any) -> Attention:
    return build_attention(
        pattern=pattern, num_heads=4, num_kv_heads=2, head_dim=8, is_causal=True, dtype="float64", **fields
    )


def tensors(*lead: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*lead, 20, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def loss(attention: Attention, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
    out, lse = attention(query, key, value, return_lse=True, **call)
    total: Tensor = out.sin().sum() + torch.where(lse.isinf(), 0.0, lse).cos().sum()
    return total


def plain_gradients(attention: Attention, inputs: list[Tensor], **call: Any) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(attention, *leaves, **call), leaves)


@pytest.mark.parametrize("call", [{}, {"key_padding_mask": MASK}, {"q_offset": 3}], ids=["plain", "padded", "offset"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(call: dict[str, Any], checkpointing: bool) -> None:
    attention, inputs = build(LONGNET | Local(3), activation_checkpointing=checkpointing), tensors(2)
    expected = plain_gradients(attention, inputs, **call)
    found = grad(lambda *x: loss(attention, *x, **call), argnums=(0, 1, 2))(*inputs)
    pull: Any = vjp(lambda *x: loss(attention, *x, **call), *inputs)[1]
    for a, b, e in zip(found, pull(torch.ones((), dtype=torch.float64)), expected, strict=True):
        assert torch.equal(a, e)
        assert torch.equal(b, e)


def test_packed_documents_have_gradients() -> None:
    attention, inputs = build(), tensors(1)
    call = {"cu_seqlens": torch.tensor([0, 7, 20])}
    found = grad(lambda *x: loss(attention, *x, **call), argnums=(0, 1, 2))(*inputs)
    for a, e in zip(found, plain_gradients(attention, inputs, **call), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("pattern", [LONGNET, Local(3), Learned(block_size=4, blocks_per_row=2)], ids=repr)
def test_mapped_calls_are_those_of_a_loop(pattern: Pattern) -> None:
    """But for the last bit: PyTorch's kernel may divide a larger batch otherwise."""
    attention, (query, key, value) = build(pattern), tensors(3, 2)
    mapped = vmap(attention, in_dims=(0, 0, None))(query, key, value[0])
    expected = torch.stack([attention(query[i], key[i], value[0]) for i in range(3)])
    torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-14)
    none = vmap(attention, in_dims=(0, 0, None))(query[:0], key[:0], value[0])
    assert none.shape == (0, *query.shape[1:])
    last = vmap(attention, in_dims=4, out_dims=1)(*(x.movedim(0, 4) for x in (query, key, value)))
    torch.testing.assert_close(last[:, 2], attention(query[2], key[2], value[2]), rtol=1e-12, atol=1e-14)


def test_mapped_masks() -> None:
    attention, (query, key, value) = build(), tensors(3, 2)
    masks = torch.stack([MASK, ~MASK, MASK.flip(0)])
    masks[1, 0] = False  # a row of padding alone is one, too; this one has none
    call = vmap(lambda q, k, v, mask: attention(q, k, v, key_padding_mask=mask))
    expected = [attention(query[i], key[i], value[i], key_padding_mask=masks[i]) for i in range(3)]
    assert torch.equal(call(query, key, value, masks), torch.stack(expected))


def test_a_gradient_for_each_sample() -> None:
    attention, inputs = build(), tensors(3, 1)
    found = vmap(grad(lambda *x: loss(attention, *x), argnums=(0, 1, 2)))(*inputs)
    for i in range(3):
        expected = plain_gradients(attention, [x[i] for x in inputs])
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a[i], e)


def test_a_jacobian() -> None:
    attention, (query, key, value) = build(), tensors(1)
    jacobian = jacrev(lambda k: attention(query, k, value)[0, 5].sum(-1))(key)  # (heads, 1, seq, kv_heads, head_dim)
    for head in range(4):
        leaf = key.clone().requires_grad_()
        (expected,) = torch.autograd.grad(attention(query, leaf, value)[0, 5, head].sum(), leaf)
        torch.testing.assert_close(jacobian[head], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pattern", [LONGNET, Learned(block_size=4, blocks_per_row=2)], ids=repr)
def test_compiled_transforms_are_whole_graphs(pattern: Pattern) -> None:
    attention, inputs = build(pattern), tensors(3, 1)

    def transforms(*inputs: Tensor) -> list[Tensor]:
        gradient = grad(lambda *x: loss(attention, *x), argnums=(0, 1, 2))
        return [vmap(attention)(*inputs), *gradient(*(x[0] for x in inputs)), *vmap(gradient)(*inputs)]

    compiled = torch.compile(transforms, backend="aot_eager", fullgraph=True)
    for a, e in zip(compiled(*inputs), transforms(*inputs), strict=True):
        assert torch.equal(a, e)


def test_compiled_gradients_of_padded_calls() -> None:
    attention, inputs = build(), tensors(2)
    gradient = grad(lambda *x: loss(attention, *x, key_padding_mask=MASK), argnums=(0, 1, 2))
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    for a, e in zip(compiled(*inputs), gradient(*inputs), strict=True):
        assert torch.equal(a, e)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch 2.15's own, where forward mode is first used
def test_what_cannot_be_transformed_is_refused() -> None:
    attention, (query, key, value) = build(), tensors(2)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda x: grad(lambda y: loss(attention, y, key, value))(x).sum())(query)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(lambda x: attention(x, key, value), (query,), (query,))
    reference = build(backend="reference")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(key, key)  # type: ignore[no-untyped-call]
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            reference(query, dual, value)
    one = [x[:1].expand(3, *x[:1].shape) for x in (query, key, value)]
    with pytest.raises(ConfigError, match=r"cu_seqlens cannot be mapped by torch\.vmap"):
        vmap(lambda *x: attention(*x, cu_seqlens=torch.tensor([0, 20])))(*one)
    dropping = build(dropout_p=0.5, backend="reference")
    with pytest.raises(ConfigError, match=r"dropout cannot be mapped by torch\.vmap; call eval"):
        vmap(dropping, randomness="same")(*one)
    with pytest.raises(ConfigError, match=r"dropout cannot be mapped by torch\.vmap"):
        vmap(grad(lambda *x: dropping(*x).sum()))(*one)
    assert torch.equal(vmap(dropping.eval())(*one)[2], dropping(*(x[2] for x in one)))
    with pytest.raises(ConfigError, match=r"torch\.func cannot trace"):
        grad(lambda x: build(Learned(2, 4))(x, key, value, key_padding_mask=MASK).sum())(query)


CALLS: list[dict[str, Any]] = [{}, {"key_padding_mask": MASK}]
ALL = [LONGNET, LONGNET | Local(3), Learned(block_size=4, blocks_per_row=2)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's loop over operators without a rule
@pytest.mark.parametrize("call", CALLS, ids=["plain", "padded"])
@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_batched_gradients(pattern: Pattern, call: dict[str, Any]) -> None:
    attention, leaves = build(pattern), [x.requires_grad_() for x in tensors(2)]
    results = attention(*leaves, return_lse=True, **call)
    weights = [torch.randn(3, *x.shape, dtype=torch.float64) for x in results]
    for batched in (weights, weights[:1]):
        outputs = results[: len(batched)]
        found = torch.autograd.grad(outputs, leaves, batched, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            expected = torch.autograd.grad(outputs, leaves, [w[i] for w in batched], retain_graph=True)
            for a, e in zip(found, expected, strict=True):
                assert torch.equal(a[i], e)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_vectorized_jacobian() -> None:
    attention, (query, key, value) = build(LONGNET | Local(3)), tensors(1)

    def sums(key: Tensor) -> Tensor:
        total: Tensor = attention(query, key, value)[0, :4].sum((-2, -1))
        return total

    jacobian: Any = torch.autograd.functional.jacobian
    assert torch.equal(jacobian(sums, key, vectorize=True), jacobian(sums, key))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("call", CALLS, ids=["plain", "padded"])
@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_second_derivatives_are_refused(pattern: Pattern, call: dict[str, Any]) -> None:
    attention, (query, key, value) = build(pattern), tensors(2)

    def of(query: Tensor) -> Tensor:
        return loss(attention, query, key, value, **call)

    leaf = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*reference\.attention"):
        torch.autograd.grad(gradient.sum(), leaf)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.functional.hessian(of, query)  # type: ignore[no-untyped-call]
    if call and isinstance(pattern, Learned):
        return  # torch.func is refused altogether
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*hessian"):
        hessian(of)(query)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        jacrev(jacrev(of))(query)


def test_the_oracle_has_second_derivatives() -> None:
    query, key, value = tensors(1)
    query = query[:, :6, :1, :2].requires_grad_()

    def of(query: Tensor) -> Tensor:
        out, lse = reference.attention(query, key[:, :6, :1, :2], value[:, :6, :1], pattern=Local(2), is_causal=True)
        return out.sin().sum() + lse.cos().sum()

    assert torch.autograd.gradgradcheck(of, query)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which torch itself reads
@pytest.mark.parametrize("call", CALLS, ids=["plain", "padded"])
@pytest.mark.parametrize("pattern", ALL[1:], ids=repr)  # the union has the branches of the first, in the same operator
def test_compiled_autograd(pattern: Pattern, call: dict[str, Any]) -> None:
    attention, inputs = build(pattern), tensors(2)
    expected = plain_gradients(attention, inputs, **call)
    leaves, graphs = [x.requires_grad_() for x in inputs], []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    total = loss(attention, *leaves, **call)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        torch.autograd.backward(total)
    for leaf, e in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, e)
    assert len(graphs) == 1
