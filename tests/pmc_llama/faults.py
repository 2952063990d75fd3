"""Faults for runs, at instants drawn from a seed: killed ranks, cut writes, a full disk, damaged checkpoints.

A story is some faults, each followed by the same command, and then the same command to its end. What has to
hold: the run's numbers are those of a run that met no fault, and no complete checkpoint is lost on the way.
"""

import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from pmc_llama.checkpoint import list_checkpoints, verify
from tests.pmc_llama.runs import command_line, kill, start
from tests.pmc_llama.small import odd_config

STEPS = 24
_PATIENCE = 120.0  # seconds for what a fault waits for
_LOOK = 0.001  # seconds between looks
_START_UP = 6.0  # seconds, about
_STEP = 0.03  # seconds, about
_SAVE = 0.1  # seconds, about
_LEAST_FILE = 40_000  # bytes: above all files of a run but its tensors
_LARGEST_FILE = 200_000


def story_command(corpus: Path, directory: Path) -> list[str]:
    """The arguments of a run of `STEPS` steps with a checkpoint every 4, of which two are kept.

    Its model of odd shapes is described in `directory`.
    """
    config = odd_config()
    config.vocab_size = Corpus.open(corpus).vocab_size
    config.to_json_file(directory / "config.json")
    (directory / "recipe.yaml").write_text("seed: 3\n")
    options = {
        "--model.size": str(directory / "config.json"),
        "--data.corpus": str(corpus),
        "--data.mode": "packed",
        "--data.sequence_length": "32",
        "--batch.global_size": "8",
        "--batch.micro_size": "2",
        "--schedule.steps": str(STEPS),
        "--optimizer.learning_rate": "0.003",
        "--checkpoint.every_steps": "4",
        "--evaluation.every_steps": "8",
        "--evaluation.max_sequences": "9",
    }
    return command_line(directory / "recipe.yaml", options, "--resume")


class Story:
    """One run and its faults.

    Args:
        run: the run's directory.
        command: the arguments of `pmc-llama train`, without the backend.
        seed: decides which faults, when, and under which backend.
        small_disk: the run's directory is on a disk of a few megabytes, which can be filled.

    Attributes:
        told: what was done, one line for each fault that struck.
    """

    def __init__(self, run: Path, command: Sequence[str], seed: int, small_disk: bool = False) -> None:
        self.told: list[str] = []
        self._run, self._command = run, command
        self._small_disk = small_disk
        self._draw = random.Random(seed)
        self._checkpoints = run / "checkpoints"

    def suffer(self, faults: int) -> None:
        """Meet up to so many faults, the same command after each; no more once the run is finished."""
        while len(self.told) < faults and self._lines() < STEPS:
            name = self._draw.choice(self._possible())
            before = self._sound()
            outcome = FAULTS[name](self)
            if outcome:
                self.told.append(f"{name}: {outcome}")
            self._require_kept(before, damaged=name in _DAMAGING)

    def end(self) -> None:
        """Run to the end, which has to be a good one."""
        process = self._start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{self.told}\n{output}"

    # --- the faults ----------------------------------------------------------------------------------------

    def kill_at_start(self) -> str:
        """Kill every rank while the run starts or resumes."""
        process, seconds = self._start(), self._draw.uniform(0.5, _START_UP)
        self._wait(process, lambda: False, seconds)
        return self._kill(process, f"{seconds:.2f} s after the start")

    def kill_in_step(self) -> str:
        """Kill every rank some steps after the start."""
        process, lines = self._start(), self._lines()
        steps = self._draw.randint(1, 8)
        self._wait(process, lambda: self._lines() >= lines + steps)
        time.sleep(self._draw.uniform(0, _STEP))
        return self._kill(process, f"{steps} steps on")

    def kill_one_rank(self) -> str:
        """Kill one rank and leave the others to find out."""
        process, lines = self._start(), self._lines()
        self._wait(process, lambda: self._lines() > lines)
        time.sleep(self._draw.uniform(0, 5 * _STEP))
        ranks = [child for child in _children(process) if "pmc_llama.cli" in " ".join(child.cmdline())]
        if ranks:
            self._draw.choice(ranks).kill()
        process.communicate(timeout=_PATIENCE)
        return f"status {process.returncode}" if process.returncode else ""

    def kill_while_writing(self) -> str:
        """Kill every rank while a checkpoint is written."""
        process = self._start()
        self._wait(process, lambda: any(self._checkpoints.glob(".writing*")))
        time.sleep(self._draw.uniform(0, _SAVE))
        return self._kill(process, "while a checkpoint was written")

    def kill_while_publishing(self) -> str:
        """Kill every rank just after a checkpoint has got its name."""
        process, before = self._start(), self._names()
        self._wait(process, lambda: bool(self._names() - before))
        time.sleep(self._draw.uniform(0, 0.02))
        return self._kill(process, "just after a checkpoint got its name")

    def kill_while_removing(self) -> str:
        """Kill every rank while an old checkpoint is removed."""
        process = self._start()
        self._wait(process, lambda: any(self._checkpoints.glob(".removing-*")))
        return self._kill(process, "while an old checkpoint was removed")

    def cut_writes(self) -> str:
        """Let no file grow beyond some bytes, as a disk that fills up."""
        most = self._draw.randint(_LEAST_FILE, _LARGEST_FILE)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
        process = self._start(preexec_fn=limit)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0 or "error: " in output, output
        return f"files of at most {most:,} bytes, status {process.returncode}" if process.returncode else ""

    def fill_disk(self) -> str:
        """Leave less room on the disk than the checkpoints to come take."""
        self._run.mkdir(exist_ok=True)
        filler, room = self._run / "filler", self._draw.randint(_LEAST_FILE, 10 * _LARGEST_FILE)
        filler.write_bytes(bytes(max(0, shutil.disk_usage(self._run).free - room)))
        process = self._start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0 or "error: " in output, output
        filler.unlink()
        return f"{room:,} bytes left, status {process.returncode}" if process.returncode else ""

    def flip(self) -> str:
        """Flip a byte of the newest checkpoint."""
        return self._damage(
            lambda content, place: content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )

    def truncate(self) -> str:
        """Cut a file of the newest checkpoint short."""
        return self._damage(lambda content, place: content[:place])

    # --- the small parts -----------------------------------------------------------------------------------

    def _possible(self) -> list[str]:
        excluded = set() if self._small_disk else {"full disk"}
        if len(list_checkpoints(self._checkpoints)) < 2:  # the only one is all there is
            excluded |= _DAMAGING
        return sorted(FAULTS.keys() - excluded)

    def _start(self, **popen: object) -> "subprocess.Popen[str]":
        backend = self._draw.choice(("deepspeed", "fsdp"))
        return start([*self._command, "--backend", backend], **popen)

    def _wait(
        self, process: "subprocess.Popen[str]", happened: Callable[[], bool], seconds: float = _PATIENCE
    ) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None and not happened():
            time.sleep(_LOOK)

    def _kill(self, process: "subprocess.Popen[str]", when: str) -> str:
        ended = process.poll() is not None
        kill(process)
        process.communicate()
        return "" if ended else f"{when}, {self._lines()} steps made"

    def _damage(self, change: Callable[[bytes, int], bytes]) -> str:
        newest = list_checkpoints(self._checkpoints)[-1]
        files = sorted(path for path in newest.iterdir() if path.stat().st_size)
        file = self._draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(change(content, self._draw.randrange(len(content))))
        return f"{file.parent.name}/{file.name}"

    def _lines(self) -> int:
        path = self._run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _names(self) -> set[str]:
        return {path.name for path in list_checkpoints(self._checkpoints)}

    def _sound(self) -> list[int]:
        """The steps of the checkpoints that are whole."""
        return [step for path in list_checkpoints(self._checkpoints) if (step := _step_if_sound(path))]

    def _require_kept(self, before: list[int], damaged: bool) -> None:
        """No complete checkpoint is newer than the newest that is left, but for one damaged on purpose."""
        wanted = max(before[:-1] if damaged else before, default=0)
        assert max(self._sound(), default=0) >= wanted, f"lost {wanted}: {self.told}"


_DAMAGING = {"flip", "truncate"}
FAULTS: dict[str, Callable[[Story], str]] = {
    "kill at start": Story.kill_at_start,
    "kill in step": Story.kill_in_step,
    "kill one rank": Story.kill_one_rank,
    "kill while writing": Story.kill_while_writing,
    "kill while publishing": Story.kill_while_publishing,
    "kill while removing": Story.kill_while_removing,
    "cut writes": Story.cut_writes,
    "full disk": Story.fill_disk,
    "flip": Story.flip,
    "truncate": Story.truncate,
}


@contextmanager
def small_disk(directory: Path) -> Iterator[Path | None]:
    """A memory disk of 16 MB at `directory`, or None where this process may not make one."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield directory
    finally:
        command = ["umount", "--lazy", str(directory)]
        subprocess.run(command, check=True)


def _step_if_sound(checkpoint: Path) -> int | None:
    try:
        return verify(checkpoint).step
    except UserError:
        return None


def _children(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
