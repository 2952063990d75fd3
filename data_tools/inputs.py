"""Input paths to shards: which files a build reads, in which order, and which of them make one part."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import NoReturn

import xxhash

from data_tools.errors import UserError
from data_tools.files import checksum
from data_tools.manifest import Inputs
from data_tools.readers import READERS, Reader, reader_for

_PARTS_TO_SHARE = 64
_FEWEST_FILES_PER_PART = 512


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        path: where it is, absolute; a string, since a corpus may have millions of files.
        name: how the corpus names it: the path from the input given on, so the same on every machine.
        bytes: its size.
    """

    path: str
    name: str
    bytes: int


def find_inputs(paths: Sequence[Path]) -> list[InputFile]:
    """Every file below the paths that a reader knows, sorted by name; each file once.

    Directories are walked, without hidden files; files in them that no reader knows are passed over.

    Raises:
        UserError: a path is missing or cannot be read, a file is a pipe or device, a file given by name has
            an unknown suffix, two files would have the same name, or there is nothing to read.
    """
    found: dict[str, InputFile] = {}
    for path in paths:
        for file in _files(path):
            found.setdefault(file.path, file)
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
    """The files of each part, in order of their first names: independent of the number of workers.

    Small files go many to a part, up to what their reader says; but where that would leave fewer than 64
    parts, the workers' shares, a part has a 64th of them or 512, whichever is more.
    """
    found = []
    for reader in READERS:
        members = [file for file in files if known_reader(file.name) is reader]
        wanted = max(_FEWEST_FILES_PER_PART, ceil(len(members) / _PARTS_TO_SHARE))
        size = min(reader.most_files_per_part, wanted)
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
            digest.update(f"{file.name}\0{file.bytes}\0{checksum(Path(file.path))}\n".encode())
        except OSError as error:
            _refuse(error)
    return Inputs(files[0].name, len(files), sum(file.bytes for file in files), digest.hexdigest())


def _files(path: Path) -> Iterator[InputFile]:
    try:
        root = path.resolve()
        mode = root.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(f"The input {path} does not exist.") from error
    except OSError as error:
        raise UserError(f"The input {path} cannot be read: {error.strerror}.") from error
    base = os.path.join(root.parent, "")
    if not stat.S_ISDIR(mode):
        known_reader(path.name)
        yield _file(str(root), base)
        return
    for directory, subdirectories, names in os.walk(root, onerror=_refuse):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and reader_for(name):
                yield _file(os.path.join(directory, name), base)


def _file(path: str, base: str) -> InputFile:
    try:
        found = os.stat(path)
    except OSError as error:
        _refuse(error)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"The input {path} is a pipe or device; only regular files are read.")
    name = os.fsencode(path.removeprefix(base)).decode(errors="replace")
    return InputFile(path, name, found.st_size)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"The input {error.filename} cannot be read: {error.strerror}.") from error


def _known_suffixes() -> str:
    return ", ".join(suffix for reader in READERS for suffix in reader.suffixes)


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
