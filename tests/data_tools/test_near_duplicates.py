"""Words are hashed as a loop over them would, and signatures estimate the similarity that the words have."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.documents import SCHEMA, table_writer
from data_tools.minhash import BANDS, ROWS, SIGNATURE_BYTES, VALUES, Signatures, signature, similarities
from data_tools.near_duplicates import near_duplicates
from data_tools.words import Hashes, bytes_hashes, ngrams, ngrams_at, word_hashes

TEXTS = st.text(
    st.sampled_from("aAbB zZ09.,-\n\t\u00e9\u00c9\u00a0\u2013\u2019\u03bc\u4e2d\U0001f600\ud800_")
    | st.characters()
)


def naive_words(text: str) -> list[bytes]:
    """Runs of letters and digits, by a regular expression over the text."""
    lowered = re.sub("[A-Z]", lambda match: match[0].lower(), re.sub("[\ud800-\udfff]", " ", text))
    return [word.encode() for word in re.findall("[0-9a-z\u00c0-\u1fff\u2080-\U0010ffff]+", lowered)]


@given(TEXTS)
def test_words_are_those_of_a_regular_expression(text: str) -> None:
    words = naive_words(text)
    expected = [int(word_hashes(word.decode())[0]) for word in words]
    assert word_hashes(text).tolist() == expected
    assert len(set(expected)) == len(set(words))


def test_a_long_text_is_hashed_as_its_words_alone() -> None:
    random = np.random.default_rng(0)
    words = ["w" * int(length) + str(number) for number, length in enumerate(random.integers(0, 300, 5000))]
    expected = [int(word_hashes(word)[0]) for word in words]
    assert word_hashes(" ".join(words)).tolist() == expected
    assert len(set(expected)) == len(words)


def test_a_word_longer_than_a_block_does_not_stop_or_swallow_what_follows() -> None:
    found = word_hashes("x" * 300_000 + " end")
    assert found[-1] == word_hashes("end")[0]


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 14))
def test_ngrams_are_equal_where_their_words_are(letters: list[int], n: int) -> None:
    words = word_hashes(" ".join(str(letter) for letter in letters))
    hashes = ngrams(words, n)
    grams = [tuple(letters[start : start + n]) for start in range(len(letters) - n + 1)]
    assert len(hashes) == max(len(grams), 0)
    assert len(set(hashes.tolist())) == len(set(grams))
    np.testing.assert_array_equal(ngrams_at(words, np.arange(len(hashes)), n), hashes)


@given(st.lists(st.binary(max_size=20), max_size=20), st.integers(0, 2))
def test_byte_strings_are_hashed_apart_from_their_neighbours(strings: list[bytes], long: int) -> None:
    strings = [*strings, *(bytes([number]) * 100_000 for number in range(long))]
    offsets = np.cumsum([0, *(len(string) for string in strings)])
    content = np.frombuffer(b"".join(strings), np.uint8)
    found = bytes_hashes(content, offsets).tolist()
    alone = [
        int(bytes_hashes(np.frombuffer(string, np.uint8), np.array([0, len(string)]))[0])
        for string in strings
    ]
    assert found == alone
    assert len(set(found)) == len(set(strings))


def signatures_of(documents: list[Hashes]) -> Signatures:
    joined = b"".join(signature(words) or b"" for words in documents)
    return np.frombuffer(joined, "<u2").reshape(-1, VALUES)


def jaccard(first: Hashes, second: Hashes) -> float:
    one, other = set(ngrams(first, 5).tolist()), set(ngrams(second, 5).tolist())
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("words", [30, 150, 1000, 6000])
@pytest.mark.parametrize("shared", [0.3, 0.7, 0.95])
def test_signatures_estimate_the_jaccard_similarity_without_bias(words: int, shared: float) -> None:
    random = np.random.default_rng(words)
    pairs, exact = [], []
    for _ in range(150):
        first = random.integers(0, 2**63, words, np.int64).astype(np.uint64)
        second = first.copy()
        tail = int(words * shared)
        second[tail:] = random.integers(0, 2**63, words - tail, np.int64).astype(np.uint64)
        pairs += [first, second]
        exact.append(jaccard(first, second))
    found = signatures_of(pairs)
    errors = similarities(found[::2], found[1::2]) - np.array(exact)
    expected = float(np.sqrt(np.mean(np.array(exact) * (1 - np.array(exact))) / min(VALUES, words)))
    assert abs(errors.mean()) < 4 * expected / np.sqrt(len(errors))
    assert np.sqrt(np.mean(errors**2)) < 1.5 * expected


def test_short_documents_have_a_signature_of_all_their_words_and_empty_ones_none() -> None:
    assert signature(word_hashes("")) is None
    assert signature(word_hashes(" -- \u2013 ")) is None
    assert signature(word_hashes("Short  one")) == signature(word_hashes("short, one."))
    assert signature(word_hashes("short one")) != signature(word_hashes("short two"))
    assert len(signature(word_hashes("one")) or b"") == SIGNATURE_BYTES


def naive(signatures: Signatures, among: list[bool], similarity: float) -> list[bool]:
    """The rule of `near_duplicates`, pair by pair."""
    left_out: list[bool] = []
    for later in range(len(signatures)):
        repeats = False
        for earlier in range(later):
            if among[later] and among[earlier] and not left_out[earlier]:
                same = signatures[earlier] == signatures[later]
                candidates = same.reshape(BANDS, ROWS).all(axis=1).any()
                repeats |= bool(candidates and same.mean() >= similarity)
        left_out.append(repeats)
    return left_out


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 40),
    families=st.integers(1, 8),
    changed=st.sampled_from([0.02, 0.1, 0.25]),
    similarity=st.sampled_from([0.6, 0.8, 0.9, 1.0]),
)
def test_near_duplicates_are_those_found_pair_by_pair(
    seed: int,
    count: int,
    families: int,
    changed: float,
    similarity: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    random = np.random.default_rng(seed)
    signatures = random.integers(0, 2**16, (families, VALUES), np.uint16)[random.integers(0, families, count)]
    noise = random.random(signatures.shape) < changed
    signatures = np.where(noise, random.integers(0, 2**16, signatures.shape, np.uint16), signatures)
    given_signature = random.random(count) < 0.9
    among = random.random(count) < 0.9
    directory, paths = tmp_path_factory.mktemp("tables"), []
    for number, rows in enumerate(np.array_split(np.arange(count), 3)):
        paths.append(directory / f"{number}.parquet")
        _write(paths[-1], [signatures[row].tobytes() if given_signature[row] else None for row in rows])
    found = near_duplicates(paths, among, similarity)
    assert found.tolist() == naive(signatures, (among & given_signature).tolist(), similarity)


def _write(path: Path, signatures: list[bytes | None]) -> None:
    with table_writer(path) as writer:
        writer.write_table(pa.Table.from_pylist([{"signature": one} for one in signatures], SCHEMA))


def test_ten_thousand_alike_are_left_out_but_for_the_first(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    template = random.integers(0, 2**16, VALUES, np.uint16)
    signatures = np.tile(template, (10_000, 1))
    signatures[np.arange(10_000), random.integers(0, VALUES, 10_000)] = random.integers(
        0, 2**16, 10_000, np.uint16
    )
    _write(tmp_path / "t.parquet", [row.tobytes() for row in signatures])
    found = near_duplicates([tmp_path / "t.parquet"], np.ones(10_000, np.bool_), 0.8)
    assert found.tolist() == [False, *[True] * 9_999]
