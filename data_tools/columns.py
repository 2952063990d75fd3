"""Arrow columns from Python values, and numbers from Arrow columns.

`pyarrow.array` and `to_numpy` do this too, but import pandas first wherever that is installed: a quarter of a
second in every process of a build.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def column(values: Sequence[Any], kind: Any) -> Any:
    """The `pyarrow.Array` of some values, each of which may be None.

    Args:
        values: of Python types that fit.
        kind: a `pyarrow.DataType`: a boolean, an integer, a string, fixed binary, or a list of integers.
    """
    known = np.array([value is not None for value in values], np.bool_)
    buffers, children = _buffers(values, kind)
    return pa.Array.from_buffers(kind, len(values), [_bits(known), *buffers], children=children)


def numbers(array: Any, null: int = 0) -> NDArray[Any]:
    """The values of a `pyarrow.Array` of booleans or integers, with `null` where there is none: `[rows]`."""
    content, rows = array.buffers()[1], slice(array.offset, array.offset + len(array))
    if not len(array):
        values = np.empty(0, str(array.type))
    elif pa.types.is_boolean(array.type):
        values = _flags(content, rows)
    else:
        values = np.frombuffer(content, str(array.type))[rows]
    return np.where(given(array), values, values.dtype.type(null))


def given(array: Any) -> NDArray[np.bool_]:
    """Where a `pyarrow.Array` has a value: `[rows]`."""
    bits = array.buffers()[0]
    if bits is None:
        return np.ones(len(array), np.bool_)
    return _flags(bits, slice(array.offset, array.offset + len(array)))


def _buffers(values: Sequence[Any], kind: Any) -> tuple[list[Any], list[Any] | None]:
    """The buffers of the values behind that which says where there are any, and the columns within."""
    if pa.types.is_fixed_size_binary(kind):
        nothing = bytes(kind.byte_width)
        return [pa.py_buffer(b"".join(value or nothing for value in values))], None
    if pa.types.is_string(kind):
        texts = [(value or "").encode() for value in values]
        return [_offsets(texts), pa.py_buffer(b"".join(texts))], None
    if pa.types.is_list(kind):
        lists = [value or () for value in values]
        return [_offsets(lists)], [column([item for items in lists for item in items], kind.value_type)]
    numbers = [value or 0 for value in values]
    if pa.types.is_boolean(kind):
        return [_bits(np.array(numbers, np.bool_))], None
    return [pa.py_buffer(np.array(numbers, str(kind)))], None


def _bits(flags: NDArray[np.bool_]) -> Any:
    return pa.py_buffer(np.packbits(flags, bitorder="little"))


def _flags(bits: Any, rows: slice) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[rows].view(np.bool_)


def _offsets(items: Sequence[Any]) -> Any:
    """Where each item begins, int32 `[items + 1]`."""
    offsets = np.zeros(len(items) + 1, np.int32)
    np.cumsum([len(item) for item in items], out=offsets[1:])
    return pa.py_buffer(offsets)
