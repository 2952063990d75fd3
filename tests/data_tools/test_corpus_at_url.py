"""A corpus at a URL reads like one in a directory, by ranges, and says what is wrong with it."""

import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_tools.corpus import Corpus, Split
from data_tools.errors import UserError
from data_tools.storage import UrlStorage


@pytest.fixture
def url(tiny_corpus: Path) -> Iterator[str]:
    """The corpus in a store that answers by ranges, as an object store does."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in tiny_corpus.rglob("*"):
        if path.is_file():
            files.pipe(f"/bucket/corpus/{path.relative_to(tiny_corpus)}", path.read_bytes())
    yield "memory://bucket/corpus"
    files.store.clear()


def some_ranges(split: Split) -> list[tuple[int, int]]:
    bounds = np.random.default_rng(0).integers(0, split.tokens + 1, (50, 2))
    pairs = [(min(a, b), max(a, b)) for a, b in bounds.tolist()]
    return [*pairs, (0, split.tokens), (0, 0), (split.tokens, split.tokens)]


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_it_has_the_documents_and_tokens_of_the_directory(name: str, url: str, tiny_corpus: Path) -> None:
    here, there = Corpus.open(tiny_corpus).split(name), Corpus.open(url).split(name)
    assert there.corpus.fingerprint == here.corpus.fingerprint
    np.testing.assert_array_equal(there.starts, here.starts)
    np.testing.assert_array_equal(there.positions, here.positions)
    ranges = some_ranges(here)
    for expected, found in zip(here.read(ranges), there.read(ranges), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_of_the_token_files_nothing_is_fetched_but_what_is_asked_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    fetch = MemoryFileSystem.cat_file

    def noted(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        content: bytes = fetch(self, path, start, end)
        fetched.append((path, len(content)))
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    split = Corpus.open(url).split("train")
    assert not [path for path, _ in fetched if "/parts/" in path]
    split.read([(10, 110), (split.tokens - 100, split.tokens)])
    assert sum(size for path, size in fetched if path.endswith(".bin")) == 200 * split.corpus.dtype.itemsize


def _first_tokens(split: Split) -> bytes:
    return split.read([(0, 500)])[0].tobytes()


def test_it_goes_to_other_processes(url: str, tiny_corpus: Path) -> None:
    in_memory = Corpus.open(url).split("train")
    assert _first_tokens(pickle.loads(pickle.dumps(in_memory))) == _first_tokens(in_memory)
    split = Corpus(UrlStorage(f"file://{tiny_corpus}"), in_memory.corpus.manifest).split("train")
    expected = _first_tokens(split)  # the file system is in use before the fork
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(_first_tokens, [split] * 2) == [expected] * 2


def test_its_tokenizer_can_be_opened_here_and_its_directory_cannot(url: str, tiny_corpus: Path) -> None:
    corpus = Corpus.open(f"{url}/")
    assert corpus.tokenizer_path.read_bytes() == (tiny_corpus / "tokenizer.model").read_bytes()
    with pytest.raises(UserError, match="memory://bucket/corpus is not on this machine; copy it here"):
        corpus.part_prefix(0)


def test_a_file_url_is_the_directory(tiny_corpus: Path) -> None:
    corpus = Corpus.open(f"file://{tiny_corpus}")
    assert corpus.directory == tiny_corpus
    assert corpus.location == str(tiny_corpus)
    here = Corpus.open(tiny_corpus).split("train")
    assert _first_tokens(corpus.split("train")) == _first_tokens(here)


def test_a_file_that_is_cut_grown_or_missing_is_named_at_opening(url: str) -> None:
    files = fsspec.filesystem("memory")
    for path in [path for path in files.find("/bucket/corpus") if not path.endswith(".json")]:
        content = files.cat_file(path)
        for damaged in {content[:-1], content + b"x"} - {content}:
            files.pipe(path, damaged)
            with pytest.raises(UserError, match=path.rpartition("/")[2]):
                Corpus.open(url)
        files.rm(path)
        with pytest.raises(UserError, match=path.rpartition("/")[2]):
            Corpus.open(url)
        files.pipe(path, content)
    Corpus.open(url)


def test_a_file_that_is_cut_or_lost_while_it_is_read_is_named(url: str) -> None:
    files = fsspec.filesystem("memory")
    split = Corpus.open(url).split("train")
    path = "/bucket/corpus/parts/part-00002.bin"
    files.pipe(path, files.cat_file(path)[:-2])
    with pytest.raises(UserError, match=r"part-00002\.bin is cut short: it ends at byte"):
        split.read([(0, split.tokens)])
    files.rm(path)
    with pytest.raises(UserError, match=r"part-00002\.bin"):
        split.read([(0, split.tokens)])


def test_no_corpus_and_no_such_protocol_are_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match="memory://bucket/elsewhere is not a corpus"):
        Corpus.open("memory://bucket/elsewhere")
    with pytest.raises(UserError, match="nosuch://bucket/corpus"):
        Corpus.open("nosuch://bucket/corpus")
    with pytest.raises(UserError, match="was given with a password") as error:
        Corpus.open("s3://key:secret@host/corpus")
    assert "secret" not in str(error.value)
