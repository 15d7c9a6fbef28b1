"""Requests against manifests: every axis that a request needs is matched with what a spec declares.

A need is derived from the configuration; an axis that a spec does not name is unsupported. So an axis that a later
release adds refuses the plugins of today by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from ..core.config import AttentionConfig
from ..core.pattern import LearnedPattern, Pattern
from ..core.refusal import Refusal
from .specs import BackendSpec, Device, Range, Request

NOT_INSTALLED: Final = "not_installed"  # the code of a refusal that names a requirement
# An axis that limits the specs that name it and says nothing about the others.
_NARROWING: Final = frozenset({"arch", "block_sizes"})
# What core's composer makes of dense pieces, and what it sees to by itself on the way.
_COMPOSED: Final = frozenset({"branch", "block"})
_COMPOSED_TRAITS: Final = frozenset({"block_sizes", "weights", "per_head", "context_parallel"})


def make_request(config: AttentionConfig, pattern: Pattern, device: Device) -> Request:
    """The request of `config` with its pattern resolved and its device described."""
    # It brings numpy, which listing backends does without.
    from ..core.blocking import sizes_of_shorter
    from ..core.lowering import block_traits, layout_kinds, table_block_size

    needs: dict[str, Any] = {
        "device_types": device.type,
        "dtypes": config.dtype,
        "head_dims": config.head_dim,
        "layouts": tuple(sorted(layout_kinds(pattern, config.one_token))),
    }
    if "block" in needs["layouts"]:
        size = table_block_size(pattern, config.one_token)
        needs["block_sizes"] = (*shorter, size) if (shorter := sizes_of_shorter(size)) else size
    needs |= dict.fromkeys(sorted(block_traits(pattern, config.one_token)), True)
    if isinstance(pattern.unwrap(), LearnedPattern):
        needs["dynamic_tables"] = True
    if device.arch:
        needs["arch"] = device.arch
    if config.kv_heads != config.num_heads:
        needs["gqa"] = True
    if config.is_causal:
        needs["causal"] = True
    if config.dropout_p > 0:
        needs["dropout"] = True
    if config.context_parallel is not None:  # of one rank too: `rebuild` may make them more
        needs["context_parallel"] = True
    if config.varlen:
        needs["varlen"] = True
    if config.requires_grad:
        needs["backward"] = True
    if config.deterministic:
        needs["deterministic"] = ("forward", "backward") if config.requires_grad else ("forward",)
    return Request(config=config, pattern=pattern, device=device, needs=needs)


def capability_refusals(request: Request, spec: BackendSpec) -> list[Refusal]:
    """One refusal for each axis that `request` needs and `spec` does not cover."""
    refusals: list[Refusal] = []
    for axis, needed in request.needs.items():
        if axis == "arch" and any(refusal.code == "device_types" for refusal in refusals):
            continue  # an x86_64 is no wrong kind of CUDA card
        if axis in _COMPOSED_TRAITS and "dense" in spec.capabilities.get("layouts", ()):
            continue
        if axis not in spec.capabilities:
            if axis not in _NARROWING:
                refusals.append(Refusal(axis, _need_words(axis, needed, request), "none declared"))
            continue
        declared = spec.capabilities[axis]
        if axis == "layouts" and "dense" in declared:
            declared = _COMPOSED.union(declared)
        if not covers(declared, needed):
            words = _need_words(axis, needed, request)
            remedy = "take a pattern of such blocks, or another backend" if axis == "block_sizes" else ""
            refusals.append(Refusal(axis, words, words_of(spec.capabilities[axis]), remedy))
    return refusals


def device_refusals(request: Request) -> list[Refusal]:
    """A refusal when the device that was asked for is not on this machine, nor assumed."""
    if request.device.available or request.device.is_assumed:
        return []
    name = request.device.torch_name
    return [Refusal("device_available", f"{name} on this machine", "none that torch can use", "choose another device")]


def requirement_refusals(spec: BackendSpec) -> list[Refusal]:
    """A refusal for each of the spec's requirements that is not installed, with the line that installs it."""
    return [
        Refusal(NOT_INSTALLED, requirement, found, f"pip install {requirement!r}")
        for requirement, found in unmet_requirements(spec.requires)
    ]


def unmet_requirements(requires: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each requirement that this environment does not meet, and what it has instead.

    Only metadata is read; nothing is imported. Requirements whose marker excludes this environment count as met.
    """
    requires = tuple(requires)
    if not requires:
        return  # without the import below, which takes longer than all the rest of a build
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement

    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            yield text, f"a requirement that cannot be read ({error})".replace("\n", " ")
            continue
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield text, f"no {requirement.name} installed"
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield text, f"{requirement.name} {installed}"


def covers(declared: object, needed: object) -> bool:
    """Whether what a spec declares for an axis covers what a request needs of it."""
    if declared is True:
        return True
    if declared is None or declared is False:
        return False
    if isinstance(needed, tuple):
        return all(covers(declared, part) for part in needed)
    if isinstance(declared, Range) or (isinstance(declared, Collection) and not isinstance(declared, str | bytes)):
        return needed in declared
    return type(declared) is type(needed) and declared == needed


def words_of(declared: object) -> str:
    """A declared capability in words: `float16, bfloat16`, `8..256, multiples of 8`, `yes`."""
    if isinstance(declared, bool) or declared is None:
        return "yes" if declared else "no"
    if isinstance(declared, Mapping):
        return ", ".join(f"{key}={words_of(value)}" for key, value in declared.items()) or "nothing"
    if isinstance(declared, Collection) and not isinstance(declared, str):
        return ", ".join(str(item) for item in _ordered(declared)) or "nothing"
    return str(declared)


def plain(declared: object) -> object:
    """A declared capability as JSON can hold it."""
    if isinstance(declared, Range):
        return {"min": declared.min, "max": declared.max, "multiple_of": declared.multiple_of}
    if isinstance(declared, Mapping):
        return {str(key): plain(value) for key, value in declared.items()}
    if isinstance(declared, bool | int | float | str) or declared is None:
        return declared
    if isinstance(declared, Collection):
        return [plain(item) for item in _ordered(declared)]
    return str(declared)


def _ordered(items: Collection[object]) -> Collection[object]:
    """Sets in a stable order; what has an order keeps it."""
    return sorted(items, key=str) if isinstance(items, set | frozenset) else items


def _need_words(axis: str, needed: object, request: Request) -> str:
    config = request.config
    if axis == "head_dims":
        return f"head_dim={needed}"
    if axis == "gqa":
        return f"{config.num_heads} query heads on {config.kv_heads} key-value heads"
    if axis == "causal":
        return "is_causal=True"
    if axis == "block_sizes":
        sizes = " and ".join(map(str, needed if isinstance(needed, tuple) else (needed,)))
        return f"blocks of {sizes} tokens ({request.pattern.kind} pattern)"
    if axis == "weights":
        return f"blocks that count more than once ({request.pattern.kind} pattern)"
    if axis == "per_head":
        return f"a table of blocks for each head ({request.pattern.kind} pattern)"
    if axis == "dynamic_tables":
        return f"blocks chosen at every call ({request.pattern.kind} pattern)"
    if axis == "context_parallel":
        return f"parts of a sequence that ranks share (context_parallel.size={config.ring_size})"
    if axis == "dropout":
        return f"dropout_p={config.dropout_p:g}"
    if axis == "varlen":
        return "sequences of several lengths (varlen=True)"
    if axis == "backward":
        return "gradients (requires_grad=True)"
    if axis == "deterministic":
        return f"a deterministic {words_of(needed).replace(', ', ' and ')}"
    return words_of(needed)
