"""JSON records: a line each (JSON Lines), or one in a file of its own."""

from collections.abc import Iterator

from data_tools.papers import Paper, Rejected, Source
from data_tools.readers import json_text
from data_tools.readers.layouts import read_record
from data_tools.streams import DamagedFile, InputStream

LONGEST_LINE = 1 << 28
"""Bytes of a line, decompressed, beyond which it is no record: the longest paper has some 20 MB."""

_PIECE = 1 << 20


def read_lines(
    stream: InputStream, name: str, companion: InputStream | None = None
) -> Iterator[Paper | Rejected]:
    """Papers and rejected lines of a JSON Lines file, in order; blank lines are no records.

    Raises:
        DamagedFile: its compression is damaged.
    """
    for line, source in lines(stream, name):
        if isinstance(line, Rejected):
            yield line
            continue
        record = decode(line, source)
        yield record if isinstance(record, Rejected) else read_record(record, source)


def read_whole(
    stream: InputStream, name: str, companion: InputStream | None = None
) -> Iterator[Paper | Rejected]:
    """The paper of a file that is one JSON object, or a rejection where its compression is damaged."""
    source = Source(name, 1)
    try:
        content = stream.read(LONGEST_LINE + 1)
    except DamagedFile as error:
        yield Rejected("broken_archive", source, str(error))
        return
    if len(content) > LONGEST_LINE:
        yield Rejected("broken_json", source, f"the file has more than {LONGEST_LINE} bytes")
        return
    record = decode(content, source)
    yield record if isinstance(record, Rejected) else read_record(record, source)


def lines(stream: InputStream, name: str) -> Iterator[tuple[bytes | Rejected, Source]]:
    """The lines of a file that are not blank; a rejection for one that is too long."""
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        source = Source(name, number)
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            del line  # it is large, and what follows may be too
            while (rest := stream.readline(_PIECE)) and not rest.endswith(b"\n"):
                pass
            yield Rejected("broken_json", source, f"the line has more than {LONGEST_LINE} bytes"), source
        elif not line.isspace():
            yield line, source


def decode(line: bytes, source: Source) -> object:
    """What a piece of JSON says (`json_text.decode`), or a rejection when it is not valid."""
    try:
        return json_text.decode(line)
    except ValueError as error:
        return Rejected("broken_json", source, str(error))
