"""The compiled part of xformers."""

_built_with_cuda: bool
_cpp_library_load_exception: Exception | None
