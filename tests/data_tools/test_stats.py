"""The statistics of a corpus are those of its documents, counted one by one."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from data_tools import show
from data_tools.build import build
from data_tools.charts import draw
from data_tools.corpus import Corpus
from data_tools.documents import read_documents, table_path
from data_tools.finalize import decide_again
from data_tools.recipe import Decisions, Recipe
from data_tools.stats import Share, Step, statistics
from tests.data_tools.sources import S2orcText, prose, s2orc_record, write_jsonl


@pytest.fixture(scope="module")
def varied(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Papers of three licences, two of them doubled, one damaged record and one without PMC id."""
    directory = tmp_path_factory.mktemp("varied")
    records: list[object] = [
        s2orc_record(
            S2orcText().add(f"Title {n}", "title").add(prose(n, 10 + 20 * n), "paragraph"),
            pmc_id=str(100 + n) if n else None,
            corpus_id=n,
            license=("CCBY", "CC BY-NC", None)[n % 3],
        )
        for n in range(31)
    ]
    source = write_jsonl(directory / "x.jsonl", [*records, records[3], records[4], 7])
    recipe = Recipe(decisions=Decisions(heldout=0.2), max_bad=0.1)
    build([source], tiny_tokenizer, directory / "corpus", recipe, workers=1)
    return directory / "corpus"


def test_statistics_are_those_of_the_counted_documents(varied: Path) -> None:
    found = statistics(Corpus.open(varied))
    table = read_documents(
        [table_path(varied, "part-00000")], ["tokens", "license", "text_bytes"]
    ).to_pylist()[:30]
    tokens = sorted(row["tokens"] for row in table)
    assert sum(split.papers for split in found.splits.values()) == 30
    assert sum(split.tokens for split in found.splits.values()) == sum(tokens)
    assert found.text_bytes == sum(row["text_bytes"] for row in table)
    assert (found.quantiles["min"], found.quantiles["max"]) == (tokens[0], tokens[-1])
    assert sum(found.histogram) == 30
    for start, end, papers in zip(found.edges, found.edges[1:], found.histogram, strict=False):
        assert papers == sum(start <= one < end for one in tokens)
    groups = {"CCBY": "commercial", "CC BY-NC": "noncommercial", None: "unknown"}
    expected = Counter(groups[row["license"]] for row in table)
    assert {name: share.papers for name, share in found.licenses.items()} == expected
    for shares in (found.years, found.journals, found.licenses):
        assert sum(share.tokens for share in shares.values()) == sum(tokens)


def test_the_waterfall_goes_from_all_records_read_to_the_papers_kept(varied: Path) -> None:
    steps = statistics(Corpus.open(varied)).waterfall
    assert [(step.reason, step.left_out, step.left) for step in steps] == [
        ("no_pmc_id", 1, 33),
        ("wrong_structure", 1, 32),
        ("duplicate_pmc_id", 2, 30),
    ]


def test_statistics_follow_a_decision(varied: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(varied, tmp_path / "copy"))
    decide_again(copy, Decisions(licenses=["commercial"], heldout=0))
    found = statistics(Corpus.open(copy))
    assert set(found.licenses) == {"commercial"}
    assert found.waterfall[2].reason == "license"


def test_they_are_shown_and_drawn(varied: Path, tmp_path: Path) -> None:
    found = statistics(Corpus.open(varied))
    with (tmp_path / "out").open("w") as file:
        show.statistics(found, Console(file=file, width=120))
    shown = (tmp_path / "out").read_text()
    for expected in ("commercial", "duplicate_pmc_id", "-2", "median", "none"):
        assert expected in shown
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_a_whole_pmc_fit_a_log_of_80_columns_a_line_a_row(varied: Path, tmp_path: Path) -> None:
    found = statistics(Corpus.open(varied))
    many, long = Share(4_900_000, 75_000_000_000), "Journal of Very Long Names and of Everything Else Besides"
    steps = [Step("duplicate_corpus_id", 1, 4_900_001), Step("near_duplicate", 1, 4_900_000)]
    found = replace(found, splits={"train": many}, journals={long: many}, waterfall=steps)
    with (tmp_path / "out").open("w") as file:
        show.statistics(found, Console(file=file, width=80))
    lines = (tmp_path / "out").read_text().splitlines()
    for whole in ("4,900,002", "duplicate_corpus_id", "75,000,000,000", "kept"):
        assert any(whole in line for line in lines)
    shown = [line for line in lines if "Journal of" in line]
    assert len(shown) == 1
    assert "Besides" not in "".join(lines)
    assert shown[0].count("█") == max(line.count("█") for line in lines)


def test_the_waterfall_says_what_was_read_and_kept_where_nothing_is_left_out(
    varied: Path, tmp_path: Path
) -> None:
    found = replace(statistics(Corpus.open(varied)), waterfall=[])
    with (tmp_path / "out").open("w") as file:
        show.statistics(found, Console(file=file, width=80))
    rows = [line.split() for line in (tmp_path / "out").read_text().splitlines()]
    for name in ("read", "kept"):
        assert any(row[1:2] == [name] and "30" in row for row in rows)


def test_a_document_that_is_left_out_says_why(varied: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        show.document(Corpus.open(varied), 30, Console(file=file, width=120))
    assert "left out: duplicate_pmc_id" in (tmp_path / "out").read_text()
