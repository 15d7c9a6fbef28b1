"""The same promises on a CUDA device: every kernel of `sdpa`, half precision, mixed-precision training, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dilated_attention import ConfigError, Dilated, Full, Global, Local, NoBackendError, Strided, build_attention
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.pattern import Pattern
from dilated_attention.core.tracing import span

from .support import NAMES, error, inputs, oracle, ours
from .test_attention import Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LONGNET = Dilated(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
PATTERNS: list[Pattern] = [
    Full(),
    LONGNET,
    Dilated(segment_lengths=(100, 230, 500), dilation_rates=(3, 5, 7)),
    Local(window_size=70) | Global(tokens=3),
    Strided(stride=3) + Local(window_size=9),
    Dilated(
        segment_lengths=(600, 47), dilation_rates=(1, 1)
    ),  # of 517 tokens the first call covers all, one tiles them
]


def compare(pattern: Pattern, geometry: Geometry, dtype: torch.dtype, kernel: str, head_dim: int) -> None:
    attention = build_attention(
        pattern=pattern,
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=head_dim,
        is_causal=geometry.is_causal,
        dtype=dtype,
        device="cuda",
        backend="sdpa",
        backend_options={"sdpa": {"kernel": kernel}},
    )
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(geometry, batch=2, head_dim=head_dim, dtype=dtype)]
    bounds = [1e-5] * 5 if dtype == torch.float32 else dense_error(tensors, geometry)
    for through_lse in (False, True):
        actual = ours(attention, tensors, geometry, through_lse=through_lse)
        expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
        for name, a, e, bound in zip(NAMES, actual, expected, bounds, strict=True):
            assert error(a, e) <= bound, (name, error(a, e), bound, through_lse)


def dense_error(tensors: list[Tensor], geometry: Geometry) -> list[float]:
    """Twice the error of dense `scaled_dot_product_attention` in the same dtype; for lse that of float32."""
    swapped = [x.transpose(1, 2) for x in tensors]
    out = torch.nn.functional.scaled_dot_product_attention(
        swapped[0], swapped[1], swapped[2], is_causal=geometry.is_causal, enable_gqa=True
    ).transpose(1, 2)
    exact = oracle(Full(), tensors, geometry, through_lse=False)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to("cuda", out.dtype)
    grads = torch.autograd.grad(out, tensors, dout)
    return [2 * error(out, exact[0]), 1e-5, *(2 * error(a, e) for a, e in zip(grads, exact[2:], strict=True))]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("cudnn", torch.bfloat16),
        ("cudnn", torch.float16),
        ("flash", torch.bfloat16),
        ("flash", torch.float16),
        ("efficient", torch.bfloat16),
        ("efficient", torch.float16),
        ("efficient", torch.float32),
    ],
)
def test_every_kernel_agrees_with_the_oracle(
    pattern: Pattern, kernel: str, dtype: torch.dtype, is_causal: bool
) -> None:
    for heads, kv_heads, head_dim, length in ((4, 4, 64, 517), (4, 2, 48, 389), (5, 5, 24, 131)):
        geometry = Geometry(q_len=length, kv_len=length, num_heads=heads, num_kv_heads=kv_heads, is_causal=is_causal)
        compare(pattern, geometry, dtype, kernel, head_dim)


@pytest.mark.parametrize("pattern", [Full(), LONGNET], ids=str)
def test_lengths_that_were_and_were_not_built_for(pattern: Pattern) -> None:
    """Of cuDNN's kernel, the first; of FlashAttention-2 the others, which take no time to plan."""
    attention = build_attention(
        pattern=pattern, num_heads=4, head_dim=64, is_causal=True, dtype="bfloat16", device="cuda", backend="sdpa",
        seq_len=512,
    )  # fmt: skip
    assert attention.plan.kernel == "cudnn"
    for length in (512, 300, 64):
        geometry = Geometry.self_attention(length, 4, is_causal=True)
        drawn = inputs(geometry, batch=2, head_dim=64, dtype=torch.bfloat16)
        tensors = [x.detach().cuda().requires_grad_() for x in drawn]
        actual = ours(attention, tensors, geometry, through_lse=True)
        for name, a, e in zip(NAMES, actual, oracle(pattern, tensors, geometry, through_lse=True), strict=True):
            assert error(a, e) < 1e-2, (length, name)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_offsets_and_unequal_lengths(kernel: str) -> None:
    for q_len, kv_len, is_causal in ((1, 300, True), (77, 300, True), (300, 77, False), (77, 300, False)):
        geometry = Geometry(q_len=q_len, kv_len=kv_len, num_heads=4, num_kv_heads=4, is_causal=is_causal)
        attention = build_attention(
            pattern=LONGNET,
            num_heads=4,
            head_dim=64,
            is_causal=is_causal,
            dtype="bfloat16",
            device="cuda",
            backend_options={"sdpa": {"kernel": kernel}},
        )
        tensors = [
            x.detach().cuda().requires_grad_() for x in inputs(geometry, batch=2, head_dim=64, dtype=torch.bfloat16)
        ]
        actual = ours(attention, tensors, geometry, through_lse=True)
        for name, a, e in zip(NAMES, actual, oracle(LONGNET, tensors, geometry, through_lse=True), strict=True):
            assert error(a, e) < 1e-2, name


def test_fp16_training_with_a_grad_scaler_tracks_float32() -> None:
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "float16"):
        torch.manual_seed(0)
        attention = build_attention(
            pattern=LONGNET, num_heads=4, head_dim=8, is_causal=True, dtype=dtype, device="cuda"
        )
        model = Block(attention).cuda()
        x, target = torch.randn(2, 390, 32).cuda(), (torch.randn(2, 390, 32).cumsum(dim=1) / 10).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
        losses[dtype] = []
        for _ in range(50):
            with torch.autocast("cuda", dtype=torch.float16, enabled=dtype == "float16"):
                loss = (model(x) - target).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[dtype].append(float(loss.detach()))
    exact, mixed = losses["float32"], losses["float16"]
    assert exact[-1] < 0.8 * exact[0]
    assert max(abs(a - b) / a for a, b in zip(exact, mixed, strict=True)) < 0.03


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # the leaves are made on another stream
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_forward_and_backward_replay_in_a_cuda_graph(pattern: Pattern) -> None:
    attention = build_attention(
        pattern=pattern, num_heads=4, head_dim=64, is_causal=True, dtype="bfloat16", device="cuda"
    )
    geometry = Geometry.self_attention(517, 4, is_causal=True)
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(geometry, batch=1, head_dim=64, dtype=torch.bfloat16)]
    dout = torch.randn_like(tensors[0])

    def step() -> tuple[Tensor, ...]:
        out = attention(*tensors)
        return (out, *torch.autograd.grad(out, tensors, dout))

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (*tensors, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, e in zip(captured, step(), strict=True):
        assert error(a, e) < 5e-3  # cuDNN's and FlashAttention's backward add up in any order


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # the capture that is meant to fail
def test_capturing_an_unprepared_length_is_an_error_that_names_it() -> None:
    attention = build_attention(pattern=LONGNET, num_heads=4, head_dim=64, dtype="bfloat16", device="cuda")
    query = torch.randn(1, 333, 4, 64, device="cuda", dtype=torch.bfloat16)
    with (
        pytest.raises(ConfigError, match=r"seq_len 333 .*attention\.prepare\(333"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attention(query, query, query)
    torch.cuda.synchronize()
    attention.prepare(333)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(query, query, query)
    graph.replay()
    assert error(out, attention(query, query, query)) < 5e-3


def test_what_no_kernel_takes_is_refused_with_reasons() -> None:
    with pytest.raises(NoBackendError, match="multiples of 8"):
        build_attention(num_heads=4, head_dim=20, dtype="bfloat16", device="cuda", backend="sdpa")
    with pytest.raises(NoBackendError, match="use_deterministic_algorithms"):
        build_attention(num_heads=4, head_dim=64, dtype="bfloat16", device="cuda", backend="sdpa", deterministic=True)
    with pytest.raises(ConfigError, match="did you mean 'flash'"):
        build_attention(
            num_heads=4, head_dim=64, dtype="bfloat16", device="cuda", backend_options={"sdpa": {"kernel": "flas"}}
        )
    attention = build_attention(num_heads=4, head_dim=64, dtype="bfloat16", device="cuda")
    with pytest.raises(ConfigError, match="built for cuda"):
        attention(*torch.zeros(3, 1, 5, 4, 64, dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of inductor's own making
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    attention = build_attention(
        pattern=LONGNET, num_heads=4, head_dim=8, is_causal=True, dtype="float32", device="cuda"
    )
    model = Block(attention).cuda()
    x = torch.randn(2, 390, 32, device="cuda")
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x).sum(), list(model.parameters())), expected, strict=True):
        assert error(a, b) < 1e-5


def test_a_graph_is_counted_when_captured_and_not_when_replayed() -> None:
    attention = build_attention(pattern=LONGNET, num_heads=4, head_dim=64, dtype="bfloat16", device="cuda", scale=0.11)
    query = torch.randn(1, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
    attention(query, query, query)
    before = attention.counters().forward
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(query, query, query)
    for _ in range(3):
        graph.replay()
    after = attention.counters().forward
    assert (after.calls, after.flops) == (before.calls + 1, 2 * before.flops)


def test_nvtx_sees_the_ranges() -> None:
    off = span("x")
    with torch.autograd.profiler.emit_nvtx():  # type: ignore[no-untyped-call]
        assert span("x") is not off
    assert span("x") is off
