"""Measurements beside the package: what it is compared with lives here, not in the wheel."""
