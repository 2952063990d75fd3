"""The rules of the cleaning chain: each drops what it names, with the value found; sound papers stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from data_tools.inputs import find_inputs, shards
from data_tools.papers import Block, Paper, Source
from data_tools.recipe_file import read_recipe
from data_tools.render import training_text
from data_tools.rules import RULES, apply, chain
from data_tools.rules.base import Dropped
from data_tools.rules.normalize import normalize_text, normalize_texts
from data_tools.shards import ShardReader
from data_tools.words import word_hashes
from tests.data_tools.sources import prose

RECIPES = Path(__file__).parents[2] / "recipes"
ARTICLES = Path(__file__).parents[3] / "shared/data/jats/pmc_cc_by_1033.tar.gz"

ENGLISH = (
    "Patients with type 2 diabetes were randomly assigned to receive the study drug or placebo.",
    "The primary outcome was the change in fasting plasma glucose, analysed by intention to treat.",
    "We found that the treatment reduced the risk of hospital admission in older adults.",
    "These results suggest that early screening of the population may improve survival.",
    "Further studies are needed to confirm whether the effect holds in patients who take other medication.",
)
GERMAN = (
    "Die Patienten mit Typ-2-Diabetes wurden zufällig einer der beiden Gruppen zugeteilt.",
    "Das wichtigste Ergebnis war die Änderung des Blutzuckers, und die Auswertung war blind.",
)
SPANISH = (
    "Los pacientes con diabetes tipo 2 fueron asignados al azar para recibir el fármaco o el placebo.",
    "El resultado principal fue el cambio de la glucosa en ayunas, y el análisis fue ciego.",
)
FRENCH = (
    "Les patients atteints de diabète de type 2 ont été répartis au hasard pour recevoir le médicament.",
    "Le critère principal était la variation de la glycémie à jeun, et l'analyse a été faite en aveugle.",
)


def paper(*paragraphs: str, abstract: tuple[str, ...] = (), plain: bool = False) -> Paper:
    sections = tuple(Block(text) for text in paragraphs)
    return Paper(Source("x", 1), "PMC1", None, None, None, "T", abstract, sections, None, False, plain=plain)


def sound_paper() -> Paper:
    return paper(*(f"{ENGLISH[n % 5]} {prose(n, 100)}" for n in range(12)), abstract=ENGLISH)


def apply_rule(name: str, to: Paper, **parameters: Any) -> Paper | Dropped:
    (rule,) = chain([{"rule": name, **parameters}])
    return rule(to)


def kept_texts(name: str, *paragraphs: str) -> list[str]:
    result = apply_rule(name, paper(*paragraphs))
    assert isinstance(result, Paper)
    return [block.text for block in result.sections]


def dropped(name: str, to: Paper, **parameters: Any) -> Dropped:
    result = apply_rule(name, to, **parameters)
    assert isinstance(result, Dropped)
    return result


@pytest.mark.parametrize("name", RULES)
def test_every_rule_leaves_a_sound_paper_as_it_is(name: str) -> None:
    assert apply_rule(name, sound_paper()) == sound_paper()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_takes_a_paper_without_any_text_and_broken_unicode(name: str) -> None:
    for odd in (
        paper(),
        paper(""),
        paper("a"),
        paper("\ud800"),
        paper("", plain=True),
        paper("\ud800 \n", plain=True),
    ):
        result = apply_rule(name, odd)
        assert isinstance(result, Paper) or result.detail


def test_length_drops_too_few_words_too_few_paragraphs_and_too_many_words_each_with_its_reason() -> None:
    short = dropped("length", paper(*["five words are in here"] * 20))
    assert (short.reason, short.detail) == ("too_few_words", "100 words, at least 500 are asked for")
    one = dropped("length", paper(prose(1, 600)))
    assert (one.reason, one.detail) == ("too_few_paragraphs", "1 paragraphs, at least 5 are asked for")
    long = dropped("length", paper(*[prose(1, 100)] * 6), max_words=599)
    assert (long.reason, long.detail) == ("too_many_words", "600 words, at most 599 are let through")


def test_the_lines_of_a_plain_document_are_its_paragraphs() -> None:
    text = "\n\n".join(prose(n, 100) for n in range(6))
    assert isinstance(apply_rule("length", paper(text, plain=True)), Paper)
    assert dropped("length", paper(text, plain=False)).reason == "too_few_paragraphs"


@pytest.mark.parametrize("other", [GERMAN, SPANISH, FRENCH])
def test_language_drops_a_paper_in_another_language_and_keeps_a_foreign_abstract(
    other: tuple[str, ...],
) -> None:
    assert dropped("language", paper(*other * 6)).reason == "language"
    assert isinstance(apply_rule("language", paper(*ENGLISH * 6, abstract=other)), Paper)


def test_language_takes_lone_surrogates_and_is_not_led_by_an_english_abstract() -> None:
    broken = paper(*(f"{text} \ud800 {text}" for text in SPANISH * 3))
    assert dropped("language", broken).reason == "language"
    assert dropped("language", paper(*GERMAN * 12, abstract=ENGLISH)).reason == "language"


def test_language_looks_at_the_same_paragraphs_each_time() -> None:
    mixed = paper(*ENGLISH, *GERMAN, *ENGLISH, *FRENCH)
    assert len({repr(apply_rule("language", mixed)) for _ in range(5)}) == 1


def test_top_word_drops_what_says_one_word_too_often_or_mostly_a_number() -> None:
    assert dropped("top_word", paper("gene " + prose(1, 9))).detail.startswith("the most frequent word is")
    numbers = "7 " * 7 + " ".join(f"w{n}x{n}" for n in range(200))
    assert "is 7," in dropped("top_word", paper(numbers)).detail
    assert apply_rule(
        "top_word",
        paper(" ".join(f"the w{n} of v{n} x{n} and u{n} y{n} z{n} in t{n} s{n} " * 2 for n in range(99))),
        max_share=0.1,
    )


def test_top_word_takes_no_word_for_more_frequent_than_it_is() -> None:
    words = [f"w{n}x" for n in range(100_000)]
    places = word_hashes(" ".join(words)) & np.uint64(8191)  # the rule's small table
    beside = [words[place] for place in np.flatnonzero(places == word_hashes("the")[0] & np.uint64(8191))]
    assert len(beside) > 8
    text = "the " * 40 + "7 " * 45 + " ".join(beside[:8]) + " " + " ".join(words[:800])
    assert "is 7," in dropped("top_word", paper(text)).detail
    assert isinstance(apply_rule("top_word", paper(text.replace("7 ", "seven "))), Paper)


def test_repetition_drops_repeated_paragraphs_and_repeated_runs_of_words() -> None:
    assert "paragraphs" in dropped("repetition", paper(*[prose(1, 50)] * 3)).detail
    loop = " ".join([prose(1, 20)] * 50)
    assert "10-grams" in dropped("repetition", paper(loop)).detail


def test_repetition_is_the_share_of_all_grams_in_papers_of_any_length() -> None:
    once = [f"w{n}" for n in range(90_000)]
    assert isinstance(apply_rule("repetition", paper(" ".join(once))), Paper)
    twice = once[:60_000] * 2
    assert "100.0%" in dropped("repetition", paper(" ".join(twice))).detail


def test_symbols_drops_what_is_mostly_signs() -> None:
    assert dropped("symbols", paper("+-*/ " * 100 + "ab")).reason == "symbols"
    assert isinstance(apply_rule("symbols", paper("患者 は 治療 を 受けた " * 10)), Paper)


def test_long_lines_drops_a_dump_and_says_how_long() -> None:
    assert "longest" in dropped("long_lines", paper(*["short"] * 99, "x" * 8000)).detail
    assert "mean" in dropped("long_lines", paper("x" * 1300, "x" * 1300)).detail


def test_ocr_drops_letters_apart_and_undecoded_characters() -> None:
    torn = "A b str act of the p ap er. M e thods were used to m ea sure. " * 10
    assert "broken words" in dropped("ocr", paper(torn)).detail
    assert "U+FFFD" in dropped("ocr", paper("the \ufffd value \ufffd of " * 20)).detail
    assert isinstance(
        apply_rule("ocr", paper("Vitamin A, group B and p < 0.05 in a J. R. Smith test. " * 50)), Paper
    )


def test_prose_drops_the_paragraph_that_is_a_table_a_sequence_or_torn_not_the_paper() -> None:
    table = "12.3 ± 0.4 11.8 ± 0.5 0.03 14.1 (3.2) 13.9 (3.1) 0.71 45/120 38/118 0.21 1.02 (0.8-1.3)"
    sequence = "Primer sequence: " + "ACGTTGCA" * 40
    torn = "A b s t r a c t B a c k g r o u n d and m e t h o d s i n this p a p e r"
    results = "The mean was 12.3 (SD 0.4) in the treated and 11.8 (SD 0.5) in the control group (p = 0.03)."
    assert kept_texts("prose", ENGLISH[0], table, sequence, torn, results) == [ENGLISH[0], results]
    address = "The code is at https://example.org/" + "a-very-long-path/" * 12
    assert kept_texts("prose", address) == [address]


def test_prose_drops_the_right_paragraphs_of_abstract_and_body_and_no_heading() -> None:
    numbers = "12.3 4.5 6.7 8.9 | " * 5
    sections = (
        Block(numbers, 1),
        Block(numbers),
        Block("Größe über 5 µm, x²"),
        Block("", 2),
        Block(numbers),
        Block("x"),
    )
    whole = replace(paper(abstract=(numbers, ENGLISH[0])), sections=sections)
    result = apply_rule("prose", whole)
    assert isinstance(result, Paper)
    assert result.abstract == (ENGLISH[0],)
    assert result.sections == (sections[0], sections[2], sections[3], sections[5])


ODD = (
    "  \t\n\x00\x07\x7f\x85\u00a0\u00ad\u0301\u0345\u1161\u200b\u2009\u2126\ufb01\ufeff\ud800\U0001f600\u4e2d"
)


@given(
    st.lists(st.text(st.sampled_from("abAE \u00e9\u00b5\u2013\u03b1" + ODD) | st.characters()), max_size=8)
)
def test_normalize_of_many_texts_at_once_is_that_of_each(texts: list[str]) -> None:
    assert normalize_texts(texts) == [normalize_text(text) for text in texts]


def test_normalize_at_once_knows_every_character_and_what_it_composes_with() -> None:
    characters = [
        chr(code) for code in range(0x11_0000) if code != ord("\x1e")
    ]  # with it each is looked at alone
    assert normalize_texts(characters) == [normalize_text(character) for character in characters]
    marks = map(chr, range(0x80, 0x3100))
    composing = [f"{base}{mark}" for mark in marks for base in "aE\u03b1\u1100\u09c7"]
    assert normalize_texts(composing) == [normalize_text(text) for text in composing]


def test_ocr_counts_a_capital_and_runs_of_letters_apart() -> None:
    ten_thousand = "word " * 2000
    for torn, count in (
        ("A b str.", 1),
        ("a b str.", 1),
        ("A B str.", 0),
        ("a b c d e f.", 2),
        ("é b str.", 0),
    ):
        found = dropped("ocr", paper(torn, ten_thousand), max_broken_words=-1)
        assert f" {count * 10_000 / (10_000 + len(torn)):.1f} " in f" {found.detail}"


def test_boilerplate_drops_publishing_matter_and_running_heads_after_the_first() -> None:
    gone = [
        "Copyright © 2012 The Authors. This is an open-access article.",
        "© 2019 Elsevier Ltd. All rights reserved.",
        "This is an Open Access article distributed under the terms of the Creative Commons licence.",
        "Correspondence: Ada Lovelace, Department of Mathematics",
        "*Corresponding author. E-mail: ada@example.org",
        "Received 3 March 2010; Accepted 5 May 2010",
        "Published online: 3 March 2010",
        "doi:10.1186/1471-2180-11-174",
        "The authors declare that they have no competing interests.",
        "Page 3 of 10",
    ]
    head = "BMC Microbiology 2011, 11:174"
    assert kept_texts("boilerplate", head, *gone, ENGLISH[0], head, ENGLISH[1], head) == [head, *ENGLISH[:2]]
    catalogue = ["Plant used for medicinal purposes (Nordal 1963)"] * 4
    assert kept_texts("boilerplate", *catalogue) == catalogue
    stays = [
        "Received doses were compared.",
        "Copyright law in medicine differs.".replace("Copyright", "Patent"),
    ]
    assert kept_texts("boilerplate", *stays, ENGLISH[0], ENGLISH[0]) == [*stays, ENGLISH[0], ENGLISH[0]]


def test_the_first_rule_that_drops_a_paper_ends_the_chain() -> None:
    rules = chain([{"rule": "normalize"}, {"rule": "length"}, {"rule": "language"}])
    result = apply(rules, paper(*GERMAN))
    assert isinstance(result, Dropped)
    assert result.reason == "too_few_words"


def test_rules_change_nothing_of_a_paper_but_its_texts() -> None:
    whole = replace(sound_paper(), license="CC BY", year=2001, journal="J", retracts=("PMC2",), corpus_id=3)
    result = apply(chain(read_recipe(RECIPES / "corpus_pmc.yaml").rules), whole)
    assert isinstance(result, Paper)
    assert replace(result, abstract=whole.abstract, sections=whole.sections) == whole


@pytest.mark.shared
@pytest.mark.skipif(not ARTICLES.exists(), reason="the real articles are not here")
def test_of_real_articles_only_corrections_announcements_and_a_checklist_are_lost() -> None:
    rules = chain(read_recipe(RECIPES / "corpus_pmc.yaml").rules)
    (files,) = shards(find_inputs([str(ARTICLES)]))
    read, lost, characters, kept_characters = 0, [], 0, 0
    for record in ShardReader(files):
        assert isinstance(record, Paper)
        read += 1
        result = apply(rules, record)
        if isinstance(result, Dropped):
            lost.append((result.reason, record.title))
        else:
            characters += len(training_text(record))
            kept_characters += len(training_text(result))
    assert read == 1033
    assert len(lost) <= 12
    assert {reason for reason, _ in lost} == {"too_few_words", "too_few_paragraphs", "top_word"}
    assert kept_characters / characters > 0.99
