"""The `triton` backend: all branches of a dilated pattern, or all blocks of a table, in one fused kernel."""
