"""Its compiler."""

from typing import Any

ir: Any
