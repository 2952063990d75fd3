"""Papers for the tests, written in the formats of their sources."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from data_tools.papers import Paper
from data_tools.recipe import Recipe
from data_tools.render import training_text
from data_tools.rules import apply, chain

WORDS = """
patients cells protein expression treatment analysis receptor tissue response clinical gene therapy serum
plasma infection immune tumour cohort baseline dose randomized placebo insulin glucose cardiac renal hepatic
pulmonary neural synapse membrane kinase inhibitor antibody antigen vaccine mortality risk ratio interval
confidence significant association outcome follow-up biopsy lesion imaging the of and in with was were by for
after between 12 0.05 95% mg/kg
"""


def prose(seed: int, words: int) -> str:
    """A reproducible paragraph."""
    chosen = np.random.default_rng(seed).choice(WORDS.split(), words)
    return " ".join(chosen).capitalize() + "."


class S2orcText:
    """Builds `content.text` and its annotations side by side."""

    def __init__(self) -> None:
        self.text = "\n"
        self.spans: dict[str, list[dict[str, object]]] = {}

    def add(self, text: str, *kinds: str, attributes: dict[str, object] | None = None) -> "S2orcText":
        span: dict[str, object] = {"start": len(self.text), "end": len(self.text) + len(text)}
        if attributes:
            span["attributes"] = attributes
        for kind in kinds:
            self.spans.setdefault(kind, []).append(span)
        self.text += text + "\n"
        return self

    def annotations(self) -> dict[str, str | None]:
        known = ("abstract", "author", "bibentry", "figure", "paragraph", "sectionheader", "table", "title")
        return {
            kind: json.dumps(self.spans[kind]) if kind in self.spans else None
            for kind in {*known, *self.spans}
        }


def s2orc_record(
    body: S2orcText,
    pmc_id: str | None = None,
    corpus_id: int = 1,
    doi: str | None = None,
    license: str | None = "CCBY",
) -> dict[str, object]:
    """A record of the API's `s2orc` dataset."""
    return {
        "corpusid": corpus_id,
        "externalids": {"pubmedcentral": pmc_id, "pubmed": None, "doi": doi},
        "content": {
            "source": {"oainfo": {"license": license}},
            "text": body.text,
            "annotations": body.annotations(),
        },
        "updated": "2023-02-18T05:38:20Z",
    }


def simple_record(number: int, words: int = 60, pmc_id: str | None = "", doi: str | None = None) -> object:
    """A paper with title, authors, abstract, two sections and a reference list; its own PMC id by default."""
    body = S2orcText().add(f"Paper {number} on {prose(number, 4)}", "title")
    body.add("Ada Lovelace University", "author").add(prose(number + 1000, 20), "abstract")
    for section in ("Introduction", "Results"):
        body.add(section, "sectionheader").add(prose(number + hash_of(section), words), "paragraph")
    body.add("Lovelace A. Notes upon the memoir. 1843", "bibentry")
    return s2orc_record(body, str(1000 + number) if pmc_id == "" else pmc_id, number, doi)


def hash_of(text: str) -> int:
    return sum(text.encode())


def jats_article(
    ids: str = '<article-id pub-id-type="pmc">77</article-id>',
    title: str = "A title",
    abstract: str = "<p>An abstract.</p>",
    body: str = "<sec><title>Methods</title><p>We measured.</p></sec>",
    meta: str = "",
    attributes: str = 'article-type="research-article"',
    after_body: str = "",
) -> str:
    """An article in JATS with the usual apparatus around the given parts."""
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE article PUBLIC "-//NLM//DTD JATS (Z39.96) Journal Archiving and Interchange DTD v1.0 20120330//EN"
 "JATS-archivearticle1.dtd">
<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML"
 {attributes}>
<front><journal-meta><journal-title>J</journal-title></journal-meta><article-meta>{ids}
<title-group><article-title>{title}</article-title>
<alt-title alt-title-type="right-running">Running head</alt-title></title-group>
<contrib-group><contrib><name><surname>Lovelace</surname><given-names>Ada</given-names></name></contrib>
<aff>University of London</aff></contrib-group>
{meta}<abstract>{abstract}</abstract></article-meta></front>
<body>{body}</body>
<back><ack><p>We thank Babbage.</p></ack><ref-list><title>References</title>
<ref><mixed-citation>Menabrea L. Sketch of the analytical engine.</mixed-citation></ref></ref-list></back>
{after_body}</article>
"""


def simple_article(number: int, words: int = 60) -> str:
    """An article with a PMC id and two sections."""
    sections = "".join(
        f"<sec><title>{name}</title><p>{escape(prose(number + hash_of(name), words))}</p></sec>"
        for name in ("Background", "Discussion")
    )
    return jats_article(
        ids=f'<article-id pub-id-type="pmc">{5000 + number}</article-id>',
        title=f"Article {number}",
        abstract=f"<p>{escape(prose(number + 9000, 20))}</p>",
        body=sections,
    )


def write_jsonl(path: Path, records: Sequence[object]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cleaned_text(paper: Paper) -> str:
    """The training text of a paper under the rules that a build applies unless told otherwise."""
    cleaned = apply(chain(Recipe().rules), paper)
    assert isinstance(cleaned, Paper)
    return training_text(cleaned)


def v2_record(number: int, words: int = 60) -> dict[str, object]:
    """A record of the API's `s2orc_v2` dataset: `simple_record`'s paper in the other layout."""
    body = S2orcText().add(prose(number + 1000, 20), "abstract")
    for section in ("Introduction", "Results"):
        body.add(section, "section_header").add(prose(number + hash_of(section), words), "paragraph")
    return {
        "corpusid": number,
        "title": f"Paper {number} on {prose(number, 4)}",
        "authors": [{"name": "Ada Lovelace"}],
        "openaccessinfo": {
            "externalids": {"PubMedCentral": 1000 + number, "DOI": None},
            "license": "CCBY",
            "status": "GOLD",
        },
        "body": {
            "text": body.text,
            "annotations": {kind: spans for kind, spans in body.annotations().items() if spans},
        },
        "bibliography": {"text": "Lovelace A. Notes upon the memoir. 1843", "annotations": {}},
    }


def parse_2020(number: int, words: int = 60) -> dict[str, object]:
    """A record of `pdf_parses` of S2ORC 2020, whose abstract is in the metadata alone."""
    text = f"Shown before [1]. {prose(number, words)}"
    span = {"start": text.index("[1]"), "end": text.index("[1]") + 3, "text": "[1]", "ref_id": "BIBREF0"}
    return {
        "paper_id": str(number),
        "_pdf_hash": "f" * 40,
        "abstract": [],
        "body_text": [
            {"section": "Results", "text": text, "cite_spans": [span], "ref_spans": []},
            {"section": "Results", "text": "More.", "cite_spans": [], "ref_spans": []},
            {"section": "", "text": "Without section.", "cite_spans": [], "ref_spans": []},
        ],
        "bib_entries": {"BIBREF0": {"title": "Sketch of the engine"}},
        "ref_entries": {"FIGREF0": {"text": "A caption", "type": "figure"}},
    }


def metadata_2020(number: int, has_parse: bool = True) -> dict[str, object]:
    """The record of `metadata` that belongs to `parse_2020`."""
    return {
        "paper_id": str(number),
        "title": f"Paper {number}",
        "authors": [],
        "abstract": "Aim: to see. ::: Result: saw.",
        "year": 2017,
        "pmc_id": f"PMC{1000 + number}",
        "pubmed_id": str(number),
        "doi": f"10.1/{number}",
        "venue": "V",
        "journal": "J",
        "has_pdf_parse": has_parse,
        "has_pdf_parsed_abstract": False,
    }


def write_archive(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar archive, compressed as its name says, with regular files of any names."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
