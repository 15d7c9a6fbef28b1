"""Masks."""

class LowerTriangularMask:
    """Query i sees keys j <= i."""
