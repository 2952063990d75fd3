"""Readers: each turns one kind of file into papers. A new one is a file here and a line in `READERS`.

The layouts of JSON records, which are told by their fields and not by the file's name, are in `layouts.py`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_tools.papers import Paper, Rejected
from data_tools.readers import archive, jats, json_records, s2orc_2020, tables
from data_tools.streams import COMPRESSIONS, InputStream


def _alone(path: str) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read.

    Attributes:
        suffixes: of the file names, lower case, without that of a compression.
        read: gives the papers and rejected records of an open file with a given name, in order; the third
            argument is its companion, the file that belongs to it, when there is one.
        most_files_per_part: how many such files make one part of a corpus, at most.
        directory: the name of the directory that such a file lies in; any when empty.
        companions: the paths at which a file may have its companion, the likeliest first.
        needs_companion: a file without one is refused.
        compressible: its files may be compressed as a whole.
    """

    suffixes: tuple[str, ...]
    read: Callable[[InputStream, str, InputStream | None], Iterator[Paper | Rejected]]
    most_files_per_part: int
    directory: str = ""
    companions: Callable[[str], tuple[str, ...]] = _alone
    needs_companion: bool = False
    compressible: bool = True


_MANY = 16_384
READERS = (
    Reader((".jsonl",), s2orc_2020.read, 1, s2orc_2020.PARSES, s2orc_2020.companions, needs_companion=True),
    Reader((".jsonl",), json_records.read_lines, 1),
    Reader((".json",), json_records.read_whole, _MANY),
    Reader((".xml", ".nxml"), jats.read, _MANY, companions=jats.companions),
    Reader((".tar", ".tgz"), archive.read, 1, companions=archive.companions),
    Reader((".parquet",), tables.read_parquet, 1, compressible=False),
    Reader((".arrow",), tables.read_arrow, 1),
)

# The JSON of PMC's cloud layout, lists of packages, what `datasets` writes beside its tables.
_BESIDE = re.compile(
    r"(?:.*/)?(?:PMC\d+\.\d+\.json|.*\.(?:filelist\.(?:csv|txt)|manifest)|(?:dataset_info|state|dataset_dict)\.json)",
    re.IGNORECASE | re.DOTALL,
)


def reader_for(path: str) -> Reader | None:
    """The reader for a file, by its path, or None when no reader knows it."""
    name = path.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    for reader in READERS:
        if name.endswith(reader.suffixes) and reader.directory in ("", *path.split("/")[-2:-1]):
            return reader
    return None


def only_describes(path: str) -> bool:
    """Whether a file only says something of others, and is itself no source of papers."""
    return _BESIDE.fullmatch(path) is not None
