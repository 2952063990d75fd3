"""Which files a build reads: found wherever they are, paired with what belongs to them, in a fixed order."""

import json
import re
from pathlib import Path

import fsspec
import pytest

from data_tools.errors import UserError
from data_tools.inputs import describe, find_inputs, shards
from data_tools.shards import ShardReader
from tests.data_tools.sources import (
    metadata_2020,
    parse_2020,
    simple_article,
    simple_record,
    write_archive,
    write_jsonl,
)


def names(*paths: Path | str) -> list[str]:
    return [file.name for file in find_inputs(paths)]


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


def test_files_that_no_reader_knows_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", "a.xml", "a.pdf", "b.pdf", "LICENSE", ".hidden", ".git/x.pdf")
    assert names(tmp_path / "in") == ["in/a.xml"]
    assert capsys.readouterr().err == (
        "3 files were passed over, which no reader knows: 2 .pdf, 1 without suffix.\n"
    )


def test_every_suffix_of_the_sources_is_known_plain_and_compressed(tmp_path: Path) -> None:
    known = ["a.jsonl", "a.jsonl.gz", "a.JSONL.ZST", "b.xml", "b.nxml.gz", "b.xml.zst", "c.json"]
    known += ["d.tar", "d.tar.gz", "d.tgz", "d.tar.zst", "e.parquet", "f.arrow"]
    write(tmp_path / "in", *known)
    assert sorted(names(tmp_path / "in")) == sorted(f"in/{name}" for name in known)


def test_shards_of_s2orc_2020_are_pairs(tmp_path: Path) -> None:
    for number in range(3):
        write(
            tmp_path / "full",
            f"metadata/metadata_{number}.jsonl.gz",
            f"pdf_parses/pdf_parses_{number}.jsonl.gz",
        )
    found = find_inputs([tmp_path / "full"])
    assert [file.name for file in found] == [
        f"full/pdf_parses/pdf_parses_{number}.jsonl.gz" for number in range(3)
    ]
    beside = [file.companion.name for file in found if file.companion]
    assert beside == [f"full/metadata/metadata_{number}.jsonl.gz" for number in range(3)]
    assert [len(shard) for shard in shards(found)] == [1, 1, 1]
    single = find_inputs([tmp_path / "full" / "pdf_parses" / "pdf_parses_0.jsonl.gz"])
    assert [file.companion and file.companion.name for file in single] == ["../metadata/metadata_0.jsonl.gz"]


@pytest.mark.parametrize("alone", ["metadata/metadata_0.jsonl.gz", "pdf_parses/pdf_parses_0.jsonl.gz"])
def test_half_of_a_pair_is_an_error_naming_it(alone: str, tmp_path: Path) -> None:
    write(tmp_path, alone)
    for given in (tmp_path, tmp_path / alone):
        with pytest.raises(UserError, match=f"{alone}.*give the directory that holds both"):
            find_inputs([given])


@pytest.mark.parametrize(
    "where", ["PMC7.1/PMC7.1.json", "metadata/PMC7.1.json", "PMC7.1/metadata/PMC7.1.json"]
)
def test_an_article_of_the_cloud_layout_has_its_json_and_the_newest_version_comes_first(
    where: str, tmp_path: Path
) -> None:
    write(
        tmp_path / "in",
        where,
        "PMC7.1/PMC7.1.xml",
        "PMC7.10/PMC7.10.xml",
        "PMC7.2/PMC7.2.xml",
        "PMC60.1/PMC60.1.xml",
    )
    found = find_inputs([tmp_path / "in"])
    assert [file.name.rpartition("/")[2] for file in found] == [
        "PMC60.1.xml",
        "PMC7.10.xml",
        "PMC7.2.xml",
        "PMC7.1.xml",
    ]
    assert [file.companion.name for file in found if file.companion] == [f"in/{where}"]


def test_of_a_datasets_directory_the_tables_of_its_state_are_read(tmp_path: Path) -> None:
    root = tmp_path / "books"
    write(
        root, "dataset_info.json", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-1f.arrow"
    )
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (root / "state.json").write_text(json.dumps({"_data_files": files}))
    assert names(root) == ["books/data-00000-of-00002.arrow", "books/data-00001-of-00002.arrow"]
    (root / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks .*data-00001-of-00002\.arrow"):
        find_inputs([root])
    (root / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json is not the state of a dataset"):
        find_inputs([root])


def test_an_empty_name_is_not_the_working_directory() -> None:
    with pytest.raises(UserError, match="An input has no name"):
        find_inputs([""])


def test_what_datasets_cached_of_its_data_is_passed_over_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "0.0.0"
    write(root, "dataset_info.json", "text-train.arrow", "cache-1f.arrow", "cache-2e_00000_of_00002.arrow")
    assert names(root) == ["0.0.0/text-train.arrow"]
    assert re.search(r"2 files such as .*cache-\S+ were passed over", capsys.readouterr().err)
    assert names(root / "cache-1f.arrow") == ["cache-1f.arrow"]
    write(tmp_path / "other", "cache-1f.arrow")
    assert names(tmp_path / "other") == ["other/cache-1f.arrow"]


def test_a_directory_at_a_url_is_found_and_read_as_a_local_one_is(tmp_path: Path) -> None:
    local = tmp_path / "in"
    (local / "pdf_parses").mkdir(parents=True)
    (local / "metadata").mkdir()
    write_jsonl(local / "a.jsonl", [simple_record(n) for n in range(3)])
    (local / "b.xml").write_text(simple_article(1))
    write_jsonl(local / "pdf_parses" / "s.jsonl", [parse_2020(n) for n in range(3)])
    write_jsonl(local / "metadata" / "s.jsonl", [metadata_2020(n) for n in range(3)])
    write_archive(local / "p.tar.gz", [("a.xml", simple_article(2).encode())])
    (local / ".hidden.jsonl").write_text("x")
    fsspec.filesystem("memory").put(str(local), "/bucket/in", recursive=True)
    here, there = find_inputs([local]), find_inputs(["memory://bucket/in"])
    assert [(file.name, file.bytes) for file in there] == [(file.name, file.bytes) for file in here]
    for mine, other in zip(shards(here), shards(there), strict=True):
        assert list(ShardReader(mine)) == list(ShardReader(other))
        assert describe(mine) == describe(other)
    assert names("memory://bucket/in/a.jsonl") == ["a.jsonl"]


@pytest.mark.parametrize(
    "url", ["memory://nothing/here", "memory://nothing/here.jsonl", "nonesuch://x/y.jsonl"]
)
def test_a_url_at_which_nothing_is_is_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match=url):
        find_inputs([url])


def test_one_pass_gives_records_position_and_the_checksum_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(simple_article(1))
    (tmp_path / "b.xml").write_text("broken")
    write_archive(tmp_path / "p.tar.gz", [("a.xml", simple_article(2).encode()), ("b.txt", b"x")])
    write_jsonl(tmp_path / "s.jsonl", [simple_record(n) for n in range(3)])
    for files in shards(find_inputs([tmp_path])):
        reader = ShardReader(files)
        assert list(reader)
        assert reader.position == sum(file.bytes for file in files)
        assert reader.inputs() == describe(files)


def test_a_file_that_went_away_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(simple_article(1))
    files = find_inputs([path])
    path.unlink()
    with pytest.raises(UserError, match=r"a\.xml cannot be read"):
        list(ShardReader(files))
    with pytest.raises(UserError, match=r"a\.xml cannot be read"):
        describe(files)


def test_links_are_followed_and_a_file_that_has_several_names_is_read_once(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write(root, "b.jsonl")
    write(tmp_path, "elsewhere/deep/a.jsonl")
    (root / "again.jsonl").symlink_to(root / "b.jsonl")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "link-too").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "circle").symlink_to(root)
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    assert names(root) == ["in/again.jsonl", "in/link/deep/a.jsonl"]


def test_a_link_to_a_file_without_suffix_is_read_by_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, "blobs/0f3a")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "books.jsonl"
    link.symlink_to(tmp_path / "blobs" / "0f3a")
    assert names(link) == ["books.jsonl"]
    assert names(link.parent) == ["snapshot/books.jsonl"]


@pytest.mark.parametrize("change", [b"", b'{"text": "a"}\n' * 3])
def test_a_file_that_changed_since_it_was_found_is_an_error(change: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 2)
    files = find_inputs([path])
    path.write_bytes(change)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        list(ShardReader(files))


@pytest.mark.parametrize("url", ["zip://a.jsonl::b.zip", "github://x"])
def test_urls_that_cannot_be_opened_are_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match=url):
        find_inputs([url])
