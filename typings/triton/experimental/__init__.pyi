"""Triton's experiments."""
