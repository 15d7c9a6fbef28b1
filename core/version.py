"""The version of this package; `pyproject.toml` says the same, and a test keeps the two together."""

VERSION = "0.1.0"
