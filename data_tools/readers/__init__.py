"""Readers: each turns one kind of file into papers. A new one is a file here and a line in `READERS`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_tools.papers import Paper, Rejected
from data_tools.readers import jats, s2orc


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read.

    Attributes:
        suffixes: of the file names, lower case.
        read: gives the papers and rejected records of an open file with a given name, in order.
        most_files_per_part: how many such files make one part of a corpus, at most.
    """

    suffixes: tuple[str, ...]
    read: Callable[[BinaryIO, str], Iterator[Paper | Rejected]]
    most_files_per_part: int


READERS = (
    Reader((".jsonl", ".jsonl.gz"), s2orc.read, most_files_per_part=1),
    Reader((".xml", ".nxml"), jats.read, most_files_per_part=16_384),
)


def reader_for(name: str) -> Reader | None:
    """The reader for a file name, or None when no reader knows its suffix."""
    return next((reader for reader in READERS if name.lower().endswith(reader.suffixes)), None)
