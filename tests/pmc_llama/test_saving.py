"""Checkpoints written behind training are those of the moment; no failure is silent, no kill loses one."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from data_tools.errors import UserError
from pmc_llama import checkpoint
from pmc_llama.checkpoint import FileTable, Manifest
from pmc_llama.config import CheckpointConfig
from pmc_llama.rectangles import Rectangles
from pmc_llama.saving import CheckpointSaver

ROWS = 64


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "some.model"
    path.write_bytes(b"pieces")
    return path


def manifest(step: int, recipe: Any = None) -> Callable[[FileTable], Manifest]:
    def describe(files: FileTable) -> Manifest:
        return Manifest(
            step=step,
            updates=step,
            samples=step * 8,
            tokens=step * 64,
            data={},
            guard={},
            recipe=recipe or {"seed": 0},
            model_config={},
            corpus="abc",
            versions={},
            files=files,
        )

    return describe


def _state(step: int) -> dict[str, Tensor]:
    """This rank's half of a tensor full of the step's number, and the number itself."""
    rows = ROWS // dist.get_world_size()
    half = torch.full((rows, 3), float(step))
    place = ChunkStorageMetadata(torch.Size([dist.get_rank() * rows, 0]), half.size())
    shard = Rectangles(torch.Size([ROWS, 3]), half.dtype, half.device, [(place, half)])
    return {"model.weight": shard, "optim.step": torch.tensor(step)}


def _load(path: Path) -> Tensor:
    """The whole tensor of a checkpoint, read by a world of one."""
    state: dict[str, Tensor] = {"model.weight": torch.zeros(ROWS, 3)}
    checkpoint.load(state, path, dist.group.WORLD)
    return state["model.weight"]


def feed(pipe: Path) -> None:
    """Let a save go on that waits for its tokenizer."""
    pipe.write_bytes(b"pieces")


# Forked from a server that has torch imported already: a fresh process would take seconds.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


def _run_ranks(function: Callable[..., None], directory: Path, *args: Any) -> list[int]:
    """Exit codes of a function on two forked ranks: negative ones are signals."""
    rendezvous = directory / f"rendezvous-{uuid.uuid4()}"
    ranks = [
        _forks.Process(target=_rank, args=(function, rank, rendezvous, directory, args)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    assert None not in codes, "a rank hangs"
    return [code for code in codes if code is not None]


def _rank(function: Callable[..., None], rank: int, rendezvous: Path, directory: Path, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    function(directory, *args)
    os._exit(0)


# --- one at a time, in step, told once -------------------------------------------------------------------


def test_a_save_waits_for_the_one_under_way_and_both_are_told_in_order(
    world_of_one: None, tmp_path: Path
) -> None:
    root, pipe = tmp_path / "checkpoints", tmp_path / "pipe"
    os.mkfifo(pipe)
    saver = CheckpointSaver(root, CheckpointConfig(), pipe)
    saver.save(_state(1), manifest(1))
    feeding = threading.Timer(0.3, feed, (pipe,))
    feeding.start()
    saver.save(_state(2), manifest(2))
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step-00000001"]
    feed(pipe)
    first, second = saver.wait()
    assert (first.step, second.step) == (1, 2)
    assert second.stall_seconds >= 0.25 > first.stall_seconds  # the wait counts
    assert saver.poll() == []
    for path, step in zip(checkpoint.list_checkpoints(root), (1, 2), strict=True):
        assert torch.equal(_load(path), torch.full((ROWS, 3), float(step)))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_checkpoints_beyond_those_to_keep_are_removed_once_a_newer_one_is_published(
    world_of_one: None, tmp_path: Path, tokenizer: Path, asynchronous: bool
) -> None:
    root = tmp_path / "checkpoints"
    saver = CheckpointSaver(root, CheckpointConfig(keep_last=1, asynchronous=asynchronous), tokenizer)
    for step in (1, 2, 2, 3):
        saver.save(_state(step), manifest(step))
        if not asynchronous:
            assert checkpoint.list_checkpoints(root)[-1].name == f"step-{step:08d}"
            (outcome,) = saver.poll()
            assert outcome.stall_seconds == outcome.seconds
    saver.wait()
    assert [path.name for path in root.iterdir()] == ["step-00000003"]
    assert checkpoint.verify(root / "step-00000003").samples == 24
    assert torch.equal(_load(root / "step-00000003"), torch.full((ROWS, 3), 3.0))


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told_once_with_its_cause_and_the_next_one_tries_again(
    world_of_one: None, tmp_path: Path, tokenizer: Path, asynchronous: bool
) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    config = CheckpointConfig(asynchronous=asynchronous, max_failed=1)
    saver = CheckpointSaver(root, config, tokenizer)
    saver.save(_state(1), manifest(1))
    saver.wait()
    root.rename(elsewhere)
    root.write_text("a file where a directory must be")
    for failures in (1, 2):
        saver.save(_state(2), manifest(2))
        with pytest.raises(UserError, match=r"no checkpoint of step 2: .*checkpoints.*--resume"):
            saver.wait()
        assert saver.failures == failures
        assert saver.poll() == []
    with pytest.raises(UserError, match=r"2 checkpoints in a row .*max_failed is 1.*checkpoints"):
        saver.stop_if_failing(saver.failures)
    root.unlink()
    elsewhere.rename(root)
    saver.save(_state(3), manifest(3))
    (outcome,) = saver.wait()
    assert (outcome.step, outcome.failure, saver.failures) == (3, None, 0)
    saver.stop_if_failing(saver.failures)
    assert [path.name for path in root.iterdir()] == ["step-00000001", "step-00000003"]


def test_a_full_disk_fails_the_save_by_its_name_and_leaves_the_room_to_the_next(
    world_of_one: None, tmp_path: Path, tokenizer: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not mount or not unmount or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        root, ballast = disk / "checkpoints", disk / "ballast"
        state = {"model.weight": torch.ones(300_000)}  # 1.2 MB
        saver = CheckpointSaver(root, CheckpointConfig(), tokenizer)
        saver.save(state, manifest(1))
        saver.wait()
        ballast.write_bytes(bytes(2_000_000))
        state["model.weight"].fill_(2)
        saver.save(state, manifest(2))
        with pytest.raises(UserError, match=r"GB are free now: .*No space left on device"):
            saver.wait()
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
        ballast.unlink()
        saver.save(state, manifest(2))
        saver.wait()
        for path, value in zip(checkpoint.list_checkpoints(root), (1.0, 2.0), strict=True):
            found: dict[str, Tensor] = {"model.weight": torch.zeros(300_000)}
            checkpoint.load(found, path, dist.group.WORLD)
            assert torch.equal(found["model.weight"], torch.full((300_000,), value))
    finally:
        subprocess.run([unmount, str(disk)], check=True)


def test_a_bug_in_the_thread_is_raised_with_its_traceback(
    world_of_one: None, tmp_path: Path, tokenizer: Path
) -> None:
    saver = CheckpointSaver(tmp_path / "checkpoints", CheckpointConfig(), tokenizer)
    saver.save(_state(1), manifest(1, recipe={"seed": object}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.wait()


def _one_rank_is_refused(directory: Path) -> None:
    root = directory / "checkpoints"
    saver = CheckpointSaver(root, CheckpointConfig(max_failed=1), directory / "some.model")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, most in ((1, limits[0]), (2, 100), (3, 100), (4, limits[0])):
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        saver.save(_state(step), manifest(step))
        while not (outcomes := saver.poll()):
            time.sleep(0.001)
        (outcome,) = outcomes
        assert (outcome.path is None) == (step in (2, 3))
        assert step not in (2, 3) or "File too large" in str(outcome)
        assert saver.failures == {1: 0, 2: 1, 3: 2, 4: 0}[step]
        dist.barrier()
        found = [path.name for path in root.iterdir()]
        assert sorted(found) == [f"step-{kept:08d}" for kept in ((1,) if step < 4 else (1, 4))]
        dist.barrier()


def test_the_disk_of_one_rank_fails_the_save_on_all_of_them_alike(tmp_path: Path, tokenizer: Path) -> None:
    assert _run_ranks(_one_rank_is_refused, tmp_path) == [0, 0]


# --- processes that die ----------------------------------------------------------------------------------


def _resume_save_and_die(directory: Path, victim: int, instant: int) -> None:
    """Go on from the newest checkpoint: save its step again, twice, then the next, keeping one.

    `victim` kills itself at its `instant`-th look at, or change of, anything in the checkpoints' directory.
    """
    root, seen = directory / "checkpoints", 0

    def die_in_time(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        removal = event in ("os.remove", "os.rmdir")  # told with names inside the directory
        touched = event.split(".")[0] in ("open", "os", "shutil") and str(args[0]).startswith(str(root))
        if removal or touched:
            seen += 1
            if seen == instant:
                os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == victim:
        sys.addaudithook(die_in_time)
    saver = CheckpointSaver(root, CheckpointConfig(keep_last=1), directory / "some.model")
    try:
        if dist.get_rank() == 0:
            checkpoint.tidy(root)
        dist.barrier()
        newest = checkpoint.newest_sound(root, dist.group.WORLD, print)
        first = checkpoint.read_manifest(newest).step if newest else 1
        for step in (first, first, first + 1):
            saver.save(_state(step), manifest(step))
            saver.wait()
            if dist.get_rank() == 0:
                (directory / "published").write_text(str(step))
    except (UserError, RuntimeError):
        os._exit(2)  # the other rank is gone, and this one has been told


def _check_no_kill_loses_a_checkpoint(directory: Path, kills: list[tuple[int, int]]) -> int:
    """Kill at each of `kills` (rank, instant), every run on the remains of the one before; count the hits."""
    root, copy, told, hits = directory / "checkpoints", directory / "copy", directory / "published", 0
    for victim, instant in kills:
        codes = _run_ranks(_resume_save_and_die, directory, victim, instant)
        assert codes[victim] in (0, -signal.SIGKILL), codes
        hits += codes[victim] == -signal.SIGKILL
        published = int(told.read_text()) if told.exists() else 0
        shutil.rmtree(copy, ignore_errors=True)
        if root.exists():
            shutil.copytree(root, copy)  # the remains themselves are for the next run to clear
        checkpoint.tidy(copy)
        newest = checkpoint.newest_sound(copy, dist.group.WORLD, pytest.fail)
        step = checkpoint.read_manifest(newest).step if newest else 0
        assert step >= published, "a published checkpoint is lost"
        if newest:
            assert torch.equal(_load(newest), torch.full((ROWS, 3), float(step)))
            assert all(path.name.startswith("step-") for path in copy.iterdir()), "remains of a killed save"
    return hits


@pytest.fixture
def instants() -> list[tuple[int, int]]:
    """Every instant of `_resume_save_and_die`, on either rank, in a seeded order."""
    every = [(0, instant) for instant in range(1, 76)] + [(1, instant) for instant in range(1, 10)]
    random.Random(0).shuffle(every)
    return every


def test_a_rank_killed_at_any_instant_of_a_save_or_resume_loses_no_checkpoint(
    world_of_one: None, tmp_path: Path, tokenizer: Path, instants: list[tuple[int, int]]
) -> None:
    assert _check_no_kill_loses_a_checkpoint(tmp_path, instants[:16]) >= 12


@pytest.mark.slow
def test_a_rank_killed_at_every_instant_of_a_save_or_resume_loses_no_checkpoint(
    world_of_one: None, tmp_path: Path, tokenizer: Path, instants: list[tuple[int, int]]
) -> None:
    assert _check_no_kill_loses_a_checkpoint(tmp_path, instants) >= 75


LEAVING = """
import atexit, dataclasses, os, sys, torch, torch.distributed as dist
from datetime import timedelta
from pathlib import Path
from pmc_llama import saving
from pmc_llama.checkpoint import Manifest
from pmc_llama.config import CheckpointConfig

directory, tokenizer, parting = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
saving._PARTING = timedelta(seconds=parting)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(os._exit, 7)  # after the saver's own parting; gloo, left open, now and then aborts a process
saver = saving.CheckpointSaver(directory, CheckpointConfig(), tokenizer)
state = {f"model.{number}": torch.ones(1_000_000) for number in range(10)}
said = {field.name: {} for field in dataclasses.fields(Manifest) if field.name != "format"}
saver.save(state, lambda files: Manifest(**{**said, "step": 1, "files": files}))
sys.exit(7)
"""


def test_a_process_that_ends_while_saving_keeps_its_exit_code_and_does_not_wait_for_ever(
    world_of_one: None, tmp_path: Path, tokenizer: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")

    def leave(root: str, source: Path, parting: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", LEAVING, tmp_path / root, source, parting])

    finishing = leave("finished", tokenizer, "60")
    stuck = leave("stuck", tmp_path / "pipe", "0.5")  # as if its peers never answered
    assert (finishing.wait(60), stuck.wait(60)) == (7, 7)
    checkpoint.verify(tmp_path / "finished" / "step-00000001")
    assert checkpoint.list_checkpoints(tmp_path / "stuck") == []
