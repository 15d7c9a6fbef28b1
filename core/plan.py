"""The frozen record of one build: what was chosen, what was refused, and what would change that. Needs no torch."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, Final, Literal

import attrs

from .errors import ConfigError
from .refusal import Refusal
from .structure import from_mapping

Status = Literal["chosen", "usable", "unjudged", "refused", "broken"]


def _plain(value: object) -> object:
    """As JSON gives it back, so that a plan equals its own round trip."""
    return json.loads(json.dumps(value))


@attrs.frozen(kw_only=True)
class NearMiss:
    """The smallest change of a request that would admit a backend.

    Attributes:
        changes: config fields and the values they would need.
        install: requirements to install.
        verified: the backend itself was asked about the changed request. It cannot be where it is not installed or
            where the change is a device that this machine lacks; then only its manifest was.
    """

    changes: dict[str, Any] = attrs.field(factory=dict, converter=_plain, hash=False)
    install: tuple[str, ...] = ()
    verified: bool = True

    def __str__(self) -> str:
        steps = [f"{name}={value}" for name, value in self.changes.items()]
        steps += [f"pip install {requirement!r}" for requirement in self.install]
        sure = "would be usable with" if self.verified else "could be usable with"
        doubt = "" if self.verified else " (by its manifest; it cannot be asked here)"
        return f"{sure} {' and '.join(steps)}{doubt}"


MATRIX_PRODUCTS: Final = "PyTorch's matrix products"  # by which core computes blocks where a kernel does not


@attrs.frozen(kw_only=True)
class BackendRow:
    """What became of one backend.

    Attributes:
        name: the backend, or the plugin where that is what broke.
        status: "chosen", "usable" (accepts the request but ranks lower), "refused", or "broken" (breaks its contract);
            for a card that is not here also "unjudged": its manifest takes the request, and what this machine lacks
            keeps it from being asked.
        kernel: the sub-kernel that it would use, or an empty string.
        refusals: every reason, where it is refused.
        near_miss: the smallest change that would admit it, where one was found.
        distribution: the installed package that it comes from.
        version: of that package.
        detail: the cause, where it is broken, or raised an error over a card that is not here; else what was noted
            about it: a slow import of its plugin, or that it would be chosen, or would take another kernel, if seq_len
            were given.
        slow: what makes it slow, in words, if it is for what no other takes (`BackendSpec.slow`).
        blocks_by_core: `MATRIX_PRODUCTS` compute blocks for it, whatever its kernel.
    """

    name: str
    status: Status
    kernel: str = ""
    refusals: tuple[Refusal, ...] = ()
    near_miss: NearMiss | None = None
    distribution: str = ""
    version: str = ""
    detail: str = ""
    slow: str = ""
    blocks_by_core: bool = False


@attrs.frozen(kw_only=True)
class LayoutSummary:
    """What a pattern was lowered to at the length it was planned for.

    Attributes:
        kinds: the layouts it needs at any length, "branch" and "block"; "band" in the place of "block" where dense
            kernels compute windows and rectangles without a table (while weights are dropped, those that have no
            windows take one); "dynamic" where blocks are chosen per call.
        seq_len: the length of the rest; without one, and of a dynamic layout, the rest is None. So is what only a
            table would tell that is larger than `Limits.layout_bytes`, where bands need none.
        digest: identifies the lowered layout.
        nbytes: memory of its tables.
        density: distinct pairs over all pairs (the causal ones, if causal).
        pairs: pairs counted with their multiplicity, over all heads, per batch row.
        distinct_pairs: the same, each pair once.
        flops: of one forward pass over `pairs`, 4 * head_dim each (two products, two operations a term).
        distinct_flops: of one forward pass over `distinct_pairs`.
        keyless_queries: queries, over all heads, that see no key; None where blocks or bands are among the kinds.
    """

    kinds: tuple[str, ...]
    seq_len: int | None = None
    digest: str | None = None
    nbytes: int | None = None
    density: float | None = None
    pairs: int | None = None
    distinct_pairs: int | None = None
    flops: int | None = None
    distinct_flops: int | None = None
    keyless_queries: int | None = None


@attrs.frozen(kw_only=True)
class ExchangeSummary:
    """What is wrapped around the chosen backend where ranks share a sequence.

    Attributes:
        transport: "gloo_cpu" or "ring_nccl".
        size: ranks that share a sequence.
        timeout_s: longest wait for another rank, see `ContextParallel`.
        companion: the backend that computes dense pieces over received rows, where the chosen one takes whole layouts
            and computes each rank's own keys; else None, the chosen one computing everything.
        companion_kernel: its pinned sub-kernel.
    """

    transport: str
    size: int
    timeout_s: float
    companion: str | None = None
    companion_kernel: str = ""


@attrs.frozen(kw_only=True)
class AttentionPlan:
    """Which backend computes an attention, and why.

    Attributes:
        config: the request, as `AttentionConfig.to_dict()` gives it.
        device: what was found on the device: type, index, name, arch, ...
        backend: the chosen backend, or None when none fits.
        kernel: its pinned sub-kernel.
        rows: one row a backend, the chosen one first, then by rank; broken plugins last. Unjudged ones stand at their
            rank, before the chosen one too.
        layout: what the pattern needs.
        compile_class: "fullgraph", "opaque" (one operator inside the graph) or "none".
        versions: of Python, torch and this package.
        exchange: what moves rows between ranks, around the backend; None where one rank has the whole sequence.
        premises: what was taken for granted, in sentences, where the card is one that is not here. A plan with premises
            is an estimate that `explain` made; no attention has one.
    """

    config: dict[str, Any] = attrs.field(converter=_plain, hash=False)
    device: dict[str, Any] = attrs.field(converter=_plain, hash=False)
    backend: str | None
    kernel: str
    rows: tuple[BackendRow, ...]
    layout: LayoutSummary
    compile_class: str
    versions: dict[str, str] = attrs.field(hash=False)
    exchange: ExchangeSummary | None = None
    premises: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits: the same request, answered by the same kernel of the same releases.

        Counters and traces name the plan so. One with premises shares its digest with no attention's.
        """
        what: list[object] = [self.config, self.backend, self.kernel, self.versions]
        if self.exchange is not None:
            what += [self.exchange.companion, self.exchange.companion_kernel]
        if self.premises:
            what += [self.device, self.premises]
        text = json.dumps(what, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:12]

    def explain(self) -> str:
        """What was chosen and why, for people: one row a backend with every reason, neither wrapped nor cut."""
        from .explain import explain_plan

        return explain_plan(self)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it again."""
        return json.dumps(attrs.asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> AttentionPlan:
        """The plan in `text`.

        Raises:
            ConfigError: for text that is no JSON, or JSON that is no plan.
        """
        try:
            parsed: object = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"a plan is JSON text: {error}") from error
        return from_mapping(cls, parsed, name="the plan")
