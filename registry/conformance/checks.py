"""The checks of the kit by name: where each is made, and when it does not apply."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import torch

from ...core.kernel import CALL_AXES
from ...core.lowering import layout_kinds
from ...core.pattern import Full
from ..discovery import installed_sources
from ..patterns import resolve_pattern
from ..selection import takes_dense
from . import contract, geometry, memory, pytorch, ring, values
from .grid import LENGTH, LONGER
from .measure import Finding

if TYPE_CHECKING:
    from .case import Case
    from .kit import Kit

LEARNED: Final = "learned"
# Far from 1/sqrt(head_dim) at every usual head_dim; the first is none of the other's size either.
SCALES: Final = (0.3, -0.7)

Where = Literal["backend", "every case", "every causal case", "few cases", "one case"]


def _always(kit: Kit, case: Case | None) -> str:
    return ""


def _as_it_is(kit: Kit, case: Case) -> Case:
    return case


@attrs.frozen(eq=False)
class Check:
    """One named check.

    Attributes:
        name: as the table shows it.
        where: what it is made on: the backend as such, every (causal) case of the grid, the cases of a few patterns,
            or one case a device.
        run: yields findings about a subject, or about the kit's backend.
        why_not: why it does not apply to a case, or an empty string.
        change: the case that it is made on instead, given the kit and the case.
    """

    name: str
    where: Where
    run: Callable[[Any], Iterator[Finding]]
    why_not: Callable[[Kit, Case | None], str] = _always
    change: Callable[[Kit, Case], Case] = _as_it_is

    @property
    def title(self) -> str:
        """What it asserts, in a sentence."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]


def _needs_backward(kit: Kit, case: Case | None) -> str:
    return "" if kit.declares("backward") else "backward is not declared"


def _needs(axis: str, needed: object = True) -> Callable[[Kit, Case | None], str]:
    def why_not(kit: Kit, case: Case | None) -> str:
        return "" if kit.declares(axis, needed) else f"{axis} is not declared"

    return why_not


def _needs_lse_gradient(kit: Kit, case: Case | None) -> str:
    if case is not None and kit.declares("backward") and not kit.subject(case).attention._engine.has_dlse:
        return f"gradients through lse are refused at head_dim {case.head_dim}"
    return _needs_backward(kit, case)


def _needs_gate(kit: Kit, case: Case | None) -> str:
    if LEARNED not in kit.registry.patterns:
        return "no pattern chooses blocks here"
    return _needs("dynamic_tables")(kit, case)


def _needs_compile(kit: Kit, case: Case | None) -> str:
    kind = kit.capabilities.get("compile", "none")
    return "compile is not declared" if kind == "none" else ""


def _needs_cuda(kit: Kit, case: Case | None) -> str:
    return "" if case is not None and case.device.startswith("cuda") else "not on a CUDA device"


def _needs_second_device(kit: Kit, case: Case | None) -> str:
    if _needs_cuda(kit, case):
        return "not on a CUDA device"
    return "" if torch.cuda.device_count() > 1 else "there is no second device"


def _needs_cuda_graph(kit: Kit, case: Case | None) -> str:
    return _needs("cuda_graph")(kit, case) or _needs_cuda(kit, case)


def _needs_installed(kit: Kit, case: Case | None) -> str:
    source = kit.registered.source
    known = {(found.name, found.distribution) for found in installed_sources()}
    here = (source.name, source.distribution) in known
    return "" if here else "its plugin is not an installed distribution"


def _needs_request(kit: Kit, case: Case | None) -> str:
    return "" if kit.large else "on request only (large)"


def _needs_request_and_memory(kit: Kit, case: Case | None) -> str:
    if not kit.large or case is None:
        return _needs_request(kit, case)
    needed = memory.large_bytes(kit.subject(case))
    free = torch.cuda.mem_get_info(case.device)[0] if case.device.startswith("cuda") else _free_bytes()
    return "" if needed < free else f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _needs_undeclared_call(kit: Kit, case: Case | None) -> str:
    every = all(kit.declares(axis) for axis in CALL_AXES)
    return f"{', '.join(CALL_AXES)} are declared" if every else ""


def _needs_decoding(kit: Kit, case: Case | None) -> str:
    if case is None or not case.is_causal:
        return "token by token is causal"
    return _needs("unequal_lengths")(kit, case)


def _needs_ring(kit: Kit, case: Case | None) -> str:
    """A ring composes what it needs of dense pieces, without asking."""
    return "" if takes_dense(kit.registered.spec) else _needs("context_parallel")(kit, case)


def _needs_dense_pieces(kit: Kit, case: Case | None) -> str:
    takes_layout = case is not None and kit.subject(case).attention._engine.takes_layout
    return "the backend takes whole layouts" if takes_layout else ""


def _needs_dense_rows(kit: Kit, case: Case | None) -> str:
    return "" if case is not None and isinstance(case.pattern, Full) else "the rows of the pattern are short"


def _needs_staged(kit: Kit, case: Case | None) -> str:
    if case is None or not kit.declares("staged_blocks"):
        return _needs("staged_blocks")(kit, case)
    kinds = layout_kinds(case.pattern, case.geometry)
    return "" if "block" in kinds else "the pattern has no blocks"


def _deterministic(kit: Kit, case: Case) -> Case:
    """Built deterministic; with gradients only where the backend claims that its backward is."""
    backward = case.requires_grad and kit.declares("deterministic", "backward")
    length = case.q_len if kit.quick else LONGER  # longer rows are split into more parts
    return attrs.evolve(case, deterministic=True, requires_grad=backward, q_len=length, kv_len=length)


def _choosing(kit: Kit, case: Case) -> Case:
    if _needs_gate(kit, case):
        return case
    pattern = resolve_pattern({"kind": LEARNED, "block_size": 16, "blocks_per_row": 3}, kit.registry)
    return attrs.evolve(case, pattern_name=LEARNED, pattern=pattern, batch=1)


def _shared(kit: Kit, case: Case) -> Case:
    return attrs.evolve(case, q_len=ring.LENGTH, kv_len=ring.LENGTH)


def _of_one_head(kit: Kit, case: Case) -> Case:
    length = geometry.LONG
    return attrs.evolve(case, batch=1, num_heads=1, num_kv_heads=1, q_len=length, kv_len=length)


def _scaled(scale: float) -> Callable[[Kit, Case], Case]:
    return lambda kit, case: attrs.evolve(case, scale=scale)


def _dropping(kit: Kit, case: Case) -> Case:
    length = max(case.q_len, LENGTH)  # means over fewer draws lie farther off
    return attrs.evolve(case, dropout_p=0.25, batch=max(case.batch, 2), q_len=length, kv_len=length)


def _on_the_second(kit: Kit, case: Case) -> Case:
    return attrs.evolve(case, device="cuda:1")


BUILDS: Final = "builds"

CHECKS: Final = (
    Check("manifest", "backend", contract.manifest, _needs_installed),
    Check("declared", "backend", contract.declared),
    Check("undeclared", "backend", contract.undeclared),
    Check(BUILDS, "every case", contract.builds),
    Check("returns", "every case", contract.returns, _needs_dense_pieces),
    Check("forms", "every case", values.forms),
    Check("out", "every case", values.out),
    Check("lse", "every case", values.lse),
    Check("dq", "every case", values.dq, _needs_backward),
    Check("dk", "every case", values.dk, _needs_backward),
    Check("dv", "every case", values.dv, _needs_backward),
    Check("through-lse", "every case", values.through_lse, _needs_lse_gradient),
    Check("ones", "every case", values.ones),
    Check("future", "every causal case", values.future),
    Check("one-token", "every case", values.one_token),
    Check("chosen-blocks", "few cases", values.chosen_blocks, _needs_gate, _choosing),
    Check("lse-base", "few cases", values.lse_base),
    Check("scale", "few cases", values.scale, change=_scaled(SCALES[0])),
    Check("negative-scale", "few cases", values.negative_scale, change=_scaled(SCALES[1])),
    Check("large-scores", "few cases", values.large_scores),
    Check("ragged", "few cases", geometry.ragged),
    Check("long-rows", "few cases", geometry.long_rows, _needs_dense_rows, _of_one_head),
    Check("unequal-lengths", "few cases", geometry.unequal_lengths, _needs("unequal_lengths")),
    Check("offsets", "few cases", geometry.offsets, _needs("offsets")),
    Check("decoding", "few cases", geometry.decoding, _needs_decoding),
    Check("empty-rows", "few cases", geometry.empty_rows),
    Check("documents", "few cases", geometry.documents, _needs("varlen")),
    Check("ring", "few cases", ring.ring, _needs_ring, _shared),
    Check("staged-blocks", "few cases", ring.staged_blocks, _needs_staged, _shared),
    Check("refused-calls", "one case", geometry.refused_calls, _needs_undeclared_call),
    Check("strided", "few cases", memory.strided),
    Check("fresh-memory", "few cases", memory.fresh_memory),
    Check("own-results", "few cases", memory.own_results),
    Check("released", "few cases", memory.released),
    Check("random-state", "few cases", memory.random_state),
    Check("process-state", "few cases", memory.process_state),
    Check("same-bits", "few cases", memory.same_bits, _needs("deterministic", "forward"), _deterministic),
    Check("dropout", "few cases", pytorch.dropout, _needs("dropout"), _dropping),
    Check("operator", "one case", pytorch.operator),
    Check("fullgraph", "one case", pytorch.fullgraph, _needs_compile),
    Check("cuda-graph", "one case", pytorch.cuda_graph, _needs_cuda_graph),
    Check("side-stream", "one case", pytorch.side_stream, _needs_cuda),
    Check("second-device", "one case", pytorch.second_device, _needs_second_device, _on_the_second),
    Check("large-strides", "one case", memory.large_strides, _needs_request),
    Check("large-tensors", "one case", memory.large_tensors, _needs_request_and_memory),
)
