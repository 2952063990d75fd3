"""A split's stream is the concatenation of its documents, however it is asked for."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

from data_tools.build import build
from data_tools.corpus import Corpus, Split
from data_tools.documents import read_documents
from data_tools.errors import UserError
from data_tools.recipe import Decisions, Recipe
from data_tools.token_files import TokenFile
from tests.data_tools.sources import simple_record, write_jsonl


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
    for pair in [(-1, 3), (0, split.tokens + 1), (5, 4), (0, 10**30)]:
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
    monkeypatch.setattr("data_tools.storage._OPEN_FILES", 1)
    split = Corpus.open(tiny_corpus).split("train")
    expected = stream(split)
    for start in range(0, split.tokens - 100, 1777):
        np.testing.assert_array_equal(split.read([(start, start + 100)])[0], expected[start : start + 100])


@pytest.fixture
def copy(tiny_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus, tmp_path / "copy"))


def files_of(corpus: Path) -> list[Path]:
    return sorted(path for path in corpus.rglob("*") if path.is_file() and path.suffix != ".json")


def test_a_file_that_is_cut_grown_or_missing_is_named_at_opening(copy: Path) -> None:
    for path in files_of(copy):
        content = path.read_bytes()
        for damaged in {content[:-1], content + b"x"} - {content}:
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                Corpus.open(copy)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            Corpus.open(copy)
        path.write_bytes(content)
    Corpus.open(copy)


def test_a_file_that_is_cut_or_lost_while_it_is_read_is_named(copy: Path) -> None:
    split = Corpus.open(copy).split("train")
    path = split.corpus.part_prefix(2).with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"part-00002\.bin is cut short: it ends at byte"):
        split.read([(0, split.tokens)])
    split.corpus.close()
    path.unlink()
    with pytest.raises(UserError, match=r"part-00002\.bin cannot be read: No such file"):
        split.read([(0, split.tokens)])


def test_a_part_whose_tokens_do_not_fill_its_file_is_refused_at_opening(copy: Path) -> None:
    path = copy / "corpus.json"
    content = json.loads(path.read_bytes())
    content["parts"][1]["tokens"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"corpus\.json is damaged: part-00001 has \d+ tokens"):
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
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_corpus_json_is_one_sentence(content: bytes, message: str, copy: Path) -> None:
    (copy / "corpus.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Corpus.open(copy)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["dtype"], "float32", "dtype 'float32'"),
        (["dtype"], ["uint16"], "dtype is not of type str"),
        (["tokenizer", "vocab_size"], "400", r"tokenizer\.vocab_size is not of type int"),
        (["tokenizer", "eos"], 400, "EOD is not in the vocabulary"),
        (["parts"], [], "it names no parts"),
        (["parts"], {}, "parts is not of type list"),
        (["parts", 0, "tokens"], 1.5, r"parts\[0\]\.tokens is not of type int"),
        (["parts", 0, "documents"], -1, "negative"),
        (["parts", 0, "documents"], True, "not of type int"),
        (["parts", 0, "name"], "../../elsewhere", "not named part-N"),
        (["parts", 0, "files"], {}, "a part lacks a file"),
        (["parts", 0, "files", "bin"], None, r"files\.bin has to be an object"),
        (["splits"], {}, "splits are not train and heldout"),
        (["splits", "train", "documents"], 10**30, "not those kept"),
        (["splits", "train", "tokens"], 10**30, "more tokens than the parts"),
        (["splits", "train", "file", "bytes"], "1", "not of type int"),
        (["counts", "kept"], None, "not of type int"),
        (["counts", "left_out"], {"retracted": "1"}, "not of type int"),
        (["counts", "examples"], {"retracted": [1]}, "not of type str"),
        (["recipe", "decisions", "heldout"], "0.1", "not of type float"),
        (["more"], 1, "has to be an object with the keys"),
    ],
)
def test_a_value_of_corpus_json_that_cannot_be_is_named(
    keys: list[str | int], value: object, message: str, copy: Path
) -> None:
    content = json.loads((copy / "corpus.json").read_bytes())
    target = content
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    (copy / "corpus.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"corpus.json is damaged: .*{message}"):
        Corpus.open(copy)


def test_a_split_file_of_other_numbers_is_refused(copy: Path) -> None:
    path = Corpus.open(copy).split("train").path
    whole = np.load(path)
    documents = Corpus.open(copy).split("train").documents
    for changed in (
        whole.astype(np.float64),
        whole.reshape(1, -1),
        whole[:-1],
        whole[: documents + 1],
        np.where(np.arange(len(whole)) == documents, whole + 1, whole),
        np.where(np.arange(len(whole)) == len(whole) - 1, whole - 1, whole),
        np.where(np.arange(len(whole)) == len(whole) - 2, whole - 1, whole),
        np.where(np.arange(len(whole)) == documents + 1, whole - 10**12, whole),
        np.where(np.arange(len(whole)) == documents + 2, whole + 10**12, whole),
    ):
        np.save(path, changed)
        with pytest.raises(UserError, match=rf"{path.name} (is damaged|does not fit)"):
            Corpus.open(copy).split("train")


def test_a_garbled_header_of_a_split_is_one_sentence(copy: Path) -> None:
    path = Corpus.open(copy).split("train").path
    content = path.read_bytes()
    for place in range(128):
        for byte in (0, ord("("), ord("'"), 0xFF):
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            try:
                Corpus.open(copy).split("train")
            except UserError as error:
                assert path.name in str(error)  # noqa: PT017


def test_a_tokenizer_of_the_same_size_that_made_other_ids_is_refused_at_opening(copy: Path) -> None:
    content = bytearray((copy / "tokenizer.model").read_bytes())
    content[-1] ^= 1
    (copy / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is damaged"):
        Corpus.open(copy)


def test_every_range_of_every_part_is_announced_before_the_first_is_read(
    tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, int, int]] = []

    def path_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").resolve().name

    advise, read = os.posix_fadvise, os.preadv

    def announced(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append(("announce", path_of(descriptor), offset, length))
        advise(descriptor, offset, length, advice)

    def was_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(("read", path_of(descriptor), offset, sum(map(len, buffers))))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "posix_fadvise", announced)
    monkeypatch.setattr(os, "preadv", was_read)
    split = Corpus.open(tiny_corpus).split("train")
    split.read([(split.tokens - 300, split.tokens), (0, 300), (split.tokens // 2, split.tokens // 2 + 50)])
    kinds = [call[0] for call in calls]
    assert kinds == sorted(kinds)  # "announce" before "read"
    ranges = {kind: [call[1:] for call in calls if call[0] == kind] for kind in ("announce", "read")}
    assert ranges["announce"] == ranges["read"]
    assert len({name for name, _, _ in ranges["read"]}) > 1


def test_the_fingerprint_changes_with_a_token_a_decision_and_the_tokenizer(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    def fingerprint(records: list[object], name: str, tokenizer: Path = tiny_tokenizer) -> str:
        source = write_jsonl(tmp_path / "papers.jsonl", records)
        options = Recipe(decisions=Decisions(heldout=0.0))
        build([source], tokenizer, tmp_path / name, options, workers=1)
        return Corpus.open(tmp_path / name).fingerprint

    records = [simple_record(number) for number in range(4)]
    first = fingerprint(records, "first")
    assert fingerprint(records, "again") == first

    other_word = json.loads(json.dumps(records).replace("patients", "patiends", 1))
    token = fingerprint(other_word, "token")

    # The third paper takes the PMC id of the first: its tokens stay, it no longer counts.
    duplicate = [*records[:2], simple_record(2, pmc_id="1000"), records[3]]
    decision = fingerprint(duplicate, "decision")

    # Other scores for pieces that the papers never need give the same ids with another model.
    model = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer.read_bytes())
    model.trainer_spec.input.append("renamed")
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    tokenizer = fingerprint(records, "tokenizer", tmp_path / "other.model")

    def ids(name: str) -> bytes:
        return (tmp_path / name / "parts" / "part-00000.bin").read_bytes()

    assert ids("decision") == ids("tokenizer") == ids("first")
    assert len({first, token, decision, tokenizer}) == 4


def test_a_directory_that_is_no_corpus_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a corpus"):
        Corpus.open(tmp_path)


def test_the_tables_name_every_document_in_order(tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus)
    paths = [f"{corpus.part_prefix(number)}.documents.parquet" for number in range(3)]
    table = read_documents(map(Path, paths), ["pmc_id", "tokens"])
    assert table["tokens"].to_pylist() == [len(document) for document in all_documents(corpus)]
    assert len(set(table["pmc_id"].to_pylist())) == 60
