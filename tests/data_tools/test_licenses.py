"""Licence statements fall into the groups of PubMed Central, however a source writes them."""

import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from data_tools.licenses import GROUPS, license_group
from data_tools.papers import Paper
from data_tools.readers.jats import read
from data_tools.streams import InputStream

STATEMENTS = {
    "commercial": (
        "CC BY",
        "CCBY",
        "cc-by",
        "CC BY 4.0",
        "CC-BY-SA",
        "CCBYSA",
        "CC BY-ND",
        "CC0",
        "cc0-1.0",
        "public-domain",
        "by",
        "https://creativecommons.org/licenses/by/4.0/",
        "http://creativecommons.org/licenses/by-sa/3.0/igo/",
        "https://creativecommons.org/publicdomain/zero/1.0/",
        "This is an open access article under the terms of the Creative Commons Attribution License",
        "licensed under a Creative Commons Attribution 4.0 International License",
    ),
    "noncommercial": (
        "CC BY-NC",
        "CCBYNC",
        "cc-by-nc",
        "CC BY-NC-ND 4.0",
        "CCBYNCND",
        "CC BY-NC-SA",
        "http://creativecommons.org/licenses/by-nc-nd/4.0/",
        "https://creativecommons.org/licenses/by-nc/2.0/uk/",
        "Creative Commons Attribution-NonCommercial License",
        "distributed under the Creative Commons Attribution Non-Commercial License, see licenses/by-nc/3.0",
    ),
    "other": (
        "NO-CC CODE",
        "publisher-specific",
        "publisher-specific, author manuscript",
        "other-oa",
        "implied-oa",
        "elsevier-specific: oa user license",
        "acs-specific: authorchoice/editors choice usage agreement",
        "Copyright 2011 the authors; access by subscription",
        "GREEN",
    ),
    "unknown": (None, "", "  ", "-"),
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_statement_falls_into_its_group(group: str) -> None:
    for statement in STATEMENTS[group]:
        assert license_group(statement) == group, statement


@pytest.mark.shared
def test_every_statement_of_the_commercial_articles_is_commercial(shared: Path) -> None:
    with tarfile.open(shared / "jats" / "pmc_cc_by_1033.tar.gz") as archive:
        articles = [(one.name, archive.extractfile(one)) for one in archive if one.isfile()]
        papers = [
            paper
            for name, file in articles
            if file
            for paper in read(InputStream(BytesIO(file.read()), name, name), name)
        ]
    statements = {paper.license for paper in papers if isinstance(paper, Paper)}
    assert len(papers) == 1033
    assert len(statements) > 5
    assert {license_group(statement) for statement in statements} == {"commercial"}
