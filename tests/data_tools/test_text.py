"""Plain text in JSON Lines: verbatim tokens, every damaged line counted with its place."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_tools.build import build
from data_tools.inputs import find_inputs
from data_tools.manifest import Manifest
from data_tools.papers import Block, Paper, Rejected, Source
from data_tools.readers import text
from data_tools.recipe import Decisions, Recipe
from data_tools.shards import ShardReader
from data_tools.token_files import TokenFile

PLAIN = Recipe(require_pmc_id=False, rules=[], decisions=Decisions(heldout=0.0), max_bad=1.0)
TEXTS = [
    "One.",
    "  two  spaces \n\n and </s> lines\t",
    "\u2581 and \ufeff",
    "three \U0001f642",
    "e\u0301\x00",
]


def test_a_document_is_its_text_untouched_and_what_is_known_of_it() -> None:
    record = {
        "text": TEXTS[1],
        "id": "PMC0012",
        "pmid": 7,
        "doi": "https://doi.org/10.1/x",
        "license": "CC BY",
        "year": "2019-03-01",
        "source": "J Test",
        "other": [1, {"deep": None}],
    }
    found = text.paper(record, Source("a.jsonl", 1))
    assert isinstance(found, Paper)
    assert found.sections == (Block(TEXTS[1]),)
    assert found.plain
    assert (found.title, found.abstract) == ("", ())
    assert (found.pmc_id, found.pubmed_id, found.doi) == ("PMC12", "7", "10.1/x")
    assert (found.license, found.year, found.journal) == ("CC BY", 2019, "J Test")


@pytest.mark.parametrize("identifier", ["12", 12, "book-7", None])
def test_an_id_that_is_not_of_pmc_is_no_pmc_id(identifier: object) -> None:
    found = text.paper({"text": "x", "id": identifier}, Source("a.jsonl", 1))
    assert isinstance(found, Paper)
    assert found.pmc_id is None


def test_the_ids_of_a_plain_build_are_those_of_the_texts(tiny_tokenizer: Path, tmp_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(tiny_tokenizer))
    _built([json.dumps({"text": one}).encode() for one in TEXTS], tiny_tokenizer, tmp_path)
    with TokenFile(tmp_path / "corpus" / "parts" / "part-00000") as file:
        found = [file.document(number).tolist() for number in range(len(TEXTS))]
    assert found == [[*reference.encode(one), reference.eos_id()] for one in TEXTS]


DAMAGED = {
    "a truncated line": (b'{"text": "cut', "broken_json"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', "broken_json"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "broken_json"),
    "nesting": (b"[" * 100_000, "broken_json"),
    "null text": (b'{"text": null}', "wrong_structure"),
    "a number for a text": (b'{"text": 5}', "wrong_structure"),
    "missing text": (b'{"words": "x"}', "wrong_structure"),
    "no object": (b'["text"]', "wrong_structure"),
    "null": (b"null", "wrong_structure"),
    "empty text": (b'{"text": ""}', "no_text"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_set_aside_with_its_place_and_all_others_are_kept(
    damage: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    line, reason = DAMAGED[damage]
    good = [json.dumps({"text": one}).encode() for one in TEXTS]
    manifest = _built([*good[:2], b"", b"  ", line, *good[2:]], tiny_tokenizer, tmp_path)
    assert (manifest.counts.read, manifest.counts.kept) == (len(TEXTS) + 1, len(TEXTS))
    assert manifest.counts.left_out == {reason: 1}
    listed = [json.loads(one) for one in (tmp_path / "corpus/parts/part-00000.rejected.jsonl").open()]
    assert [(one["file"], one["position"], one["reason"]) for one in listed] == [
        ("texts.jsonl.gz", 5, reason)
    ]
    with TokenFile(tmp_path / "corpus" / "parts" / "part-00000") as file:
        assert file.header.documents == len(TEXTS)
        assert np.count_nonzero(file.read(0, file.header.tokens) == 2) == len(TEXTS)


def test_a_lone_surrogate_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x \\ud835 y"}\n')
    (paper,) = ShardReader(find_inputs([path]))
    assert isinstance(paper, Paper)
    assert paper.sections == (Block("x \ufffd y"),)


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "last, without a line break"}')
    records = list(ShardReader(find_inputs([path])))
    assert not any(isinstance(record, Rejected) for record in records)
    assert [record.sections[0].text for record in records if isinstance(record, Paper)] == [
        "first",
        "last, without a line break",
    ]


def _built(lines: list[bytes], tokenizer: Path, tmp_path: Path) -> Manifest:
    path = tmp_path / "texts.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\n".join(lines) + b"\n")
    return build([path], tokenizer, tmp_path / "corpus", PLAIN, workers=1)
