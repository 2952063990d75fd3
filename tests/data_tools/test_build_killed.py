"""A build is killed with SIGKILL at random instants; the same command then gives the bytes of a whole one."""

import gzip
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.data_tools.sources import simple_article, simple_record, write_jsonl

INSTANTS = 20
SEED = 20


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of JSON Lines, one of them compressed, one with damaged lines, and loose articles."""
    directory = tmp_path_factory.mktemp("killed") / "papers"
    directory.mkdir()
    for shard in range(6):
        numbers = range(shard * 60, shard * 60 + 60)
        write_jsonl(directory / f"{shard}.jsonl", [simple_record(n, words=2500) for n in numbers])
    with (directory / "1.jsonl").open("ab") as file:
        file.write(b'{"corpusid": 1\n\xff\n')
    compressed = directory / "2.jsonl"
    (directory / "2.jsonl.gz").write_bytes(gzip.compress(compressed.read_bytes()))
    compressed.unlink()
    for number in range(20):
        (directory / f"PMC{5000 + number}.xml").write_text(simple_article(number))
    return directory


def command(papers: Path, tokenizer: Path, output: Path, workers: int = 2) -> list[str]:
    """A build with everything that is measured."""
    return [
        *(sys.executable, "-m", "data_tools.cli", "build", "--input", str(papers), "--output", str(output)),
        *("--tokenizer", str(tokenizer), "--workers", str(workers), "--heldout", "0.1"),
        *("--measures.near_duplicates", "true", "--decisions.near_duplicates", "0.8"),
    ]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def processes_of(build: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The build's own process and its workers, those of them that still run."""
    try:
        parent = psutil.Process(build.pid)
        found = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if process.is_running() and _status(process) != "zombie"]


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return "zombie"


def kill_one(build: subprocess.Popen[bytes], draw: random.Random) -> bool:
    """Kill the build or one of its workers, wait until all are gone, and say whether it was cut short."""
    alive = processes_of(build)
    others = []
    if alive:
        victim = draw.choice(alive)
        others = [process for process in alive if process != victim]
        victim.send_signal(signal.SIGKILL)
    status = build.wait(timeout=60)
    _, left = psutil.wait_procs(others, timeout=60)
    assert not left, "a process of a killed build goes on"
    return status != 0


@pytest.mark.slow
def test_whatever_is_killed_whenever_the_same_command_gives_the_same_bytes(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    begin = time.monotonic()
    subprocess.run(command(papers, tiny_tokenizer, whole), check=True, capture_output=True)
    duration = time.monotonic() - begin
    expected = contents(whole)
    assert sum(name.endswith(".bin") for name in expected) == 7
    draw, cut_short = random.Random(SEED), 0
    for instant in range(INSTANTS):
        output = tmp_path / f"killed-{instant}"
        build = subprocess.Popen(command(papers, tiny_tokenizer, output), stderr=subprocess.DEVNULL)
        time.sleep(duration * draw.uniform(0.15, 0.95))
        cut_short += kill_one(build, draw)
        subprocess.run(command(papers, tiny_tokenizer, output), check=True, capture_output=True)
        assert contents(output) == expected, f"instant {instant} of seed {SEED}"
    assert cut_short >= INSTANTS // 2, "most builds ended before they were killed; the test proves too little"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_a_build_killed_three_times_on_its_way_gives_the_same_bytes_with_any_number_of_workers(
    workers: int, papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    subprocess.run(command(papers, tiny_tokenizer, tmp_path / "whole"), check=True, capture_output=True)
    draw, output = random.Random(SEED + workers), tmp_path / "killed"
    for finished in (1, 2, 4):
        build = subprocess.Popen(command(papers, tiny_tokenizer, output, workers), stderr=subprocess.DEVNULL)
        while len(list(output.glob("parts/part-*.json"))) < finished:
            assert build.poll() is None, "the build ended before it could be killed"
            time.sleep(0.005)
        kill_one(build, draw)
    subprocess.run(command(papers, tiny_tokenizer, output, workers), check=True, capture_output=True)
    assert contents(output) == contents(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    directory = tmp_path / "small"
    directory.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield directory
    subprocess.run([shutil.which("umount") or "umount", str(directory)], check=True)


def mount(*arguments: str) -> None:
    """Call mount."""
    subprocess.run([shutil.which("mount") or "mount", *arguments], check=True, capture_output=True)


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on_when_there_is_room(
    papers: Path, tiny_tokenizer: Path, small_disk: Path, tmp_path: Path
) -> None:
    build = command(papers, tiny_tokenizer, small_disk / "corpus")
    refused = subprocess.run(build, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "No space left on device" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (small_disk / "corpus" / "corpus.json").exists()
    assert not list(small_disk.rglob("*.partial"))
    mount("-o", "remount,size=64m", str(small_disk))
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run(command(papers, tiny_tokenizer, tmp_path / "whole"), check=True, capture_output=True)
    assert contents(small_disk / "corpus") == contents(tmp_path / "whole")
