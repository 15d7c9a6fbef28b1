"""Checks of the contract: the manifest, what is declared and accepted, what is not declared and refused."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor

from ...core.config import DTYPES as ALL_DTYPES
from ...core.config import AttentionConfig
from ...core.errors import NoBackendError, PluginError
from ...core.kernel import DensePiece
from ...core.plan import MATRIX_PRODUCTS
from ..build import build_from
from ..capabilities import covers, make_request
from ..device import describe_device, device_type_of_torch, local_device_types
from ..selection import judge
from ..specs import Device, Range
from .grid import request_of
from .measure import Finding, lse_form

if TYPE_CHECKING:
    from .case import Case, Subject
    from .kit import Kit

HEAVY: Final = ("torch", "triton", "numba", "cattrs")

_LOAD: Final = """
import sys
from dilated_attention.registry.discovery import installed_sources
from dilated_attention.registry.plugins import load_plugin
before = set(sys.modules)
for source in installed_sources():
    if (source.name, source.distribution) == (sys.argv[1], sys.argv[2]):
        print(*load_plugin(source).faults, sep="\\n", file=sys.stderr)
        print(*(name for name in sys.argv[3:] if name in sys.modules and name not in before))
        break
"""


def manifest(kit: Kit) -> Iterator[Finding]:
    """Loading the manifest in a fresh process brings in neither torch nor what takes as long."""
    source = kit.registered.source
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, source.name, source.distribution, *HEAVY],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    problem = " ".join(done.stderr.split())
    if done.stdout.split():
        problem = f"its import brings {', '.join(done.stdout.split())}; name the code as a string in `target`"
    yield Finding(what=f"the plugin {source.name!r} of {source.origin}", problem=problem)


def builds(subject: Subject) -> Iterator[Finding]:
    """What is declared and not refused is built, and the kernel is the one that was pinned."""
    pinned, built = subject.attention.plan.kernel, subject.attention._engine.kernel.name
    problem = "" if pinned in (built, MATRIX_PRODUCTS) else f"pin() names {pinned!r}, and build() makes {built!r}"
    yield Finding(what="kernel", problem=problem)


def returns(subject: Subject) -> Iterator[Finding]:
    """A dense kernel's own results: out as q, lse (B, H, S) in float32, or float64, and dq, dk, dv as q, k, v."""
    kernel, case = subject.attention._engine.kernel, subject.case
    query, key, value = subject.inputs
    scale = subject.attention.config.softmax_scale
    piece = DensePiece(is_causal=case.is_causal, scale=scale, deterministic=case.deterministic)
    with torch.no_grad():
        forward = kernel.forward(query, key, value, piece)
        problem = _problem(forward, {"out": (query.shape, None), "lse": lse_form(query)}, query.device)
        yield Finding(what="forward", problem=problem)
        if not problem and case.requires_grad:
            backward = kernel.backward(torch.ones_like(query), query, key, value, *forward, piece)
            shapes = {"dq": (query.shape, None), "dk": (key.shape, None), "dv": (value.shape, None)}
            yield Finding(what="backward", problem=_problem(backward, shapes, query.device))


def _problem(
    found: object, wanted: Mapping[str, tuple[Sequence[int], torch.dtype | None]], device: torch.device
) -> str:
    """What is wrong with the results of a kernel, or an empty string."""
    if not isinstance(found, tuple | list) or len(found) != len(wanted):
        kind = f"{len(found)} values" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        return f"returns {kind}, not the {len(wanted)} tensors {', '.join(wanted)}"
    for (name, (shape, dtype)), x in zip(wanted.items(), found, strict=True):
        if not isinstance(x, Tensor):
            return f"returns a {type(x).__name__} as {name}, not a tensor"
        if x.shape != torch.Size(shape):
            return f"returns {name} of the shape {tuple(x.shape)}, not {tuple(shape)}"
        if dtype is not None and x.dtype != dtype:
            return f"returns {name} in {x.dtype}, not in {dtype}"
        if x.device != device:
            return f"returns {name} on {x.device}, not on {device}"
        if x.requires_grad:
            return f"returns {name} with a graph of its own, which keeps its memory; leave autograd to the library"
    return ""


def declared(kit: Kit) -> Iterator[Finding]:
    """Each declared value is accepted at least once on this machine, and asking never crashes."""
    for axis, cases in _declared_cases(kit).items():
        for value, tries in cases.items():
            yield _accepted(kit, f"{axis}={value}", tries)


def _accepted(kit: Kit, what: str, tries: list[Case]) -> Finding:
    reasons: list[str] = []
    for case in tries:
        verdict = judge(kit.registered, request_of(case, kit.name))
        if verdict.fault:
            return Finding(what=what, problem=f"asked about {case} it {verdict.fault}")
        if verdict.accepts:
            return Finding(what=what)
        reasons += [str(refusal) for refusal in verdict.refusals]
    return Finding(what=what, problem=f"is declared and never accepted here: {'; '.join(dict.fromkeys(reasons))}")


def _declared_cases(kit: Kit) -> dict[str, dict[Any, list[Case]]]:
    """By axis and declared value, cases that have it, on every device of this machine that is declared."""
    capabilities = kit.registered.spec.capabilities
    types = [d for d in local_device_types() if covers(capabilities.get("device_types", ()), device_type_of_torch(d))]
    bases = [
        attrs.evolve(case, device=device, dtype=dtype)
        for device, dtype in itertools.product(types, ALL_DTYPES)
        if covers(capabilities.get("dtypes", ()), dtype)
        for case in kit.templates
    ]
    found: dict[str, dict[Any, list[Case]]] = {
        "dtype": {dtype: [b for b in bases if b.dtype == dtype] for dtype in ALL_DTYPES},
        "device": {device: [b for b in bases if b.device == device] for device in types},
        "head_dim": {d: [attrs.evolve(b, head_dim=d) for b in bases] for d in _head_dims(capabilities)},
    }
    if covers(capabilities.get("deterministic", ()), "forward"):
        forward = [attrs.evolve(b, deterministic=True, requires_grad=False) for b in bases]
        found["deterministic"] = {"forward": forward}
        if covers(capabilities["deterministic"], "backward"):
            found["deterministic"]["forward and backward"] = [attrs.evolve(b, requires_grad=True) for b in forward]
    if covers(capabilities.get("dropout", False), True):
        found["dropout_p"] = {0.1: [attrs.evolve(b, dropout_p=0.1) for b in bases]}
    return {axis: {value: tries for value, tries in cases.items() if tries} for axis, cases in found.items()}


def _head_dims(capabilities: Mapping[str, Any]) -> list[int]:
    """Declared values of head_dim: the ends of a range and usual and odd ones between, or all that are listed."""
    declared = capabilities.get("head_dims", ())
    if isinstance(declared, Range):
        ends = [d for d in range(declared.min, declared.min + declared.multiple_of) if d in declared][:1]
        ends += [d for d in range(declared.max, declared.max - declared.multiple_of, -1) if d in declared][:1]
        return sorted({d for d in (*ends, 7, 24, 48, 56, 64, 72, 128, 256) if d in declared})
    return sorted(d for d in range(1, 1025) if covers(declared, d)) if declared is not True else [24, 48, 64]


def undeclared(kit: Kit) -> Iterator[Finding]:
    """Each value that is not declared is a refusal that names it: no crash, no result, no other backend."""
    for what, config, device in _undeclared_requests(kit):
        request = make_request(config, kit.templates[0].pattern, device)
        verdict = judge(kit.registered, request)
        if verdict.fault:
            yield Finding(what=what, problem=f"asked about it, the backend {verdict.fault}")
        elif verdict.accepts:
            yield Finding(what=what, problem="is not declared and yet accepted")
        elif not all(refusal.code and refusal.required and refusal.actual for refusal in verdict.refusals):
            yield Finding(what=what, problem=f"is refused without a full reason: {verdict.refusals}")
        else:
            yield Finding(what=what, problem=_build_problem(kit, config) if device.available else "")


def _build_problem(kit: Kit, config: AttentionConfig) -> str:
    try:
        build_from(config, kit.registry)
    except NoBackendError:
        return ""
    except PluginError as error:
        return f"building it is {error}"
    return "is not declared and yet built"


def _undeclared_requests(kit: Kit) -> Iterator[tuple[str, AttentionConfig, Device]]:
    """Requests that differ from a sound one in a single value that the manifest does not have."""
    capabilities, case = kit.registered.spec.capabilities, kit.templates[0]
    base, device = case.config(kit.name), describe_device(case.device)
    changes: list[dict[str, Any]] = [
        {"dtype": dtype} for dtype in ALL_DTYPES if not covers(capabilities.get("dtypes", ()), dtype)
    ]
    widths = (1, 7, 24, 48, 100, 257, 1024, (1 << 16) + 1)
    changes += [{"head_dim": d} for d in widths if not covers(capabilities.get("head_dims", ()), d)]
    flags: dict[str, dict[str, Any]] = {
        "gqa": {"num_heads": 4, "num_kv_heads": 2},
        "causal": {"is_causal": True},
        "dropout": {"dropout_p": 0.1},
    }
    flags |= {"backward": {"requires_grad": True}, "varlen": {"varlen": True}}
    changes += [change for axis, change in flags.items() if not covers(capabilities.get(axis, False), True)]
    for directions, grad in ((("forward",), False), (("forward", "backward"), True)):
        if not covers(capabilities.get("deterministic", ()), directions):
            changes.append({"deterministic": True, "requires_grad": grad})
    for change in changes:
        yield _words(change), attrs.evolve(base, **change), device
    for kind in ("cpu", "cuda", "hip", "xpu", "mps"):
        if not covers(capabilities.get("device_types", ()), kind):
            yield f"device={kind}", base, Device(type=kind, available=False, torch_name=kind)


def _words(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in change.items())
