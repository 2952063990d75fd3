"""What the rules do to a paper, shown: nothing is lost or made up in the picture, and drops say why."""

import random
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_tools.before_after import before_after, changes
from data_tools.errors import UserError
from data_tools.recipe import Recipe
from tests.data_tools.sources import jats_article, prose, simple_record, write_jsonl

WORDS = st.lists(st.sampled_from(["a", "b", "c", "\n\n", " ", "long\u00ad"]), max_size=30).map("".join)


def shown(path: Path, recipe: Recipe, number: int = 0, colour: bool = False) -> str:
    out = StringIO()
    before_after(
        path, number, recipe, Console(file=out, width=100, color_system="standard" if colour else None)
    )
    return out.getvalue()


@pytest.fixture
def article(tmp_path: Path) -> Path:
    body = (
        f"<sec><title>Methods</title><p>We  mea\u00adsured it. {prose(1, 200)}</p></sec>"
        "<sec><title>Funding</title><p>By the Crown.</p></sec>"
    )
    path = tmp_path / "PMC77.xml"
    path.write_text(jats_article(body=body))
    return path


@given(WORDS, WORDS)
def test_what_is_the_same_and_removed_is_the_text_before_and_with_added_the_text_after(
    one: str, other: str
) -> None:
    pieces = list(changes(one, other))
    before = "".join(text for kind, text in pieces if kind != "added")
    after = "".join(text for kind, text in pieces if kind != "removed")
    assert (before.rstrip("\n"), after.rstrip("\n")) == (one.rstrip("\n"), other.rstrip("\n"))


@given(st.integers(0, 2**32), st.sampled_from([0.001, 0.1, 1.0]))
@settings(max_examples=10, deadline=None)
def test_a_long_text_without_paragraphs_is_compared_whole_and_by_words(seed: int, share: float) -> None:
    chance = random.Random(seed)
    words = prose(seed % 100, 4000).split()
    one, other = " ".join(words), " ".join(w + "x" if chance.random() < share else w for w in words)
    pieces = list(changes(one, other))
    assert "".join(text for kind, text in pieces if kind != "added").rstrip("\n") == one
    assert "".join(text for kind, text in pieces if kind != "removed").rstrip("\n") == other
    if share < 0.01:
        assert sum(len(text) for kind, text in pieces if kind == "removed") < len(one) / 20


def test_each_rule_shows_what_it_removed_and_added_and_folds_the_rest(article: Path) -> None:
    out = shown(article, Recipe())
    normalize, sections = out[: out.index("sections: ")], out[out.index("sections: ") :]
    assert "[-" in normalize
    assert "mea<U+00AD>sured" in normalize
    assert "{+" in normalize
    assert "measured" in normalize
    assert "words \u2026" in normalize
    assert "[-## Funding\n\nBy the Crown.-]" in sections
    assert "Kept:" in sections


def test_removed_is_red_and_added_green(article: Path) -> None:
    out = shown(article, Recipe(), colour=True)
    assert "\x1b[9;31m" in out  # struck through, red
    assert "\x1b[32m" in out


def test_a_paper_that_a_rule_drops_ends_with_the_rule_and_the_reason(article: Path) -> None:
    rules = [{"rule": "normalize"}, {"rule": "length"}, {"rule": "sections"}]
    out = shown(article, Recipe(rules=rules))
    assert "length: left out" in out
    assert "too_few_words: " in out
    assert "sections" not in out


def test_records_without_pmc_id_and_damaged_ones_are_said_to_be_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "papers.jsonl", [simple_record(1, pmc_id=None), {"odd": 1}])
    assert "no_pmc_id" in shown(path, Recipe())
    assert "wrong_structure" in shown(path, Recipe(), number=1)


def test_a_corpus_and_a_number_beyond_the_input_are_refused(tmp_path: Path, article: Path) -> None:
    with pytest.raises(UserError, match=r"There is no record 1 in .*; it has 0 to 0"):
        shown(article, Recipe(), number=1)
    (tmp_path / "corpus.json").touch()
    with pytest.raises(UserError, match="is a corpus, which has only what the rules left"):
        shown(tmp_path, Recipe())
