"""One spelling of identifiers; retraction by a publisher's mark and not by the word."""

import pytest

from data_tools.papers import normalize_doi, normalize_pmc_id, title_says_retracted


@pytest.mark.parametrize(
    "value",
    [
        "9925312",
        "PMC9925312",
        "PMC9925312.1",
        "pmc9925312",
        " PMC9925312 ",
        9925312,
        9925312.0,
        "PMC09925312",
    ],
)
def test_every_spelling_of_a_pmc_id_becomes_one(value: object) -> None:
    assert normalize_pmc_id(value) == "PMC9925312"


@pytest.mark.parametrize(
    "value", [None, "", "PMC", "0", "PMC0", "12a", "PMC1.x", "PMID:12", [], 1.5, "١٢", -4]
)
def test_what_is_no_pmc_id_is_none(value: object) -> None:
    assert normalize_pmc_id(value) is None


@pytest.mark.parametrize(
    "value",
    [
        "10.7150/Thno.1",
        "https://doi.org/10.7150/Thno.1",
        "http://dx.doi.org/10.7150/Thno.1",
        "doi: 10.7150/Thno.1",
    ],
)
def test_a_doi_loses_its_resolver_and_keeps_its_case(value: str) -> None:
    assert normalize_doi(value) == "10.7150/Thno.1"


@pytest.mark.parametrize("value", [None, "", "11.1/x", "10.1/a b", 10.1])
def test_what_is_no_doi_is_none(value: object) -> None:
    assert normalize_doi(value) is None


@pytest.mark.parametrize(
    "title",
    [
        "RETRACTED: Drought tolerance in rice",
        "RETRACTED ARTICLE: Drought tolerance",
        "[RETRACTED] Drought tolerance",
        "Retracted: Drought tolerance",
        "[Retracted] Drought tolerance",
        "Retracted article: Drought tolerance",
        "Retraction: Drought tolerance",
        "Retraction Note to: Drought tolerance",
    ],
)
def test_a_publishers_mark_is_a_retraction(title: str) -> None:
    assert title_says_retracted(title)


@pytest.mark.parametrize(
    "title",
    [
        "Retracted science and the retraction index",
        "Retraction of the foreskin in infants",
        "Lung retraction after surgery: RETRACTED lobes",
        "Retracted eyelids in Graves disease: a cohort",
    ],
)
def test_the_word_alone_is_not(title: str) -> None:
    assert not title_says_retracted(title)
