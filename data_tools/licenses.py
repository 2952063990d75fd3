"""Licence statements as sources write them, sorted into PubMed Central's groups.

The groups of its open-access subset (https://pmc.ncbi.nlm.nih.gov/tools/openftlist/): commercial use allowed
(CC0, CC BY, CC BY-SA, CC BY-ND, public domain), non-commercial use only (CC BY-NC and its variants), and
other: a statement that names no such licence. Unknown is a paper that states nothing.
"""

import re

GROUPS = ("commercial", "noncommercial", "other", "unknown")

_NONCOMMERCIAL = re.compile(r"\bcc ?by ?nc|\bby ?nc\b|non ?commercial")
_COMMERCIAL = re.compile(
    r"\bcc ?(?:0|by|zero)|public ?domain|licenses by\b|licences by\b"
    r"|creative commons (?:by|attribution|zero)|^pd$|^by(?: sa| nd)?(?: \d.*)?$"
)
_SEPARATORS = re.compile(r"[\W_]+")


def license_group(statement: str | None) -> str:
    """The group of a licence statement: `commercial`, `noncommercial`, `other` or `unknown`.

    Known are short names in any spelling (`CC BY-NC 4.0`, `CCBYNC`, `cc-by`), addresses of
    creativecommons.org and the licences' names in sentences. `NO-CC CODE` and `publisher-specific` are other.
    """
    plain = _SEPARATORS.sub(" ", (statement or "").lower()).strip()
    if not plain:
        return "unknown"
    if plain.startswith("no cc"):
        return "other"
    if _NONCOMMERCIAL.search(plain):
        return "noncommercial"
    return "commercial" if _COMMERCIAL.search(plain) else "other"
