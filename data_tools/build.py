"""A whole build: inputs to parts on any number of processes, parts to corpus."""

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data_tools.claims import PREFIX
from data_tools.errors import UserError
from data_tools.files import NO_LOCKS, locked, write_published
from data_tools.finalize import finalize, recorded, require_papers
from data_tools.inputs import InputFile, find_inputs, shards
from data_tools.manifest import Manifest, read_manifest, to_json
from data_tools.measures import Measurer
from data_tools.parts import PartTask, add_counts, make_part
from data_tools.progress import Progress
from data_tools.recipe import Recipe
from data_tools.streams import is_url
from data_tools.tokenizer import Tokenizer
from data_tools.workers import run

MARKER = "parts.json"
"""Says that `parts` beside it was made by a build. Written before `parts`, it stays with the corpus."""
MARKER_CONTENT = to_json({"format": "pmc-llama parts", "version": 1})
_UNFINISHED_MARKER = re.compile(r"\.parts\.json(\..+)?\.partial")
_PART_FILE = r"(part-\d{5,})\.(?:bin|idx|documents\.parquet|rejected\.jsonl|json)"
_FINISHED_FILE = re.compile(_PART_FILE)
_UNFINISHED_FILE = re.compile(rf"\.{_PART_FILE}\.partial")


def build(
    inputs: Sequence[str | Path], tokenizer_path: Path, directory: Path, recipe: Recipe, workers: int
) -> Manifest:
    """Build a corpus, or go on with one that was interrupted.

    The corpus' bytes depend on the inputs, the tokenizer and the recipe alone.

    Args:
        inputs: files and directories of papers.
        tokenizer_path: a SentencePiece model, or a Hugging Face `tokenizer.json`.
        directory: where the corpus goes.
        recipe: what to select, clean, measure and decide.
        workers: processes.

    Raises:
        UserError: an input is missing or unreadable, the tokenizer is not one, or the directory holds
            another corpus. Finished parts stay, and the same command goes on from them.
    """
    tokenizer = Tokenizer(tokenizer_path)
    files = find_inputs(inputs)
    require_outside(inputs, files, directory)
    groups = shards(files)
    with _held(directory):
        fixed = is_finished(directory, tokenizer, groups, recipe)
        with _parts(directory) as parts:
            tasks = part_tasks(groups, parts, tokenizer, recipe, fixed)
            prepare(tokenizer, recipe)
            with Progress(sum(file.bytes for file in files), "papers") as progress:
                made = run(make_part, tasks, workers, progress.report)
            counts = add_counts([part.counts for part in made])
            remove_others(parts, {part.info.name for part in made} if counts.kept else set())
            require_papers(counts)
            return finalize(directory, made, tokenizer, recipe)


def prepare(tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Make, once, what workers forked from this process then have from it: the encoder, the test questions.

    Says on standard error if the tokenizer has to take the slow way, and why.

    Raises:
        UserError: a test set cannot be read.
    """
    Measurer(recipe.measures)
    if tokenizer.why_slow:
        print(
            f"With the tokenizer {tokenizer.path} its own library has to encode, some twenty times slower: "
            f"{tokenizer.why_slow}.",
            file=sys.stderr,
        )


def part_tasks(
    groups: Sequence[tuple[InputFile, ...]], parts: Path, tokenizer: Tokenizer, recipe: Recipe, fixed: bool
) -> list[PartTask]:
    """The parts to make of shards, in their order."""
    return [
        PartTask(f"part-{number:05}", group, parts, tokenizer.path.resolve(), recipe, fixed)
        for number, group in enumerate(groups)
    ]


def require_outside(inputs: Sequence[str | Path], files: Sequence[InputFile], directory: Path) -> None:
    """Refuse to write a corpus among its own inputs, where it would be found as input the next time.

    Raises:
        UserError: an input lies in the output, or the output in an input.
    """
    inside = os.path.join(os.path.realpath(directory), "")
    for file in files:
        if file.path.startswith(inside):
            raise UserError(
                f"The input {file.path} lies in the output {directory}; build into another directory."
            )
    for path in (os.fspath(path) for path in inputs):
        if not is_url(path) and inside.startswith(os.path.join(os.path.realpath(path), "")):
            raise UserError(
                f"The output {directory} lies in the input {path}; build into a directory outside of it."
            )


def is_finished(
    directory: Path, tokenizer: Tokenizer, groups: Sequence[tuple[InputFile, ...]], recipe: Recipe
) -> bool:
    """Whether the directory holds the finished corpus of this very build.

    Raises:
        UserError: it holds another corpus, or files that are no corpus.
    """
    if not (directory / "corpus.json").exists():
        _require_free(directory)
        return False
    manifest = read_manifest(directory)
    found = [(part.inputs.first, part.inputs.files, part.inputs.bytes) for part in manifest.parts]
    wanted = [(files[0].name, len(files), sum(file.bytes for file in files)) for files in groups]
    wished = recorded(recipe)
    differing = [
        what
        for what, same in (
            ("tokenizer", manifest.tokenizer.sha256 == tokenizer.sha256),
            ("recipe", manifest.recipe == wished),
            ("input", found == wanted),
        )
        if not same
    ]
    if differing == ["recipe"] and replace(wished, decisions=manifest.recipe.decisions) == manifest.recipe:
        raise UserError(
            f"{directory} already holds a corpus of these papers with other decisions; `pmc-data finalize "
            f"{directory}` with the new ones decides again in seconds."
        )
    if differing:
        raise UserError(
            f"{directory} already holds a corpus that differs in {' and '.join(differing)}; build into "
            "another directory."
        )
    return True


def _require_free(directory: Path) -> None:
    """Refuse a directory with files in it that no build left there."""
    # What is there is listed first: a build that begins beside this one writes its marker before all else.
    # One that was killed in its first moment leaves only the marker that it was writing.
    foreign = [path for path in directory.iterdir() if not _UNFINISHED_MARKER.fullmatch(path.name)]
    if foreign and not is_marked(directory):
        raise UserError(f"The output {directory} is not empty and holds no corpus; give a new directory.")


def is_marked(directory: Path) -> bool:
    """Whether a build wrote its marker into the directory."""
    marker = directory / MARKER
    return marker.is_file() and marker.read_bytes() == MARKER_CONTENT


@contextmanager
def held(directory: Path, how: int) -> Iterator[bool]:
    """Hold the output, made where it is missing: `LOCK_EX` for a build alone, `LOCK_SH` for a shared one.

    Yields whether it was missing.

    On a network file system the lock reaches as far as that lets it, which may be this machine. A shared
    build needs none.

    Raises:
        UserError: a build of the other kind, or another build alone, holds it, or it cannot be written.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"The output {directory} is a file; give a directory.")
        created = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory, how | fcntl.LOCK_NB, required=how == fcntl.LOCK_EX):
            yield created
    except BlockingIOError as error:
        raise UserError(f"Another build is at work in {directory}; wait for it or end it.") from error
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(
                f"The file system of {directory} keeps no locks ({error.strerror}); build with --shared, "
                "which needs none, also in one process."
            ) from error
        raise UserError(f"The output {directory} cannot be written: {error}.") from error


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold the output for this build alone; a new one is gone again when nothing is in it."""
    with held(directory, fcntl.LOCK_EX) as created:
        try:
            yield
        finally:
            if created and not any(directory.iterdir()):
                directory.rmdir()


@contextmanager
def _parts(directory: Path) -> Iterator[Path]:
    """The `parts` directory under its marker; at the end it has whole parts, or both are gone again."""
    marker, parts = directory / MARKER, directory / "parts"
    write_published(marker, MARKER_CONTENT)
    try:
        parts.mkdir(exist_ok=True)
        with locked(parts, fcntl.LOCK_EX):
            pass  # the workers of a build that was killed have ended
        remove_left_over(parts)
        yield parts
    finally:
        _remove_unfinished(parts)
        if not any(parts.iterdir()):
            parts.rmdir()
            marker.unlink()


def _remove_unfinished(parts: Path) -> None:
    """Remove what was being written when the build, or one before it, was stopped."""
    for path in list(parts.iterdir()):
        finished = _FINISHED_FILE.fullmatch(path.name)
        if _UNFINISHED_FILE.fullmatch(path.name) or (
            finished and not (parts / f"{finished[1]}.json").exists()
        ):
            path.unlink(missing_ok=True)


def remove_left_over(parts: Path, keep: Collection[str] = ()) -> None:
    """Remove what processes of a shared build left for each other, but for the names to keep."""
    for path in list(parts.iterdir()):
        if not path.name.startswith(PREFIX) or path.name in keep:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_others(parts: Path, names: set[str]) -> None:
    """Remove the parts that belong to other inputs: an earlier build was stopped and the inputs changed."""
    for path in list(parts.iterdir()):
        finished = _FINISHED_FILE.fullmatch(path.name)
        if finished and finished[1] not in names:
            path.unlink(missing_ok=True)
