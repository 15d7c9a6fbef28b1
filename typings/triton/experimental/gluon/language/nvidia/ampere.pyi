"""What Ampere brought."""

from typing import Any

async_copy: Any
