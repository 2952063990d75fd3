"""JATS and NLM journal article XML, as PubMed Central and publishers give it: one or more articles a file.

Both styles of PMC id (`pmc`, `pmcid`/`pmcid-ver`) are read. The text is the article's own abstract and body;
figures, tables, displayed formulas, notes, back matter, floats and sub-articles are not part of it.
"""

import html
import re
from collections.abc import Iterator
from typing import BinaryIO

from lxml import etree

from data_tools.papers import (
    Block,
    Paper,
    Rejected,
    Source,
    normalize_doi,
    normalize_pmc_id,
    title_says_retracted,
)
from data_tools.readers.citations import MARK, close_gaps, is_numeric

_FLOATS = {
    "fig",
    "fig-group",
    "table-wrap",
    "table-wrap-group",
    "table",
    "caption",
    "graphic",
    "inline-graphic",
}
_FORMULAS = {"disp-formula", "disp-formula-group", "chem-struct-wrap", "tex-math", "annotation"}
_NOTES = {"ref-list", "fn", "fn-group", "supplementary-material", "inline-supplementary-material", "media"}
_APPARATUS = {"label", "related-article", "related-object", "permissions", "attrib", "object-id", "sec-meta"}
_SKIPPED = _FLOATS | _FORMULAS | _NOTES | _APPARATUS | {"alt-text", "long-desc"}
_SECTIONS = {"sec", "boxed-text"}
_LISTS = {"list", "list-item", "def-list", "def-item", "disp-quote", "verse-group", "verse-line"}
_PARAGRAPHS = _SECTIONS | _LISTS | {"p", "title", "abstract", "statement", "speech", "preformat", "code"}
# The article-types of a retracted article and of the notice that says so.
_RETRACTED_TYPES = frozenset({"retraction", "retracted-article"})
_YES = frozenset({"yes", "true", "1"})
_POWER = re.compile(r"[+\u2212-]?\d")


def read(stream: BinaryIO, name: str) -> Iterator[Paper | Rejected]:
    """The articles of a file, or one rejection when it is not well-formed XML.

    No entity of the file's own is expanded, no DTD is loaded, nothing is fetched.

    Args:
        stream: the file.
        name: recorded as the source.
    """
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=True,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.parse(stream, parser).getroot()
    except etree.XMLSyntaxError as error:
        yield Rejected("broken_xml", Source(name, 1), str(error))
        return
    for element in root.iter(etree.Element):
        element.tag = etree.QName(element).localname
    articles = [root] if root.tag == "article" else list(root.iter("article"))
    if not articles:
        yield Rejected("wrong_structure", Source(name, 1), f"the root is <{root.tag}>, not <article>")
    for number, article in enumerate(articles, start=1):
        yield _record(article, Source(name, number))


def _record(article: etree._Element, source: Source) -> Paper | Rejected:
    try:
        return _paper(article, source)
    except RecursionError:
        return Rejected("wrong_structure", source, "the elements are nested too deep")


def _paper(article: etree._Element, source: Source) -> Paper | Rejected:
    meta = article.find("front/article-meta")
    if meta is None:
        return Rejected("wrong_structure", source, "the article has no <article-meta>")
    ids = {
        element.get("pub-id-type"): (element.text or "").strip() for element in meta.iterfind("article-id")
    }
    title_element = meta.find("title-group/article-title")
    title = _inline(title_element) if title_element is not None else ""
    body = article.find("body")
    return Paper(
        source=source,
        pmc_id=_first(normalize_pmc_id(ids.get(kind)) for kind in ("pmc", "pmcid", "pmcid-ver")),
        corpus_id=None,
        doi=normalize_doi(ids.get("doi")),
        pubmed_id=ids.get("pmid") or None,
        title=title,
        abstract=tuple(_abstract(meta)),
        sections=tuple(_blocks(body, depth=1)) if body is not None else (),
        license=_license(meta),
        retracted=_is_retracted(article, meta, title),
    )


def _text(element: etree._Element) -> str:
    return "".join(str(piece) for piece in element.itertext())


def _first(values: Iterator[str | None]) -> str | None:
    return next((value for value in values if value), None)


def _is_retracted(article: etree._Element, meta: etree._Element, title: str) -> bool:
    """Whether the article is retracted, or is the notice of a retraction.

    By its article-type, by its title, by a link forward to the notice, or by PMC's own flag among the custom
    metadata. A link *to* a retracted article says nothing of this one.
    """
    links = {link.get("related-article-type") for link in meta.iterfind("related-article")}
    flags = (
        (pair.findtext("meta-value") or "").strip().lower() in _YES
        for pair in meta.iter("custom-meta")
        if "retracted" in (pair.findtext("meta-name") or "").lower()
    )
    return (
        article.get("article-type") in _RETRACTED_TYPES
        or title_says_retracted(title)
        or "retraction-forward" in links
        or any(flags)
    )


def _license(meta: etree._Element) -> str | None:
    """The licence's address, or its type, or its own words; None when the article states none."""
    license_element = next(meta.iter("license"), None)
    if license_element is None:
        return None
    address = license_element.get("{http://www.w3.org/1999/xlink}href") or license_element.findtext(
        "license_ref"
    )
    words = " ".join(_text(license_element).split())
    return address or license_element.get("license-type") or words[:200] or None


def _abstract(meta: etree._Element) -> Iterator[str]:
    """Paragraphs of the abstract proper; those with an abstract-type are digests and graphical abstracts.

    The title of a section of a structured abstract opens its first paragraph: `Methods: We ...`.
    """
    for abstract in meta.iterfind("abstract"):
        if abstract.get("abstract-type") is not None:
            continue
        heading = ""
        for block in _blocks(abstract, depth=1):
            if block.depth:
                heading = block.text.rstrip(" .:") + ": "
            else:
                yield heading + block.text
                heading = ""


def _blocks(parent: etree._Element, depth: int) -> Iterator[Block]:
    """Headings and paragraphs below a body, an abstract or a section, whose headings stand at `depth`."""
    for child in parent:
        if child.tag in _SECTIONS:
            yield from _section(child, depth)
        elif child.tag != "title":
            yield from (Block(text) for text in _paragraphs(child))


def _section(section: etree._Element, depth: int) -> Iterator[Block]:
    """A section's heading and text, or nothing when it holds only what is skipped."""
    inside = list(_blocks(section, depth + 1))
    title = section.find("title")
    if title is None:
        title = section.find("caption/title")
    heading = _inline(title) if title is not None else ""
    if inside and heading:
        yield Block(heading, depth)
    yield from inside


def _inline(element: etree._Element) -> str:
    return " ".join(_paragraphs(element))


def _paragraphs(element: etree._Element) -> list[str]:
    """The text of an element, cut wherever a paragraph, list item or quotation begins or ends."""
    collector = _Paragraphs()
    collector.add(element)
    collector.cut()
    return collector.finished


class _Paragraphs:
    """Collects running text into paragraphs."""

    def __init__(self) -> None:
        self.finished: list[str] = []
        self._pieces: list[str] = []

    def cut(self) -> None:
        """End the paragraph."""
        text = close_gaps("".join(self._pieces))
        if text.strip():
            self.finished.append(text)
        self._pieces.clear()

    def add(self, element: etree._Element) -> None:
        """Add an element's text, without its tail."""
        if isinstance(element, etree._Entity):
            self._pieces.append(_character(element))
        elif element.tag in _SKIPPED:
            return
        elif element.tag == "xref":
            self._add_reference(element)
        elif element.tag in _PARAGRAPHS:
            self.cut()
            self._add_content(element)
            self.cut()
        elif element.tag == "sup":
            self._add_superscript(element)
        else:
            self._add_content(element)

    def _add_content(self, element: etree._Element) -> None:
        self._pieces.append(element.text or "")
        for child in element:
            self.add(child)
            self._pieces.append(child.tail or "")

    def _add_reference(self, element: etree._Element) -> None:
        kind = element.get("ref-type")
        if kind == "bibr" and is_numeric(_text(element)):
            self._pieces.append(MARK)
        elif kind not in ("fn", "table-fn", "aff", "corresp"):
            self._add_content(element)

    def _add_superscript(self, element: etree._Element) -> None:
        """`10<sup>-3</sup>` becomes `10^-3`: as `10-3` it would be another number."""
        if element.text and _POWER.match(element.text.strip()):
            self._pieces.append("^")
        self._add_content(element)


def _character(entity: etree._Element) -> str:
    """The character of an entity with a name that HTML knows too; nothing for one the file defines itself."""
    name = entity.text or ""
    character = html.unescape(name)
    return character if character != name else ""
