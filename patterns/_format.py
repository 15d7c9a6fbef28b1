"""The bytes of a stored pattern: a safetensors file in one canonical form, so that any other byte is an error.

The header's `__metadata__` holds two strings: `pattern`, a JSON document, and `digest`, the SHA-256 over that document
and all tensors. Documents and headers have one spelling (sorted keys, no spaces but the header's padding), and a file
is read by writing what it seems to say and comparing: repeated keys, padding and gaps all fail that comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..core.errors import PatternFileError

Arrays = Mapping[str, NDArray[Any]]

_MAX_HEADER_BYTES: Final = 1 << 20
_DTYPES: Final = {"<i8": "I64", "<i4": "I32", "|u1": "U8"}
_BY_NAME: Final = {name: np.dtype(code) for code, name in _DTYPES.items()}


def encode(document: Mapping[str, Any], arrays: Arrays) -> bytes:
    """The file for a JSON document and its arrays (int64, int32 or uint8)."""
    text = _canonical(document)
    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    header: dict[str, Any] = {"__metadata__": {"digest": _digest(text, ordered), "pattern": text}}
    end = 0
    for name, array in ordered.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": [begin, end]}
    head = _canonical(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(array.tobytes() for array in ordered.values())])


def decode(content: bytes, source: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The document and the arrays (read-only views of `content`) of a file, or `PatternFileError`; `source` names it.

    Nothing is allocated beyond the header, and nothing is returned unless the whole file is what `encode` writes.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= length <= min(len(content) - 8, _MAX_HEADER_BYTES):
        raise PatternFileError(f"{source} is no safetensors file: it has {len(content):,} bytes and no whole header")
    header = _object(content[8 : 8 + length], f"the header of {source}")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {"digest", "pattern"}:
        raise PatternFileError(f"{source} holds no pattern of this package")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise PatternFileError(f"{source} has metadata that are no strings")
    arrays = {name: _array(name, entry, content, 8 + length, source) for name, entry in header.items()}
    document = _object(metadata["pattern"].encode("utf-8", "surrogatepass"), f"the document of {source}")
    try:
        same = encode(document, arrays) == content
    except (ValueError, RecursionError):  # NaN, lone surrogates: nothing that is ever written
        same = False
    if not same:
        raise PatternFileError(f"{source} is damaged: its digest or its layout is not that of its content")
    return document, arrays


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(text: str, arrays: Arrays) -> str:
    sha = hashlib.sha256(text.encode())
    for name, array in arrays.items():
        sha.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PatternFileError(f"{what} is no JSON: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise PatternFileError(f"{what} is a {type(value).__name__}, not an object")
    return value


def _array(name: str, entry: object, content: bytes, begin: int, source: str) -> NDArray[Any]:
    """One tensor as a view; its place and size must lie within the file."""
    problem = PatternFileError(f"{source} describes its tensor {name[:40]!r} wrongly")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise problem
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BY_NAME or not _sizes(shape) or not _sizes(offsets):
        raise problem
    count = 1
    for size in shape:
        count *= size
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] or len(shape) > 3:
        raise problem
    if begin + offsets[1] > len(content):
        raise PatternFileError(
            f"{source} is cut off: it has {len(content):,} bytes, and its tensor {name[:40]!r} ends after "
            f"{begin + offsets[1]:,}; copy or save it again"
        )
    if count * _BY_NAME[dtype].itemsize != offsets[1] - offsets[0]:
        raise problem
    try:
        if not count:
            return np.zeros(shape, dtype=_BY_NAME[dtype])
        flat = np.frombuffer(content, dtype=_BY_NAME[dtype], count=count, offset=begin + offsets[0])
        return flat.reshape(shape)
    except ValueError as error:  # a shape beyond numpy
        raise problem from error


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
