"""JATS and NLM journal article XML, as PubMed Central and publishers give it: one or more articles a file.

Both styles of PMC id (`pmc`, `pmcid`/`pmcid-ver`) are read. The text is the article's own abstract and body;
figures, tables, displayed formulas, notes, back matter, floats and sub-articles are not part of it.
"""

import html
import re
from collections.abc import Iterator
from itertools import count, zip_longest
from typing import cast

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
from data_tools.readers.fields import year as year_of
from data_tools.readers.pmc_metadata import from_json
from data_tools.streams import DamagedFile, InputStream

LARGEST_ARTICLE = 1 << 28
"""Bytes beyond which a file is no article: the longest has some 30 MB."""

_FLOATS = {
    "fig",
    "fig-group",
    "table-wrap",
    "table-wrap-group",
    "table",
    "array",
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
_MATHEMATICS = frozenset({"msup", "msubsup", "mfrac", "msqrt", "mroot", "mmultiscripts"})
# How running text goes on at an element; those not named here are looked into.
_TREATMENTS: dict[object, str] = {
    **dict.fromkeys(_PARAGRAPHS, "paragraph"),
    **dict.fromkeys(_SKIPPED, "skip"),
    **dict.fromkeys(_MATHEMATICS, "formula"),
    "xref": "reference",
    "sup": "superscript",
    "break": "space",
    etree.Entity: "entity",
}
# The article-types of a retracted article and of the notice that says so.
_RETRACTED_TYPES = frozenset({"retraction", "retracted-article"})
_YES = frozenset({"yes", "true", "1"})
# A signed number, or a negative symbol as in 2^-ddCt; the signs are hyphen, en dash and minus in any guise.
_VERSIONED = re.compile(r"(.*/)(PMC\d+\.\d+)\.n?xml(?:\.gz|\.zst)?", re.DOTALL)
_POWER = re.compile(r"\s*(?:\+?\d|[\u2010-\u2013\u2212-]\w)")
_ONE_SYMBOL = re.compile(r"[+\u2010-\u2013\u2212-]?(?:[\w.,]+|\([^()]*\)|.)")
_CREATIVE_COMMONS = re.compile(r"https?://(?:www\.)?creativecommons\.org/[^\s<>\"')\]]*[^\s<>\"')\].,;]")
# Elements in a namespace: of MathML, tables, licences, or all of them where the article has a default one.
_named = etree.XPath("//*[namespace-uri()]")
# Values of abstract-type for what is no abstract; the attribute also marks abstracts by section or language.
_DIGESTS = frozenset(
    {
        "graphical",
        "teaser",
        "editor",
        "editors-summary",
        "summary",
        "short",
        "precis",
        "toc",
        "toc-abstract",
        "plain-language-summary",
        "plain-summary",
        "lay-summary",
        "executive-summary",
        "key-points",
        "keypoints",
        "highlights",
        "web-summary",
        "video",
    }
)


def companions(path: str) -> tuple[str, ...]:
    """Where the JSON of an article in PMC's cloud layout is: beside it, or in a directory `metadata`."""
    match = _VERSIONED.fullmatch(path)
    if match is None:
        return ()
    directory, name = match[1], f"{match[2]}.json"
    above = directory.rstrip("/").rpartition("/")[0]
    return (f"{directory}{name}", f"{directory}metadata/{name}", f"{above}/metadata/{name}")


def read(stream: InputStream, name: str, companion: InputStream | None = None) -> Iterator[Paper | Rejected]:
    """The articles of a file, or one rejection when it is not well-formed XML.

    No entity of the file's own is expanded, no DTD is loaded, nothing is fetched.

    Args:
        stream: the file.
        name: recorded as the source.
        companion: what PMC says of the article, as JSON.
    """
    source = Source(name, 1)
    try:
        content = stream.read(LARGEST_ARTICLE + 1)
        stated = companion.read(LARGEST_ARTICLE + 1) if companion else b""
    except DamagedFile as error:
        yield Rejected("broken_archive", source, str(error))
        return
    if max(len(content), len(stated)) > LARGEST_ARTICLE:
        yield Rejected("too_large", source, f"it has more than {LARGEST_ARTICLE} bytes")
        return
    sources = (Source(name, number) for number in count(1))
    yield from articles(content, article_parser(), sources, stated if companion else None)


def article_parser() -> etree.XMLParser:
    """A parser that expands no entity of the file's own, loads no DTD and fetches nothing."""
    return etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=True,
        remove_comments=True,
        remove_pis=True,
    )


def articles(
    content: bytes, parser: etree.XMLParser, sources: Iterator[Source], stated: bytes | None = None
) -> Iterator[Paper | Rejected]:
    """The articles of an XML document, or one rejection when it is not well-formed.

    Args:
        content: the document.
        parser: from `article_parser`.
        sources: where each article stands.
        stated: what PMC says of the article, as JSON.
    """
    try:
        metadata = from_json(stated) if stated is not None else None
    except ValueError as error:
        yield Rejected("broken_json", next(sources), f"the JSON beside the article: {error}")
        return
    try:
        root = etree.fromstring(content, parser)
    except etree.XMLSyntaxError as error:
        yield Rejected("broken_xml", next(sources), str(error))
        return
    for element in cast(list[etree._Element], _named(root)):
        element.tag = etree.QName(element).localname
    found = [root] if root.tag == "article" else list(root.iter("article"))
    if not found:
        yield Rejected("wrong_structure", next(sources), f"the root is <{root.tag}>, not <article>")
    for article, source in zip(found, sources, strict=False):
        record = _record(article, source)
        yield metadata.added_to(record) if metadata and isinstance(record, Paper) else record


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
        year=_year(meta),
        journal=_journal(article),
        retracts=tuple(_retracts(meta)),
    )


def _year(meta: etree._Element) -> int | None:
    """The year of the first publication; the release in PMC is none."""
    years = (
        year_of(date.findtext("year"))
        for date in meta.iterfind("pub-date")
        if date.get("pub-type") != "pmc-release" and date.get("date-type") != "pmc-release"
    )
    return min((year for year in years if year), default=None)


def _journal(article: etree._Element) -> str | None:
    journal = article.find("front/journal-meta")
    title = next(journal.iter("journal-title"), None) if journal is not None else None
    return " ".join(_text(title).split()) or None if title is not None else None


def _retracts(meta: etree._Element) -> Iterator[str]:
    """PMC ids and DOIs of the articles that this one, a notice, says are retracted."""
    for link in meta.iterfind("related-article[@related-article-type='retracted-article']"):
        address = link.get("{http://www.w3.org/1999/xlink}href")
        kind = (link.get("ext-link-type") or "").lower()
        found = normalize_pmc_id(address) if kind in ("pmc", "pmcid") else normalize_doi(address)
        if found:
            yield found


def _text(element: etree._Element) -> str:
    if not len(element):
        return element.text or ""
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
    """The Creative Commons address in a licence, its other address, its type, or its words; None without."""
    license_element = next(meta.iter("license"), None)
    if license_element is None:
        return None
    found = (_CREATIVE_COMMONS.search(words) for words in _stated(license_element))
    common = next((match[0] for match in found if match), None)
    address = (
        common
        or license_element.get("{http://www.w3.org/1999/xlink}href")
        or license_element.findtext("license_ref")
    )
    words = " ".join(_text(license_element).split())
    return address or license_element.get("license-type") or words[:200] or None


def _stated(element: etree._Element) -> Iterator[str]:
    """Attributes and text of an element and all below it, in order."""
    for inner in element.iter():
        yield from map(str, inner.values())
        yield inner.text or ""
        yield inner.tail or ""


def _abstract(meta: etree._Element) -> Iterator[str]:
    """Paragraphs of the abstract proper; not digests and graphical abstracts.

    The title of a section of a structured abstract opens its first paragraph: `Methods: We ...`.
    """
    for abstract in meta.iterfind("abstract"):
        if (abstract.get("abstract-type") or "").lower() in _DIGESTS:
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
        if text and not text.isspace():
            self.finished.append(text)
        self._pieces.clear()

    def add(self, element: etree._Element) -> None:
        """Add an element's text, without its tail."""
        match _TREATMENTS.get(element.tag):
            case None:
                self._add_content(element)
            case "skip":
                return
            case "reference":
                self._add_reference(element)
            case "paragraph":
                self.cut()
                self._add_content(element)
                self.cut()
            case "superscript":
                self._add_superscript(element)
            case "formula":
                self._pieces.append(_formula(element))
            case "space":
                self._pieces.append(" ")
            case "entity":
                self._pieces.append(_character(element))

    def _add_content(self, element: etree._Element) -> None:
        pieces = self._pieces
        if text := element.text:
            pieces.append(text)
        for child in element:
            self.add(child)
            if tail := child.tail:
                pieces.append(tail)

    def _add_reference(self, element: etree._Element) -> None:
        kind = element.get("ref-type")
        if kind == "bibr" and is_numeric(_text(element)):
            self._pieces.append(MARK)
        elif kind not in ("fn", "table-fn", "aff", "corresp"):
            self._add_content(element)

    def _add_superscript(self, element: etree._Element) -> None:
        """`10<sup>-3</sup>` becomes `10^-3`: as `10-3` it would be another number."""
        place = len(self._pieces)
        self._add_content(element)
        if _POWER.match("".join(self._pieces[place:])):
            self._pieces.insert(place, "^")


def _formula(element: etree._Element) -> str:
    """A power, fraction or root of MathML in one line: `10^28`, `a/b`, `\u221a2`.

    Without the signs it would be another number. A part of several symbols is put in brackets.
    """
    parts = [_inline(child).strip() for child in element if isinstance(child.tag, str)]
    match element.tag, [part if _ONE_SYMBOL.fullmatch(part) else f"({part})" for part in parts]:
        case "msup", [base, power]:
            return f"{base}{_power(parts[1], power)}"
        case "msubsup", [base, _, power]:
            return f"{base}{parts[1]}{_power(parts[2], power)}"
        case "mfrac", [above, below]:
            return f"{above}/{below}"
        case "mroot", [base, degree]:
            return f"{base}^(1/{degree})"
        case "mmultiscripts", [_, *_]:
            return _scripts(element, parts)
        case "msqrt", _:
            inside = "".join(parts)
            return "\u221a" + (inside if _ONE_SYMBOL.fullmatch(inside) else f"({inside})")
    return "".join(parts)  # not as MathML has it


def _scripts(element: etree._Element, parts: list[str]) -> str:
    """A base with scripts in pairs, lower and upper, first those behind it and then those before it."""
    kinds = [child.tag for child in element if isinstance(child.tag, str)]
    behind = kinds.index("mprescripts") if "mprescripts" in kinds else len(kinds)
    return _pairs(parts[behind + 1 :]) + parts[0] + _pairs(parts[1:behind])


def _pairs(scripts: list[str]) -> str:
    lower, upper = scripts[::2], scripts[1::2]
    return "".join(f"{low}{_power(high, high)}" for low, high in zip_longest(lower, upper, fillvalue=""))


def _power(text: str, in_brackets: str) -> str:
    """An exponent after `^`; a mark such as a prime or an asterisk as it is."""
    return f"^{in_brackets}" if any(character.isalnum() for character in text) else text


def _character(entity: etree._Element) -> str:
    """The character of an entity with a name that HTML knows too; nothing for one the file defines itself."""
    name = entity.text or ""
    character = html.unescape(name)
    return character if character != name else ""
