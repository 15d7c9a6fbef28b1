"""The compiled part of xformers."""

_built_with_cuda: bool
