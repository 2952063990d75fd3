"""Bulk packages of PubMed Central: tar archives of JATS articles, read in one pass from memory.

Nothing is extracted. Of the members only regular files are read; links and devices never.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from itertools import repeat
from typing import IO, cast

from data_tools.errors import UserError
from data_tools.papers import Paper, Rejected, Source
from data_tools.readers import jats
from data_tools.readers.pmc_metadata import Metadata, from_filelist
from data_tools.streams import DamagedFile, InputStream

_BLOCK = 1 << 20
_MOST_ENDS = 8  # `tarfile` asks twice; passing over a member of a damaged size, up to 2^90 times
_END = 1024  # zero bytes close an archive (POSIX pax format)
_PACKAGE = re.compile(r"\.(?:tar(?:\.gz|\.zst)?|tgz)$", re.IGNORECASE)
_ARTICLES = (".xml", ".nxml")
_STATEMENTS = (".json",)
_LARGEST_NAME = 1 << 20
_NAMES = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)


def companions(path: str) -> tuple[str, ...]:
    """Where the list of a package is, with licences and retractions."""
    return (_PACKAGE.sub(".filelist.csv", path),)


def read(stream: InputStream, name: str, companion: InputStream | None = None) -> Iterator[Paper | Rejected]:
    """The articles of a package, in its order; members that are no articles by their names are passed over.

    What PMC says of an article is taken from the package's list, or from its JSON when that stands right
    before the article. A paper's source is the package; its position counts the files in it, from 1.

    Raises:
        UserError: the archive, its compression or its list is damaged or cut.
    """
    listed = _listed(companion, name)
    parser = jats.article_parser()
    stated: dict[str, bytes] = {}
    empty = True
    for source, member, content in _members(stream, name):
        if isinstance(content, Rejected):
            empty = False
            yield content
        elif member.lower().endswith(_STATEMENTS):
            stated = {member.rpartition(".")[0]: content}
        else:
            empty = False
            said = stated.get(member.rpartition(".")[0])
            for found in jats.articles(content, parser, repeat(source), said):
                known = listed.get(found.pmc_id or "") if isinstance(found, Paper) else None
                yield known.added_to(found) if known and isinstance(found, Paper) else found
    if empty:
        yield Rejected("wrong_structure", Source(name, 1), "the package holds no .xml and no .nxml")


def _members(stream: InputStream, name: str) -> Iterator[tuple[Source, str, bytes | Rejected]]:
    """Where it stands, the name and the content of each article, of JSON, and of what is rejected."""
    number = 0
    file = _Remembering(stream)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r|", tarinfo=_Header) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it remembers a million of them
                if member.isdir():
                    continue
                number += 1
                source = Source(name, number)
                reason = _refused(member)
                if reason:
                    yield source, member.name, Rejected(reason, source, f"the member {member.name}")
                elif member.name.lower().endswith(_ARTICLES + _STATEMENTS):
                    content = archive.extractfile(member)
                    yield source, member.name, content.read() if content else b""
            while file.read(_BLOCK):
                pass  # what follows the last member has to be sound too
        if file.last.strip(b"\0"):
            raise tarfile.ReadError("it ends without the mark of its end")
    except (tarfile.TarError, ValueError) as error:
        raise DamagedFile(f"{name} is not a readable tar archive ({error}); download it again.") from error


class _Header(tarfile.TarInfo):
    """Refuses long names beyond a megabyte, which `tarfile` reads into memory whatever their size."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":  # type: ignore[override]
        header = super().frombuf(buf, encoding, errors)
        if header.type in _NAMES and header.size > _LARGEST_NAME:
            raise tarfile.ReadError(f"the name of a member has {header.size} bytes")
        return header


class _Remembering(io.RawIOBase):
    """Keeps the last bytes of a stream: `tarfile` takes an archive cut between two members for whole."""

    def __init__(self, stream: InputStream) -> None:
        self._stream = stream
        self._ends = 0
        self.last = b"?"

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self._ends += not block
        if self._ends > _MOST_ENDS:
            raise tarfile.ReadError("a member is longer than the archive")
        self.last = (self.last + block)[-_END:]
        return block


def _refused(member: tarfile.TarInfo) -> str | None:
    """Why a member is not read, if it is not: none of these has a place in a package of articles."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "unsafe_name"
    if not member.isreg():
        return "not_a_file"
    return "too_large" if member.size > jats.LARGEST_ARTICLE else None


def _listed(companion: InputStream | None, name: str) -> dict[str, Metadata]:
    if companion is None:
        return {}
    try:
        return from_filelist(companion)
    except ValueError as error:
        raise UserError(
            f"The list of {name} cannot be read ({error}); download it again or remove it."
        ) from error
