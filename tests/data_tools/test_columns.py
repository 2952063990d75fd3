"""Columns hold the values they were made of, and give them back."""

from typing import Any

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from data_tools.columns import column, given, numbers

_VALUES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (pa.bool_(), st.booleans()),
    (pa.int16(), st.integers(-(2**15), 2**15 - 1)),
    (pa.int32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.string(), st.text()),
    (pa.binary(5), st.binary(min_size=5, max_size=5)),
    (pa.list_(pa.int32()), st.lists(st.integers(-(2**31), 2**31 - 1))),
]


@pytest.mark.parametrize(("kind", "values"), _VALUES, ids=[str(kind) for kind, _ in _VALUES])
@hypothesis.given(data=st.data())
def test_a_column_is_the_one_that_pyarrow_makes(
    kind: Any, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.none() | values, max_size=40))

    made = column(chosen, kind)

    made.validate(full=True)
    assert made.equals(pa.array(chosen, kind))
    assert made.to_pylist() == chosen


@hypothesis.given(
    st.lists(st.none() | st.integers(-(2**15), 2**15 - 1), max_size=40),
    st.sampled_from([pa.int16(), pa.int32(), pa.int64(), pa.bool_()]),
    st.integers(0, 10),
)
def test_numbers_are_those_of_the_column(values: list[int | None], kind: Any, skipped: int) -> None:
    if kind == pa.bool_():
        values = [None if value is None else value > 0 for value in values]
    array = pa.array(values, kind).slice(skipped)

    assert numbers(array).tolist() == [value or 0 for value in values[skipped:]]
    assert given(array).tolist() == [value is not None for value in values[skipped:]]
