"""A flat range is told as rectangles that cover it exactly, in order."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from pmc_llama.backends.flat_shard import FlatShard, rectangles

shapes = st.one_of(
    st.tuples(st.integers(1, 50)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[torch.Size, int, int]:
    shape = torch.Size(draw(shapes))
    start = draw(st.integers(0, shape.numel()))
    return shape, start, draw(st.integers(start, shape.numel()))


@given(ranges())
def test_rectangles_cover_the_range_once_and_are_three_at_most(case: tuple[torch.Size, int, int]) -> None:
    shape, start, stop = case
    found = rectangles(shape, start, stop)
    assert len(found) <= 3
    seen = torch.zeros(shape)
    for offsets, sizes, _ in found:
        window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        seen[window] += 1
    expected = torch.zeros(shape.numel())
    expected[start:stop] = 1
    assert torch.equal(seen.flatten(), expected)


@given(ranges())
def test_what_is_written_into_the_pieces_lands_in_the_flat_memory(case: tuple[torch.Size, int, int]) -> None:
    shape, start, stop = case
    whole = torch.arange(float(shape.numel())).view(shape)
    shard = FlatShard(torch.zeros(stop - start), start, shape)
    assert shard.size() == shape
    for chunk in shard.__create_chunk_list__():
        window = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        shard.__get_tensor_shard__(MetadataIndex("name", chunk.offsets)).copy_(whole[window])
    assert torch.equal(shard.local, whole.flatten()[start:stop])


@given(ranges())
def test_written_items_name_the_same_rectangles(case: tuple[torch.Size, int, int]) -> None:
    shape, start, stop = case
    shard = FlatShard(torch.zeros(stop - start), start, shape)
    items = shard.__create_write_items__("name", shard)
    assert [item.tensor_data.chunk for item in items] == shard.__create_chunk_list__()
    assert all(item.tensor_data.size == shape for item in items)
