"""Checks of memory: strides, fresh and shared buffers, inputs left alone and let go, large offsets, equal bits."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .case import Subject
from .measure import Finding, compare, random_like

RUNS: Final = 3
# Elements between the batch rows of the inputs with large strides: one more than 32 bits can count, rounded up.
LARGE: Final = (1 << 31) + 64
# Types of device with a random state for each device; others ("mps") have one that PyTorch gives no such access to.
_RANDOM: Final = ("cuda", "xpu")
# How each is read and set, and what it is during a call: what PyTorch begins with, or a number that nobody chooses.
_SETTINGS: Final[Mapping[str, tuple[Callable[[], object], Callable[[Any], object], object]]] = {
    "threads": (torch.get_num_threads, torch.set_num_threads, 3),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    "precision of float32 products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "highest",
    ),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
        False,
    ),
}


def strided(subject: Subject) -> Iterator[Finding]:
    """Inputs need be neither contiguous nor alike: slices of a fused projection, transposed, shared by batch rows."""
    for name, inputs in _strided_forms(subject).items():
        results = subject.run(inputs)
        expected = subject.oracle([x.contiguous() for x in inputs], through_lse=False)
        yield from subject.compared(results, expected, f"of {name} inputs")


def _strided_forms(subject: Subject) -> dict[str, list[Tensor]]:
    """The case's inputs in other places of memory."""
    query, key, value = subject.inputs
    heads = [x.shape[2] for x in (query, key, value)]
    head_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    forms = {
        "head-first": head_first,
        "dim-first": [x.mT.contiguous().mT for x in (query, key, value)],
        "batch-shared": [x[:1].expand_as(x) for x in (query, key, value)],
        "unlike": [query, head_first[1], _spaced(value)],
    }
    if query.shape[1] == key.shape[1]:
        batch, length, _, dim = query.shape
        fused = query.new_full((batch, length + 5, sum(heads) + 1, dim), math.nan)
        fused[:, 2 : 2 + length, : sum(heads)] = torch.cat((query, key, value), dim=2)
        forms["fused"] = list(fused[:, 2 : 2 + length, : sum(heads)].split(heads, dim=2))  # type: ignore[no-untyped-call]
    return forms


def _spaced(x: Tensor) -> Tensor:
    """The same numbers, with NaN between the rows: wherever strides of another tensor lead, memory is there."""
    return torch.stack((x, torch.full_like(x, math.nan)), dim=2).flatten(1, 2)[:, ::2]


def fresh_memory(subject: Subject) -> Iterator[Finding]:
    """Memory that a kernel takes without clearing holds NaN; none of it may reach a result.

    What is poisoned: every uninitialised tensor that is made through PyTorch (its own switch for that is on for the
    call, and off again after it), and blocks that were just freed. Memory that a library takes from the driver or the
    system by itself cannot be reached.
    """
    subject.inputs, subject.expected  # noqa: B018 - computed before the switch
    with _poisoned_allocations():
        filled = subject.run(subject.inputs)
    yield from subject.compared(filled, subject.expected, "in memory full of NaN")
    for x in (*subject.inputs, *subject.expected.values()):
        torch.full(x.shape, math.nan, dtype=x.dtype, device=subject.case.device)  # freed at once, for reuse
    reused = subject.run(subject.inputs)
    yield from subject.compared(reused, subject.expected, "in reused memory")


@contextlib.contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """PyTorch fills what it allocates with NaN; the three switches are put back as they were."""
    settings: Any = torch.utils.deterministic
    was_on, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    was_filling = settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "… does not have a deterministic implementation"
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warning)
        settings.fill_uninitialized_memory = was_filling


def own_results(subject: Subject) -> Iterator[Finding]:
    """A call's results stay as they are when the next call is made, and its inputs are left alone."""
    inputs = [x.clone() for x in subject.inputs]
    first = subject.run(subject.inputs)
    kept = {name: x.clone() for name, x in first.items()}
    subject.run([random_like(x.shape, x.dtype, x.device, seed=77) for x in inputs])
    for name, x in first.items():
        problem = "" if _same(x, kept[name]) else "was overwritten by the next call"
        yield Finding(what=name, problem=problem)
    for name, x, y in zip(("query", "key", "value"), subject.inputs, inputs, strict=True):
        yield Finding(what=name, problem="" if _same(x, y) else "was written to")


def released(subject: Subject) -> Iterator[Finding]:
    """Nothing holds on to the inputs of a call whose results are gone: their memory is free again."""
    inputs = [x.clone() for x in subject.inputs]
    stores = [weakref.ref(x.untyped_storage()) for x in inputs]  # as long-lived as the memory itself
    subject.run(inputs)
    inputs.clear()
    if any(store() is not None for store in stores):
        gc.collect()  # what is held by a cycle alone is let go; to look at everything takes long
    for name, store in zip(("query", "key", "value"), stores, strict=True):
        problem = "" if store() is None else "is still held after the call; a kernel keeps no tensor that it was given"
        yield Finding(what=name, problem=problem)


def random_state(subject: Subject) -> Iterator[Finding]:
    """Without dropout the caller's random numbers, on the CPU and on the device, are those of no call at all."""
    device = torch.device(subject.case.device)
    devices = [device] if device.type in _RANDOM else []
    subject.inputs  # noqa: B018 - nothing but the backend runs between the two looks
    with torch.random.fork_rng(devices, device_type=device.type if devices else _RANDOM[0]):
        for place in (torch.device("cpu"), *devices):
            torch.rand(1, device=place)  # so that the state is none that a seed set before has left
        before = _random_states(devices)
        subject.run(subject.inputs)
        after = _random_states(devices)
    for name, state in before.items():
        problem = "" if torch.equal(state, after[name]) else "was seeded or drawn from; use a generator of your own"
        yield Finding(what=f"random state of {name}", problem=problem)


def _random_states(devices: Sequence[torch.device]) -> dict[str, Tensor]:
    """Of the CPU and of these devices."""
    states = {str(device): torch.get_device_module(device).get_rng_state(device) for device in devices}
    return {"cpu": torch.get_rng_state(), **states}


def process_state(subject: Subject) -> Iterator[Finding]:
    """A call leaves what PyTorch has once a process as it was: threads, default dtype, precision of products."""
    subject.inputs  # noqa: B018 - nothing but the backend runs between the two looks
    kept = {name: read() for name, (read, _, _) in _SETTINGS.items()}
    try:
        for _, write, value in _SETTINGS.values():
            write(value)
        subject.run(subject.inputs)
        found = {name: read() for name, (read, _, _) in _SETTINGS.items()}
    finally:
        for name, (_, write, _) in _SETTINGS.items():
            write(kept[name])
    for name, (_, _, value) in _SETTINGS.items():
        problem = "" if found[name] == value else f"was {value} and is {found[name]} after the call"
        yield Finding(what=name, problem=problem)


def same_bits(subject: Subject) -> Iterator[Finding]:
    """Built deterministic, the same call gives the same bits every time, forward and (where claimed) backward."""
    first = subject.run(subject.inputs)
    differing: set[str] = set()
    for _ in range(RUNS):
        again = subject.run(subject.inputs)
        differing |= {name for name, x in again.items() if not _same(x, first[name])}
    for name in first:
        yield Finding(what=name, problem="differs between equal calls" if name in differing else "")


def large_strides(subject: Subject) -> Iterator[Finding]:
    """Batch rows that lie more than 2**31 elements apart: offsets need 64 bits."""
    inputs = subject.inputs
    span = LARGE + sum(x[0].numel() for x in inputs)
    store = torch.empty(span, dtype=subject.torch_dtype, device=subject.case.device)
    far, start = [], 0
    for x in inputs:
        view = store.as_strided(x.shape, (LARGE, *x.stride()[1:]), start)
        far.append(view.copy_(x))
        start += x[0].numel()
    results = subject.run(far)
    yield from subject.compared(results, subject.expected, "with batch rows far apart")


def large_tensors(subject: Subject) -> Iterator[Finding]:
    """Tensors of more than 2**31 elements: the first and the last batch row are as right as those of small ones."""
    case = subject.case
    rows = -(-LARGE // (case.q_len * case.num_heads * case.head_dim))
    inputs = [x[:1].expand(rows, *x.shape[1:]).contiguous() for x in subject.inputs]
    with torch.no_grad():
        out, lse = subject.at(batch=rows).call(*inputs)
    for row in (0, rows - 1):
        for name, x in (("out", out), ("lse", lse)):
            expected = subject.expected[name][:1]
            yield compare(f"{name} of batch row {row:,}", x[row : row + 1], expected, subject.bounds[name])


def large_bytes(subject: Subject) -> int:
    """Memory that `large_tensors` takes: the inputs, the output and its copy in float32."""
    case = subject.case
    kv = 2 * case.num_kv_heads / case.num_heads
    return int(LARGE * (subject.torch_dtype.itemsize * (2 + kv) + 4))


def _same(x: Tensor, y: Tensor) -> bool:
    """Equal to the bit; NaN equals NaN here, as it is for other checks to find."""
    return torch.equal(torch.nan_to_num(x, nan=3.0), torch.nan_to_num(y, nan=3.0))
