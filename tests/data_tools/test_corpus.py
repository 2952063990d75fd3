"""A split's stream is the concatenation of its documents, however it is asked for."""

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_tools.corpus import Corpus, Split
from data_tools.documents import read_documents
from data_tools.errors import UserError
from data_tools.token_files import TokenFile


def all_documents(corpus: Corpus) -> list[NDArray[np.integer]]:
    found = []
    for number in range(len(corpus.manifest.parts)):
        with TokenFile(corpus.part_prefix(number)) as file:
            found += [file.document(document) for document in range(file.header.documents)]
    return found


def stream(split: Split) -> NDArray[np.integer]:
    """The stream by the plainest route: every document of every part, those in the split kept."""
    documents = all_documents(split.corpus)
    begins = np.cumsum([0, *(len(document) for document in documents)])
    chosen = set(split.positions[:-1].tolist())
    return np.concatenate([d for d, begin in zip(documents, begins, strict=False) if int(begin) in chosen])


@given(data=st.data())
@pytest.mark.parametrize("name", ["train", "heldout"])
def test_reading_ranges_equals_slicing_the_concatenation(
    name: str, data: st.DataObject, tiny_corpus: Path
) -> None:
    split = Corpus.open(tiny_corpus).split(name)
    expected = stream(split)
    edges = st.one_of(st.sampled_from(split.starts.tolist()), st.integers(0, split.tokens))
    pairs = data.draw(st.lists(st.tuples(edges, edges).map(sorted).map(tuple), max_size=8))
    found = split.read(pairs)
    assert len(found) == len(pairs)
    for (start, stop), tokens in zip(pairs, found, strict=True):
        assert tokens.dtype == split.corpus.dtype
        np.testing.assert_array_equal(tokens, expected[start:stop])


def test_every_document_of_a_split_begins_where_starts_says_and_ends_with_the_eod(tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus)
    for name in ("train", "heldout"):
        split = corpus.split(name)
        assert split.starts.shape == (split.documents + 1,)
        assert split.starts[-1] == split.tokens
        pairs = list(zip(split.starts[:-1].tolist(), split.starts[1:].tolist(), strict=True))
        for document in split.read(pairs):
            assert document[-1] == corpus.eod
            assert corpus.eod not in document[:-1]


def test_the_splits_hold_every_document_once(tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus)
    positions = np.concatenate([corpus.split(name).positions[:-1] for name in ("train", "heldout")])
    assert len(set(positions.tolist())) == len(positions) == 60
    assert corpus.split("train").tokens + corpus.split("heldout").tokens == corpus.part_starts[-1]


def test_a_read_across_parts_and_left_out_documents_is_right(tiny_corpus: Path) -> None:
    split = Corpus.open(tiny_corpus).split("train")
    np.testing.assert_array_equal(split.read([(0, split.tokens)])[0], stream(split))


def test_a_range_outside_the_stream_is_an_index_error(tiny_corpus: Path) -> None:
    split = Corpus.open(tiny_corpus).split("train")
    for pair in [(-1, 3), (0, split.tokens + 1), (5, 4)]:
        with pytest.raises(IndexError):
            split.read([pair])


def test_an_unknown_split_names_the_known_ones(tiny_corpus: Path) -> None:
    with pytest.raises(UserError, match="heldout or train"):
        Corpus.open(tiny_corpus).split("test")


def _read_all(split: Split) -> bytes:
    return split.read([(0, split.tokens)])[0].tobytes()


def test_a_split_goes_to_other_processes_spawned_or_forked(tiny_corpus: Path) -> None:
    split = Corpus.open(tiny_corpus).split("train")
    expected = _read_all(split)  # the descriptors are open before the fork
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(_read_all, [split] * 4) == [expected] * 4


def test_more_parts_than_open_files_are_read(tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.corpus._OPEN_FILES", 1)
    split = Corpus.open(tiny_corpus).split("train")
    expected = stream(split)
    for start in range(0, split.tokens - 100, 1777):
        np.testing.assert_array_equal(split.read([(start, start + 100)])[0], expected[start : start + 100])


@pytest.fixture
def copy(tiny_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus, tmp_path / "copy"))


def files_of(corpus: Path) -> list[Path]:
    tables = [path for path in corpus.rglob("*") if path.is_file() and path.suffix != ".json"]
    return sorted(path for path in tables if path.name != "tokenizer.model")


def test_a_file_that_is_cut_grown_or_missing_is_named_at_opening(copy: Path) -> None:
    for path in files_of(copy):
        content = path.read_bytes()
        for damaged in (content[:-1], content + b"x"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                Corpus.open(copy)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            Corpus.open(copy)
        path.write_bytes(content)
    Corpus.open(copy)


def test_a_part_of_another_corpus_is_refused_at_opening(copy: Path) -> None:
    index = next(copy.rglob("*.idx"))
    content = bytearray(index.read_bytes())
    content[17] = 4  # int32 instead of uint16
    index.write_bytes(content)
    with pytest.raises(UserError, match=index.stem):
        Corpus.open(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "not the description"),
        (b'{"format": "pmc-llama corpus", "version": 9}', "not the description"),
        (b'{"format": "pmc-llama corpus", "version": 1}', "damaged"),
        (b'{"format": "pmc-llama corpus", "version": 1, "tokenizer": 3}', "damaged"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_damaged_corpus_json_is_one_sentence(content: bytes, message: str, copy: Path) -> None:
    (copy / "corpus.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Corpus.open(copy)


def test_a_directory_that_is_no_corpus_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a corpus"):
        Corpus.open(tmp_path)


def test_the_tables_name_every_document_in_order(tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus)
    paths = [f"{corpus.part_prefix(number)}.documents.parquet" for number in range(3)]
    table = read_documents(map(Path, paths), ["pmc_id", "tokens"])
    assert table["tokens"].to_pylist() == [len(document) for document in all_documents(corpus)]
    assert len(set(table["pmc_id"].to_pylist())) == 60
