"""Every error the package raises on purpose. All derive from `DilatedAttentionError`."""


class DilatedAttentionError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(DilatedAttentionError, ValueError):
    """A configuration or call that cannot be honoured; the message names the actual and the allowed value."""


class NoBackendError(DilatedAttentionError):
    """No backend can honour the configuration; the message is the explain table with every refusal."""


class PatternFileError(DilatedAttentionError, ValueError):
    """A stored pattern that is damaged, foreign, too large, or does not fit the sequence it is used with."""


class UnsafePathError(DilatedAttentionError, ValueError):
    """A pattern name or path that would leave the store's root."""


class PluginError(DilatedAttentionError):
    """A plugin that does not honour the contract; the message names its distribution and version."""


class RingBroken(DilatedAttentionError, RuntimeError):  # noqa: N818 - the name is part of the public contract
    """A context-parallel pass failed; the communicator is closed and must be rebuilt by its caller."""
