"""The training text: title, abstract, headings, paragraphs; white space and controls; what is dropped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from data_tools.papers import Block, Paper, Source
from data_tools.readers.citations import close_gaps
from data_tools.render import training_text
from data_tools.rules.normalize import normalize_text
from tests.data_tools.sources import cleaned_text

TEXTS = st.text(alphabet=st.characters(), max_size=60)
BLOCKS = st.lists(st.builds(Block, TEXTS, st.integers(0, 8)), max_size=8)


def paper(title: str = "T", abstract: tuple[str, ...] = (), sections: tuple[Block, ...] = ()) -> Paper:
    return Paper(Source("x", 1), None, None, None, None, title, abstract, sections, None, False)


def test_the_format_is_headings_and_paragraphs_with_empty_lines_between() -> None:
    text = cleaned_text(
        paper("Title", ("One.", "Two."), (Block("Methods", 1), Block("a"), Block("Sub", 2), Block("b")))
    )
    assert text == "# Title\n\n## Abstract\n\nOne.\n\nTwo.\n\n## Methods\n\na\n\n### Sub\n\nb"


def test_a_title_alone_is_no_text() -> None:
    assert cleaned_text(paper("Title", ("  ",), (Block("Methods", 1), Block(" \n")))) == ""


@pytest.mark.parametrize(
    "heading",
    [
        "References",
        "5. REFERENCES:",
        "VI Acknowledgements",
        "Authors\u2019 contributions",
        "Funding",
        "Conflicts of Interest",
        "Supplementary Material:",
        "Authors' information",
        "Electronic supplementary material",
        "2.1. Data availability statement",
        "Declaration of Competing Interest",
    ],
)
def test_sections_of_names_and_references_are_dropped_up_to_the_next_of_their_depth(heading: str) -> None:
    sections = (
        Block("A", 1),
        Block("a"),
        Block(heading, 2),
        Block("dropped"),
        Block("below it", 3),
        Block("dropped"),
        Block("B", 2),
        Block("b"),
    )
    text = cleaned_text(paper(sections=sections))
    assert text == "# T\n\n## A\n\na\n\n### B\n\nb"


@pytest.mark.parametrize(
    "heading",
    ["Funding of trials", "Reference values in infants", "References to prior work", "Mixture", "Civil law"],
)
def test_headings_that_only_begin_like_them_are_kept(heading: str) -> None:
    assert cleaned_text(paper(sections=(Block(heading, 1), Block("kept")))) == f"# T\n\n## {heading}\n\nkept"


def test_a_heading_that_nothing_follows_is_dropped() -> None:
    sections = (Block("A", 1), Block("a"), Block("B", 1), Block("C", 2))
    assert cleaned_text(paper(sections=sections)) == "# T\n\n## A\n\na"


def test_letters_and_signs_stay_what_has_no_shape_goes_surrogates_are_replaced() -> None:
    assert (
        normalize_text(" \u03b1\u00a0\t\nβ²\u2009\x07\x00x\ud835y\x7f\u200b mi\u00ad croscope\ufeff ")
        == "\u03b1 β² x\ufffdy mi croscope"
    )


def test_ligatures_become_letters_and_accents_are_composed_but_no_number_changes() -> None:
    assert normalize_text("e\ufb03cient \ufb01ndings, Mu\u0308ller") == "efficient findings, M\u00fcller"
    assert normalize_text("10\u00b2 m \u00bd \u2460") == "10\u00b2 m \u00bd \u2460"


def test_the_unicode_form_can_be_left_as_it_is() -> None:
    assert normalize_text("Mu\u0308ller", "none") == "Mu\u0308ller"


@given(TEXTS)
def test_normalized_text_is_not_changed_again(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once


def test_a_plain_document_keeps_its_lines() -> None:
    text = "A\u00ad  line\nand\tanother\n\n\n\nparagraph\n"
    plain = replace(paper(sections=(Block(text),)), title="", plain=True)
    assert cleaned_text(plain) == "A line\nand another\n\nparagraph"
    assert training_text(plain) == text


@given(title=TEXTS, abstract=st.lists(TEXTS, max_size=3), sections=BLOCKS)
def test_any_paper_gives_encodable_text_of_single_lines(
    title: str, abstract: list[str], sections: list[Block]
) -> None:
    text = cleaned_text(paper(title, tuple(abstract), tuple(sections)))
    text.encode()
    lines = text.split("\n\n")
    assert all(line == " ".join(line.split()) for line in lines)
    assert all(line for line in lines) or text == ""


@given(TEXTS)
def test_text_without_markers_is_left_alone(text: str) -> None:
    text = text.replace("\x00", "")
    assert close_gaps(text) == text
