"""The language inside kernels: what it means is Gluon's matter, not Python's."""

from typing import Any

def __getattr__(name: str) -> Any: ...
