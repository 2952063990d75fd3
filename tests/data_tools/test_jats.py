"""JATS articles become papers: both id styles, nested sections, and nothing of the apparatus around them."""

import tempfile

import pytest

from data_tools.papers import Block, Paper, Rejected
from data_tools.readers import jats
from data_tools.streams import opened
from tests.data_tools.sources import cleaned_text, jats_article


def read(xml: str | bytes) -> list[Paper | Rejected]:
    """Read from a file on disk, as a build does."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(xml.encode() if isinstance(xml, str) else xml)
        file.flush()
        with opened(file.name) as stream:
            return list(jats.read(stream, "x.xml"))


def read_paper(xml: str) -> Paper:
    (paper,) = read(xml)
    assert isinstance(paper, Paper), paper
    return paper


def body_text(body: str) -> list[str]:
    """The paragraphs of a body."""
    return [block.text for block in read_paper(jats_article(body=body)).sections]


@pytest.mark.parametrize(
    "ids",
    [
        '<article-id pub-id-type="pmc">9925312</article-id>',
        '<article-id pub-id-type="pmc">PMC9925312</article-id>',
        '<article-id pub-id-type="pmcid">PMC9925312</article-id>'
        '<article-id pub-id-type="pmcid-ver">PMC9925312.1</article-id>'
        '<article-id pub-id-type="pmcaid">55</article-id>',
        '<article-id pub-id-type="pmcid-ver">PMC9925312.2</article-id>',
    ],
)
def test_every_style_of_pmc_id_is_read(ids: str) -> None:
    assert read_paper(jats_article(ids=ids)).pmc_id == "PMC9925312"


def test_the_ids_of_references_and_sub_articles_are_not_the_papers() -> None:
    other = '<article-id pub-id-type="pmc">1</article-id>'
    xml = jats_article(
        ids='<article-id pub-id-type="doi">10.1/x</article-id><article-id pub-id-type="pmid">5</article-id>',
        body='<p>a <pub-id pub-id-type="pmcid">PMC2</pub-id></p>',
        after_body=f"<sub-article><front-stub>{other}</front-stub><body><p>Reply.</p></body></sub-article>",
    )
    paper = read_paper(xml)
    assert (paper.pmc_id, paper.doi, paper.pubmed_id) == (None, "10.1/x", "5")
    assert "Reply" not in cleaned_text(paper)


def test_nested_sections_keep_their_order_and_depth() -> None:
    body = (
        "<p>Before.</p><sec><title>A</title><p>a</p><sec><title>B</title><sec><title>C</title><p>c</p></sec>"
        "</sec><p>after B</p></sec><sec><p>untitled</p></sec>"
    )
    assert read_paper(jats_article(body=body)).sections == (
        Block("Before."),
        Block("A", 1),
        Block("a"),
        Block("B", 2),
        Block("C", 3),
        Block("c"),
        Block("after B"),
        Block("untitled"),
    )


def test_authors_affiliations_running_heads_references_and_thanks_stay_out() -> None:
    text = cleaned_text(read_paper(jats_article()))
    assert text == "# A title\n\n## Abstract\n\nAn abstract.\n\n## Methods\n\nWe measured."


def test_figures_tables_formulas_notes_and_floats_stay_out_wherever_they_stand() -> None:
    body = (
        "<sec><title>R</title><p>Before<fig><caption><p>CAPTION</p></caption></fig> after.</p>"
        "<table-wrap><table><tr><td>CELL</td></tr></table></table-wrap>"
        "<p>Given <disp-formula><tex-math>TEX</tex-math>DISPLAYED</disp-formula>by.</p>"
        "<p>Note<xref ref-type='fn'>*</xref><fn><p>FOOTNOTE</p></fn></p></sec>"
        "<sec><title>Only a table</title><table-wrap><table/></table-wrap></sec>"
    )
    paper = read_paper(jats_article(body=body, after_body="<floats-group><fig>FLOAT</fig></floats-group>"))
    assert [block.text for block in paper.sections] == ["R", "Before after.", "Given by.", "Note"]


def test_an_inline_formula_keeps_its_symbols_and_loses_its_tex() -> None:
    formula = (
        "<inline-formula><alternatives><tex-math>\\documentclass</tex-math>"
        "<mml:math><mml:mi>x</mml:mi><mml:mo>=</mml:mo><mml:mn>2</mml:mn></mml:math></alternatives></inline-formula>"
    )
    assert body_text(f"<p>where {formula} holds</p>") == ["where x=2 holds"]


def test_powers_do_not_become_other_numbers() -> None:
    assert body_text("<p>10<sup>-3</sup> m<sup>2</sup>, CO<sub>2</sub>, X<sup>®</sup></p>") == [
        "10^-3 m^2, CO2, X®"
    ]


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("<msup><mn>10</mn><mn>28</mn></msup>", "10^28"),
        ("<msup>\n <mn>10</mn>\n <mrow><mo>\u2212</mo><mn>3</mn></mrow>\n</msup>", "10^\u22123"),
        ("<msup><mi>x</mi><mrow><mi>n</mi><mo>+</mo><mn>1</mn></mrow></msup>", "x^(n+1)"),
        ("<msup><mi>x</mi><mo>\u2032</mo></msup>", "x\u2032"),
        ("<msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup>", "x1^2"),
        ("<mfrac><mn>1</mn><mn>2</mn></mfrac>", "1/2"),
        ("<mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><mn>2</mn></mfrac>", "(a+b)/2"),
        (
            "<msup><mrow><mo>(</mo><mi>a</mi><mo>+</mo><mi>b</mi><mo>)</mo></mrow><mn>2</mn></msup>",
            "(a+b)^2",
        ),
        ("<msqrt><mn>2</mn></msqrt>", "\u221a2"),
        ("<mroot><mn>8</mn><mn>3</mn></mroot>", "8^(1/3)"),
        ("<msup><mfrac><mn>1</mn><mn>2</mn></mfrac><mn>3</mn></msup>", "(1/2)^3"),
        ("<mmultiscripts><mi>X</mi><mi>a</mi><mn>2</mn></mmultiscripts>", "Xa^2"),
        (
            "<mmultiscripts><mi>C</mi><none/><mo>+</mo><mprescripts/><mn>6</mn><mn>14</mn></mmultiscripts>",
            "6^14C+",
        ),
    ],
)
def test_mathml_powers_fractions_and_roots_keep_their_value(formula: str, expected: str) -> None:
    assert body_text(f"<p><math>{formula}</math></p>") == [expected]


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        ("10<sup>\u20133</sup>", "10^\u20133"),
        ("10<sup>\u20103</sup>", "10^\u20103"),
        ("2<sup>\u2212\u0394\u0394Ct</sup>", "2^\u2212\u0394\u0394Ct"),
        ("m<sup><italic>2</italic></sup>", "m^2"),
        ("Cl<sup>\u2212</sup> and CD4<sup>+</sup>", "Cl\u2212 and CD4+"),
    ],
)
def test_powers_in_other_spelling(xml: str, expected: str) -> None:
    assert body_text(f"<p>{xml}</p>") == [expected]


def test_a_year_alone_is_half_of_an_author_year_citation_and_stays() -> None:
    body = (
        '<p>Lovelace (<xref ref-type="bibr">1843</xref>; <xref ref-type="bibr">1844b</xref>) but not '
        'these [<xref ref-type="bibr">18</xref>].</p>'
    )
    assert body_text(body) == ["Lovelace (1843; 1844b) but not these."]


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        ("Known (Menabrea 1842; {1}).", "Known (Menabrea 1842)."),
        ("Known ({1}; Menabrea 1842; {2}; Babbage 1837).", "Known (Menabrea 1842; Babbage 1837)."),
        ("As Lovelace et al.{1}. More.", "As Lovelace et al. More."),
        ("As Lovelace et al. [{1}]. More.", "As Lovelace et al. More."),
        ("Known (see {1},{2}), (e.g., {3}), (reviewed in {4}) and (see also refs. {5}).", "Known and."),
        ("Known (see Table 1).", "Known (see Table 1)."),
    ],
)
def test_nothing_is_left_of_what_only_held_a_citation(xml: str, expected: str) -> None:
    numbers = {str(n): f'<xref ref-type="bibr">{n}</xref>' for n in range(6)}
    for number, reference in numbers.items():
        xml = xml.replace("{" + number + "}", reference)
    assert body_text(f"<p>{xml}</p>") == [expected]


def test_a_break_is_a_space_and_an_array_is_cut_like_a_table() -> None:
    assert body_text("<p>one<break/>two</p><array><tbody><tr><td>CELL</td></tr></tbody></array>") == [
        "one two"
    ]


def test_numeric_citations_go_and_author_years_stay() -> None:
    def cite(text: str) -> str:
        return f'<xref ref-type="bibr" rid="b">{text}</xref>'

    body = (
        f"<p>Known [{cite('1')},{cite('2')}\u2013{cite('5')}] and<sup>{cite('6')},{cite('7')}</sup> more "
        f"({cite('Lovelace, 1843')}), but (not {cite('8')}) in <xref ref-type='fig'>Figure 2</xref> "
        f"[{cite('9')}].</p>"
        "<p>f() and [] stay.</p>"
    )
    assert body_text(body) == [
        "Known and more (Lovelace, 1843), but (not) in Figure 2.",
        "f() and [] stay.",
    ]


def test_lists_and_quotations_become_paragraphs_of_their_own() -> None:
    body = (
        "<p>First: <list><list-item><label>1.</label><p>one</p></list-item>"
        "<list-item><p>two</p></list-item></list>then on.</p>"
        "<disp-quote><p>Quoted.</p></disp-quote><boxed-text><title>Box</title><p>Boxed.</p></boxed-text>"
    )
    assert body_text(body) == ["First: ", "one", "two", "then on.", "Quoted.", "Box", "Boxed."]


@pytest.mark.parametrize(
    ("kind", "kept"), [("section", True), ("teaser", False), ("plain-language-summary", False)]
)
def test_of_abstracts_with_a_type_only_digests_are_left_out(kind: str, kept: bool) -> None:
    xml = jats_article(meta=f'<abstract abstract-type="{kind}"><p>Another.</p></abstract>')
    assert ("Another." in read_paper(xml).abstract) is kept


def test_the_sections_of_a_structured_abstract_are_named_and_digests_left_out() -> None:
    xml = jats_article(
        abstract="<sec><title>Aim:</title><p>To see.</p></sec>"
        "<sec><title>Result</title><p>Saw.</p><p>Well.</p></sec>",
        meta='<abstract abstract-type="graphical"><p>PICTURE</p></abstract>',
    )
    assert read_paper(xml).abstract == ("Aim: To see.", "Result: Saw.", "Well.")


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ("", None),
        (
            '<permissions><license xlink:href="http://cc/by"><p>words</p></license></permissions>',
            "http://cc/by",
        ),
        ('<permissions><license license-type="open-access"/></permissions>', "open-access"),
        ("<permissions><license><p>Free to  all.</p></license></permissions>", "Free to all."),
        ("<permissions><license/></permissions>", None),
        (
            '<permissions><license license-type="open-access" xlink:href="http://journal/terms"><p>Under '
            '<ext-link xlink:href="https://creativecommons.org/licenses/by/4.0/">CC BY</ext-link>.</p>'
            "</license></permissions>",
            "https://creativecommons.org/licenses/by/4.0/",
        ),
        (
            '<permissions><license license-type="open-access"><p>Terms '
            "(http://creativecommons.org/licenses/by-nc/3.0/).</p></license></permissions>",
            "http://creativecommons.org/licenses/by-nc/3.0/",
        ),
    ],
)
def test_the_licence_is_its_address_type_or_words(meta: str, expected: str | None) -> None:
    assert read_paper(jats_article(meta=meta)).license == expected


CUSTOM = (
    "<custom-meta-group><custom-meta><meta-name>is-{}</meta-name><meta-value>{}</meta-value></custom-meta>"
    "</custom-meta-group>"
)


@pytest.mark.parametrize(
    ("article", "expected"),
    [
        (jats_article(title="RETRACTED: X"), True),
        (jats_article(title="<bold>Retracted:</bold> X"), True),
        (jats_article(attributes='article-type="retraction"'), True),
        (jats_article(meta='<related-article related-article-type="retraction-forward"/>'), True),
        (jats_article(meta=CUSTOM.format("retracted", "yes")), True),
        (jats_article(meta=CUSTOM.format("retracted", "no")), False),
        (jats_article(meta=CUSTOM.format("open", "yes")), False),
        (jats_article(meta='<related-article related-article-type="retracted-article"/>'), False),
        (jats_article(meta='<related-article related-article-type="corrected-article"/>'), False),
        (jats_article(title="Retracted science and the retraction index"), False),
    ],
)
def test_a_paper_is_retracted_by_its_own_mark_and_not_by_a_link_to_another(
    article: str, expected: bool
) -> None:
    assert read_paper(article).retracted is expected


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"not xml",
        jats_article()[:700].encode(),
        jats_article().replace("</sec>", "").encode(),
        jats_article().encode().replace(b"measured", b"\xff\xfe"),
        jats_article().replace('encoding="UTF-8"', 'encoding="nonesuch"').encode(),
        jats_article(body="<p>\x01</p>").encode(),
    ],
)
def test_broken_xml_is_a_counted_reason(xml: bytes) -> None:
    (rejected,) = read(xml)
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, str(rejected.source)) == ("broken_xml", "x.xml:1")


@pytest.mark.parametrize("xml", ["<html/>", "<article/>", "<article><front/></article>"])
def test_xml_that_is_no_article_is_wrong_structure(xml: str) -> None:
    (rejected,) = read(xml)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "wrong_structure"


def test_elements_nested_too_deep_are_a_counted_reason() -> None:
    (rejected,) = read(jats_article(body="<p>" + "<bold>" * 1500 + "x" + "</bold>" * 1500 + "</p>"))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "wrong_structure"


def test_several_articles_in_a_file_are_several_papers_with_or_without_namespace() -> None:
    article = jats_article().partition('dtd">')[2]
    inner = article.replace("<article ", '<article xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/" ')
    found = read(f"<pmc-articleset>{article}{inner}</pmc-articleset>")
    assert [str(paper.source) for paper in found] == ["x.xml:1", "x.xml:2"]
    texts = {cleaned_text(paper) for paper in found if isinstance(paper, Paper)}
    assert len(texts) == 1
    assert "We measured." in texts.pop()


def test_entities_are_characters_or_nothing_and_never_expanded(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    secret = tmp_path_factory.mktemp("secret") / "secret.txt"
    secret.write_text("SECRET")
    doctype = (
        f'<!DOCTYPE article [<!ENTITY a "LAUGH"><!ENTITY b "&a;&a;&a;"><!ENTITY s SYSTEM "file://{secret}">]>'
    )
    xml = jats_article(body="<p>x &b;&s; y &#945;</p>")
    before, _, after = xml.partition("<!DOCTYPE")
    text = cleaned_text(read_paper(before + doctype + after.partition('dtd">')[2]))
    assert text.endswith("x y \N{GREEK SMALL LETTER ALPHA}")
    external = jats_article(body="<p>&beta;-cells &nonesuch;</p>")
    assert cleaned_text(read_paper(external)).endswith("β-cells")


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ("", None),
        ('<pub-date pub-type="epub"><day>3</day><year>2012</year></pub-date>', 2012),
        (
            '<pub-date date-type="pub"><year>2013</year></pub-date>'
            '<pub-date pub-type="epub"><year>2012</year>'
            '</pub-date><pub-date pub-type="pmc-release"><year>2001</year></pub-date>',
            2012,
        ),
        ("<pub-date><year>soon</year></pub-date>", None),
    ],
)
def test_the_year_is_that_of_the_first_publication(meta: str, expected: int | None) -> None:
    assert read_paper(jats_article(meta=meta)).year == expected


def test_the_journal_is_named() -> None:
    assert read_paper(jats_article()).journal == "J"


def test_a_notice_names_what_it_retracts_by_pmc_id_or_doi() -> None:
    link = '<related-article related-article-type="{}" ext-link-type="{}" xlink:href="{}"/>'
    meta = (
        link.format("retracted-article", "doi", "https://doi.org/10.1/x")
        + link.format("retracted-article", "pmc", "PMC0042.1")
        + link.format("retracted-article", "pmid", "7")
        + link.format("corrected-article", "doi", "10.1/y")
    )
    assert read_paper(jats_article(meta=meta)).retracts == ("10.1/x", "PMC42")
