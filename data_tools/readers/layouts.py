"""The layouts of JSON records, told by the fields. A new one is a file here and a place in `LAYOUTS`.

A layout is a module with `recognizes(record)`, whether a record with these fields (names in lower case) is of
that layout, and `paper(record, source)`, the paper of a record that is.
"""

from typing import Any, Protocol

from data_tools.papers import Paper, Rejected, Source
from data_tools.readers import doc2json, s2orc, s2orc_2019, s2orc_v2, text
from data_tools.readers.fields import WrongStructure


class Layout(Protocol):
    """What a module of a layout gives."""

    def recognizes(self, record: dict[str, Any]) -> bool:
        """Whether a record has this layout."""
        ...

    def paper(self, record: dict[str, Any], source: Source) -> Paper | Rejected:
        """The paper of such a record."""
        ...


LAYOUTS: tuple[Layout, ...] = (s2orc, s2orc_v2, s2orc_2019, doc2json, text)
"""In the order in which they are asked."""

_MOST_NAMES = 10


def read_record(record: object, source: Source) -> Paper | Rejected:
    """The paper of a decoded record, by the first layout that recognizes it."""
    if not isinstance(record, dict):
        return Rejected("wrong_structure", source, f"the record is {type(record).__name__}, not an object")
    fields = {str(key).lower(): value for key, value in record.items()}
    for layout in LAYOUTS:
        if layout.recognizes(fields):
            try:
                return layout.paper(fields, source)
            except WrongStructure as error:
                return Rejected("wrong_structure", source, str(error))
    names = ", ".join(sorted(fields)[:_MOST_NAMES])
    return Rejected("wrong_structure", source, f"no known layout has the fields: {names or 'none'}")
