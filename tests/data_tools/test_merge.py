"""The merged token file is what writing the counted documents directly would have been."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.files import checksum
from data_tools.finalize import decide_again
from data_tools.merge import merge
from data_tools.recipe import Decisions
from data_tools.token_files import TokenFile, TokenFileWriter


def written_directly(corpus: Corpus, split: str, prefix: Path) -> tuple[bytes, bytes]:
    """The documents of a split, each taken from its part, through the writer of parts."""
    positions = set(corpus.split(split).positions[:-1].tolist())
    place = 0
    with TokenFileWriter(prefix, corpus.dtype) as writer:
        for number in range(len(corpus.manifest.parts)):
            with TokenFile(corpus.part_prefix(number)) as part:
                for document in range(part.header.documents):
                    tokens = part.document(document)
                    if place in positions:
                        writer.add(tokens)
                    place += len(tokens)
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("block", [64, 1 << 23])
def test_a_merge_is_byte_for_byte_the_documents_written_directly(
    split: str, block: int, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.merge._BLOCK", block)
    merged = merge(tiny_corpus, tmp_path / "deep" / "merged", split)
    corpus = Corpus.open(tiny_corpus)
    expected = written_directly(corpus, split, tmp_path / "direct")
    assert contents(tmp_path / "deep" / "merged") == expected
    assert merged.documents == corpus.split(split).documents
    for suffix, info in merged.files.items():
        path = tmp_path / "deep" / f"merged.{suffix}"
        assert (info.bytes, info.checksum) == (path.stat().st_size, checksum(path))


def test_megatron_reads_a_merge(tiny_corpus: Path, tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    merge(tiny_corpus, tmp_path / "m")
    found = indexed_dataset.IndexedDataset(str(tmp_path / "m"))
    split = Corpus.open(tiny_corpus).split("train")
    assert len(found) == split.documents
    for number in (0, split.documents // 2, split.documents - 1):
        (expected,) = split.read([(int(split.starts[number]), int(split.starts[number + 1]))])
        np.testing.assert_array_equal(found[number], expected)


def test_a_merge_that_is_there_is_left_alone_and_one_cut_short_is_made_again(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    merge(tiny_corpus, tmp_path / "m")
    expected, made = contents(tmp_path / "m"), (tmp_path / "m.bin").stat().st_mtime_ns
    merge(tiny_corpus, tmp_path / "m")
    assert (tmp_path / "m.bin").stat().st_mtime_ns == made
    (tmp_path / "m.bin").write_bytes(expected[0][:-2])
    merge(tiny_corpus, tmp_path / "m")
    assert contents(tmp_path / "m") == expected


def test_files_of_other_documents_are_never_written_over(tiny_corpus: Path, tmp_path: Path) -> None:
    for name in ("a.bin", "b.idx", "c.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is already there"):
            merge(tiny_corpus, tmp_path / name[0])
        assert (tmp_path / name).read_text() == "mine"
    copy = Path(shutil.copytree(tiny_corpus, tmp_path / "copy"))
    merge(copy, tmp_path / "m")
    with pytest.raises(UserError, match="is already there"):
        merge(copy, tmp_path / "m", "heldout")
    decide_again(copy, Decisions(heldout=0.5))
    with pytest.raises(UserError, match="is already there"):
        merge(copy, tmp_path / "m")


def test_an_empty_or_unknown_split_is_one_sentence(tiny_corpus: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_corpus, tmp_path / "copy"))
    decide_again(copy, Decisions(heldout=0))
    with pytest.raises(UserError, match="has no documents"):
        merge(copy, tmp_path / "m", "heldout")
    with pytest.raises(UserError, match="no split 'test'"):
        merge(copy, tmp_path / "m", "test")
    assert not list(tmp_path.glob("m*"))


_NO_ROOM = """
import resource, sys
from pathlib import Path
from data_tools.errors import UserError
from data_tools.merge import merge
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # stands for a full disk
try:
    merge(Path(sys.argv[1]), Path(sys.argv[2]))
except UserError as error:
    print(error)
"""


def test_without_room_a_merge_is_one_sentence_and_leaves_nothing(tiny_corpus: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _NO_ROOM, str(tiny_corpus), str(tmp_path / "deep" / "m")]
    process = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "m cannot be written: " in process.stdout
    assert not list((tmp_path / "deep").iterdir())


_KILLED = """
import os, sys
from pathlib import Path
from data_tools.merge import merge
calls = 0
def watch(event, arguments):
    global calls
    if event in {"open", "os.rename", "os.remove"} and sys.argv[2] in str(arguments[0]):
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), 9)
sys.addaudithook(watch)
merge(Path(sys.argv[1]), Path(sys.argv[2]) / "m")
"""


def test_killed_at_any_file_operation_there_is_no_pair_that_is_not_whole(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    merge(tiny_corpus, tmp_path / "m")
    expected = contents(tmp_path / "m")
    for instant in range(1, 100):
        directory = tmp_path / f"kill-{instant:02}-"
        directory.mkdir()
        arguments = [sys.executable, "-c", _KILLED, str(tiny_corpus), str(directory), str(instant)]
        process = subprocess.run(arguments, capture_output=True, check=False)
        if (directory / "m.idx").exists():
            assert contents(directory / "m") == expected
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.decode()
        merge(tiny_corpus, directory / "m")
        assert contents(directory / "m") == expected
        assert json.loads((directory / "m.json").read_bytes())["split"] == "train"
        assert len(list(directory.iterdir())) == 3
    assert process.returncode == 0
    assert instant > 5
