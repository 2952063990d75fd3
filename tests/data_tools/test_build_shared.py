"""A build by several processes makes the bytes of one, whatever becomes of them, and none waits for ever."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from data_tools import shared_build
from data_tools.build import build
from data_tools.claims import Claims
from data_tools.errors import UserError
from data_tools.finalize import finalize
from data_tools.launcher import Task, discover
from data_tools.manifest import Manifest
from data_tools.recipe import Decisions, Recipe
from data_tools.shared_build import build_shared
from tests.data_tools.sources import simple_article, simple_record, write_jsonl

PROCESS = """
import sys
from pathlib import Path
from data_tools.errors import UserError
from data_tools.launcher import discover
from data_tools.recipe import Decisions, Recipe
from data_tools.shared_build import build_shared
papers, tokenizer, output, workers, stale = sys.argv[1:]
recipe = Recipe(decisions=Decisions(heldout=0.1))
try:
    build_shared(
        [papers], Path(tokenizer), Path(output), recipe, int(workers), discover(), stale_seconds=float(stale)
    )
except UserError as error:
    sys.exit(f"stopped: {error}")
"""
RECIPE = Recipe(decisions=Decisions(heldout=0.1))
STALE = 2.0
Process = subprocess.Popen[str]


class Start(Protocol):
    """Starts a process of a shared build."""

    def __call__(
        self,
        environment: Mapping[str, str] | None = None,
        source: Path | None = None,
        workers: int = 1,
        stale: float = STALE,
    ) -> Process: ...


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine shards of JSON Lines, and loose articles."""
    directory = tmp_path_factory.mktemp("shared-build") / "papers"
    directory.mkdir()
    for shard in range(9):
        numbers = range(shard * 40, shard * 40 + 40)
        write_jsonl(directory / f"{shard}.jsonl", [simple_record(n, words=2500) for n in numbers])
    for number in range(20):
        (directory / f"PMC{5000 + number}.xml").write_text(simple_article(number))
    return directory


@pytest.fixture(scope="module")
def alone(papers: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of them."""
    directory = tmp_path_factory.mktemp("alone") / "corpus"
    build([papers], tiny_tokenizer, directory, RECIPE, workers=1)
    return contents(directory)


@pytest.fixture
def start(papers: Path, tiny_tokenizer: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a process of a shared build; those still there at the end of the test are killed."""
    started: list[Process] = []

    def begin(
        environment: Mapping[str, str] | None = None,
        source: Path | None = None,
        workers: int = 1,
        stale: float = STALE,
    ) -> Process:
        arguments = [source or papers, tiny_tokenizer, tmp_path / "corpus", workers, stale]
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, arguments)],
            env={**os.environ, **(environment or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def rank(number: int, size: int = 3) -> dict[str, str]:
    """The environment of an MPI process."""
    return {"PMI_RANK": str(number), "PMI_SIZE": str(size)}


def parts_made(directory: Path) -> int:
    return len(list(directory.glob("parts/part-*.json")))


def wait_for_parts(directory: Path, number: int, processes: list[Process]) -> None:
    while parts_made(directory) < number:
        assert all(process.poll() is None for process in processes), "a process ended too early"
        time.sleep(0.005)


def wait_for_claim_of(directory: Path, process: Process) -> None:
    """Until a process holds a claim."""
    pid = f'"pid": {process.pid}}}'
    while not any(pid in _text(path) for path in directory.glob("parts/.shared-part-*.claim")):
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.002)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def succeed(*processes: Process) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def test_three_processes_make_the_bytes_of_one_and_leave_nothing_else(
    start: Start, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    succeed(*[start(rank(number)) for number in range(3)])
    assert contents(tmp_path / "corpus") == alone


@pytest.mark.slow
def test_processes_with_several_workers_each_make_the_bytes_of_one(
    start: Start, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    succeed(*[start(rank(number, 2), workers=2) for number in range(2)])
    assert contents(tmp_path / "corpus") == alone


def test_one_of_three_is_killed_and_the_others_finish(
    start: Start, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    processes = [start(rank(number)) for number in range(3)]
    wait_for_parts(tmp_path / "corpus", 1, processes)
    wait_for_claim_of(tmp_path / "corpus", processes[1])
    processes[1].kill()
    succeed(processes[0], processes[2])
    assert contents(tmp_path / "corpus") == alone


@pytest.mark.slow
def test_all_are_killed_and_the_same_command_goes_on(
    start: Start, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    processes = [start(rank(number), stale=1000.0) for number in range(3)]
    wait_for_parts(tmp_path / "corpus", 2, processes)
    for process in processes:
        process.kill()
        process.wait()
    finished = {path: path.read_bytes() for path in tmp_path.glob("corpus/parts/part-*.json")}
    assert len(finished) < 10
    # The claims are fresh, but their holders are known to be gone: the time need not pass.
    succeed(*[start(rank(number), stale=1000.0) for number in range(2)])
    assert contents(tmp_path / "corpus") == alone


@pytest.mark.slow
def test_a_process_that_is_stopped_until_the_corpus_is_finished_does_no_harm_when_it_goes_on(
    start: Start, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    processes = [start(rank(number)) for number in range(3)]
    wait_for_claim_of(tmp_path / "corpus", processes[1])
    processes[1].send_signal(signal.SIGSTOP)
    succeed(processes[0], processes[2])
    assert contents(tmp_path / "corpus").items() >= alone.items()
    processes[1].send_signal(signal.SIGCONT)
    succeed(processes[1])
    assert contents(tmp_path / "corpus") == alone


@pytest.mark.slow
def test_a_process_that_is_stopped_and_goes_on_while_others_make_its_part_does_no_harm(
    start: Start, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    processes = [start(rank(number, 2), stale=0.5) for number in range(2)]
    wait_for_claim_of(tmp_path / "corpus", processes[1])
    processes[1].send_signal(signal.SIGSTOP)
    wait_for_parts(tmp_path / "corpus", 9, [processes[0]])
    time.sleep(0.5)
    processes[1].send_signal(signal.SIGCONT)
    succeed(*processes)
    assert contents(tmp_path / "corpus") == alone


def test_records_and_files_that_were_half_written_are_made_again(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    parts = tmp_path / "corpus" / "parts"
    for name, content in alone.items():
        if not name.startswith("corpus.json"):
            path = tmp_path / "corpus" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (parts / "part-00000.json").write_bytes(alone["parts/part-00000.json"][:100])
    (parts / "part-00001.json").write_bytes(b"")
    (parts / ".part-00002.json.partial").write_bytes(b"{")
    (parts / "part-00003.bin").write_bytes(b"")
    (parts / ".shared-part-00004.n7-1-a").mkdir()
    (parts / ".shared-part-00004.n7-1-a" / "part-00004.json").write_bytes(b"{")
    share = build_shared([papers], tiny_tokenizer, tmp_path / "corpus", RECIPE, 1, Task(0, 1))
    assert share.finalized
    found = contents(tmp_path / "corpus")
    found.pop("parts/.part-00002.json.partial", None)
    assert found == alone


def test_a_process_whose_finalization_was_swept_away_waits_for_that_of_the_other(
    papers: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    alone: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swept: list[Path] = []

    def finalize_late(work: Path, *arguments: Any) -> Manifest:
        if not swept:
            swept.append(work)
            shutil.rmtree(work)  # as a process does that takes this one for lost
        return finalize(work, *arguments)

    monkeypatch.setattr(shared_build, "finalize", finalize_late)
    share = build_shared([papers], tiny_tokenizer, tmp_path / "corpus", RECIPE, 1, Task(0, 1))
    assert swept
    assert share.finalized
    assert contents(tmp_path / "corpus") == alone


def test_a_late_process_finds_the_corpus_finished_and_changes_nothing(
    start: Start, tmp_path: Path, papers: Path, tiny_tokenizer: Path
) -> None:
    build([papers], tiny_tokenizer, tmp_path / "corpus", RECIPE, workers=1)
    bins = {path: path.stat().st_mtime_ns for path in tmp_path.glob("corpus/**/*.bin")}
    corpus = (tmp_path / "corpus" / "corpus.json").stat()
    succeed(start(rank(2)))
    assert {path: path.stat().st_mtime_ns for path in bins} == bins
    assert (tmp_path / "corpus" / "corpus.json").stat().st_mtime_ns == corpus.st_mtime_ns


def test_a_bad_input_stops_every_process_with_its_sentence_and_mended_it_goes_on(
    start: Start, papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    mended = tmp_path / "papers"
    shutil.copytree(papers, mended)
    (mended / "4.jsonl").rename(tmp_path / "4.jsonl")
    (mended / "4.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")
    processes = [start(rank(number), mended) for number in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "papers/4.jsonl.gz is not a readable gzip" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    (mended / "4.jsonl.gz").unlink()
    (tmp_path / "4.jsonl").rename(mended / "4.jsonl")
    succeed(*[start(rank(number), mended) for number in range(2)])
    build([mended], tiny_tokenizer, tmp_path / "fresh", RECIPE, workers=1)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "fresh")


def test_a_build_alone_and_a_shared_one_keep_out_of_each_others_directory(
    start: Start, papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    process = start(rank(0))
    wait_for_claim_of(tmp_path / "corpus", process)
    with pytest.raises(UserError, match="Another build is at work"):
        build([papers], tiny_tokenizer, tmp_path / "corpus", RECIPE, workers=1)
    succeed(process)


@pytest.mark.slow
def test_a_build_alone_goes_on_from_a_killed_shared_one(
    start: Start, papers: Path, tiny_tokenizer: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    process = start(rank(0))
    wait_for_parts(tmp_path / "corpus", 2, [process])
    wait_for_claim_of(tmp_path / "corpus", process)
    process.kill()
    process.wait()
    build([papers], tiny_tokenizer, tmp_path / "corpus", RECIPE, workers=1)
    assert contents(tmp_path / "corpus") == alone


def command(papers: Path, tokenizer: Path, output: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "data_tools.cli", "build", "--input", str(papers), "--output", str(output)),
        *("--tokenizer", str(tokenizer), "--workers", "1", "--heldout", "0.1", *more),
    ]


MPIEXEC = Path(sys.executable).with_name("mpiexec")


@pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python")
def test_under_mpiexec_two_processes_make_the_bytes_of_one(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    line = [str(MPIEXEC), "-n", "2", *command(papers, tiny_tokenizer, tmp_path / "corpus", "--shared")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "corpus") == alone
    assert done.stdout.count("parts were made by this process.") == 1
    assert done.stdout.count("look at it with") == 1


@pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python")
def test_under_mpiexec_without_the_flag_it_is_named(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    line = [str(MPIEXEC), "-n", "2", *command(papers, tiny_tokenizer, tmp_path / "corpus")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "add --shared" in done.stderr
    assert not (tmp_path / "corpus").exists()


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_make_the_bytes_of_one(
    papers: Path, tiny_tokenizer: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2"}
    batch = {**os.environ, **array, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    line = command(papers, tiny_tokenizer, tmp_path / "corpus", "--shared")
    tasks = [
        subprocess.Popen(
            line,
            env={**batch, "SLURM_ARRAY_TASK_ID": str(number)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    succeed(*tasks)
    assert contents(tmp_path / "corpus") == alone


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "10",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Task(0, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Task(0, 1)),  # a batch script's own shell
        (STEP, Task(5, 8)),
        (ARRAY, Task(3, 10)),
        ({**ARRAY, **STEP}, Task(3 * 8 + 5, 80)),
        ({**STEP, "SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, Task(3, 4)),
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "8"}, Task(5, 8)),
        ({**STEP, "PMIX_RANK": "5"}, Task(5, 8)),
    ],
)
def test_what_started_a_process_is_read_from_its_environment(
    environment: dict[str, str], expected: Task
) -> None:
    assert discover(environment) == expected


def test_a_failure_keeps_its_sentence_where_there_is_no_room_to_leave_it_for_the_others(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(b"no gzip")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"bad\.jsonl\.gz is not a readable gzip"):
        build_shared([bad], tiny_tokenizer, tmp_path / "corpus", RECIPE, 1, Task(0, 1))


def test_a_claim_is_held_by_one_and_free_again_when_given_up(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, STALE), Claims(tmp_path, STALE)
    claim = first.take("x")
    assert claim is not None
    assert second.take("x") is None
    claim.release()
    again = second.take("x")
    assert again is not None
    again.release()
    assert not list(tmp_path.iterdir())


def test_a_claim_outlives_its_staleness_as_long_as_its_holder_lives_and_no_longer(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, 0.4), Claims(tmp_path, 0.4)
    claim = first.take("x")
    assert claim is not None
    time.sleep(1.2)
    assert second.take("x") is None
    claim.release()
    path = tmp_path / first.file_name("x")
    path.write_text('{"owner": "n7-1-a", "machine": "n7", "pid": 1}')
    os.utime(path, (time.time() - 10, time.time() - 10))
    taken = second.take("x")
    assert taken is not None
    assert first.take("x") is None
    taken.release()


def test_a_claim_of_a_process_that_cannot_be_seen_from_here_is_not_taken_for_lost(tmp_path: Path) -> None:
    claims = Claims(tmp_path, STALE)
    path = tmp_path / claims.file_name("x")
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    mine = claims.take("y")
    assert mine is not None
    holder = json.loads((tmp_path / claims.file_name("y")).read_text())
    mine.release()
    # A container on this machine, of the same host name: its numbers of processes say nothing here.
    path.write_text(json.dumps(holder | {"machine": holder["machine"] + "1", "pid": int(gone.stdout)}))
    assert claims.take("x") is None
    path.write_text(json.dumps(holder | {"pid": int(gone.stdout)}))
    taken = Claims(tmp_path, STALE).take("x")
    assert taken is not None
    taken.release()


def test_a_holder_that_was_replaced_leaves_the_new_claim_alone(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, STALE), Claims(tmp_path, STALE)
    old = first.take("x")
    (tmp_path / first.file_name("x")).unlink()
    new = second.take("x")
    assert old is not None
    assert new is not None
    old.release()
    assert first.take("x") is None
    new.release()
