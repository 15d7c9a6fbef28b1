"""Numbers as the kernels hand them to functions of others."""

from typing import Any

def scalar_to_ssa(a: Any, dtype: Any) -> Any: ...
