"""What PubMed Central says of an article outside of it: JSON in its cloud layout, a list of each package.

Sources: `PMC{id}.{version}.json` (keys `pmcid`, `pmid`, `doi`, `license_code`, `is_retracted`) and
`*.filelist.csv` (columns `AccessionID`, `PMID`, `License`, `Retracted`).
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from msgspec.structs import replace

from data_tools.papers import Paper, normalize_doi, normalize_pmc_id
from data_tools.readers.fields import json_object, pubmed_id, words
from data_tools.readers.json_text import decode

_YES = frozenset({"yes", "true", "1"})
# PMC's code where it found no Creative Commons licence; the article's own words then say more.
_NO_CODE = frozenset({"", "NO-CC CODE", "NONE", "TDM"})


@dataclass(frozen=True)
class Metadata:
    """Statements about one article."""

    pmc_id: str | None
    pubmed_id: str | None
    doi: str | None
    license: str | None
    retracted: bool

    def added_to(self, paper: Paper) -> Paper:
        """The paper with what it does not say itself, with this licence, and retracted if either says so."""
        return replace(
            paper,
            pmc_id=paper.pmc_id or self.pmc_id,
            pubmed_id=paper.pubmed_id or self.pubmed_id,
            doi=paper.doi or self.doi,
            license=self.license or paper.license,
            retracted=paper.retracted or self.retracted,
        )


def from_json(content: bytes) -> Metadata:
    """The statements of a JSON file of the cloud layout.

    Raises:
        ValueError: it is no JSON object.
    """
    decoded = decode(content)
    if decoded is None:
        raise ValueError("it is null, not an object")
    fields = json_object(decoded, "it")
    return _metadata(
        {
            "pmc_id": fields.get("pmcid"),
            "pubmed_id": fields.get("pmid"),
            "doi": fields.get("doi"),
            "license": fields.get("license_code"),
            "retracted": fields.get("is_retracted"),
        }
    )


def from_filelist(stream: BinaryIO) -> dict[str, Metadata]:
    """The statements of a package's list, by PMC id.

    Raises:
        ValueError: it is no CSV in UTF-8 with these columns.
    """
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    missing = {"AccessionID", "License"} - set(rows.fieldnames or ())
    if missing:
        raise ValueError(f"it has no column {' and no column '.join(sorted(missing))}")
    try:
        found = [
            _metadata(
                {
                    "pmc_id": row["AccessionID"],
                    "pubmed_id": row.get("PMID"),
                    "license": row["License"],
                    "retracted": row.get("Retracted"),
                }
            )
            for row in rows
        ]
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return {metadata.pmc_id: metadata for metadata in found if metadata.pmc_id}


def _metadata(fields: Mapping[str, Any]) -> Metadata:
    license = words(fields["license"])
    return Metadata(
        pmc_id=normalize_pmc_id(fields["pmc_id"]),
        pubmed_id=pubmed_id(fields["pubmed_id"]),
        doi=normalize_doi(fields.get("doi")),
        license=license if license and license.strip().upper() not in _NO_CODE else None,
        retracted=str(fields["retracted"]).strip().lower() in _YES,
    )
