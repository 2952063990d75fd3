"""Input paths to shards: which files a build reads, in which order, and which of them make one part."""

import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from data_tools.errors import UserError
from data_tools.manifest import Inputs
from data_tools.readers import READERS, Reader, only_describes, reader_for, s2orc_2020
from data_tools.streams import compression, filesystem, is_url, stored_checksum

_PARTS_TO_SHARE = 64
_FEWEST_FILES_PER_PART = 512
_SUFFIXES_TOLD = 5
_CACHED = re.compile(r"cache-.*\.arrow")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read.

    Attributes:
        path: where it is, absolute, or its URL; a string, since a corpus may have millions of files.
        name: how the corpus names it: the path from the input given on, so the same on every machine.
        bytes: its size, with that of its companion.
        companion: the file that says more of it: metadata of a shard, of an article, of a package.
    """

    path: str
    name: str
    bytes: int
    companion: "InputFile | None" = None

    def parts(self) -> "tuple[InputFile, ...]":
        """The file and its companion."""
        return (self, self.companion) if self.companion else (self,)


def find_inputs(paths: Sequence[str | Path]) -> list[InputFile]:
    """Every file below the paths that a reader knows, sorted by name; each file once.

    Directories, local or at fsspec URLs, are walked without hidden files; files in them that no reader knows
    are told on standard error. Symbolic links are followed; of several ways to a file the first name counts.
    Of the versions of an article (`PMC1.2`, `PMC1.1`) the newest comes first.

    Raises:
        UserError: a path is empty, missing or cannot be read, a file is a pipe or device, a file given by
            name has an unknown suffix, a file lacks the one that it belongs with, two files would have the
            same name, or there is nothing to read.
    """
    found: dict[str, InputFile] = {}
    unknown: Counter[str] = Counter()
    links: set[str] = set()
    for path in (os.fspath(path) for path in paths):
        if not path:
            raise UserError("An input has no name, it is empty; give a file, a directory or a URL.")
        for file in _remote(path, unknown) if is_url(path) else _local(path, unknown, links):
            found.setdefault(file.path, file)
    _drop_strays(found)
    files = list(_once(sorted(_paired(found), key=_order), links))
    _tell(unknown)
    if not files:
        raise UserError(f"There is nothing to read in {_listed(paths)}: no file ends in {_known_suffixes()}.")
    for first, second in pairwise(sorted(files, key=lambda file: file.name)):
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
    members: dict[Reader, list[InputFile]] = {}
    for file in files:
        members.setdefault(known_reader(file.path), []).append(file)
    found = []
    for reader, group in members.items():
        wanted = max(_FEWEST_FILES_PER_PART, ceil(len(group) / _PARTS_TO_SHARE))
        size = min(reader.most_files_per_part, wanted)
        found += [tuple(group[first : first + size]) for first in range(0, len(group), size)]
    return sorted(found, key=lambda shard: _order(shard[0]))


def known_reader(path: str) -> Reader:
    """The reader of a file that `find_inputs` gave."""
    reader = reader_for(path)
    if reader is None:
        raise UserError(f"No reader knows {path}; it has to end in {_known_suffixes()}.")
    return reader


def describe(files: Sequence[InputFile]) -> Inputs:
    """What a part records of its input, from the names, sizes and bytes of its files.

    Raises:
        UserError: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for file in files:
        for part in file.parts():
            try:
                add_file(digest, part, stored_checksum(part.path))
            except OSError as error:
                _refuse(error, part.path)
    return Inputs(files[0].name, len(files), sum(file.bytes for file in files), digest.hexdigest())


def add_file(digest: Any, file: InputFile, checksum: str) -> None:
    """Add a file's name, size and checksum to the digest over a shard."""
    digest.update(f"{file.name}\0{file.bytes}\0{checksum}\n".encode())


def _local(path: str, unknown: Counter[str], links: set[str]) -> Iterator[InputFile]:
    """The files below a path that are of use, those that no reader knows counted by suffix.

    Args:
        path: a file or directory.
        unknown: filled with the suffixes.
        links: filled with the paths that lead over a symbolic link below the given one.
    """
    try:
        root = os.path.realpath(path, strict=True)
        mode = os.stat(root).st_mode
    except FileNotFoundError as error:
        raise UserError(f"The input {path} does not exist.") from error
    except OSError as error:
        raise UserError(f"The input {path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISDIR(mode) and not reader_for(root):
        root = os.path.abspath(path)  # the link has the suffix: caches name their files by checksums
        links.add(root)
    base = os.path.join(os.path.dirname(root), "")
    if not stat.S_ISDIR(mode):
        yield _file(root, base)
        for companion in known_reader(root).companions(root):
            if os.path.isfile(companion):
                yield replace(_file(companion, ""), name=os.path.relpath(companion, base))
        return
    for directory, name, linked in _walk(root, [root]):
        file = os.path.join(directory, name)
        if _is_wanted(file, unknown):
            if linked or os.path.islink(file):
                links.add(file)
            yield _file(file, base)


def _walk(top: str, walked: list[str], linked: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Directory and name of each file, and whether the way to it leads over a link to a directory.

    A link into what is walked anyway is not followed, so a circle of links ends.
    """
    over = []
    for directory, subdirectories, names in os.walk(top, onerror=_refuse):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        paths = (os.path.join(directory, name) for name in subdirectories)
        over += [path for path in paths if os.path.islink(path)]
        yield from ((directory, name, linked) for name in names)
    for path in sorted(over):
        target = os.path.realpath(path)
        if not any(os.path.commonpath((target, root)) == root for root in walked):
            walked.append(target)
            yield from _walk(path, walked, linked=True)


def _remote(url: str, unknown: Counter[str]) -> Iterator[InputFile]:
    """The files below a URL, as `_local`."""
    files, root = filesystem(url)
    base = root.rstrip("/").rpartition("/")[0] + "/"
    try:
        if not files.exists(root):
            raise UserError(f"The input {url} does not exist.")
        single = not files.isdir(root)
        if single:
            beside = [path for path in known_reader(root).companions(root) if files.exists(path)]
            listed = {path: files.info(path) for path in (root, *beside)}
        else:
            listed = files.find(root, detail=True)
    except OSError as error:
        raise UserError(f"The input {url} cannot be read: {error}.") from error
    for path, info in listed.items():
        hidden = any(part.startswith(".") for part in path.removeprefix(base).split("/"))
        if single or (not hidden and _is_wanted(path, unknown)):
            name = os.path.relpath(path, base) if single else path.removeprefix(base)
            yield InputFile(files.unstrip_protocol(path), name, info.get("size") or 0)


def _once(files: Iterable[InputFile], links: set[str]) -> Iterator[InputFile]:
    """The files without those that a link shows a second time."""
    seen = set()
    for file in files:
        target = os.path.realpath(file.path) if file.path in links else file.path
        if target not in seen:
            seen.add(target)
            yield file


def _is_wanted(path: str, unknown: Counter[str]) -> bool:
    """Whether a file in a directory is of use; one that is not, and not hidden, is counted."""
    name = path.rpartition("/")[2]
    if name.startswith("."):
        return False
    if reader_for(path) or only_describes(path):
        return True
    unknown[os.path.splitext(name)[1].lower()] += 1
    return False


def _file(path: str, base: str) -> InputFile:
    try:
        found = os.stat(path)
    except OSError as error:
        _refuse(error)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"The input {path} is a pipe or device; only regular files are read.")
    name = os.fsencode(path.removeprefix(base)).decode(errors="replace")
    return InputFile(path, name, found.st_size)


def _drop_strays(found: dict[str, InputFile]) -> None:
    """Keep of a `datasets` directory its data, not what `map` and `filter` cached of it.

    Where there is a `state.json`, the data are the tables that it lists.

    Raises:
        UserError: a table is missing, or the list cannot be read.
    """
    cached = [path for path in found if _is_cached(path, found)]
    for path in cached:
        del found[path]
    if cached:
        print(
            f"{len(cached)} files such as {cached[0]} were passed over: `datasets` keeps in them what it "
            "made of the data beside them; name one as input to read it.",
            file=sys.stderr,
        )
    for state in [path for path in found if path.endswith("/state.json")]:
        directory = state.removesuffix("state.json")
        if directory + "dataset_info.json" not in found:
            continue
        tables = {directory + name for name in _tables(state)}
        missing = tables - found.keys()
        if missing:
            raise UserError(f"The dataset {directory} lacks {min(missing)}, which its state.json lists.")
        for path in [path for path in found if path.endswith(".arrow")]:
            if path.rpartition("/")[0] + "/" == directory and path not in tables:
                del found[path]


def _is_cached(path: str, found: Mapping[str, InputFile]) -> bool:
    directory, _, name = path.rpartition("/")
    return bool(_CACHED.fullmatch(name)) and f"{directory}/dataset_info.json" in found


def _tables(state: str) -> list[str]:
    try:
        if is_url(state):
            files, path = filesystem(state)
            content = json.loads(files.cat_file(path))
        else:
            content = json.loads(Path(state).read_bytes())
        return [str(file["filename"]) for file in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state} is not the state of a dataset ({error}).") from error


def _paired(found: Mapping[str, InputFile]) -> Iterator[InputFile]:
    """The sources of papers, each with its companion.

    Raises:
        UserError: one of two files that belong together is missing, or a file is compressed that must not.
    """
    taken = set()
    for path, file in found.items():
        if only_describes(path) or s2orc_2020.is_metadata(path):
            continue
        reader = known_reader(path)
        if compression(path) and not reader.compressible:
            raise UserError(
                f"{path} is compressed as a whole, but is read from its end; decompress it (Parquet is "
                "compressed inside)."
            )
        candidates = reader.companions(path)
        beside = next((place for place in candidates if place in found), None)
        if beside is None:
            if reader.needs_companion:
                raise UserError(
                    f"{path} has no {candidates[0]} beside it; give the directory that holds both."
                )
            yield file
        else:
            taken.add(beside)
            companion = found[beside]
            yield InputFile(path, file.name, file.bytes + companion.bytes, companion)
    for path in found:
        if s2orc_2020.is_metadata(path) and path not in taken:
            raise UserError(
                f"{path} lies where S2ORC has metadata, without the parses that belong to it in a directory "
                f"{s2orc_2020.PARSES} beside; give the directory that holds both."
            )


_VERSIONED = re.compile(r"PMC(\d+)\.(\d+)")
_MOST_VERSIONS = 10**6


def _order(file: InputFile) -> tuple[str, str]:
    """By name, but newer versions of an article first: of those with a PMC id the first one counts."""
    return _VERSIONED.sub(
        lambda match: f"PMC{match[1]}.{_MOST_VERSIONS - int(match[2]):07}", file.name
    ), file.name


def _tell(unknown: Counter[str]) -> None:
    """Say which files were passed over, in one line."""
    if unknown:
        kinds = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in unknown.most_common(_SUFFIXES_TOLD)
        )
        print(f"{unknown.total()} files were passed over, which no reader knows: {kinds}.", file=sys.stderr)


def _refuse(error: OSError, path: str = "") -> NoReturn:
    raise UserError(
        f"The input {path or error.filename} cannot be read: {error.strerror or error}."
    ) from error


def _known_suffixes() -> str:
    return ", ".join(dict.fromkeys(suffix for reader in READERS for suffix in reader.suffixes))


def _listed(paths: Sequence[str | Path]) -> str:
    return ", ".join(str(path) for path in paths)
