"""S2ORC of 2019-09-28: one object a paper, with its metadata, a parse of its PDF and one of its LaTeX."""

from typing import Any

from data_tools.papers import Paper, Source
from data_tools.readers.doc2json import parsed_paper
from data_tools.readers.fields import json_object


def recognizes(record: dict[str, Any]) -> bool:
    """Whether a record has parses by their kind."""
    return "grobid_parse" in record


def paper(record: dict[str, Any], source: Source) -> Paper:
    """The paper of a record; of its LaTeX where that was parsed, which is the cleaner text.

    Raises:
        WrongStructure: a field is not of the documented type.
    """
    latex = json_object(record.get("latex_parse"), "latex_parse")
    grobid = json_object(record["grobid_parse"], "grobid_parse")
    metadata = json_object(record.get("metadata"), "metadata")
    return parsed_paper(record, latex if latex.get("body_text") else grobid, metadata, source)
