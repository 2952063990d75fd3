"""Which documents count, for what reason the others do not, and that it can be decided again at any time."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.build import build
from data_tools.corpus import Corpus
from data_tools.decide import REASONS, decide
from data_tools.documents import SCHEMA
from data_tools.errors import UserError
from data_tools.facts import COLUMNS, Facts, facts_of
from data_tools.finalize import decide_again
from data_tools.licenses import GROUPS
from data_tools.recipe import Decisions, Measures, Recipe
from data_tools.splits import Mask, divide, read_reasons, split_file
from data_tools.verify import verify
from tests.data_tools.sources import simple_record, write_jsonl

Document = tuple[str | None, str | None, int | None, int, bool]
"""PMC id, DOI, corpus id, text, retracted."""
KEEP_ALL = Decisions(heldout=0)
DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from([None, "PMC1", "PMC2", "PMC3"]),
        st.sampled_from([None, "10.1/a", "10.1/A", "10.1/b", "10.1/\u00c9", "10.1/\u00e9"]),
        st.sampled_from([None, 0, 1, 2]),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=12,
)


def facts(
    documents: list[Document],
    licenses: list[str | None] | None = None,
    overlaps: list[list[int]] | None = None,
) -> Facts:
    rows = [
        {
            "pmc_id": pmc_id,
            "doi": doi,
            "corpus_id": corpus_id,
            "text_hash": bytes([text + 1]) * 16,
            "retracted": retracted,
            "license": licenses[number] if licenses else None,
            "tokens": 10,
            "overlaps": overlaps[number] if overlaps else [],
        }
        for number, (pmc_id, doi, corpus_id, text, retracted) in enumerate(documents)
    ]
    return facts_of(pa.Table.from_pylist(rows, SCHEMA).select(COLUMNS))


def no_near_duplicates(among: Mask, similarity: float) -> Mask:
    raise AssertionError("not asked for")


def reasons(
    *documents: Document,
    retracts: tuple[str, ...] = (),
    decisions: Decisions = KEEP_ALL,
    licenses: list[str | None] | None = None,
    overlaps: list[list[int]] | None = None,
) -> list[str]:
    found = decide(facts(list(documents), licenses, overlaps), retracts, decisions, no_near_duplicates)
    return ["counts" if not number else REASONS[number - 1] for number in found]


def naive(documents: list[Document]) -> list[str]:
    """The same decisions, a document at a time."""
    names = ("duplicate_pmc_id", "duplicate_doi", "duplicate_corpus_id")
    keys = [(pmc_id, doi and doi.lower(), corpus_id) for pmc_id, doi, corpus_id, *_ in documents]

    def shared(one: int, other: int) -> list[str]:
        pairs = zip(names, keys[one], keys[other], strict=True)
        return [name for name, mine, theirs in pairs if mine is not None and mine == theirs]

    def paper(of: int, among: list[int]) -> set[int]:
        found, last = {of}, set[int]()
        while found != last:
            last = found
            found = found | {other for other in among if any(shared(one, other) for one in found)}
        return found

    every = list(range(len(documents)))
    marked = {number for number in every if documents[number][-1]}
    retracted = {number for number in every if paper(number, every) & marked}
    left = [number for number in every if number not in retracted]
    reasons = dict.fromkeys(retracted, "retracted")
    for number in left:
        if min(paper(number, left)) < number:
            others = [[name for other in left if other < number for name in shared(number, other)]]
            others += [[name for other in left if other > number for name in shared(number, other)]]
            reasons[number] = min(next(filter(None, others)), key=names.index)
    texts = set()
    for number in left:
        if number not in reasons:
            text = documents[number][3]
            reasons[number] = "duplicate_text" if text in texts else "counts"
            texts.add(text)
    return [reasons[number] for number in every]


def test_the_first_of_each_identifier_and_text_counts() -> None:
    assert reasons(
        ("PMC1", "10.1/a", None, 1, False),
        ("PMC1", "10.1/z", None, 2, False),
        ("PMC2", "10.1/A", 0, 3, False),
        ("PMC3", None, None, 1, False),
        (None, None, 0, 4, False),
        (None, None, None, 5, False),
    ) == ["counts", "duplicate_pmc_id", "duplicate_doi", "duplicate_text", "duplicate_corpus_id", "counts"]


def test_a_retracted_paper_takes_its_other_copies_with_it() -> None:
    assert reasons(
        ("PMC1", "10.1/a", None, 1, False),
        ("PMC1", None, None, 2, True),
        ("PMC2", "10.1/b", None, 3, True),
        (None, "10.1/B", None, 4, False),
        ("PMC3", None, None, 5, False),
    ) == ["retracted"] * 4 + ["counts"]


@given(DOCUMENTS, st.randoms())
def test_which_papers_count_does_not_depend_on_the_order_of_their_documents(
    documents: list[Document], random: Random
) -> None:
    documents = [(*one[:3], text, False) for text, one in enumerate(documents)]
    shuffled = random.sample(documents, len(documents))
    assert reasons(*documents).count("counts") == reasons(*shuffled).count("counts")


def test_documents_linked_by_a_third_are_one_paper_wherever_the_third_stands() -> None:
    linked = [("PMC1", None, None, 1, False), (None, "10.1/a", None, 2, False)]
    link = ("PMC1", "10.1/a", None, 3, False)
    assert reasons(*linked, link) == ["counts", "duplicate_doi", "duplicate_pmc_id"]
    assert reasons(link, *linked) == ["counts", "duplicate_pmc_id", "duplicate_doi"]


def test_a_retraction_reaches_every_document_of_the_paper() -> None:
    documents = [
        (None, "10.1/a", None, 1, True),
        ("PMC1", "10.1/A", None, 2, False),
        ("PMC1", None, 7, 3, False),
        ("PMC2", None, 7, 4, False),
        ("PMC3", None, 8, 5, False),
    ]
    assert reasons(*documents) == ["retracted"] * 4 + ["counts"]


def test_a_text_is_no_duplicate_of_one_that_is_left_out_itself() -> None:
    assert reasons(
        ("PMC1", None, None, 1, False), ("PMC1", None, None, 2, False), ("PMC2", None, None, 2, False)
    ) == ["counts", "duplicate_pmc_id", "counts"]


def test_an_empty_identifier_in_a_notice_retracts_nobody() -> None:
    documents = (None, None, None, 1, False), ("PMC1", None, None, 2, False)
    assert reasons(*documents, retracts=("", "PMC9")) == ["counts", "counts"]


@pytest.mark.parametrize("heldout", [0.0, 0.5, 0.999])
def test_a_corpus_of_one_document_has_it_for_training(heldout: float) -> None:
    for number in range(20):
        one = facts([(f"PMC{number}", None, None, 1, False)])
        assert divide(one, np.ones(1, np.bool_), heldout)["train"].tolist() == [True]


def test_a_text_shared_with_a_retracted_paper_is_not_yet_a_retraction() -> None:
    documents = ("PMC1", None, None, 1, True), ("PMC2", None, None, 1, False)
    assert reasons(*documents) == ["retracted", "counts"]


def test_a_paper_that_a_notice_names_by_pmc_id_or_by_doi_in_any_case_is_retracted() -> None:
    documents = [
        ("PMC1", None, None, 1, False),
        ("PMC2", "10.1/Q", None, 2, False),
        ("PMC12", None, None, 3, False),
    ]
    assert reasons(*documents, retracts=("PMC1", "10.1/q")) == ["retracted", "retracted", "counts"]


def test_licence_groups_not_asked_for_are_left_out_and_a_usable_copy_takes_the_place() -> None:
    documents = [("PMC1", None, None, n, False) for n in (1, 2)] + [("PMC2", None, None, 3, False)]
    assert reasons(
        *documents, decisions=Decisions(licenses=["commercial"]), licenses=["CC BY-NC", "CC BY", None]
    ) == ["license", "counts", "license"]


def test_a_document_with_as_many_overlapping_questions_as_decided_is_left_out() -> None:
    documents = [(f"PMC{n}", None, None, n, False) for n in range(1, 4)]
    overlaps = [[], [7], [7, 9]]
    for least, expected in ((1, [0, 1, 1]), (2, [0, 0, 1]), (3, [0, 0, 0])):
        found = reasons(*documents, decisions=Decisions(contamination=least), overlaps=overlaps)
        assert [reason == "contaminated" for reason in found] == [bool(one) for one in expected]


@given(DOCUMENTS)
def test_decisions_are_those_made_a_document_at_a_time(documents: list[Document]) -> None:
    assert reasons(*documents) == naive(documents)


@given(DOCUMENTS)
def test_no_identifier_or_text_counts_twice(documents: list[Document]) -> None:
    decided = reasons(*documents)
    kept = [document for document, reason in zip(documents, decided, strict=True) if reason == "counts"]
    for values in (
        [pmc_id for pmc_id, *_ in kept if pmc_id],
        [doi.lower() for _, doi, *_ in kept if doi],
        [corpus_id for _, _, corpus_id, *_ in kept if corpus_id is not None],
        [text for *_, text, _ in kept],
    ):
        assert all(count == 1 for count in Counter(values).values())


@given(
    identities=st.lists(st.integers(1, 10**6), unique=True, min_size=2, max_size=50),
    heldout=st.sampled_from([0.0, 1e-9, 0.01, 0.3, 0.999]),
)
def test_the_splits_are_disjoint_complete_and_never_empty(identities: list[int], heldout: float) -> None:
    documents = facts([(f"PMC{number}", None, None, 1, False) for number in identities])
    counted = np.ones(len(identities), np.bool_)
    counted[0] = len(identities) == 2
    splits = divide(documents, counted, heldout)
    np.testing.assert_array_equal(splits["train"] ^ splits["heldout"], counted)
    assert splits["train"].any()
    assert splits["heldout"].any() == (heldout > 0 and counted.sum() >= 2)


def test_a_paper_is_held_out_whatever_else_is_in_the_corpus_and_in_about_the_asked_share() -> None:
    papers: list[Document] = [(f"PMC{n}", f"10.1/{n}", n, n % 200, False) for n in range(1, 20_001)]
    papers += [(None, f"10.2/{n}", None, n % 200, False) for n in range(20_000)]
    whole = divide(facts(papers), np.ones(len(papers), np.bool_), 0.05)["heldout"]
    every_third = divide(facts(papers[::3]), np.ones(len(papers[::3]), np.bool_), 0.05)["heldout"]
    np.testing.assert_array_equal(whole[::3], every_third)
    assert 0.045 < whole[:20_000].mean() < 0.055
    assert 0.045 < whole[20_000:].mean() < 0.055


@given(
    st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=20),
    st.lists(st.integers(0, 20), max_size=4).map(sorted),
)
def test_a_split_file_says_where_each_document_and_each_run_of_them_lies(
    documents: list[tuple[int, bool]], firsts: list[int]
) -> None:
    tokens = np.array([length for length, _ in documents], np.int64)
    chosen = np.array([is_chosen for _, is_chosen in documents], np.bool_)
    found = np.load(BytesIO(split_file(tokens, chosen, np.array([0, *firsts]))))
    starts, runs, before, place, in_run = [], [], 0, 0, False
    for number, (length, is_chosen) in enumerate(documents):
        if is_chosen:
            if not in_run or number in firsts:
                runs.append([before, place])
            starts.append(before)
            before += length
        in_run, place = is_chosen, place + length
    assert found.dtype == np.int64
    assert found[: len(starts) + 1].tolist() == [*starts, before]
    assert found[len(starts) + 1 :].reshape(-1, 2).tolist() == [*runs, [before, place]]


@pytest.fixture(scope="module")
def measured(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with signatures, in which document 30 is document 3 but for its title and PMC id."""
    directory = tmp_path_factory.mktemp("measured")
    records = [simple_record(number, words=300) for number in range(30)]
    again = simple_record(3, words=300, pmc_id="9999")
    assert isinstance(again, dict)
    again["corpusid"] = 9999
    again["content"]["text"] = again["content"]["text"].replace("Paper 3 on", "Study 3 on")
    write_jsonl(directory / "a.jsonl", [*records[:20]])
    write_jsonl(directory / "b.jsonl", [*records[20:], again, "damaged"])
    recipe = Recipe(measures=Measures(near_duplicates=True), decisions=Decisions(heldout=0.1), max_bad=0.1)
    inputs = [directory / "a.jsonl", directory / "b.jsonl"]
    build(inputs, tiny_tokenizer, directory / "corpus", recipe, workers=1)
    return directory / "corpus"


@pytest.fixture
def copy(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "copy"))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_deciding_again_leaves_out_near_duplicates_and_deciding_back_gives_the_same_bytes(
    measured: Path, copy: Path
) -> None:
    before = files(copy)
    manifest = decide_again(copy, Decisions(near_duplicates=0.7, heldout=0.1))
    assert manifest.counts.left_out["near_duplicate"] == 1
    assert manifest.counts.examples["near_duplicate"] == ["b.jsonl:11"]
    path = manifest.path(copy, "reasons.npy")
    assert np.flatnonzero(read_reasons(path, 31)).tolist() == [30]
    assert Corpus.open(copy).fingerprint != Corpus.open(measured).fingerprint
    verify(copy)
    decide_again(copy, Decisions(heldout=0.1))
    assert files(copy) == before


def test_a_corpus_decided_again_is_the_one_that_a_build_with_those_decisions_makes(
    measured: Path, copy: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    decisions = Decisions(near_duplicates=0.7, heldout=0.3)
    decide_again(copy, decisions)
    recipe = Recipe(measures=Measures(near_duplicates=True), decisions=decisions, max_bad=0.1)
    inputs = [measured.parent / "a.jsonl", measured.parent / "b.jsonl"]
    build(inputs, tiny_tokenizer, tmp_path / "built", recipe, workers=1)
    assert files(copy) == files(tmp_path / "built")


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        (Decisions(contamination=1), "needs test questions"),
        (Decisions(near_duplicates=1.5), "above 0 and up to 1"),
        (Decisions(licenses=["comercial"]), "names comercial; known are " + ", ".join(GROUPS)),
        (Decisions(licenses=[]), "leaves no paper"),
        (Decisions(licenses=["noncommercial"]), "No paper is left"),
        (Decisions(heldout=1.0), "decisions.heldout is 1.0"),
    ],
)
def test_a_decision_that_cannot_be_made_is_one_sentence_and_changes_nothing(
    decisions: Decisions, message: str, copy: Path
) -> None:
    before = files(copy)
    with pytest.raises(UserError, match=message):
        decide_again(copy, decisions)
    assert files(copy) == before


def test_near_duplicates_cannot_be_decided_without_signatures(tiny_corpus: Path) -> None:
    with pytest.raises(UserError, match="needs signatures"):
        decide_again(tiny_corpus, Decisions(near_duplicates=0.8))


_KILLED = """
import os, sys
from pathlib import Path
from data_tools.finalize import decide_again
from data_tools.recipe import Decisions
calls = 0
def stop(*_):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
names = {"open", "os.rename", "os.remove"}
def watch(event, arguments):
    if event in names and sys.argv[1] in str(arguments[0]):
        stop()
sys.addaudithook(watch)
decide_again(Path(sys.argv[1]), Decisions(near_duplicates=0.7, heldout=0.2))
"""


def test_killed_at_any_file_operation_the_corpus_is_the_old_one_or_the_new(
    measured: Path, tmp_path: Path
) -> None:
    new = Path(shutil.copytree(measured, tmp_path / "new"))
    decide_again(new, Decisions(near_duplicates=0.7, heldout=0.2))
    prints = {Corpus.open(measured).fingerprint, Corpus.open(new).fingerprint}
    seen = set()
    for instant in range(1, 150, 3):
        copy = Path(shutil.copytree(measured, tmp_path / f"copy-{instant}"))
        arguments = [sys.executable, "-c", _KILLED, str(copy), str(instant)]
        process = subprocess.run(arguments, capture_output=True, check=False, cwd=os.getcwd())
        fingerprint = Corpus.open(copy).fingerprint
        seen.add(fingerprint)
        assert fingerprint in prints
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.decode()
        if instant % 4 == 0:
            verify(copy)
            decide_again(copy, Decisions(near_duplicates=0.7, heldout=0.2))
            assert files(copy) == files(new)
    assert process.returncode == 0
    assert instant > 10
    assert seen == prints


@given(
    near_duplicates=st.sampled_from([None, 0.5, 0.7, 1.0]),
    licenses=st.sampled_from([None, ["commercial"], ["commercial", "unknown"]]),
    heldout=st.sampled_from([0.0, 0.1, 0.9]),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_record_read_is_kept_or_left_out_for_one_reason_whatever_is_decided(
    near_duplicates: float | None, licenses: list[str] | None, heldout: float, copy: Path
) -> None:
    decisions = Decisions(near_duplicates=near_duplicates, licenses=licenses, heldout=heldout)
    manifest = decide_again(copy, decisions)
    counts = manifest.counts
    assert counts.read == counts.kept + sum(counts.left_out.values()) == 32
    found = read_reasons(manifest.path(copy, "reasons.npy"), 31)
    assert (found == 0).sum() == counts.kept == sum(split.documents for split in manifest.splits.values())
    by_decision = [(decision.documents, decision.tokens) for decision in manifest.decisions]
    assert sum(documents for documents, _ in by_decision) == (found != 0).sum()
    tokens = sum(split.tokens for split in manifest.splits.values()) + sum(one for _, one in by_decision)
    assert tokens == sum(part.tokens for part in manifest.parts)
    once = files(copy)
    decide_again(copy, decisions)
    assert files(copy) == once


def test_a_table_of_other_documents_is_refused_and_nothing_changes(copy: Path) -> None:
    first, second = sorted((copy / "parts").glob("*.documents.parquet"))
    shutil.copy(second, first)
    before = files(copy)
    with pytest.raises(UserError, match=r"part-00000.documents.parquet is not the table of its part"):
        decide_again(copy, KEEP_ALL)
    assert files(copy) == before


def test_a_description_that_loses_records_is_refused(copy: Path) -> None:
    content = json.loads((copy / "corpus.json").read_bytes())
    content["counts"]["read"] += 1
    (copy / "corpus.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="kept and left out are not those read"):
        Corpus.open(copy)


def test_every_record_set_aside_is_in_one_list(copy: Path) -> None:
    parts = sorted((copy / "parts").glob("*.rejected.jsonl"))
    assert (copy / "rejected.jsonl").read_bytes() == b"".join(path.read_bytes() for path in parts)
    assert b"b.jsonl" in (copy / "rejected.jsonl").read_bytes()


def test_too_many_damaged_records_stop_the_build_and_a_higher_share_goes_on_from_its_parts(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [*(simple_record(n) for n in range(8)), 7, 7])
    with pytest.raises(UserError, match=r"2 of 10 records are damaged \(20.0%\).*wrong_structure.*x.jsonl:9"):
        build([source], tiny_tokenizer, tmp_path / "c", Recipe(max_bad=0.19), workers=1)
    made = (tmp_path / "c" / "parts" / "part-00000.json").stat().st_mtime_ns
    assert not (tmp_path / "c" / "corpus.json").exists()
    build([source], tiny_tokenizer, tmp_path / "c", Recipe(max_bad=0.2), workers=1)
    assert (tmp_path / "c" / "parts" / "part-00000.json").stat().st_mtime_ns == made
