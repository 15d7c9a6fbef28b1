"""Every error the package raises on purpose. All derive from `DilatedAttentionError`."""

from __future__ import annotations


class DilatedAttentionError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(DilatedAttentionError, ValueError):
    """A configuration or call that cannot be honoured; the message names the actual and the allowed value."""


class NoBackendError(DilatedAttentionError):
    """No backend can honour the configuration; the message is the explain table with every refusal."""


class PatternFileError(DilatedAttentionError, ValueError):
    """A stored pattern that is damaged, foreign, too large, or does not fit the sequence it is used with."""


class PatternNotFoundError(PatternFileError, FileNotFoundError):
    """No stored pattern has that name."""


class UnsafePathError(DilatedAttentionError, ValueError):
    """A pattern name or path that would leave the store's root."""


class PluginError(DilatedAttentionError):
    """A plugin that does not honour the contract; the message names its distribution and version."""


class RingBroken(DilatedAttentionError, RuntimeError):  # noqa: N818 - the name is part of the public contract
    """A context-parallel pass failed; the communicator is closed and must be rebuilt by its caller.

    Attributes:
        generation: of the communicator that broke.
        step: the pass in which it broke, counted from 1; 0 while it was set up.
        peer: the rank that failed, as far as this one knows; itself where the failure was its own, None where no
            single one is to blame.
        reason: what happened.
    """

    def __init__(self, generation: int, step: int, peer: int | None, reason: str) -> None:
        who = "" if peer is None else f", rank {peer}"
        super().__init__(f"the ring is broken (generation {generation}, pass {step}{who}): {reason}")
        self.generation = generation
        self.step = step
        self.peer = peer
        self.reason = reason

    def __reduce__(self) -> tuple[type[RingBroken], tuple[int, int, int | None, str]]:
        return type(self), (self.generation, self.step, self.peer, self.reason)
