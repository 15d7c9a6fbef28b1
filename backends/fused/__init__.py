"""The `triton` backend: all branches of a dilated pattern in one fused kernel."""
