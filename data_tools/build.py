"""A whole build: inputs to parts on any number of processes, parts to corpus."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import UserError
from data_tools.files import locked
from data_tools.finalize import finalize, require_papers
from data_tools.inputs import InputFile, find_inputs, shards
from data_tools.manifest import Manifest, Options, read_manifest
from data_tools.parts import PartTask, add_counts, make_part
from data_tools.progress import Progress
from data_tools.tokenizer import Tokenizer
from data_tools.workers import run


def build(
    inputs: Sequence[Path], tokenizer_path: Path, directory: Path, options: Options, workers: int
) -> Manifest:
    """Build a corpus, or go on with one that was interrupted.

    The corpus' bytes depend on the inputs, the tokenizer and the options alone.

    Args:
        inputs: files and directories of papers.
        tokenizer_path: a SentencePiece model.
        directory: where the corpus goes.
        options: what to select and how to divide.
        workers: processes.

    Raises:
        UserError: an input is missing or unreadable, the tokenizer is not one, or the directory holds
            another corpus. Finished parts stay, and the same command goes on from them.
    """
    tokenizer = Tokenizer(tokenizer_path)
    groups = shards(find_inputs(inputs))
    fixed = _is_finished(directory, tokenizer, groups, options)
    with _locked(directory) as parts:
        tasks = [
            PartTask(f"part-{number:05}", files, parts, tokenizer_path.resolve(), options, fixed)
            for number, files in enumerate(groups)
        ]
        with Progress(sum(file.bytes for files in groups for file in files)) as progress:
            made = run(make_part, tasks, workers, progress.report)
        counts = add_counts([part.counts for part in made])
        _remove_others(parts, {part.info.name for part in made} if counts.kept else set())
        require_papers(counts)
        return finalize(directory, made, tokenizer, options)


def _is_finished(
    directory: Path, tokenizer: Tokenizer, groups: Sequence[tuple[InputFile, ...]], options: Options
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
    differing = [
        what
        for what, same in (
            ("tokenizer", manifest.tokenizer.sha256 == tokenizer.sha256),
            ("options", manifest.options == options),
            ("input", found == wanted),
        )
        if not same
    ]
    if differing:
        raise UserError(
            f"{directory} already holds a corpus that differs in {' and '.join(differing)}; build into "
            "another directory (or, to decide again over the same parts, delete its corpus.json)."
        )
    return True


def _require_free(directory: Path) -> None:
    """Refuse a directory with files in it that no build left there."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"The output {directory} is a file; give a directory.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "parts").is_dir():
        raise UserError(f"The output {directory} is not empty and holds no corpus; give a new directory.")


@contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    """The `parts` directory, held by this build alone; at the end it has whole parts, or is gone again."""
    parts = directory / "parts"
    created = [path for path in (directory, parts) if not path.exists()]
    try:
        parts.mkdir(parents=True, exist_ok=True)
        with locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
            with locked(parts, fcntl.LOCK_EX):
                pass  # the workers of a build that was killed have ended
            try:
                yield parts
            finally:
                _remove_unfinished(parts)
    except BlockingIOError as error:
        raise UserError(f"Another build is at work in {directory}; wait for it or end it.") from error
    except OSError as error:
        raise UserError(f"The output {directory} cannot be written: {error}.") from error
    finally:
        for path in reversed(created):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _remove_unfinished(parts: Path) -> None:
    """Remove what was being written when the build, or one before it, was stopped."""
    for path in parts.iterdir():
        name = path.name.split(".")[0]
        if path.name.startswith(".part-") or (
            name.startswith("part-") and not (parts / f"{name}.json").exists()
        ):
            path.unlink(missing_ok=True)


def _remove_others(parts: Path, names: set[str]) -> None:
    """Remove the parts that belong to other inputs: an earlier build was stopped and the inputs changed."""
    for path in parts.glob("part-*"):
        if path.name.split(".")[0] not in names:
            path.unlink()
