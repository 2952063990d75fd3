"""The commands: what they show, and one sentence with status 2 for everything a user can mend."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_tools.cli import main
from data_tools.files import checksum
from data_tools.manifest import FileInfo, read_manifest, write_manifest
from data_tools.recipe import Decisions
from tests.data_tools.sources import simple_record, write_jsonl


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(result: tuple[int, str, str], message: str) -> None:
    status, _, error = result
    assert status == 2
    sentence = error.strip().splitlines()[-1]
    assert sentence.startswith("pmc-data: ")
    assert message in sentence
    assert sentence.endswith(".")
    assert "Traceback" not in error


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "papers.jsonl", [simple_record(number) for number in range(5)])


@pytest.fixture
def copy(tiny_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus, tmp_path / "copy"))


def test_build_says_what_was_kept_and_where(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with papers.open("a") as file:
        file.write("broken\n")
    output = tmp_path / "corpus"
    status, out, error = run(
        capsys,
        *("build", "--input", papers, "--tokenizer", tiny_tokenizer, "--output", output),
        *("--workers", 1, "--max_bad", 0.5),
    )
    assert status == 0
    assert "broken_json" in out
    assert f"The corpus is in {output}" in out
    assert "100%" in error
    assert json.loads((output / "corpus.json").read_bytes())["counts"]["kept"] == 5


def test_build_refuses_what_is_not_there_or_not_readable(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def built(source: Path, tokenizer: Path = tiny_tokenizer) -> tuple[int, str, str]:
        output = tmp_path / "corpus"
        result = run(capsys, "build", "--input", source, "--tokenizer", tokenizer, "--output", output)
        assert not output.exists()
        return result

    assert_refused(built(tmp_path / "nowhere"), "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    assert_refused(built(tmp_path / "empty"), "nothing to read")
    (tmp_path / "empty.jsonl").touch()
    assert_refused(built(tmp_path / "empty.jsonl"), "No paper is left")
    (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 cut")
    assert_refused(built(tmp_path / "x.jsonl.gz"), "not a readable gzip")
    (tmp_path / "paper.pdf").touch()
    assert_refused(built(tmp_path / "paper.pdf"), "paper.pdf; it has to end in .jsonl")
    assert_refused(built(papers, tokenizer=papers), "is not a SentencePiece model")
    assert_refused(built(papers, tokenizer=tmp_path / "none"), "cannot be read")


def test_options_out_of_range_are_refused_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (
        ("--heldout", "1"),
        ("--heldout", "-0.1"),
        ("--workers", "0"),
        ("--workers", "x"),
        ("--heldout", "nan"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["build", "--input", "a", "--tokenizer", "b", "--output", "c", option, value])
        assert exit_.value.code == 2
        assert option in capsys.readouterr().err


def test_inspect_shows_the_paper_its_tokens_and_its_text(
    tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "inspect", tiny_corpus, "--document", 3)
    assert status == 0
    for expected in ("Article 3", "PMC5003", "PMC5003.xml:1", "first ids", "## Background", "## Discussion"):
        assert expected in out
    for hidden in ("Lovelace", "Menabrea", "Babbage", "Running head"):
        assert hidden not in out


def test_every_document_can_be_inspected_and_no_other(
    tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = set()
    for number in range(60):
        status, out, _ = run(capsys, "inspect", tiny_corpus, "--document", number)
        assert status == 0
        seen.add(next(line for line in out.splitlines() if "PMC id" in line))
    assert len(seen) == 60
    for number in (60, -1):
        assert_refused(run(capsys, "inspect", tiny_corpus, "--document", number), "it has 0 to 59")


def test_stats_counts_splits_tokens_and_licences(
    tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "stats", tiny_corpus)
    assert status == 0
    for expected in ("train", "heldout", "commercial", "unknown", "kept"):
        assert expected in out


def test_verify_passes_a_sound_corpus(tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "verify", tiny_corpus)
    assert status == 0
    assert "60 documents" in out


def test_verify_names_the_file_in_which_any_byte_changed(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [path for path in copy.rglob("*") if path.is_file() and path.suffix != ".json"]
    files = [path for path in files if path.stat().st_size]
    assert len(files) == 3 * 3 + 4
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 0x20
            path.write_bytes(damaged)
            assert_refused(run(capsys, "verify", copy), path.name)
        path.write_bytes(content)
    assert run(capsys, "verify", copy)[0] == 0


def test_verify_names_the_record_of_a_part_that_is_damaged(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "parts" / "part-00001.json"
    content = path.read_text()
    for damaged in ("", content[:-20], content.replace('"tokens": ', '"tokens": 1', 1)):
        assert damaged != content
        path.write_text(damaged)
        assert_refused(run(capsys, "verify", copy), "part-00001.json is damaged")
    path.write_text(content.replace('"read": ', '"read": 1'))
    assert_refused(run(capsys, "verify", copy), "papers that were read")


def test_verify_finds_ids_that_the_tokenizer_did_not_make_even_with_right_checksums(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "parts" / "part-00000.bin"
    tokens = np.fromfile(path, "<u2")
    manifest = read_manifest(copy)
    for place, token in ((0, 2), (3, tokens[3] ^ 1), (-1, 5)):
        changed = tokens.copy()
        changed[place] = token
        path.write_bytes(changed.tobytes())
        part = manifest.parts[0]
        files = {**part.files, "bin": FileInfo(len(tokens) * 2, checksum(path))}
        write_manifest(copy, replace(manifest, parts=[replace(part, files=files), *manifest.parts[1:]]))
        assert_refused(run(capsys, "verify", copy), "part-00000.bin is not what its tokenizer makes")


def test_verify_shows_how_far_it_is(tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, error = run(capsys, "verify", tiny_corpus)
    (line,) = error.splitlines()
    assert line.startswith("100%  15 files")
    assert "MB/s" in line
    assert line.endswith("0:00:00 left")


def test_ids_beyond_the_vocabulary_are_one_sentence(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "parts" / "part-00000.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[3] = 60_000
    path.write_bytes(tokens.tobytes())
    assert_refused(run(capsys, "inspect", copy), "the tokenizer has 0 to 399")


def test_an_output_whose_name_is_like_markup_is_printed_as_it_is(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out[" / "b][red]"
    status, out, _ = run(
        capsys, "build", "--input", papers, "--tokenizer", tiny_tokenizer, "--output", output, "--workers", 1
    )
    assert status == 0
    assert f"inspect {output}\n" in out


def _build_with_two_workers(directory: Path, tokenizer: Path) -> subprocess.Popen[str]:
    """A build in a session of its own, returned as soon as it has a worker."""
    papers = [
        write_jsonl(directory / f"{shard}.jsonl", [simple_record(n, words=900) for n in range(300)])
        for shard in range(2)
    ]
    arguments = ["--input", *papers, "--tokenizer", tokenizer, "--output", directory / "c", "--workers", "2"]
    command = [sys.executable, "-m", "data_tools.cli", "build", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not _workers(process.pid):
        assert process.poll() is None, "the build ended before it had a worker"
        time.sleep(0.001)
    return process


def test_an_interruption_while_the_workers_start_is_one_line(tiny_tokenizer: Path, tmp_path: Path) -> None:
    process = _build_with_two_workers(tmp_path, tiny_tokenizer)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal
    _, error = process.communicate(timeout=60)
    assert error == "pmc-data: interrupted; finished parts are kept, the same command goes on.\n"
    assert process.returncode == 130


def test_workers_leave_an_interruption_to_their_parent_from_their_first_moment(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    process = _build_with_two_workers(tmp_path, tiny_tokenizer)
    for worker in _workers(process.pid):
        worker.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    assert process.returncode == 0


def _workers(parent: int) -> list[psutil.Process]:
    """The workers, forked or spawned, in which Python has begun, so that it has a handler for SIGINT."""
    try:
        children = psutil.Process(parent).children()
        workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        return [worker for worker in workers if _handled_signals(worker.pid) & (1 << (signal.SIGINT - 1))]
    except (psutil.NoSuchProcess, FileNotFoundError):  # one ended meanwhile
        return []


def _handled_signals(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))


def test_every_command_on_a_corpus_refuses_another_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("inspect", "stats", "verify"):
        for directory in (tmp_path, tmp_path / "nowhere"):
            assert_refused(run(capsys, command, directory), "is not a corpus")


def test_commands_on_a_corpus_refuse_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "stats", "verify"):
        with pytest.raises(SystemExit) as exit_:
            main([command, "s3://bucket/corpus"])
        assert exit_.value.code == 2
        assert "s3://bucket/corpus is not on this machine; copy it here" in capsys.readouterr().err


def test_stats_are_given_as_json_and_as_a_picture(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "corpus.png"
    status, out, _ = run(capsys, "stats", tiny_corpus, "--json", "--png", picture)
    assert status == 0
    train = read_manifest(tiny_corpus).splits["train"]
    assert json.loads(out)["splits"]["train"] == {"papers": train.documents, "tokens": train.tokens}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_recipe_file_and_options_make_the_corpus(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [normalize]\nmeasures: {near_duplicates: true}\ndecisions: {heldout: 0.5}\n")
    status, _, error = run(
        capsys,
        *("build", "--input", papers, "--tokenizer", tiny_tokenizer, "--output", tmp_path / "c"),
        *("--workers", 1, "--recipe", recipe, "--decisions.near_duplicates", "0.9", "--heldout", 0.2),
    )
    assert status == 0, error
    made = read_manifest(tmp_path / "c").recipe
    assert made.rules == [{"rule": "normalize"}]
    assert made.require_pmc_id
    assert made.decisions == Decisions(near_duplicates=0.9, heldout=0.2)


def test_mistakes_in_a_recipe_stop_a_build_before_it_begins(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "c"
    build = ("build", "--input", papers, "--tokenizer", tiny_tokenizer, "--output", output)
    recipe.write_text("rules: [lenght]")
    assert_refused(run(capsys, *build, "--recipe", recipe), "there is no rule lenght (did you mean length?)")
    assert_refused(run(capsys, *build, "--recipe", tmp_path / "none"), "cannot be read")
    assert_refused(run(capsys, *build, "--max_bad", "many"), "--max_bad: max_bad is 'many'")
    assert_refused(run(capsys, *build, "--decisions.near_duplicates", 0.8), "needs signatures")
    assert_refused(run(capsys, *build, "--decisions.licenses", "[free]"), "free")
    assert not output.exists()


def test_finalize_decides_again_and_keeps_every_other_decision(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_manifest(copy)
    status, out, error = run(capsys, "finalize", copy, "--decisions.heldout", 0.5)
    assert status == 0, error
    assert "The corpus is in" in out
    after = read_manifest(copy)
    assert after.recipe == replace(before.recipe, decisions=replace(before.recipe.decisions, heldout=0.5))
    assert after.splits["heldout"].documents > before.splits["heldout"].documents
    assert run(capsys, "verify", copy)[0] == 0
    assert_refused(run(capsys, "finalize", copy, "--decisions.heldout", "x"), "expected a number")
    assert read_manifest(copy) == after


def test_merge_writes_one_token_file_and_says_what_is_in_it(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "merge", tiny_corpus, tmp_path / "all")
    assert status == 0
    train = read_manifest(tiny_corpus).splits["train"]
    assert f"{train.documents:,} documents, {train.tokens:,} tokens" in out
    assert (tmp_path / "all.bin").stat().st_size == 2 * train.tokens


def test_before_after_takes_papers_and_a_recipe_and_the_plain_view_a_corpus(
    papers: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [normalize, length]")
    status, out, _ = run(capsys, "inspect", papers, "--before-after", "--recipe", recipe, "--document", 2)
    assert status == 0
    assert "papers.jsonl:3" in out
    assert "too_few_words" in out
    assert_refused(run(capsys, "inspect", tiny_corpus, "--before-after"), "is a corpus")
    assert_refused(run(capsys, "inspect", tiny_corpus, "--recipe", recipe), "belong to --before-after")


def test_fetch_is_among_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for source in ("pmc", "s2orc"):
        with pytest.raises(SystemExit) as exit_:
            main(["fetch", source, "--help"])
        assert exit_.value.code == 0
        assert "--output" in capsys.readouterr().out


def test_an_interruption_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(directory: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.verify.verify", interrupt)
    status, _, error = run(capsys, "verify", tiny_corpus)
    assert status == 130
    assert error == "pmc-data: interrupted; finished parts are kept, the same command goes on.\n"
