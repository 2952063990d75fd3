"""S2ORC of 2020-07-05: shards of parses, each with a shard of metadata to join with on `paper_id`.

`pdf_parses/pdf_parses_7.jsonl.gz` belongs with `metadata/metadata_7.jsonl.gz`. A shard has 1.4 million
records of metadata and 127,000 parses; of the first only those with a parse are held, and only what is used
of them.
"""

import os
from collections.abc import Iterator

import msgspec

from data_tools.papers import Paper, Rejected, Source
from data_tools.readers import json_text
from data_tools.readers.doc2json import parsed_paper
from data_tools.readers.fields import WrongStructure, json_object
from data_tools.readers.json_records import decode, lines
from data_tools.streams import InputStream

PARSES = "pdf_parses"
METADATA = "metadata"


class _Metadata(msgspec.Struct, gc=False):
    """What is used of a record of metadata."""

    paper_id: str | int
    title: str | None = None
    abstract: str | None = None
    year: str | int | float | None = None
    pmc_id: str | int | None = None
    pubmed_id: str | int | None = None
    doi: str | None = None
    venue: str | None = None
    journal: str | None = None
    has_pdf_parse: bool | None = None
    has_pdf_parsed_abstract: bool | None = None


_decoder = msgspec.json.Decoder(_Metadata)
_encoder = msgspec.msgpack.Encoder()


def companions(path: str) -> tuple[str, ...]:
    """Where the metadata of a shard of parses is."""
    directory, name = os.path.split(path)
    return (f"{os.path.dirname(directory)}/{METADATA}/{name.replace(PARSES, METADATA)}",)


def is_metadata(path: str) -> bool:
    """Whether a file is a shard of metadata, by the directory that it lies in."""
    return os.path.basename(os.path.dirname(path)) == METADATA and ".jsonl" in os.path.basename(path).lower()


def read(stream: InputStream, name: str, companion: InputStream | None = None) -> Iterator[Paper | Rejected]:
    """The papers of a shard of parses, in its order, and what is rejected; damaged metadata comes first.

    Raises:
        DamagedFile: the compression of one of the files is damaged.
    """
    known: dict[str, bytes] = {}
    if companion is not None:
        yield from _read_metadata(companion, f"{METADATA} of {name}", known)
    for line, source in lines(stream, name):
        parse = line if isinstance(line, Rejected) else decode(line, source)
        yield parse if isinstance(parse, Rejected) else _join(parse, known, source)


def _read_metadata(stream: InputStream, name: str, known: dict[str, bytes]) -> Iterator[Rejected]:
    """Fill `known` with the records that have a parse, encoded: a tenth of the memory of objects."""
    for line, source in lines(stream, name):
        if isinstance(line, Rejected):
            yield line
            continue
        try:
            record = _metadata(line)
        except msgspec.ValidationError as error:
            yield Rejected("wrong_structure", source, str(error))
        except ValueError as error:
            yield Rejected("broken_json", source, str(error))
        else:
            if record.has_pdf_parse:
                if record.has_pdf_parsed_abstract:
                    record.abstract = None
                known[str(record.paper_id)] = _encoder.encode(record)


def _metadata(line: bytes) -> _Metadata:
    """A record of metadata; the tolerant way only for those that need it.

    Raises:
        msgspec.ValidationError: a field is not of the documented type.
        ValueError: it is not valid JSON.
    """
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.convert(json_text.decode(line), _Metadata)


def _join(parse: object, known: dict[str, bytes], source: Source) -> Paper | Rejected:
    try:
        fields = json_object(parse, "the record")
        if "body_text" not in fields:
            return Rejected("wrong_structure", source, "the record has no body_text: not a parse of S2ORC")
        found = known.get(str(fields.get("paper_id")))
        if found is None:
            paper_id = str(fields.get("paper_id"))
            return Rejected("missing_pair", source, f"no metadata has the paper_id {paper_id}")
        return parsed_paper(fields, fields, msgspec.msgpack.decode(found), source)
    except WrongStructure as error:
        return Rejected("wrong_structure", source, str(error))
