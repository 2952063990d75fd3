"""A build by any number of processes on any number of machines that share a file system.

Every process runs the same command on the same output. Each claims parts one at a time (`claims.py`), makes a
part in a directory of its own and publishes it by rename; when none is left to claim it waits for those that
others make, and takes over what they leave. One of them finalizes, the same way. Since a part's bytes depend
on its input, the tokenizer and the recipe alone, a part published twice is the same part.

A claim is given up when its holder ends, and lost when it dies. What a process that died left in its own
directory is removed by the one that finalizes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

from data_tools.build import (
    MARKER,
    MARKER_CONTENT,
    held,
    is_finished,
    is_marked,
    part_tasks,
    prepare,
    remove_left_over,
    remove_others,
    require_outside,
)
from data_tools.claims import PREFIX, STALE_SECONDS, Claim, Claims
from data_tools.errors import UserError
from data_tools.files import locked, sync
from data_tools.finalize import finalize, require_papers
from data_tools.inputs import find_inputs, shards
from data_tools.launcher import Task
from data_tools.manifest import DECIDED_FILES, Manifest, read_manifest
from data_tools.parts import Part, PartTask, add_counts, find_part, record_path, write_part
from data_tools.progress import Progress
from data_tools.recipe import Recipe
from data_tools.tokenizer import Tokenizer
from data_tools.workers import Report, run_from

_FAILED = f"{PREFIX}failed"
_FINALIZE = "finalize"
_NOBODY = -1
_LONGEST_PAUSE = 1.0  # seconds
_PAUSES = 20  # in the seconds after which a claim is stale
_SECONDS_BETWEEN_LOOKS = 2.0


class _OtherFailed(UserError):
    """Another process of the build has failed."""


class _OvertakenError(Exception):
    """Another process of the build took this one for lost and does its work."""


@dataclass(frozen=True)
class Share:
    """What one process had of a shared build.

    Attributes:
        manifest: of the corpus, which is finished.
        parts: how many this process made, or found made before the build.
        finalized: whether it was this one that finalized the corpus.
    """

    manifest: Manifest
    parts: int
    finalized: bool


def build_shared(
    inputs: Sequence[str | Path],
    tokenizer_path: Path,
    directory: Path,
    recipe: Recipe,
    workers: int,
    task: Task,
    stale_seconds: float = STALE_SECONDS,
) -> Share:
    """Take part in building a corpus, and return when it is finished: the same bytes as of `build`.

    Args:
        inputs: as for `build`, like the next three; the same in every process.
        tokenizer_path: a SentencePiece model, or a Hugging Face `tokenizer.json`.
        directory: where the corpus goes; on a file system that all processes share.
        recipe: what to select, clean, measure and decide.
        workers: processes that this one starts.
        task: which of how many this process is, a hint: each begins at another part.
        stale_seconds: after which a process that gives no sign of life has lost its claims.

    Raises:
        UserError: as `build`; or another process of this build met such an error, and here is its sentence.
    """
    tokenizer = Tokenizer(tokenizer_path)
    files = find_inputs(inputs)
    require_outside(inputs, files, directory)
    groups = shards(files)
    with held(directory, fcntl.LOCK_SH):
        fixed = is_finished(directory, tokenizer, groups, recipe)
        parts = directory / "parts"
        claims = Claims(parts, stale_seconds)
        pause = min(_LONGEST_PAUSE, stale_seconds / _PAUSES)
        _mark(directory, claims.owner)
        parts.mkdir(exist_ok=True)
        with locked(parts, fcntl.LOCK_EX, required=False):
            pass  # the workers of a build alone that was killed have ended
        (parts / _FAILED).unlink(missing_ok=True)
        tasks = part_tasks(groups, parts, tokenizer, recipe, fixed)
        prepare(tokenizer, recipe)
        with Progress(sum(file.bytes for file in files), "papers") as progress:
            source = _Parts(tasks, claims, tokenizer, task, pause, progress.report)
            with source:
                run_from(_make, source, min(workers, len(tasks)), source.report)
        made = [source.found[number] for number in range(len(tasks))]

        def done() -> bool:
            return (directory / "corpus.json").exists() and is_finished(directory, tokenizer, groups, recipe)

        def finish() -> None:
            _finalize(directory, made, claims, tokenizer, recipe)

        finalized = _once(claims, parts, pause, done, finish)
        return Share(read_manifest(directory), source.taken, finalized)


def _mark(directory: Path, owner: str) -> None:
    """Write the marker of a build, unless it is there; many processes may do so at once."""
    if is_marked(directory):
        return
    written = directory / f".{MARKER}.{owner}.partial"
    written.write_bytes(MARKER_CONTENT)
    sync(written)
    os.replace(written, directory / MARKER)
    sync(directory)


@dataclass(frozen=True)
class _Claimed:
    """A part that this process has claimed.

    Attributes:
        part: what to make.
        work: a directory to make it in, that no other process uses.
        begin: when this process began, by the file server's clock.
    """

    part: PartTask
    work: Path
    begin: float


class _Parts:
    """The parts of the build as this process sees them: a source of tasks for its workers.

    Attributes:
        found: finished parts by number.
        taken: how many were claimed here and finished.
        pause: seconds between looks at what the others do.
    """

    def __init__(
        self,
        tasks: Sequence[PartTask],
        claims: Claims,
        tokenizer: Tokenizer,
        task: Task,
        pause: float,
        on_report: Callable[[int, int, int], None],
    ) -> None:
        self.found: dict[int, Part] = {}
        self.taken = 0
        self.pause = pause
        self._tasks = tasks
        self._claims = claims
        self._tokenizer = tokenizer
        self._on_report = on_report
        self._parts = tasks[0].directory
        first = task.rank % task.size * len(tasks) // task.size
        self._order = [*range(first, len(tasks)), *range(first)]
        self._held: dict[int, Claim] = {}
        self._begin = claims.now()
        self._looked = monotonic()

    def __enter__(self) -> "_Parts":
        return self

    def __exit__(self, *_: object) -> None:
        for claim in self._held.values():
            claim.release()

    @property
    def over(self) -> bool:
        return len(self.found) == len(self._tasks)

    def take(self) -> tuple[int, _Claimed] | None:
        _stop_if_failed(self._parts)
        names = set(os.listdir(self._parts))
        for number in self._order:
            if number in self.found or number in self._held:
                continue
            task = self._tasks[number]
            if record_path(task).name in names and self._is_new(task):
                self._note(number, self._require(task))
                continue
            claim = self._claims.take(task.name, self._claims.file_name(task.name) in names)
            if claim is not None:
                self._held[number] = claim
                work = self._parts / f"{PREFIX}{task.name}.{self._claims.owner}"
                return number, _Claimed(task, work, self._begin)
        self._order = [number for number in self._order if number not in self.found]
        self._on_report(_NOBODY, 0, 0)  # shows how the others get on
        return None

    def done(self, number: int, result: Part) -> None:
        self._note(number, result)
        self.taken += 1
        self._held.pop(number).release()

    def report(self, number: int, records: int, size: int) -> None:
        """Pass on how a part gets on, and stop when another process has failed."""
        self._held[number].sign_of_life()
        self._on_report(number, records, size)
        if monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._looked = monotonic()
            _stop_if_failed(self._parts)

    def _note(self, number: int, part: Part) -> None:
        self.found[number] = part
        self._on_report(number, part.counts.read, part.info.inputs.bytes)

    def _is_new(self, task: PartTask) -> bool:
        """Whether a process of this build made the part, or has looked it over."""
        try:
            return record_path(task).stat().st_mtime >= self._begin
        except FileNotFoundError:
            return False

    def _require(self, task: PartTask) -> Part:
        part = find_part(task, self._tokenizer, self._begin)
        if part is None:
            raise UserError(
                f"Another process makes {task.directory}/{task.name} of other input; all processes of a "
                "build have to be started with the same command."
            )
        return part


def _make(task: _Claimed, report: Report) -> Part:
    """Make a claimed part in a directory of its own and publish it, or find it made before."""
    tokenizer = Tokenizer(task.part.tokenizer)
    with _told_to_all(task.part.directory):
        found = find_part(task.part, tokenizer, task.begin)
        if found is not None:
            with suppress(OSError):  # the file may be another user's
                os.utime(record_path(task.part))  # so the others need not look it over again
            return found
        # Before the part's files change. (Stopped right here and overtaken, this process would make the part
        # once more; killed then, it would leave the finished corpus without a record, for the next build.)
        try:
            record_path(task.part).unlink(missing_ok=True)
            task.work.mkdir()
            part = write_part(replace(task.part, directory=task.work), tokenizer, report)
            _publish(task, part)
        except _OtherFailed:
            raise
        except (UserError, OSError) as error:
            # Overtaken, the process may find its directory gone; then the part is there.
            found = find_part(task.part, tokenizer, task.begin)
            if found is None:
                raise UserError(str(error)) from error
            return found
        finally:
            shutil.rmtree(task.work, ignore_errors=True)
    return part


def _publish(task: _Claimed, part: Part) -> None:
    """Move the files of a part, which are on disk, to their place, its record last."""
    directory = task.part.directory
    for suffix in part.info.files:
        os.replace(task.work / f"{part.info.name}.{suffix}", directory / f"{part.info.name}.{suffix}")
    sync(directory)
    os.replace(task.work / record_path(task.part).name, record_path(task.part))
    sync(directory)


def _once(
    claims: Claims, parts: Path, pause: float, done: Callable[[], bool], act: Callable[[], None]
) -> bool:
    """Wait until it is done, by another process or this one; whether it was this one."""
    while not done():
        _stop_if_failed(parts)
        claim = claims.take(_FINALIZE)
        if claim is None:
            sleep(pause)
            continue
        with claim, _told_to_all(parts):
            if not done():
                try:
                    act()
                except _OvertakenError:
                    continue
                return True
    return False


def _finalize(
    directory: Path, made: Sequence[Part], claims: Claims, tokenizer: Tokenizer, recipe: Recipe
) -> None:
    """Finalize in a directory of this process, where `parts` is a link, and move the result to its place.

    Raises:
        UserError: the corpus cannot be finalized.
        OSError: files cannot be written.
        _OvertakenError: another process took this one for lost and removed what it had done.
    """
    parts = directory / "parts"
    counts = add_counts([part.counts for part in made])
    remove_others(parts, {part.info.name for part in made} if counts.kept else set())
    require_papers(counts)
    remove_left_over(parts, keep=(claims.file_name(_FINALIZE),))
    work = parts / f"{PREFIX}{_FINALIZE}.{claims.owner}"
    try:
        work.mkdir()
        (work / "parts").symlink_to(parts.resolve())
        manifest = finalize(work, made, tokenizer, recipe)
        for path in sorted(work.iterdir()):
            if path.name not in ("parts", "corpus.json"):
                os.replace(path, directory / path.name)
        sync(directory)
        os.replace(work / "corpus.json", directory / "corpus.json")
        sync(directory)
    except (UserError, OSError) as error:
        if not work.exists():
            raise _OvertakenError from error
        if isinstance(error, OSError):
            raise
        raise UserError(str(error).replace(str(work), str(directory))) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _remove_other_decisions(directory, manifest)


def _remove_other_decisions(directory: Path, manifest: Manifest) -> None:
    """Remove the files of decisions made before, by a build whose corpus.json is gone."""
    present = {*manifest.files, *(f"{name}.npy" for name in manifest.splits)}
    current = {manifest.path(directory, name) for name in present}
    for name in DECIDED_FILES:
        stem, _, suffix = name.partition(".")
        for path in directory.glob(f"{stem}-{'[0-9a-f]' * 16}.{suffix}"):
            if path not in current:
                path.unlink(missing_ok=True)


@contextmanager
def _told_to_all(parts: Path) -> Iterator[None]:
    """Leave the sentence of a failure for the other processes."""
    try:
        yield
    except _OtherFailed:
        raise
    except UserError as error:
        path = parts / _FAILED
        written = path.with_name(f"{_FAILED}.{os.uname().nodename}-{os.getpid()}")
        with suppress(OSError):  # a full disk is a failure, too; the others meet it themselves
            written.write_text(json.dumps({"sentence": str(error), "host": os.uname().nodename}))
            os.replace(written, path)
        raise


def _stop_if_failed(parts: Path) -> None:
    """Stop with the sentence of another process that failed.

    Raises:
        _OtherFailed: one has.
    """
    try:
        failure = json.loads((parts / _FAILED).read_bytes())
    except FileNotFoundError:
        return
    raise _OtherFailed(f"{failure['sentence']} (Met by a process on {failure['host']}.)")
