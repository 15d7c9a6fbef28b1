"""Checks of PyTorch's machinery: operators, torch.compile, CUDA graphs, streams, devices, dropout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Final

import torch

from .case import Subject
from .measure import Finding, compare

_DRAWS: Final = 32
# The mean of so many draws, projected on what it should be, is a mean over some ten thousand numbers as well: chance
# moves it by a thousandth, and a forgotten factor 1 / (1 - p) by p.
_BIAS: Final = 0.02


def operator(subject: Subject) -> Iterator[Finding]:
    """`torch.library.opcheck` on the operator as this backend runs it: schema, fake tensors, autograd."""
    case = subject.case
    query, key, value = (x.detach().requires_grad_(case.requires_grad) for x in subject.inputs)
    given = {
        "query": query,
        "key": key,
        "value": value,
        "engine": subject.attention._engine.key,
        "q_offset": case.geometry.q_offset,
        "kv_offset": case.kv_offset,
        "recompute": False,
    }
    attend = torch.ops.dilated_attention.attend.default
    arguments = tuple(given.get(argument.name) for argument in attend._schema.arguments)
    utils = ["test_schema", "test_faketensor"]
    if case.requires_grad:
        utils.append("test_autograd_registration")
        if subject.attention._engine.has_dlse:  # it differentiates every output
            utils.append("test_aot_dispatch_dynamic")
    with warnings.catch_warnings():
        # It looks at clones' .grad. PyTorch hides its warning about that, but not where warnings are errors.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        found = torch.library.opcheck(
            attend,
            arguments,
            test_utils=utils,
            raise_exception=False,
            rtol=subject.bounds["out"],
            atol=subject.bounds["out"],
        )
    for name, verdict in found.items():
        problem = "" if verdict == "SUCCESS" else f"{type(verdict).__name__}: {' '.join(str(verdict).split())}"
        yield Finding(what=name, problem=problem)


def fullgraph(subject: Subject) -> Iterator[Finding]:
    """`torch.compile(fullgraph=True)` gives what eager gives, and a second step compiles nothing again."""
    torch.compiler.reset()
    case = subject.case
    try:
        compiled = torch.compile(subject.attention, fullgraph=True, backend="aot_eager")
        twin = Subject(case, compiled, subject.capabilities)
        yield from subject.compared(twin.run(subject.inputs), subject.expected, "compiled")
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed in (31, 32):
                inputs = [x + 0.01 * seed for x in subject.inputs]
                results = twin.run(inputs)
                yield from subject.compared(results, subject.oracle(inputs, through_lse=False), "of a later step")
    finally:
        torch.compiler.reset()


def cuda_graph(subject: Subject) -> Iterator[Finding]:
    """A forward captured in a CUDA graph and replayed on other inputs gives those inputs' output."""
    attention, held = subject.attention, [x.clone() for x in subject.inputs]
    case = subject.case
    attention.prepare(case.q_len, kv_len=case.kv_len)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(2):
                subject.call(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = subject.call(*held)
        fresh = [x.flip(1) for x in subject.inputs]
        for x, y in zip(held, fresh, strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
    expected = subject.oracle(fresh, through_lse=False)
    yield from subject.compared({"out": out, "lse": lse}, expected, "of the replay")


def side_stream(subject: Subject) -> Iterator[Finding]:
    """On a stream other than the default one, work is queued there and nowhere else."""
    device = torch.device(subject.case.device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    late = [torch.empty_like(x) for x in subject.inputs]
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # the inputs arrive late, on this stream
        for x, y in zip(late, subject.inputs, strict=True):
            x.copy_(y)
        results = subject.run(late)
    stream.synchronize()
    yield from subject.compared(results, subject.expected, "on another stream")


def second_device(subject: Subject) -> Iterator[Finding]:
    """On a device other than the current one, work is queued there."""
    yield from subject.compared(subject.results, subject.expected, f"on {subject.case.device}")


def dropout(subject: Subject) -> Iterator[Finding]:
    """Dropout is off in eval, leaves lse alone, is unbiased, and its backward uses the forward's draw."""
    attention, (query, key, value) = subject.attention, subject.inputs
    expected = subject.oracle(subject.inputs, through_lse=False)
    attention.eval()
    out, lse = subject.call(query, key, value)
    yield from subject.compared({"out": out, "lse": lse}, expected, "in eval")
    attention.train()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draws = [subject.call(query, key, value) for _ in range(_DRAWS)]
        yield compare("lse in training", draws[0][1], expected["lse"], subject.bounds["lse"])
        same = torch.equal(draws[0][0], draws[1][0])
        yield Finding(what="draws", problem="two calls in training gave the same output" if same else "")
        mean, exact = sum(draw[0].double() for draw in draws) / _DRAWS, expected["out"]
        slope = float((mean * exact).sum() / (exact * exact).sum())
        yield Finding(what="mean of the draws", error=abs(slope - 1), bound=_BIAS)
        if subject.case.requires_grad:
            yield _linear(subject)


def _linear(subject: Subject) -> Finding:
    """For one draw out is linear in the values, so <dout, out> equals <dv, v> if the backward drops the same."""
    query, key, value = subject.inputs
    leaf = value.detach().requires_grad_()
    out, _ = subject.call(query, key, leaf)
    (dv,) = torch.autograd.grad(out, leaf, out.detach())
    left, right = float((out.detach().double() ** 2).sum()), float((dv.double() * value.double()).sum())
    bound = 10 * subject.bounds["dv"]
    return Finding(what="dv for the same draw", error=abs(left - right) / abs(left), bound=bound)
