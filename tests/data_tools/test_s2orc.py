"""S2ORC records become papers; whatever is wrong with one is a counted reason at its line."""

import copy
import io
import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from data_tools.papers import Block, Paper, Rejected
from data_tools.readers.json_records import read_lines
from data_tools.readers.spans import AnnotatedText
from data_tools.streams import InputStream
from tests.data_tools.sources import S2orcText, cleaned_text, s2orc_record


def read(*lines: bytes | str | object) -> list[Paper | Rejected]:
    """Read lines; what is neither bytes nor text is written as JSON."""
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    return list(read_lines(InputStream(io.BytesIO(b"\n".join(raw) + b"\n"), "x.jsonl", "x.jsonl"), "x.jsonl"))


def read_paper(record: object) -> Paper:
    (paper,) = read(record)
    assert isinstance(paper, Paper), paper
    return paper


def sample() -> dict[str, Any]:
    body = S2orcText().add("The title", "title").add("Ada Lovelace Univ. of London", "author")
    body.add("We did this.", "abstract")
    body.add("Introduction", "sectionheader", attributes={"n": "1"})
    body.add("Much is known.", "paragraph")
    body.add("Details", "sectionheader", attributes={"n": "1.2"}).add("More is\nnot.", "paragraph")
    body.add("Figure 1 Header", "figure", "sectionheader").add("Caption words", "figure", "paragraph")
    body.add("Menabrea L. Sketch of the engine", "bibentry", "paragraph")
    return s2orc_record(body, pmc_id="9925312", corpus_id=7, doi="10.1/x")


def test_a_record_gives_its_identifiers_and_only_its_own_text() -> None:
    paper = read_paper(sample())
    assert (paper.pmc_id, paper.corpus_id, paper.doi, paper.license) == ("PMC9925312", 7, "10.1/x", "CCBY")
    assert (paper.title, paper.abstract) == ("The title", ("We did this.",))
    assert paper.sections == (
        Block("Introduction", 1),
        Block("Much is known."),
        Block("Details", 2),
        Block("More is\nnot."),
    )
    assert str(paper.source) == "x.jsonl:1"


def _with_annotations(change: Callable[[list[dict[str, Any]]], object]) -> dict[str, Any]:
    record = sample()
    annotations = record["content"]["annotations"]
    for kind, value in annotations.items():
        if value is not None:
            annotations[kind] = change(json.loads(value))
    return record


def _as_strings(spans: list[dict[str, Any]]) -> str:
    return json.dumps([{**span, "start": str(span["start"]), "end": str(span["end"])} for span in spans])


def _with_useless_spans(spans: list[dict[str, Any]]) -> str:
    useless = [(5, 5), (9, 4), (-3, 8), (0, 10**6), (10**6, 10**6 + 5)]
    return json.dumps([*({"start": start, "end": end} for start, end in useless), *spans])


@pytest.mark.parametrize(
    "change", [_as_strings, _with_useless_spans, lambda spans: spans, lambda spans: json.dumps(spans[::-1])]
)
def test_offsets_as_strings_useless_spans_plain_lists_and_any_order_change_nothing(
    change: Callable[[list[dict[str, Any]]], object],
) -> None:
    assert read_paper(_with_annotations(change)) == read_paper(sample())


def test_keys_are_read_in_any_case() -> None:
    record = sample()
    upper: dict[str, Any] = {key.upper(): value for key, value in record.items()}
    upper["EXTERNALIDS"] = {"PubMedCentral": "9925312", "DOI": "10.1/x"}
    upper["CONTENT"]["annotations"] = {k.title(): v for k, v in record["content"]["annotations"].items()}
    assert read_paper(upper) == read_paper(sample())


def test_an_abstract_also_annotated_as_paragraph_is_not_said_twice() -> None:
    body = S2orcText().add("T", "title").add("Once only.", "abstract", "paragraph").add("Body.", "paragraph")
    paper = read_paper(s2orc_record(body, "1"))
    assert (paper.abstract, paper.sections) == (("Once only.",), (Block("Body."),))


def test_a_title_also_annotated_as_paragraph_is_not_said_twice() -> None:
    record = s2orc_record(S2orcText().add("The title", "title").add("Once only.", "paragraph"), "1")
    spans = [{"start": 0, "end": len("\nThe title\nOnce only.")}]
    record["content"]["annotations"]["paragraph"] = json.dumps(spans)  # type: ignore[index]
    assert cleaned_text(read_paper(record)) == "# The title\n\nOnce only."


def test_overlapping_paragraphs_are_not_said_twice() -> None:
    record = s2orc_record(S2orcText().add("one two three", "paragraph"), "1")
    spans = [{"start": 1, "end": 8}, {"start": 5, "end": 14}, {"start": 1, "end": 8}]
    record["content"]["annotations"]["paragraph"] = json.dumps(spans)  # type: ignore[index]
    text = "".join(block.text for block in read_paper(record).sections)
    assert text == "one two three"


def test_numeric_citations_go_with_their_brackets_and_author_years_stay() -> None:
    text = "Shown before [1, 2] and (3); see Lovelace (1843). Late [4]."
    body = S2orcText().add(text, "paragraph")
    body.spans["bibref"] = [
        {"start": 1 + text.index(marker), "end": 1 + text.index(marker) + len(marker)}
        for marker in ("1", "2", "(3)", "Lovelace (1843)", "[4]")
    ]
    paper = read_paper(s2orc_record(body, "1"))
    assert cleaned_text(paper) == "Shown before and; see Lovelace (1843). Late."


def test_running_heads_taken_for_paragraphs_stay_out() -> None:
    kept = (
        "We read page 2 of 6 pages.",
        "Of 6 patients 2 died",
        "Page 2 of 6 was torn. " + "Much follows. " * 9,
    )
    body = S2orcText()
    for text in ("A short title Page 2 of 6", "Page 3 of 6 Lovelace et al.", "417", *kept):
        body.add(text, "paragraph")
    assert [block.text for block in read_paper(s2orc_record(body, "1")).sections] == list(kept)


def test_a_marked_title_is_a_retraction() -> None:
    assert read_paper(s2orc_record(S2orcText().add("RETRACTED: X", "title"), "1")).retracted
    assert not read_paper(sample()).retracted


def test_broken_lines_are_counted_where_they_stand_and_the_others_are_read() -> None:
    good = json.dumps(sample())
    found = read(good, good[:50], "", b'{"a": "\xff"}', "[" * 100_000, "1e999999", "nonsense", good)
    assert [type(record).__name__ for record in found] == ["Paper"] + ["Rejected"] * 5 + ["Paper"]
    rejected = [record for record in found if isinstance(record, Rejected)]
    assert [str(record.source) for record in rejected] == [f"x.jsonl:{line}" for line in (2, 4, 5, 6, 7)]
    assert [record.reason for record in rejected] == ["broken_json"] * 3 + ["wrong_structure", "broken_json"]


WRONG: list[tuple[list[str], object]] = [
    ([], [1, 2]),
    ([], "text"),
    ([], None),
    (["content"], 5),
    (["content"], "text"),
    (["externalids"], [3]),
    (["content", "text"], 7),
    (["content", "text"], ["a"]),
    (["content", "annotations"], "x"),
    (["content", "annotations", "paragraph"], "not json"),
    (["content", "annotations", "paragraph"], "5"),
    (["content", "annotations", "paragraph"], '{"start": 1}'),
    (["content", "annotations", "paragraph"], '[{"start": 1}]'),
    (["content", "annotations", "paragraph"], '[{"start": "a", "end": 3}]'),
    (["content", "annotations", "paragraph"], '[{"start": 1, "end": 1e999}]'),
    (["content", "annotations", "paragraph"], "[null]"),
    (["content", "annotations", "paragraph"], '[{"start": 1, "end": null}]'),
]


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_a_field_of_the_wrong_type_is_wrong_structure(path: list[str], value: object) -> None:
    root: Any = {"record": sample()}
    *above, last = ["record", *path]
    target = root
    for key in above:
        target = target[key]
    target[last] = value
    (rejected,) = read(json.dumps(root["record"]))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "wrong_structure"


@pytest.mark.parametrize(
    "empty",
    [
        {"content": None},
        {"content": {}},
        {"content": {"text": None}},
        {"content": {"text": "a", "annotations": None}},
    ],
)
def test_a_record_with_empty_content_is_a_paper_without_text(empty: dict[str, object]) -> None:
    assert cleaned_text(read_paper({**{"corpusid": 1, "externalids": None}, **empty})) == ""


def test_a_year_alone_is_half_of_an_author_year_citation_and_stays() -> None:
    text = "Lovelace (1843) and Menabrea (1842a; 1842) but not these [13] here."
    body = S2orcText().add(text, "paragraph")
    body.spans["bibref"] = [
        {"start": 1 + text.index(marker), "end": 1 + text.index(marker) + len(marker)}
        for marker in ("1843", "1842a", "[13]")
    ]
    paper = read_paper(s2orc_record(body, "1"))
    assert cleaned_text(paper) == "Lovelace (1843) and Menabrea (1842a; 1842) but not these here."


def test_a_long_run_of_spaces_takes_no_long_time() -> None:
    text = "a [1]" + " " * 300_000 + "b" + ", ; " * 75_000 + "c"
    body = S2orcText().add(text, "paragraph").add(" " * 300_000 + "x", "paragraph")
    body.spans["bibref"] = [{"start": 4, "end": 5}]
    assert cleaned_text(read_paper(s2orc_record(body, "1"))).startswith("a b,")


def test_a_citation_marker_as_long_as_a_paragraph_is_none() -> None:
    body = S2orcText().add("12 34 " * 500, "paragraph", "bibref")
    assert cleaned_text(read_paper(s2orc_record(body, "1"))) == ("12 34 " * 500).strip()


@pytest.mark.parametrize("kind", ["figure", "bibref", "paragraph", "abstract"])
@pytest.mark.parametrize("nested", [True, False])
def test_twice_the_spans_are_twice_the_work_however_they_overlap(kind: str, nested: bool) -> None:
    def steps(count: int) -> int:
        size = 4 * count
        over = [{"start": n if nested else 0, "end": size - n} for n in range(count)]
        single = [{"start": 4 * n, "end": 4 * n + 3} for n in range(count)]
        annotations = {"paragraph": json.dumps(single), "abstract": json.dumps(single[::2])}
        return _steps(lambda: AnnotatedText("1234" * count, {**annotations, kind: json.dumps(over)}).body())

    assert steps(400) < 3 * steps(200)


def _steps(work: Callable[[], object]) -> int:
    """Bytecodes that the readers run for a piece of work: the same on any machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "opcode"
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return trace if "data_tools/readers" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("value", [True, "abc", 10**30, -1, 1.5, None, {}])
def test_an_odd_corpus_id_does_not_lose_the_paper(value: object) -> None:
    record = copy.deepcopy(sample())
    record["corpusid"] = value
    assert read_paper(record).corpus_id is None
