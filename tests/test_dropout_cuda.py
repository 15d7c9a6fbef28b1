"""Dropout inside PyTorch's kernels for CUDA: exactly that, drawn by the caller's seed, and in no graph."""

from __future__ import annotations

import pytest
import torch

from dilated_attention import ConfigError, Dilated, Full, Local, Pattern, Random, Strided

from .dropout_kit import HEADS, KV_HEADS, TOKENS, build, check_draws

pytestmark = pytest.mark.gpu

LONGNET = Dilated(segment_lengths=(8, 16, 40), dilation_rates=(1, 2, 4))
PATTERNS: list[Pattern] = [
    Full(),
    LONGNET,
    LONGNET + Full(),
    Full() + Full(),
    Local(5),
    Local(5) + Local(9),
    LONGNET + Local(5),
    LONGNET | Random(2, 8, seed=3),
    Strided(3),
]
DROPPED = 77 / 256  # of 0.3


@pytest.mark.parametrize("seq_len", [None, TOKENS])  # for which cuDNN's kernel is taken where nothing is dropped
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_flash_attention_drops_exactly(pattern: Pattern, is_causal: bool, seq_len: int | None) -> None:
    fields = {"backend": "sdpa", "device": "cuda", "dtype": "bfloat16", "seq_len": seq_len}
    attention = build(pattern, is_causal=is_causal, dropout_p=0.3, **fields)
    assert "flash" in attention.plan.kernel
    check_draws(attention, pattern, DROPPED, of_weights=0.2, of_results=2e-2, batch=8)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_memory_efficient_kernel_drops_exactly(pattern: Pattern, is_causal: bool) -> None:
    fields = {"backend": "sdpa", "device": "cuda", "dtype": "float32"}
    attention = build(pattern, is_causal=is_causal, dropout_p=0.3, **fields)
    assert attention.plan.kernel == "efficient"
    check_draws(attention, pattern, 0.3, of_weights=1e-3, of_results=1e-4, batch=8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", [*PATTERNS[:-2], LONGNET | Random(2, 16, seed=3), Random(2, 16, seed=3)], ids=str)
def test_the_fused_kernels_drop_exactly(pattern: Pattern, is_causal: bool, dtype: str) -> None:
    fields = {"backend": "triton", "device": "cuda", "dtype": dtype}
    attention = build(pattern, is_causal=is_causal, dropout_p=0.3, **fields)
    of_weights, of_results = (0.2, 2e-2) if dtype == "bfloat16" else (1e-3, 1e-4)
    check_draws(attention, pattern, DROPPED, of_weights=of_weights, of_results=of_results, batch=8)


@pytest.mark.parametrize("dropout_p", [1e-5, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("pattern", [Full(), Random(density=0.25, block_size=128)], ids=str)
def test_the_fused_kernels_are_unbiased(pattern: Pattern, dropout_p: float) -> None:
    """As below, over all tiles of blocks and of branches."""
    attention = build(pattern, backend="triton", device="cuda", dtype="float32", dropout_p=dropout_p)
    length = 2048
    query, key = (torch.zeros(16, length, heads, TOKENS, device="cuda") for heads in (HEADS, KV_HEADS))
    out = attention(query, key, torch.ones_like(key)).double()
    keys = length if pattern == Full() else length / 4
    pairs = 16 * HEADS * length * keys
    dropped = min(max(round(dropout_p * 256), 1), 255) / 256
    assert abs(float(out.mean()) - 1) < 5 * (dropped / (1 - dropped) / pairs) ** 0.5
    if dropout_p > 0.05:
        spread = float(out[..., 0].var() * keys)
        assert abs(spread / (dropped / (1 - dropped)) - 1) < 0.1


@pytest.mark.parametrize("dropout_p", [1e-5, 0.1, 0.5, 0.999])
def test_flash_attention_is_unbiased_in_256ths(dropout_p: float) -> None:
    """Of equal scores each weighs 1 / T: out is as much of a value as keys are kept. Many values, which round apart."""
    attention = build(Full(), backend="sdpa", device="cuda", dtype="bfloat16", dropout_p=dropout_p, seq_len=None)
    length = 2048
    query, key = (torch.zeros(16, length, heads, TOKENS, device="cuda").bfloat16() for heads in (HEADS, KV_HEADS))
    ratio = 1 + torch.arange(TOKENS, device="cuda").bfloat16() / 64
    out = attention(query, key, ratio.expand_as(key)).double() / ratio.double()
    dropped = min(max(round(dropout_p * 256), 1), 255) / 256
    pairs = 16 * HEADS * length * length
    assert abs(float(out.mean()) - 1) < 5 * (dropped / (1 - dropped) / pairs) ** 0.5 + 2e-4
    if dropped > 0.05:  # rows that differ by more than bfloat16 rounds: in how many keys they keep
        spread = float(out.mean(-1).var() * length)
        assert abs(spread / (dropped / (1 - dropped)) - 1) < 0.1


def test_more_batch_rows_than_a_launch_takes_are_dropped() -> None:
    attention = build(Full(), backend="sdpa", device="cuda", dtype="float32", head_dim=8, dropout_p=0.5)
    value = torch.ones((1 << 16) + 3, 2, KV_HEADS, 8, device="cuda", requires_grad=True)
    query, key = (torch.zeros((1 << 16) + 3, 2, heads, 8, device="cuda") for heads in (HEADS, KV_HEADS))
    out = attention(query, key, value)
    assert set(out.unique().tolist()) == {0.0, 1.0, 2.0}
    (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
    assert torch.allclose(grad.sum((1, 2)), out.sum((1, 2)))  # which is linear in the values, all of them 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_numbers_of_the_caller_stay_as_they_are(dtype: str) -> None:
    attention = build(LONGNET, backend="sdpa", device="cuda", dtype=dtype, dropout_p=0.5)
    tensors = [
        torch.randn(1, TOKENS, heads, TOKENS, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    torch.cuda.manual_seed(3)
    undisturbed = torch.rand(5, device="cuda")
    torch.cuda.manual_seed(3)
    attention(*tensors).sum().backward()
    assert torch.equal(torch.rand(5, device="cuda"), undisturbed)


def test_it_is_captured_in_eval_alone() -> None:
    attention = build(Full(), backend="sdpa", device="cuda", dtype="bfloat16", dropout_p=0.5)
    tensors = [torch.randn(1, TOKENS, heads, TOKENS, device="cuda").bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors[0].clone()  # a graph of nothing would be warned of
        with pytest.raises(ConfigError, match=r"dropout_p=0\.5: every replay of a CUDA graph would drop the same"):
            attention(*tensors)
    attention.eval()
    attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*tensors)
    graph.replay()
    assert torch.equal(out, attention(*tensors))


@pytest.mark.parametrize("pattern", [LONGNET, LONGNET + Random(2, 16, seed=3)], ids=str)
def test_every_replay_of_a_graph_drops_anew(pattern: Pattern) -> None:
    """By the seed of the card's generator, in both passes the same."""
    attention = build(pattern, backend="triton", device="cuda", dtype="float32", dropout_p=0.5)
    query, key, value, dout = (
        torch.randn(2, TOKENS, heads, TOKENS, device="cuda") for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    value.requires_grad_()
    torch.autograd.grad(attention(query, key, value), value, dout)  # compiles
    attention.prepare(TOKENS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(query, key, value)
        (dv,) = torch.autograd.grad(out, value, dout)
    found = []
    for seed in (3, 3, 4):
        torch.cuda.manual_seed(seed)
        for _ in range(2):
            graph.replay()
            sums = [float((a * b).sum().detach()) for a, b in ((dout, out), (dv, value))]
            assert abs(sums[0] / sums[1] - 1) < 1e-4  # linear in the values
            found.append(out.detach().clone())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not any(torch.equal(found[0], found[i]) for i in (1, 4, 5))
    mean = torch.zeros_like(out)
    for _ in range(400):
        graph.replay()
        mean += out.detach() / 400
    attention.eval()
    exact = attention(query, key, value).detach()
    assert float((mean - exact).norm() / exact.norm()) < 0.1


def test_a_graph_of_documents_is_not_captured_with_dropout() -> None:
    attention = build(LONGNET, backend="triton", device="cuda", dtype="float32", dropout_p=0.5, varlen=True)
    tensors = [torch.randn(1, TOKENS, heads, TOKENS, device="cuda") for heads in (HEADS, KV_HEADS, KV_HEADS)]
    ends = torch.tensor([0, 17, TOKENS])
    attention(*tensors, cu_seqlens=ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors[0].clone()  # a graph of nothing would be warned of
        with pytest.raises(ConfigError, match=r"every replay .* would drop the same"):
            attention(*tensors, cu_seqlens=ends)
