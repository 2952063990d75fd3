"""Token files are Megatron's, byte for byte, and a damaged one is refused with one sentence."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.files import checksum, publish
from data_tools.merge import merge
from data_tools.token_files import TokenFile, TokenFileWriter, bin_path, idx_path, read_header

UINT16, INT32 = np.dtype("<u2"), np.dtype("<i4")
DOCUMENTS = st.lists(st.lists(st.integers(0, 65_499), min_size=1, max_size=40), min_size=1, max_size=30)


def write(prefix: Path, documents: list[list[int]], dtype: np.dtype = UINT16) -> Path:
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype))
    return prefix


def write_with_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """Documents of several sequences each."""
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for sequences in documents:
        tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
        builder.add_document(tokens, [len(sequence) for sequence in sequences])
    builder.finalize(str(idx_path(prefix)))
    return prefix


@pytest.mark.parametrize(("dtype", "theirs"), [(UINT16, np.uint16), (INT32, np.int32)])
@given(documents=DOCUMENTS)
def test_both_files_equal_megatrons_byte_for_byte(
    documents: list[list[int]], dtype: np.dtype, theirs: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("pair")
    ours = write(directory / "ours", documents, dtype)
    other = write_with_megatron(directory / "theirs", [[document] for document in documents], theirs)
    assert bin_path(ours).read_bytes() == bin_path(other).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(other).read_bytes()


@given(documents=DOCUMENTS)
def test_megatron_reads_what_we_write(
    documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    dataset = IndexedDataset(str(write(tmp_path_factory.mktemp("file") / "x", documents)))
    assert [dataset[number].tolist() for number in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))


@given(documents=st.lists(DOCUMENTS, min_size=1, max_size=6))
def test_we_read_what_megatron_writes_even_documents_of_several_sequences(
    documents: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = write_with_megatron(tmp_path_factory.mktemp("file") / "x", documents)
    with TokenFile(prefix) as file:
        file.verify()
        assert file.header.documents == len(documents)
        for number, sequences in enumerate(documents):
            assert file.document(number).tolist() == [token for sequence in sequences for token in sequence]


@pytest.mark.parametrize("theirs", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
@given(data=st.data())
def test_we_read_every_integer_dtype_that_megatron_writes(
    theirs: type, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    info = np.iinfo(theirs)
    ids = st.integers(int(info.min), int(info.max))
    documents = data.draw(st.lists(st.lists(ids, min_size=1, max_size=20), min_size=1, max_size=9))
    prefix = write_with_megatron(
        tmp_path_factory.mktemp("file") / "x", [[document] for document in documents], theirs
    )
    with TokenFile(prefix) as file:
        file.verify()
        assert file.header.dtype == np.dtype(theirs)
        assert [file.document(number).tolist() for number in range(len(documents))] == documents


@pytest.mark.parametrize("theirs", [np.float32, np.float64])
def test_a_file_of_floats_is_refused(theirs: type, tmp_path: Path) -> None:
    prefix = write_with_megatron(tmp_path / "x", [[[1, 2]]], theirs)
    with pytest.raises(UserError, match=r"x\.idx is of float.* no token ids"):
        TokenFile(prefix)


def test_a_multimodal_file_is_refused_as_such(tmp_path: Path) -> None:
    prefix = tmp_path / "x"
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16, multimodal=True)
    for document in ([1, 2], [3], [4, 5, 6]):
        builder.add_document(torch.tensor(document), [len(document)], [1])
    builder.finalize(str(idx_path(prefix)))
    assert IndexedDataset(str(prefix), multimodal=True)[2][1] == 1  # it is one
    with pytest.raises(UserError, match=r"x\.idx .* multimodal"):
        TokenFile(prefix)


@given(first=st.lists(DOCUMENTS, min_size=1, max_size=4), second=DOCUMENTS)
def test_we_read_what_megatron_merges_of_its_files_and_ours(
    first: list[list[list[int]]], second: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("merge")
    theirs = write_with_megatron(directory / "theirs", first)
    ours = write(directory / "ours", second)
    merged = directory / "merged"
    builder = IndexedDatasetBuilder(str(bin_path(merged)), dtype=np.uint16)
    for prefix in (theirs, ours):
        builder.add_index(str(prefix))
    builder.finalize(str(idx_path(merged)))
    expected = [[id_ for sequence in document for id_ in sequence] for document in first] + second
    with TokenFile(merged) as file:
        file.verify()
        assert [file.document(number).tolist() for number in range(file.header.documents)] == expected


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_our_merge_is_byte_for_byte_what_megatrons_builder_writes_of_its_documents(
    split: str, tiny_corpus: Path, tmp_path: Path
) -> None:
    merge(tiny_corpus, tmp_path / "ours", split)
    stream = Corpus.open(tiny_corpus).split(split)
    ranges = list(zip(stream.starts[:-1].tolist(), stream.starts[1:].tolist(), strict=True))
    documents = [[document.tolist()] for document in stream.read(ranges)]
    write_with_megatron(tmp_path / "theirs", documents)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@given(documents=DOCUMENTS, data=st.data())
def test_any_range_of_positions_is_that_range_of_the_concatenation(
    documents: list[list[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flat = [token for document in documents for token in document]
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    with TokenFile(write(tmp_path_factory.mktemp("file") / "x", documents)) as file:
        assert file.read(start, stop).tolist() == flat[start:stop]
        assert file.header.tokens == len(flat)


def test_the_checksums_of_the_writer_are_those_of_the_files(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "x", UINT16) as writer:
        writer.add(np.arange(100, dtype=UINT16))
    assert writer.bin_checksum == checksum(tmp_path / "x.bin")
    assert writer.idx_checksum == checksum(tmp_path / "x.idx")


def test_a_file_without_documents_can_be_written_and_read(tmp_path: Path) -> None:
    with TokenFile(write(tmp_path / "x", [])) as file:
        file.verify()
        assert (file.header.documents, file.header.tokens) == (0, 0)


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail_midway() -> None:
        with TokenFileWriter(tmp_path / "x", UINT16) as writer:
            writer.add(np.arange(5, dtype=UINT16))
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert list(tmp_path.iterdir()) == []


def test_until_the_writer_is_done_the_old_pair_stands_whole(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3]])
    with TokenFileWriter(prefix, UINT16) as writer:
        writer.add(np.arange(9, dtype=UINT16))
        with TokenFile(prefix) as old:
            assert old.document(0).tolist() == [1, 2, 3]
    with TokenFile(prefix) as new:
        assert new.document(0).tolist() == list(range(9))


@pytest.mark.parametrize("published", [0, 1])
def test_a_stop_between_the_two_files_never_leaves_an_index_beside_other_ids(
    published: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3]])
    steps = iter(range(2))

    def stop_after_some(path: Path) -> None:
        if next(steps) == published:
            raise KeyboardInterrupt
        publish(path)

    monkeypatch.setattr("data_tools.token_files.publish", stop_after_some)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [[4, 5, 6]])
    assert not idx_path(prefix).exists()


def test_a_document_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="int64"), TokenFileWriter(tmp_path / "x", UINT16) as writer:
        writer.add(np.arange(5))


def test_an_index_cut_at_any_byte_is_refused_by_name(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    whole = idx_path(prefix).read_bytes()
    for length in range(len(whole)):
        idx_path(prefix).write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.idx.*found \d+ bytes, expected"):
            TokenFile(prefix)


def test_a_bin_cut_at_any_byte_or_grown_is_refused_by_name(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    whole = bin_path(prefix).read_bytes()
    for content in [*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + b"\0\0"]:
        bin_path(prefix).write_bytes(content)
        with pytest.raises(UserError, match=rf"x\.bin.*found {len(content)} bytes, expected"):
            TokenFile(prefix)


@pytest.mark.parametrize(
    ("offset", "replacement", "message"),
    [
        (0, b"X", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "float64 numbers .* no token ids"),
        (17, b"\x07", "float32 numbers .* no token ids"),
        (17, b"\x00", "dtype code 0"),
        (17, b"\x09", "dtype code 9"),
        (18, struct.pack("<Q", 2), "expected"),
        (18, struct.pack("<Q", 2**63), "expected"),
        (26, struct.pack("<Q", 0), "expected"),
        (34 + 12 * 3, struct.pack("<q", 1), "documents do not run"),
        (34 + 12 * 3 + 8 * 3, struct.pack("<q", 2), "documents do not run"),
    ],
)
def test_a_garbled_header_or_edge_is_refused_at_opening(
    offset: int, replacement: bytes, message: str, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    content = bytearray(idx_path(prefix).read_bytes())
    content[offset : offset + len(replacement)] = replacement
    idx_path(prefix).write_bytes(content)
    with pytest.raises(UserError, match=message):
        TokenFile(prefix)


def test_verify_finds_any_changed_entry_of_the_index(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    whole = idx_path(prefix).read_bytes()
    for place in range(34, len(whole)):
        content = bytearray(whole)
        content[place] ^= 0x81
        idx_path(prefix).write_bytes(content)
        with pytest.raises(UserError, match=r"x\.(idx|bin)"), TokenFile(prefix) as file:
            file.verify()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1]])
    bin_path(prefix).unlink()
    with pytest.raises(UserError, match=r"x\.bin"):
        read_header(prefix)


def test_a_bin_that_shrinks_under_an_open_reader_is_an_error_not_zeros(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3, 4]])
    with TokenFile(prefix) as file:
        with bin_path(prefix).open("r+b") as stream:
            stream.truncate(5)
        with pytest.raises(UserError, match="cut short"):
            file.read(0, 4)
