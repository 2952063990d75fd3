"""Every source is read from its own files: what is kept, what is counted, and the bytes of whole builds."""

import gzip
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_tools.build import build
from data_tools.errors import UserError
from data_tools.inputs import find_inputs, shards
from data_tools.papers import BAD_RECORDS, Block, Paper, Rejected
from data_tools.readers import jats, json_records
from data_tools.recipe import Decisions, Recipe
from data_tools.shards import ShardReader
from tests.data_tools.sources import (
    cleaned_text,
    jats_article,
    metadata_2020,
    parse_2020,
    prose,
    simple_article,
    simple_record,
    v2_record,
    write_archive,
    write_jsonl,
)


def read(path: Path) -> list[Paper | Rejected]:
    """All records of a file or directory, in the order of a build."""
    return [record for files in shards(find_inputs([path])) for record in ShardReader(files)]


def papers_of(path: Path) -> list[Paper]:
    found = read(path)
    assert all(isinstance(record, Paper) for record in found), found
    return [record for record in found if isinstance(record, Paper)]


def reasons(path: Path) -> list[tuple[int, str]]:
    return [(one.source.position, one.reason) for one in read(path) if isinstance(one, Rejected)]


# S2ORC


def test_a_paper_reads_the_same_in_both_layouts_of_the_datasets_api(tmp_path: Path) -> None:
    (old,) = papers_of(write_jsonl(tmp_path / "old.jsonl", [simple_record(7)]))
    (new,) = papers_of(write_jsonl(tmp_path / "new.jsonl", [v2_record(7)]))
    assert (new.pmc_id, new.corpus_id, new.license) == (old.pmc_id, old.corpus_id, old.license)
    assert (new.title, new.abstract, new.sections) == (old.title, old.abstract, old.sections)


def _ids_as_text(record: dict[str, Any]) -> None:
    record["corpusid"] = str(record["corpusid"])
    record["openaccessinfo"]["externalids"] = {"pubmedcentral": "1007", "doi": None}


def _offsets_as_text(record: dict[str, Any]) -> None:
    annotations = record["body"]["annotations"]
    for kind, value in annotations.items():
        spans = [{**span, "start": str(span["start"])} for span in json.loads(value or "[]")]
        annotations[kind] = json.dumps([*spans, {"start": 3, "end": 3}])


def _other_case(record: dict[str, Any]) -> None:
    record["openAccessInfo"] = {key.upper(): value for key, value in record.pop("openaccessinfo").items()}
    record["Body"] = record.pop("body")


@pytest.mark.parametrize("change", [_ids_as_text, _offsets_as_text, _other_case])
def test_s2orc_v2_is_read_with_ids_offsets_and_keys_in_any_spelling(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    expected = papers_of(write_jsonl(tmp_path / "x.jsonl", [v2_record(7)]))
    record = v2_record(7)
    change(record)
    assert papers_of(write_jsonl(tmp_path / "x.jsonl", [record])) == expected


def write_2020(root: Path, numbers: range, metadata: list[object]) -> Path:
    for directory in ("pdf_parses", "metadata"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    write_jsonl(root / "pdf_parses" / "pdf_parses_0.jsonl", [parse_2020(number) for number in numbers])
    write_jsonl(root / "metadata" / "metadata_0.jsonl", metadata)
    return root


def test_s2orc_2020_joins_parses_with_their_metadata(tmp_path: Path) -> None:
    metadata = [metadata_2020(number) for number in (9, 2, 0, 1)]
    found = papers_of(write_2020(tmp_path, range(3), [*metadata]))
    assert [paper.corpus_id for paper in found] == [0, 1, 2]
    one = found[1]
    assert (one.pmc_id, one.doi, one.pubmed_id) == ("PMC1001", "10.1/1", "1")
    assert (one.title, one.year, one.journal) == ("Paper 1", 2017, "J")
    assert one.abstract == ("Aim: to see.", "Result: saw.")
    assert one.sections == (
        Block("Results", 1),
        Block(f"Shown before. {prose(1, 60)}"),
        Block("More."),
        Block("Without section."),
    )


def test_a_parse_without_metadata_and_damaged_metadata_are_counted(tmp_path: Path) -> None:
    metadata = [metadata_2020(0), metadata_2020(1, has_parse=False), {"paper_id": [3]}, metadata_2020(3)]
    root = write_2020(tmp_path, range(4), [*metadata])
    with (root / "metadata" / "metadata_0.jsonl").open("a") as file:
        file.write('{"paper_id": "2", "title": "cut\n')
    expected = [(3, "wrong_structure"), (5, "broken_json"), (2, "missing_pair"), (3, "missing_pair")]
    assert reasons(root) == expected
    assert reasons(write_jsonl(tmp_path / "loose.jsonl", [parse_2020(1)])) == [(1, "missing_pair")]


def test_the_abstract_of_a_parse_goes_before_that_of_the_metadata(tmp_path: Path) -> None:
    root = write_2020(tmp_path, range(1), [metadata_2020(0)])
    parse = {**parse_2020(0), "abstract": [{"text": "Parsed [2].", "cite_spans": [{"start": 7, "end": 10}]}]}
    write_jsonl(root / "pdf_parses" / "pdf_parses_0.jsonl", [parse])
    assert papers_of(root)[0].abstract == ("Parsed.",)


def test_a_paper_of_2019_is_read_as_a_line_and_as_a_file_of_its_own(tmp_path: Path) -> None:
    parse = parse_2020(5)
    record = {
        "paper_id": "5",
        "metadata": metadata_2020(5),
        "grobid_parse": {key: parse[key] for key in ("abstract", "body_text")},
        "latex_parse": None,
    }
    (line,) = papers_of(write_jsonl(tmp_path / "x.jsonl", [record]))
    (tmp_path / "x.json").write_text(json.dumps(record, indent=1))
    (file,) = papers_of(tmp_path / "x.json")
    assert cleaned_text(line) == cleaned_text(file)
    assert (file.pmc_id, file.corpus_id, file.year) == ("PMC1005", 5, 2017)
    record["latex_parse"] = {"body_text": [{"text": "From LaTeX.", "section": "S"}]}
    (latex,) = papers_of(write_jsonl(tmp_path / "x.jsonl", [record]))
    assert latex.sections == (Block("S", 1), Block("From LaTeX."))


@pytest.mark.parametrize("kind", [None, "pdf_parse"])
def test_what_doc2json_writes_is_read(kind: str | None, tmp_path: Path) -> None:
    body = {"body_text": [{"text": "A paragraph.", "section": "S"}], "abstract": "An abstract."}
    record = {"paper_id": "x", "title": "T", **(body if kind is None else {kind: body})}
    (paper,) = papers_of(write_jsonl(tmp_path / "x.jsonl", [record]))
    assert cleaned_text(paper) == "# T\n\n## Abstract\n\nAn abstract.\n\n## S\n\nA paragraph."


@pytest.mark.shared
def test_the_real_records_of_every_release_of_s2orc_are_papers(shared: Path) -> None:
    (old,) = papers_of(shared / "s2orc" / "v20190928")
    assert (old.pmc_id, old.year, old.journal) == ("PMC5371592", 2017, "Frontiers in microbiology")
    joined = papers_of(shared / "s2orc" / "v20200705")
    assert len(joined) == 3
    assert sum(paper.pmc_id is not None for paper in joined) == 1
    api = papers_of(shared / "s2orc" / "api_s2orc-sample.jsonl")
    assert [paper.pmc_id for paper in api] == ["PMC9925312", None, None]
    for paper in [old, *joined, *api]:
        assert len(cleaned_text(paper)) > 500


# Records that are none


BAD_LINES = {
    "broken_json": [b'{"text": "cut', b'{"text": "\xff"}', b"[" * 100_000, b"nonsense", b'{"a": 1} {"a": 2}'],
    "wrong_structure": [b'{"text": null}', b'{"other": 1}', b"{}", b"[1]", b"null", b'"text"', b"5"],
}


@pytest.mark.parametrize(
    ("reason", "line"), [(reason, line) for reason, lines in BAD_LINES.items() for line in lines]
)
def test_a_bad_line_is_counted_where_it_stands_and_the_others_are_read(
    reason: str, line: bytes, tmp_path: Path
) -> None:
    good = b'{"text": "A book."}'
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, line, b"", b"  ", good]))
    assert reasons(tmp_path / "x.jsonl") == [(2, reason)]
    assert [paper.source.position for paper in read(tmp_path / "x.jsonl") if isinstance(paper, Paper)] == [
        1,
        5,
    ]


def test_fields_that_no_layout_has_are_named(tmp_path: Path) -> None:
    (rejected,) = read(write_jsonl(tmp_path / "x.jsonl", [{"b": 1, "Abstract": "x"}]))
    assert isinstance(rejected, Rejected)
    assert rejected.detail == "no known layout has the fields: abstract, b"


def test_lone_surrogates_and_byte_order_marks_lose_no_paper(tmp_path: Path) -> None:
    line = json.dumps(simple_record(3)).replace("Paper 3", "Paper \\ud835")
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    (paper,) = papers_of(tmp_path / "x.jsonl")
    (whole,) = papers_of(write_jsonl(tmp_path / "y.jsonl", [simple_record(3)]))
    assert paper.title == whole.title.replace("3", "\ufffd")
    assert paper.sections == whole.sections


def test_a_line_without_end_is_passed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "LONGEST_LINE", 100)
    lines = [b'{"text": "one"}', b'{"text": "' + b"x" * 1000 + b'"}', b'{"text": "two"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert reasons(tmp_path / "x.jsonl") == [(2, "broken_json")]
    assert len(read(tmp_path / "x.jsonl")) == 3


# PubMed Central


def test_an_article_of_the_cloud_layout_takes_licence_ids_and_retraction_from_its_json(
    tmp_path: Path,
) -> None:
    article = tmp_path / "PMC77.1"
    article.mkdir()
    (article / "PMC77.1.xml").write_text(jats_article(ids=""))
    said = {"pmcid": "PMC77", "pmid": 5, "doi": "10.1/x", "license_code": "CC BY-NC", "is_retracted": True}
    (article / "PMC77.1.json").write_text(json.dumps(said))
    (paper,) = papers_of(tmp_path)
    assert (paper.pmc_id, paper.pubmed_id, paper.doi) == ("PMC77", "5", "10.1/x")
    assert (paper.license, paper.retracted) == ("CC BY-NC", True)
    (article / "PMC77.1.json").write_text("{")
    assert reasons(tmp_path) == [(1, "broken_json")]


def test_the_articles_of_a_package_are_read_with_what_its_list_says(tmp_path: Path) -> None:
    members = [("PMC000/", b"")] + [
        (f"PMC000/PMC{5000 + number}.xml", simple_article(number).encode()) for number in range(4)
    ]
    write_archive(tmp_path / "oa.2024.tar.gz", [*members[1:], ("PMC000/readme.txt", b"x")])
    (tmp_path / "oa.2024.filelist.csv").write_text(
        "Article File,Article Citation,AccessionID,LastUpdated (YYYY-MM-DD HH:MM:SS),PMID,License,Retracted\n"
        'PMC000/PMC5001.xml,"J. 2019; 9:1",PMC5001,"2024-02-07 23:35:31",31867269,"CC BY",no\n'
        'PMC000/PMC5002.xml,"J. 2019; 9:2",PMC5002,"2024-02-07 23:35:31",,"NO-CC CODE",yes\n'
    )
    found = papers_of(tmp_path)
    assert [paper.source.position for paper in found] == [1, 2, 3, 4]
    assert [paper.license for paper in found] == [None, "CC BY", None, None]
    assert [paper.retracted for paper in found] == [False, False, True, False]
    assert found[1].pubmed_id == "31867269"


def test_json_before_its_article_in_a_package_says_its_licence(tmp_path: Path) -> None:
    said = b'{"pmcid": "PMC5000", "license_code": "CC0", "is_retracted": false}'
    members = [
        ("PMC5000.1/PMC5000.1.json", said),
        ("PMC5000.1/PMC5000.1.xml", simple_article(0).encode()),
        ("PMC5001.1/PMC5001.1.xml", simple_article(1).encode()),
    ]
    found = papers_of(write_archive(tmp_path / "x.tar", members))
    assert [(paper.pmc_id, paper.license) for paper in found] == [("PMC5000", "CC0"), ("PMC5001", None)]


def test_members_with_names_out_of_the_archive_are_set_aside_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    good = simple_article(1).encode()
    bad = ["../up.xml", "a/../../up.xml", "/absolute.xml"]
    path = write_archive(
        tmp_path / "in" / "x.tar.gz", [("a.xml", good), *((name, good) for name in bad), ("b.xml", b"<x")]
    )
    before = sorted(tmp_path.rglob("*"))
    assert reasons(path) == [(2, "unsafe_name"), (3, "unsafe_name"), (4, "unsafe_name"), (5, "broken_xml")]
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(jats, "LARGEST_ARTICLE", 10)
    assert reasons(path)[0] == (1, "too_large")


def test_members_that_are_no_files_are_set_aside_and_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo("a.xml")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert reasons(path) == [(number, "not_a_file") for number in range(1, 5)]
    assert "unsafe_name" in BAD_RECORDS
    assert "not_a_file" not in BAD_RECORDS


@pytest.mark.parametrize(("suffix", "cut"), [("tar.gz", 0.3), ("tar.gz", 0.99), ("tar", 0.1), ("tar", 0.2)])
def test_a_cut_package_is_an_error_naming_it(suffix: str, cut: float, tmp_path: Path) -> None:
    members = [(f"{number}.xml", simple_article(number).encode()) for number in range(20)]
    path = write_archive(tmp_path / f"x.{suffix}", members)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(UserError, match=rf"x\.{suffix} is not a readable"):
        read(path)


def test_a_package_cut_between_two_members_is_an_error_too(tmp_path: Path) -> None:
    members = [(f"{number}.xml", simple_article(number).encode().ljust(4096)) for number in range(5)]
    path = write_archive(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[: 2 * (512 + 4096)])
    with pytest.raises(UserError, match="ends without the mark of its end"):
        read(path)


@pytest.mark.parametrize("suffix", ["xml.gz", "nxml.gz", "xml.zst"])
def test_loose_articles_may_be_compressed_and_a_damaged_one_is_counted(suffix: str, tmp_path: Path) -> None:
    compress = gzip.compress if suffix.endswith("gz") else zstandard.compress
    whole = compress(simple_article(1).encode())
    (tmp_path / f"a.{suffix}").write_bytes(whole)
    (tmp_path / f"b.{suffix}").write_bytes(whole[: len(whole) // 2])
    found = read(tmp_path)
    assert [getattr(record, "reason", "") for record in found] == ["", "broken_archive"]
    # What is written into a corpus does not say where its input lay.
    assert str(found[1].detail).startswith(f"{tmp_path.name}/b.{suffix} is not a readable")


def test_a_bomb_of_entities_is_harmless(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    doctype = f'<!DOCTYPE article [<!ENTITY e0 "ha">{entities}]>'
    before, _, after = jats_article(body="<p>x &e9; y</p>").partition("<!DOCTYPE")
    (tmp_path / "a.xml").write_text(before + doctype + after.partition('dtd">')[2])
    for record in read(tmp_path):
        assert isinstance(record, Rejected) or len(cleaned_text(record)) < 200


def test_a_package_without_articles_is_counted(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.tar", [("a.jsonl", b'{"text": "a"}'), ("PMC1.1.json", b"{}")])
    assert reasons(path) == [(1, "wrong_structure")]


def test_a_name_without_end_in_a_package_is_an_error_and_takes_no_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16))
    with pytest.raises(UserError, match=r"x\.tar is not a readable .*name of a member has"):
        read(tmp_path / "x.tar")


@pytest.mark.timeout(30)
def test_a_member_of_a_damaged_size_is_an_error_and_no_hang(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.txt")
    header.size = 1 << 80
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UserError, match=r"x\.tar is not a readable"):
        read(tmp_path / "x.tar")


def test_whole_files_without_end_are_not_read_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jats, "LARGEST_ARTICLE", 1000)
    monkeypatch.setattr(json_records, "LONGEST_LINE", 1000)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b" " * 1001))
    (tmp_path / "b.xml.gz").write_bytes(gzip.compress(b" " * 1001))
    assert reasons(tmp_path) == [(1, "broken_json"), (1, "too_large")]


def test_a_damaged_file_of_one_record_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(simple_record(1)).encode())
    (tmp_path / "a.json.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.json.gz").write_bytes(whole)
    assert [getattr(record, "reason", "") for record in read(tmp_path)] == ["broken_archive", ""]


@pytest.mark.parametrize("stated", [b"[" * 100_000, b"null", b"3"])
def test_json_beside_an_article_that_says_nothing_is_counted(stated: bytes, tmp_path: Path) -> None:
    members = [("PMC1.1.json", stated), ("PMC1.1.xml", simple_article(1).encode())]
    assert reasons(write_archive(tmp_path / "x.tar", members)) == [(2, "broken_json")]


def test_json_beside_an_article_may_have_a_byte_order_mark_and_lone_surrogates(tmp_path: Path) -> None:
    stated = b'\xef\xbb\xbf{"license_code": "CC0", "title": "\\ud800"}'
    members = [("PMC1.1.json", stated), ("PMC1.1.xml", simple_article(1).encode())]
    (paper,) = papers_of(write_archive(tmp_path / "x.tar", members))
    assert paper.license == "CC0"


def test_metadata_of_2020_with_byte_order_marks_and_lone_surrogates_loses_no_paper(tmp_path: Path) -> None:
    metadata = [metadata_2020(number) | {"title": "A \ud800 title"} for number in range(2)]
    write_2020(tmp_path, range(2), metadata)
    path = tmp_path / "metadata" / "metadata_0.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [paper.title for paper in papers_of(tmp_path)] == ["A \ufffd title"] * 2


# Tables of text


def test_parquet_and_a_datasets_directory_give_the_texts_of_their_rows(tmp_path: Path) -> None:
    texts = [prose(number, 30) for number in range(150)]
    rows = {"text": texts, "year": list(range(1900, 2050))}
    pq.write_table(pa.table(rows), tmp_path / "books.parquet", row_group_size=40)
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "single"), num_shards=2)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "split"))
    for name in ("books.parquet", "single", "split"):
        found = papers_of(tmp_path / name)
        assert [paper.sections for paper in found] == [(Block(text),) for text in texts]
        assert all(paper.plain for paper in found)
        assert found[7].year == 1907
    assert len(find_inputs([tmp_path / "single"])) == 2


def test_a_bad_row_is_counted_and_a_damaged_table_is_an_error(tmp_path: Path) -> None:
    valid = pa.array([b"one", b"\xff\xfe", None, b"two"], pa.binary())
    text = pa.StringArray.from_buffers(4, valid.buffers()[1], valid.buffers()[2], valid.buffers()[0], 1)
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    assert reasons(tmp_path / "x.parquet") == [(2, "wrong_structure"), (3, "wrong_structure")]
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"x\.parquet is not a readable Parquet file"):
        read(tmp_path / "x.parquet")
    (tmp_path / "y.arrow").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"y\.arrow is not a readable Arrow file"):
        read(tmp_path / "y.arrow")


def test_an_arrow_file_with_an_index_is_read_and_compressed_it_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": [prose(number, 30) for number in range(150)]})
    path = tmp_path / "x.arrow"
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=40)
    whole = path.read_bytes()
    assert [paper.sections[0].text for paper in papers_of(path)] == table["text"].to_pylist()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"x\.arrow is not a readable Arrow file"):
        read(path)
    (tmp_path / "y.arrow.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"y\.arrow\.gz is an Arrow file with an index.*decompress it"):
        read(tmp_path / "y.arrow.gz")


def test_a_compressed_parquet_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.parquet\.gz is compressed as a whole.*decompress it"):
        find_inputs([tmp_path])


def test_damaged_offsets_of_an_arrow_file_are_rejections_and_nothing_foreign_is_read(tmp_path: Path) -> None:
    texts = [prose(number, 8) for number in range(100)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "whole"))
    whole = (tmp_path / "whole" / "data-00000-of-00001.arrow").read_bytes()
    starts = np.cumsum([0, *(len(text.encode()) for text in texts)]).astype("<i4").tobytes()
    for row in range(1, 100, 9):
        damaged = bytearray(whole)
        damaged[whole.index(starts) + 4 * row + 3] ^= 0x7F  # the highest byte of an offset
        (tmp_path / "x.arrow").write_bytes(damaged)
        found = read(tmp_path / "x.arrow")
        assert [getattr(record, "reason", "") for record in found[row - 1 : row + 1]] == [
            "wrong_structure"
        ] * 2
        sound = [record.sections[0].text for record in found if isinstance(record, Paper)]
        assert sound == texts[: row - 1] + texts[row + 1 :]


def test_rows_with_values_that_python_does_not_have_are_counted(tmp_path: Path) -> None:
    rows = {"text": ["one", "two"], "x": pa.array([1, 2**60], pa.duration("s"))}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    assert reasons(tmp_path / "x.parquet") == [(2, "wrong_structure")]


def test_ids_and_years_of_a_column_with_gaps_are_whole_numbers(tmp_path: Path) -> None:
    rows = {"text": ["one", "two"], "year": [2015.0, None], "pmid": [123.0, None]}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    found = [(paper.year, paper.pubmed_id) for paper in papers_of(tmp_path / "x.parquet")]
    assert found == [(2015, "123"), (None, None)]


# Damage of any kind


def _mutated(content: bytes, chance: random.Random) -> bytes:
    """Content with a piece cut off, out, or replaced."""
    first, last = sorted(chance.sample(range(len(content) + 1), 2))
    match chance.randrange(4):
        case 0:
            return content[:last]
        case 1:
            return content[:first] + content[last:]
        case 2:
            return content[:first] + chance.randbytes(3) + content[first + 3 :]
    other = [b"null", b"-1", b"1e999", b"[[]]", b"{}", b'""', b"&x;", b"<p>", b"]]>", b"9" * 5000, b"\0"]
    return content[:first] + chance.choice(other) + content[first + 1 :]


def _swapped(value: Any, chance: random.Random) -> Any:
    """A value in which some inner values are of other types."""
    if chance.random() < 0.05:
        return chance.choice([None, True, -1, 2.5, 10**30, "", "x", [], {}, [[None]], {"start": "a"}])
    if isinstance(value, dict):
        return {key: _swapped(item, chance) for key, item in value.items()}
    return [_swapped(item, chance) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.xml", "x.tar", "x.parquet"])
def test_whatever_the_damage_there_are_papers_rejections_or_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    records = [simple_record(1), v2_record(2), parse_2020(3) | {"metadata": metadata_2020(3)}]
    if ".jsonl" in name:
        write_jsonl(path, records)
    elif name == "x.xml":
        path.write_text(simple_article(1))
    elif name == "x.tar":
        write_archive(
            path, [("PMC1.1.json", b'{"pmcid": "PMC1"}'), ("PMC1.1.xml", simple_article(1).encode())]
        )
    else:
        pq.write_table(pa.table({"text": [prose(number, 20) for number in range(20)]}), path)
    whole = path.read_bytes()
    chance = random.Random(name)
    for _ in range(150):
        if name == "x.jsonl" and chance.random() < 0.5:
            write_jsonl(path, [_swapped(record, chance) for record in records])
        else:
            damaged = _mutated(whole, chance)
            path.write_bytes(gzip.compress(damaged) if name.endswith("gz") else damaged)
        try:
            found = read(path)
        except UserError:
            continue
        assert all(isinstance(record, Paper | Rejected) for record in found)


# Whole builds


def _api(root: Path) -> None:
    write_jsonl(root / "a.jsonl", [simple_record(n) for n in range(20)])
    lines = "".join(json.dumps(simple_record(n)) + "\n" for n in range(19, 40))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def _v2(root: Path) -> None:
    lines = "".join(json.dumps(v2_record(n)) + "\n" for n in range(20))
    (root / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    write_jsonl(root / "b.jsonl", [v2_record(n) for n in range(20, 40)])


def _pairs(root: Path) -> None:
    write_2020(root, range(30), [metadata_2020(n) for n in range(1, 30)])


def _packages(root: Path) -> None:
    for package in range(3):
        members = [(f"{n}.xml", simple_article(10 * package + n).encode()) for n in range(10)]
        write_archive(root / f"p{package}.tar.gz", [*members, ("../x.xml", members[0][1])])


def _tables(root: Path) -> None:
    for number in range(3):
        rows = {"text": [prose(number * 10 + row, 50) for row in range(10)]}
        pq.write_table(pa.table(rows), root / f"{number}.parquet")


@pytest.mark.parametrize(
    ("write", "kept", "left_out"),
    [
        (_api, 40, {"duplicate_pmc_id": 1}),
        (_v2, 40, {}),
        (_pairs, 29, {"missing_pair": 1}),
        (_packages, 30, {"unsafe_name": 3}),
        (_tables, 30, {}),
    ],
)
def test_a_source_is_built_to_the_same_bytes_by_one_and_by_two_workers(
    write: Callable[[Path], None], kept: int, left_out: dict[str, int], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    recipe = Recipe(require_pmc_id=write is not _tables, decisions=Decisions(heldout=0.1), max_bad=0.2)
    contents = []
    for workers in (1, 2):
        corpus = tmp_path / f"corpus-{workers}"
        manifest = build([tmp_path / "in"], tiny_tokenizer, corpus, recipe, workers)
        assert (manifest.counts.kept, manifest.counts.left_out) == (kept, left_out)
        contents.append({path.name: path.read_bytes() for path in corpus.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
