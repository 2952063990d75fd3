"""Input paths to shards: which files a build reads, in which order, and which of them make one part."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import xxhash

from data_tools.errors import UserError
from data_tools.files import checksum
from data_tools.manifest import Inputs
from data_tools.readers import READERS, Reader, reader_for


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        path: where it is.
        name: how the corpus names it: the path from the input given on, so the same on every machine.
        bytes: its size.
    """

    path: Path
    name: str
    bytes: int


def find_inputs(paths: Sequence[Path]) -> list[InputFile]:
    """Every file below the paths that a reader knows, sorted by name; each file once.

    Directories are walked, without hidden files; files in them that no reader knows are passed over.

    Raises:
        UserError: a path is missing, a file given by name has an unknown suffix, two files would have the
            same name, or there is nothing to read.
    """
    found: dict[Path, InputFile] = {}
    for path in paths:
        for file in _files(path):
            found.setdefault(file.path.resolve(), file)
    files = sorted(found.values(), key=lambda file: file.name)
    if not files:
        raise UserError(f"There is nothing to read in {_listed(paths)}: no file ends in {_known_suffixes()}.")
    for first, second in pairwise(files):
        if first.name == second.name:
            raise UserError(
                f"The inputs {first.path} and {second.path} would both be recorded as {first.name}; "
                "rename one, or give the directory that holds both."
            )
    return files


def shards(files: Sequence[InputFile]) -> list[tuple[InputFile, ...]]:
    """The files of each part, in order of their first names: independent of the number of workers."""
    found = []
    for reader in READERS:
        members = [file for file in files if known_reader(file.name) is reader]
        size = reader.files_per_part
        found += [tuple(members[first : first + size]) for first in range(0, len(members), size)]
    return sorted(found, key=lambda shard: shard[0].name)


def known_reader(name: str) -> Reader:
    """The reader of a file that `find_inputs` gave."""
    reader = reader_for(name)
    if reader is None:
        raise UserError(f"No reader knows {name}; it has to end in {_known_suffixes()}.")
    return reader


def describe(files: Sequence[InputFile]) -> Inputs:
    """What a part records of its input, from the names, sizes and bytes of its files.

    Raises:
        UserError: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for file in files:
        try:
            digest.update(f"{file.name}\0{file.bytes}\0{checksum(file.path)}\n".encode())
        except OSError as error:
            _refuse(error)
    return Inputs(files[0].name, len(files), sum(file.bytes for file in files), digest.hexdigest())


def _files(path: Path) -> Iterator[InputFile]:
    if not path.exists():
        raise UserError(f"The input {path} does not exist.")
    base = path.resolve().parent
    if path.is_file():
        known_reader(path.name)
        yield _file(path.resolve(), base)
        return
    for directory, subdirectories, names in os.walk(path.resolve(), onerror=_refuse):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and reader_for(name):
                yield _file(Path(directory, name), base)


def _file(path: Path, base: Path) -> InputFile:
    name = os.fsencode(path.relative_to(base).as_posix()).decode(errors="replace")
    try:
        return InputFile(path, name, path.stat().st_size)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"The input {error.filename} cannot be read: {error.strerror}.") from error


def _known_suffixes() -> str:
    return ", ".join(suffix for reader in READERS for suffix in reader.suffixes)


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
