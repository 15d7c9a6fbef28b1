"""The same calls replayed from CUDA graphs: what they take without the host's work for each launch."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .contenders import BOUNDS, Contender
from .timing import Call, difference

# Beyond this the memory that a graph keeps for itself is no longer small.
LONGEST = 1 << 17


def captured(contender: Contender, dtype: str) -> Contender:
    """The contender's calls as graphs.

    Raises:
        RuntimeError: a call that cannot be captured, or whose replay computes something else.
    """
    eager = contender.forward()
    replay_forward, out = capture(contender.forward)
    replay_training, _ = capture(contender.training)
    assert isinstance(out, Tensor)
    out.zero_()
    replay_forward()
    if not difference(out, eager) < BOUNDS[dtype]:
        raise RuntimeError("its replay computes something else")

    def forward() -> Tensor:
        replay_forward()
        return out

    return attrs.evolve(
        contender,
        name=f"{contender.name}, CUDA graph",
        forward=forward,
        training=replay_training,
        can_be_captured=False,
    )


def capture(call: Call) -> tuple[Call, object]:
    """`call` as a graph, and what it returned while it was captured."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # whatever is made on the first calls must not be part of the graph
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
