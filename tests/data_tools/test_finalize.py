"""Which documents count: the first of each PMC id, DOI and text, never a retracted one, held out by paper."""

from collections import Counter
from io import BytesIO

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data_tools.documents import SCHEMA
from data_tools.finalize import decide, divide, split_file

NAMES = ("counts", "retracted", "duplicate_pmc_id", "duplicate_doi", "duplicate_text")
DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from([None, "PMC1", "PMC2", "PMC3"]),
        st.sampled_from([None, "10.1/a", "10.1/A", "10.1/b"]),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=12,
)


def table(documents: list[tuple[str | None, str | None, int, bool]]) -> pa.Table:
    rows = [
        {"pmc_id": pmc_id, "doi": doi, "text_hash": bytes([text]) * 16, "retracted": retracted}
        for pmc_id, doi, text, retracted in documents
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def reasons(*documents: tuple[str | None, str | None, int, bool]) -> list[str]:
    return [NAMES[number] for number in decide(table(list(documents)))]


def test_the_first_of_each_identifier_and_text_counts() -> None:
    assert reasons(
        ("PMC1", "10.1/a", 1, False),
        ("PMC1", "10.1/z", 2, False),
        ("PMC2", "10.1/A", 3, False),
        ("PMC3", None, 1, False),
        (None, None, 4, False),
        (None, None, 5, False),
    ) == ["counts", "duplicate_pmc_id", "duplicate_doi", "duplicate_text", "counts", "counts"]


def test_a_retracted_paper_takes_its_other_copies_with_it() -> None:
    assert reasons(
        ("PMC1", "10.1/a", 1, False),
        ("PMC1", None, 2, True),
        ("PMC2", "10.1/b", 3, True),
        (None, "10.1/B", 4, False),
        ("PMC3", None, 5, False),
    ) == ["retracted"] * 4 + ["counts"]


def test_a_text_shared_with_a_retracted_paper_is_not_yet_a_retraction() -> None:
    assert reasons(("PMC1", None, 1, True), ("PMC2", None, 1, False)) == ["retracted", "counts"]


@given(DOCUMENTS)
def test_no_identifier_or_text_counts_twice_and_no_group_is_lost(
    documents: list[tuple[str | None, str | None, int, bool]],
) -> None:
    decided = decide(table(documents))
    kept = [document for document, reason in zip(documents, decided, strict=True) if reason == 0]
    assert not any(retracted for _, _, _, retracted in kept)
    for values in (
        [pmc_id for pmc_id, _, _, _ in kept if pmc_id],
        [doi.lower() for _, doi, _, _ in kept if doi],
        [text for _, _, text, _ in kept],
    ):
        assert all(count == 1 for count in Counter(values).values())
    sound = [number for number, reason in enumerate(decided) if reason != 1]
    assert not sound or decided[sound[0]] == 0


@given(
    identities=st.lists(st.integers(1, 10**6), unique=True, min_size=2, max_size=50),
    heldout=st.sampled_from([0.0, 1e-9, 0.01, 0.3, 0.999]),
)
def test_the_splits_are_disjoint_complete_and_never_empty(identities: list[int], heldout: float) -> None:
    documents = table([(f"PMC{number}", None, 1, False) for number in identities])
    counted = np.ones(len(identities), np.bool_)
    counted[0] = len(identities) == 2
    splits = divide(documents, counted, heldout)
    np.testing.assert_array_equal(splits["train"] ^ splits["heldout"], counted)
    assert splits["train"].any()
    assert splits["heldout"].any() == (heldout > 0 and counted.sum() >= 2)


def test_a_paper_is_held_out_whatever_else_is_in_the_corpus_and_in_about_the_asked_share() -> None:
    papers = [(f"PMC{number}", f"10.1/{number}", number % 256, False) for number in range(1, 20_001)]
    whole = divide(table(papers), np.ones(len(papers), np.bool_), 0.05)["heldout"]
    every_third = divide(table(papers[::3]), np.ones(len(papers[::3]), np.bool_), 0.05)["heldout"]
    np.testing.assert_array_equal(whole[::3], every_third)
    assert 0.04 < whole.mean() < 0.06


@given(st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=20))
def test_a_split_file_says_where_each_document_lies(documents: list[tuple[int, bool]]) -> None:
    tokens = np.array([length for length, _ in documents], np.int64)
    chosen = np.array([is_chosen for _, is_chosen in documents], np.bool_)
    rows = np.load(BytesIO(split_file(tokens, chosen)))
    expected, before, place = [], 0, 0
    for length, is_chosen in documents:
        if is_chosen:
            expected.append([before, place])
            before += length
        place += length
    assert rows.tolist() == [*expected, [before, place]]
    assert rows.dtype == np.int64
