"""Near misses: the smallest change of a request that would admit a backend, found by trying.

Each candidate changes one config field, or installs what is missing. Single changes are tried first, then two and
three together, and each trial goes through the same judgement as the request itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations
from typing import Any, Final

import attrs

from ..core.config import DTYPES
from ..core.errors import ConfigError
from ..core.plan import NearMiss
from ..core.refusal import Refusal
from .capabilities import NOT_INSTALLED, capability_refusals, make_request
from .device import describe_device, device_type_of_torch, local_device_types
from .specs import BackendSpec, Device, Range, Request

_MOST_CHANGES: Final = 3
_MOST_HALVINGS: Final = 6
_DEVICE_AXES: Final = ("device_types", "device_available", "arch")
_TORCH_TYPE: Final = {"hip": "cuda"}


@attrs.frozen(kw_only=True, eq=False)
class _Change:
    """One step: config fields with their new values, or an installation; `device` describes a changed device.

    `mends` are the codes of the refusals that it may do away with; two steps that share one exclude each other.
    """

    mends: tuple[str, ...]
    fields: dict[str, Any] = attrs.field(factory=dict)
    install: tuple[str, ...] = ()
    device: Device | None = None


def near_miss(
    spec: BackendSpec, request: Request, refusals: Sequence[Refusal], accepts: Callable[[Request], bool]
) -> NearMiss | None:
    """The smallest set of changes with which `spec` takes the request, or None where none of those tried do.

    Args:
        spec: the backend's manifest.
        request: what it refused.
        refusals: what its manifest, the machine or the installation said against it; none where the backend itself did.
        accepts: the full judgement of a changed request, the backend itself included.
    """
    missing = tuple(refusal.required for refusal in refusals if refusal.code == NOT_INSTALLED)
    changes = list(_changes(spec, request, missing))
    # What the manifest, the machine or the installation refuses can only be mended on its own axis, so combinations
    # that leave it alone need no trial. A backend's finer refusals may be mended anywhere.
    required = {refusal.code for refusal in refusals}
    if not required <= {axis for change in changes for axis in change.mends}:
        return None
    for size in range(1, _MOST_CHANGES + 1):
        for chosen in combinations(changes, size):
            mended = [axis for change in chosen for axis in change.mends]
            if len(set(mended)) < len(mended) or not required <= set(mended):
                continue
            found = _try(spec, request, chosen, missing, accepts)
            if found is not None:
                return found
    return None


def _try(
    spec: BackendSpec,
    request: Request,
    chosen: Sequence[_Change],
    missing: Sequence[str],
    accepts: Callable[[Request], bool],
) -> NearMiss | None:
    fields = {name: value for change in chosen for name, value in change.fields.items()}
    install = tuple(text for change in chosen for text in change.install)
    device = next((change.device for change in chosen if change.device), request.device)
    try:
        changed = make_request(attrs.evolve(request.config, **fields), request.pattern, device)
    except ConfigError:  # such as a pattern that the changed number of heads does not fit
        return None
    if capability_refusals(changed, spec) or set(missing) - set(install):
        return None
    verified = (device.available or device.is_assumed) and not install
    if verified and not accepts(changed):
        return None
    return NearMiss(changes=fields, install=install, verified=verified)


def _changes(spec: BackendSpec, request: Request, missing: tuple[str, ...]) -> Iterator[_Change]:
    """Every single change worth trying, the least intrusive first."""
    config, declared = request.config, spec.capabilities
    if missing:
        yield _Change(mends=(NOT_INSTALLED,), install=missing)
    if config.deterministic:
        yield _Change(mends=("deterministic",), fields={"deterministic": False})
    if config.varlen:
        yield _Change(mends=("varlen",), fields={"varlen": False})
    if config.dropout_p > 0:
        yield _Change(mends=("dropout",), fields={"dropout_p": 0.0})
    if config.requires_grad:
        yield _Change(mends=("backward",), fields={"requires_grad": False})
    for dtype in _other_dtypes(config.dtype, declared.get("dtypes", ())):
        yield _Change(mends=("dtypes",), fields={"dtype": dtype})
    if config.kv_heads != config.num_heads:
        yield _Change(mends=("gqa",), fields={"num_kv_heads": config.num_heads})
    for head_dim in _nearest(config.head_dim, declared.get("head_dims", ())):
        yield _Change(mends=("head_dims",), fields={"head_dim": head_dim})
    yield from _device_changes(request, declared.get("device_types", ()))
    for halvings in range(1, _MOST_HALVINGS + 1):
        if config.seq_len is not None and config.seq_len >> halvings:
            yield _Change(mends=("seq_len",), fields={"seq_len": config.seq_len >> halvings})


def _device_changes(request: Request, declared: object) -> Iterator[_Change]:
    if not isinstance(declared, Collection) or request.device.is_assumed:  # whoever names a card asks about that one
        return
    local = local_device_types()
    here = [name for name in local if device_type_of_torch(name) in declared]
    for name in here:
        if device_type_of_torch(name) != request.device.type or not request.device.available:
            yield _Change(mends=_DEVICE_AXES, fields={"device": name}, device=describe_device(name))
    if not here and request.device.available:
        for kind in sorted(map(str, declared)):
            name = _TORCH_TYPE.get(kind, kind)
            yield _Change(
                mends=_DEVICE_AXES,
                fields={"device": name},
                device=Device(type=kind, torch_name=name, available=False),
            )


def _other_dtypes(dtype: str, declared: object) -> list[str]:
    """The nearest in precision first."""
    if not isinstance(declared, Collection):
        return []
    place = DTYPES.index(dtype)
    others = [name for name in DTYPES if name in declared and name != dtype]
    return sorted(others, key=lambda name: abs(DTYPES.index(name) - place))


def _nearest(value: int, declared: object) -> list[int]:
    """The nearest allowed values, the one above first: padding keeps the result, cutting does not."""
    if isinstance(declared, Range):
        step = declared.multiple_of
        above = max(-(-value // step) * step, -(-declared.min // step) * step)
        below = min(value // step * step, declared.max // step * step)
        candidates = [above, below]
    elif isinstance(declared, Collection):
        numbers = sorted(number for number in declared if isinstance(number, int))
        candidates = [n for n in numbers if n > value][:1] + [n for n in numbers if n < value][-1:]
    else:
        return []
    return [n for n in dict.fromkeys(candidates) if n != value and n > 0 and n in declared]
