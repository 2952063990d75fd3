"""A build gives the same bytes however it is run, survives its own death, and leaves nothing half-written."""

import fcntl
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import sentencepiece

from data_tools.build import build
from data_tools.corpus import Corpus
from data_tools.documents import read_documents, table_path
from data_tools.errors import UserError
from data_tools.files import locked
from data_tools.inputs import InputFile, find_inputs, shards
from data_tools.manifest import Manifest
from data_tools.papers import Paper
from data_tools.recipe import Decisions, Recipe
from data_tools.shards import ShardReader
from data_tools.token_files import TokenFile
from data_tools.verify import verify
from tests.data_tools.sources import cleaned_text, simple_article, simple_record, write_jsonl

OPTIONS = Recipe(decisions=Decisions(heldout=0.1))
TOLERANT = replace(OPTIONS, max_bad=0.2)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    """Three shards of JSON Lines, one of them compressed, and loose articles."""
    directory = tmp_path / "papers"
    directory.mkdir()
    for shard in range(3):
        write_jsonl(
            directory / f"s{shard}.jsonl", [simple_record(n) for n in range(shard * 20, shard * 20 + 20)]
        )
    compressed = directory / "s1.jsonl"
    (directory / "s1.jsonl.gz").write_bytes(gzip.compress(compressed.read_bytes()))
    compressed.unlink()
    for number in range(7):
        (directory / f"PMC{5000 + number}.xml").write_text(simple_article(number))
    (directory / "README.txt").write_text("not a paper")
    return directory


def make(papers: Path | list[Path], tokenizer: Path, output: Path, workers: int = 1) -> Manifest:
    return build(papers if isinstance(papers, list) else [papers], tokenizer, output, OPTIONS, workers)


def test_one_worker_and_several_and_a_moved_input_give_the_same_bytes(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "one", workers=1)
    moved = tmp_path / "elsewhere" / "papers"
    shutil.copytree(papers, moved)
    make(moved, tiny_tokenizer, tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "one").values())


def test_the_order_in_which_inputs_are_named_and_named_twice_changes_nothing(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    files = sorted(papers.glob("*.jsonl*"))
    make(files, tiny_tokenizer, tmp_path / "a")
    make([*files[::-1], files[0]], tiny_tokenizer, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_every_record_is_kept_or_counted(papers: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    records = [
        simple_record(200, pmc_id=None),
        simple_record(0),
        {"corpusid": 5, "externalids": {"pubmedcentral": "1"}, "content": None},
        {"corpusid": 5, "externalids": [], "content": []},
        simple_record(201),
        7,
    ]
    write_jsonl(papers / "t.jsonl", records)
    with (papers / "t.jsonl").open("a") as file:
        file.write('{"corpusid": \n')
    (papers / "broken.xml").write_text(simple_article(300)[:400])
    counts = build([papers], tiny_tokenizer, tmp_path / "corpus", TOLERANT, workers=1).counts
    assert counts.left_out == {
        "no_pmc_id": 1,
        "duplicate_pmc_id": 1,
        "no_text": 1,
        "wrong_structure": 2,
        "broken_json": 1,
        "broken_xml": 1,
    }
    assert counts.read == 60 + 7 + 7 + 1
    assert counts.read == counts.kept + sum(counts.left_out.values())
    assert counts.examples["no_pmc_id"] == ["papers/t.jsonl:1"]
    assert counts.examples["broken_json"][0].startswith("papers/t.jsonl:7 ")
    assert counts.examples["broken_xml"][0].startswith("papers/broken.xml:1 ")


def test_papers_without_pmc_id_are_kept_when_asked(tiny_tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [simple_record(n, pmc_id=None) for n in range(3)])
    options = Recipe(require_pmc_id=False, decisions=Decisions(heldout=0))
    manifest = build([source], tiny_tokenizer, tmp_path / "corpus", options, workers=1)
    assert (manifest.counts.kept, manifest.splits["heldout"].documents) == (3, 0)
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.split("heldout").read([(0, 0)])[0].size == 0
    verify(tmp_path / "corpus")


def test_ids_and_rows_are_those_of_each_paper(papers: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    assert_corpus_is([papers], tiny_tokenizer, tmp_path / "corpus")


def assert_corpus_is(inputs: list[Path], tokenizer: Path, directory: Path) -> None:
    """Every document equals sentencepiece on the paper's text, read anew, in order."""
    processor = sentencepiece.SentencePieceProcessor(str(tokenizer))
    expected = []
    for file in sorted(find_inputs(inputs), key=lambda file: file.name):
        found = [paper for paper in ShardReader([file]) if isinstance(paper, Paper) and paper.pmc_id]
        expected += [(paper.pmc_id, processor.encode(cleaned_text(paper))) for paper in found]
    corpus = Corpus.open(directory)
    names = [part.name for part in corpus.manifest.parts]
    ids = read_documents([table_path(directory, name) for name in names], ["pmc_id"])["pmc_id"].to_pylist()
    documents = []
    for number in range(len(names)):
        with TokenFile(corpus.part_prefix(number)) as part:
            documents += [part.document(document).tolist() for document in range(part.header.documents)]
    made = dict(zip(ids, documents, strict=True))
    assert made == {pmc_id: [*tokens, processor.eos_id()] for pmc_id, tokens in expected}


def test_the_same_command_again_finishes_without_touching_a_part(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus" / "parts").iterdir()}
    first = contents(tmp_path / "corpus")
    make(papers, tiny_tokenizer, tmp_path / "corpus", workers=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus" / "parts").iterdir()} == before
    assert contents(tmp_path / "corpus") == first


def test_a_missing_or_cut_part_of_a_finished_corpus_is_made_again(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    first = contents(tmp_path / "corpus")
    (tmp_path / "corpus/parts/part-00001.bin").write_bytes(b"")
    (tmp_path / "corpus/parts/part-00002.json").write_bytes(b"{")
    (tmp_path / "corpus/parts/part-00003.idx").unlink()
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    assert contents(tmp_path / "corpus") == first


def test_a_killed_build_leaves_no_process_and_goes_on_to_the_same_bytes(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    papers = tmp_path / "papers"
    papers.mkdir()
    for shard in range(5):
        write_jsonl(
            papers / f"{shard}.jsonl",
            [simple_record(n, words=600) for n in range(shard * 50, shard * 50 + 50)],
        )
    make(papers, tiny_tokenizer, tmp_path / "whole")
    arguments = ["build", "--input", papers, "--tokenizer", tiny_tokenizer, "--output", tmp_path / "killed"]
    command = [
        sys.executable,
        "-m",
        "data_tools.cli",
        *map(str, arguments),
        "--workers",
        "2",
        "--heldout",
        "0.1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("parts/*.json")):
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "corpus.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/parts/part-*.json")}
    assert len(finished) < 5
    psutil.wait_procs(children, timeout=30)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    subprocess.run(command, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_build_that_was_stopped_with_other_inputs_leaves_no_stale_part(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    (tmp_path / "corpus" / "corpus.json").unlink()
    (tmp_path / "corpus" / "parts" / ".part-00000.bin.partial").write_bytes(b"left by a killed build")
    (papers / "s0.jsonl").unlink()
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    make(papers, tiny_tokenizer, tmp_path / "fresh")
    assert contents(tmp_path / "corpus") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_gzip_leaves_no_half_part(
    workers: int, papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    whole = (papers / "s1.jsonl.gz").read_bytes()
    (papers / "s1.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"papers/s1\.jsonl\.gz is not a readable gzip"):
        make(papers, tiny_tokenizer, tmp_path / "corpus", workers)
    names = set(contents(tmp_path / "corpus"))
    assert not any(name.startswith("parts/.") for name in names)
    whole_parts = {name for name in names if name.endswith(".json")}
    assert {name.split(".")[0] for name in names} == {name.split(".")[0] for name in whole_parts}
    (papers / "s1.jsonl.gz").write_bytes(whole)
    make(papers, tiny_tokenizer, tmp_path / "corpus", workers)
    make(papers, tiny_tokenizer, tmp_path / "fresh")
    assert contents(tmp_path / "corpus") == contents(tmp_path / "fresh")


def test_an_input_that_gives_nothing_leaves_nothing(tiny_tokenizer: Path, tmp_path: Path) -> None:
    for name, content in (("a.jsonl", ""), ("b.jsonl", "{}\n"), ("c.xml", "<a/>"), ("d.jsonl.gz", "no gzip")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError):
            make(tmp_path / name, tiny_tokenizer, tmp_path / "corpus")
        assert not (tmp_path / "corpus").exists()


def test_a_finished_corpus_is_never_overwritten_by_another(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    first = contents(tmp_path / "corpus")
    with pytest.raises(UserError, match=r"with other decisions; `pmc-data finalize"):
        build([papers], tiny_tokenizer, tmp_path / "corpus", Recipe(decisions=Decisions(heldout=0.5)), 1)
    with pytest.raises(UserError, match="differs in recipe"):
        build([papers], tiny_tokenizer, tmp_path / "corpus", replace(OPTIONS, rules=[]), 1)
    shorter = write_jsonl(papers / "s2.jsonl", [simple_record(1)])
    with pytest.raises(UserError, match="differs in input"):
        make(papers, tiny_tokenizer, tmp_path / "corpus")
    shorter.unlink()
    assert contents(tmp_path / "corpus") == first


def test_an_input_changed_without_changing_its_size_is_noticed(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    content = (papers / "s0.jsonl").read_bytes()
    (papers / "s0.jsonl").write_bytes(content.replace(b"patients", b"patiends"))
    with pytest.raises(UserError, match=r"papers/s0\.jsonl has changed"):
        make(papers, tiny_tokenizer, tmp_path / "corpus")


def test_parts_of_another_tokenizer_or_selection_are_not_continued(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    (tmp_path / "corpus" / "corpus.json").unlink()
    with pytest.raises(UserError, match="another tokenizer or another recipe"):
        build(
            [papers],
            tiny_tokenizer,
            tmp_path / "corpus",
            Recipe(require_pmc_id=False, decisions=Decisions(heldout=0.1)),
            1,
        )
    # Another share held out needs no part anew.
    manifest = build(
        [papers],
        tiny_tokenizer,
        tmp_path / "corpus",
        Recipe(decisions=Decisions(heldout=0.5)),
        1,
    )
    assert manifest.splits["heldout"].documents > 10


def test_a_directory_with_other_files_or_a_file_is_refused(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "parts").mkdir(parents=True)
    (other / "parts" / "part-00000.bin").write_bytes(b"a figure of another program")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not empty and holds no corpus"):
        make(papers, tiny_tokenizer, other)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="is a file"):
        make(papers, tiny_tokenizer, other / "parts" / "part-00000.bin")


def test_a_build_removes_no_file_that_is_not_its_own(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    parts = tmp_path / "corpus" / "parts"
    others = ["part-notes.txt", "part-00000.bin.backup", ".part-notes.swp", "part-7.bin", "part-00099.csv"]
    for name in others:
        (parts / name).write_text("mine")
    for name in ("part-00098.bin", ".part-00000.idx.partial"):
        (parts / name).write_text("left by a build")
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    assert {name for name in others if (parts / name).exists()} == set(others)
    assert not (parts / "part-00098.bin").exists()
    assert not (parts / ".part-00000.idx.partial").exists()


@pytest.mark.parametrize("where", [".", "parts", "deep/down"])
def test_an_input_in_the_output_is_refused_and_left_alone(
    where: str, papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "corpus"
    (output / where).mkdir(parents=True, exist_ok=True)
    inside = output / where / "part-00000.jsonl"
    shutil.copy(papers / "s0.jsonl", inside)
    before = contents(output)
    for source in (inside, output):
        with pytest.raises(UserError, match="lies in the output"):
            make([papers, source], tiny_tokenizer, output)
    assert contents(output) == before


def test_an_output_in_an_input_is_refused_before_anything_is_written(
    papers: Path, tiny_tokenizer: Path
) -> None:
    with pytest.raises(UserError, match=r"The output .*corpus lies in the input .*papers; build into"):
        make(papers, tiny_tokenizer, papers / "corpus")
    assert not (papers / "corpus").exists()


def test_a_build_killed_while_it_wrote_its_marker_goes_on(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / ".parts.json.partial").write_text("{")
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    make(papers, tiny_tokenizer, tmp_path / "fresh")
    assert contents(tmp_path / "corpus") == contents(tmp_path / "fresh")


def test_whether_the_corpus_is_finished_is_asked_under_the_lock(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """A directory that another build holds is in use, whatever stands in it at this moment."""
    make(papers, tiny_tokenizer, tmp_path / "corpus")
    (tmp_path / "corpus" / "corpus.json").write_bytes(b"{")
    with (
        locked(tmp_path / "corpus", fcntl.LOCK_EX),
        pytest.raises(UserError, match="Another build is at work"),
    ):
        make(papers, tiny_tokenizer, tmp_path / "corpus")


def test_one_bad_file_among_articles_is_counted_and_the_build_goes_on(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (papers / "latin.xml").write_bytes(simple_article(300).encode().replace(b"Article", b"\xe9rticle"))
    counts = build([papers], tiny_tokenizer, tmp_path / "corpus", TOLERANT, workers=1).counts
    assert counts.left_out == {"broken_xml": 1}
    assert counts.kept == 67


def test_what_was_found_in_a_record_is_named_in_short_clean_text(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    record = {"\ud800" + "k" * 1000: "x"}
    write_jsonl(papers / "t.jsonl", [record])
    counts = build([papers], tiny_tokenizer, tmp_path / "corpus", TOLERANT, workers=1).counts
    (example,) = counts.examples["wrong_structure"]
    assert example.startswith("papers/t.jsonl:1 no known layout has the fields: \ufffdk")
    assert len(example) <= len("papers/t.jsonl:1 ") + 200


def test_pipes_are_refused_without_waiting_for_a_writer(papers: Path, tmp_path: Path) -> None:
    os.mkfifo(papers / "z.jsonl")
    for path in (papers, papers / "z.jsonl"):
        with pytest.raises(UserError, match=r"z\.jsonl is a pipe or device"):
            find_inputs([path])


def test_a_name_that_is_too_long_is_one_sentence(papers: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        find_inputs([tmp_path / ("x" * 300 + ".jsonl")])
    with pytest.raises(UserError, match="cannot be written"):
        make(papers, tiny_tokenizer, tmp_path / ("x" * 300))


def test_few_articles_still_make_parts_for_many_workers() -> None:
    def sizes(articles: int) -> list[int]:
        return [len(group) for group in shards([InputFile("/a.xml", "a.xml", 1)] * articles)]

    assert sizes(1000) == [512, 488]
    assert sizes(64_000) == [1000] * 64
    assert max(sizes(1_200_000)) == 16_384


def test_loose_articles_are_grouped_by_count_and_other_files_stand_alone(tmp_path: Path) -> None:
    size = 512
    for number in range(size + 1):
        (tmp_path / f"{number:05}.xml").touch()
    (tmp_path / "00003.jsonl").touch()
    (tmp_path / "00004.jsonl.gz").touch()
    (tmp_path / ".hidden.xml").touch()
    groups = shards(find_inputs([tmp_path]))
    assert [len(group) for group in groups] == [size, 1, 1, 1]
    assert [file.name for group in groups[1:] for file in group] == [
        f"{tmp_path.name}/{name}" for name in ("00003.jsonl", "00004.jsonl.gz", f"{size:05}.xml")
    ]


def test_an_input_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read"):
        find_inputs([tmp_path])


def test_two_builds_into_one_directory_do_not_mix(papers: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "parts").mkdir(parents=True)
    with (
        locked(tmp_path / "corpus", fcntl.LOCK_EX),
        pytest.raises(UserError, match="Another build is at work"),
    ):
        make(papers, tiny_tokenizer, tmp_path / "corpus")


def test_inputs_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "x.jsonl").touch()
    with pytest.raises(UserError, match=r"both be recorded as x\.jsonl"):
        find_inputs([tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"])


@pytest.fixture(scope="module")
def real_corpus(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    directory = tmp_path_factory.mktemp("real") / "corpus"
    make(real_inputs(shared), shared / "tokenizers" / "llama_tokenizer.model", directory, workers=2)
    return directory


def real_inputs(shared: Path) -> list[Path]:
    articles = sorted([*shared.glob("jats/*.xml"), *shared.glob("jats/*.nxml")])
    return [*articles, shared / "s2orc" / "api_s2orc-sample.jsonl"]


@pytest.mark.shared
def test_of_the_real_papers_exactly_those_with_a_pmc_id_are_kept(real_corpus: Path, shared: Path) -> None:
    expected = set()
    for path in [*shared.glob("jats/*.xml"), *shared.glob("jats/*.nxml")]:
        front = path.read_text().partition("</front>")[0]
        expected |= {f"PMC{i}" for i in re.findall(r'<article-id pub-id-type="pmc">(?:PMC)?(\d+)<', front)}
    for line in (shared / "s2orc" / "api_s2orc-sample.jsonl").read_text().splitlines():
        number = json.loads(line)["externalids"]["pubmedcentral"]
        expected |= {f"PMC{number}"} if number else set()
    assert len(expected) == 7
    parts = [table_path(real_corpus, part.name) for part in Corpus.open(real_corpus).manifest.parts]
    found = read_documents(parts, ["pmc_id"])["pmc_id"].to_pylist()
    assert len(found) == Corpus.open(real_corpus).manifest.counts.kept
    assert set(found) == expected


@pytest.mark.shared
def test_the_ids_of_the_real_papers_are_sentencepieces(real_corpus: Path, shared: Path) -> None:
    tokenizer = shared / "tokenizers" / "llama_tokenizer.model"
    assert_corpus_is(real_inputs(shared), tokenizer, real_corpus)
    verified = verify(real_corpus)
    assert verified.samples == verified.same_text == 7


@pytest.mark.shared
def test_the_real_papers_texts_hold_no_author_block_and_no_reference_list(
    real_corpus: Path, shared: Path
) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(str(shared / "tokenizers" / "llama_tokenizer.model"))
    corpus = Corpus.open(real_corpus)
    checked = 0
    for number in range(len(corpus.manifest.parts)):
        path = table_path(real_corpus, corpus.manifest.parts[number].name)
        rows = read_documents([path], ["source_file"]).to_pylist()
        with TokenFile(corpus.part_prefix(number)) as file:
            for document, row in enumerate(rows):
                if row["source_file"].endswith(".jsonl"):
                    continue
                text = tokenizer.decode(file.document(document).tolist())
                xml = (shared / "jats" / row["source_file"]).read_text()
                front, _, _ = xml.partition("</front>")
                affiliations = re.findall(r"<aff[ >].*?</aff>", front, re.DOTALL)
                references = re.findall(
                    r"<(?:article-title|source)>([^<]{40,})</", xml.partition("<ref-list")[2]
                )
                assert affiliations
                assert len(references) > 10
                for forbidden in references + [re.sub(r"<[^>]+>", "", item).strip() for item in affiliations]:
                    assert forbidden not in text
                    checked += 1
    assert checked > 100
