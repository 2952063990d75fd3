"""What an article's metadata says about whether it is wanted."""

import json
import re
from dataclasses import dataclass
from typing import Any

from data_tools.licenses import license_group

_MD5 = re.compile(r"[?&]md5=([0-9a-f]{32})(?:&|$)")


@dataclass(frozen=True)
class Metadata:
    """The part of an article version's JSON that decides on it.

    Attributes:
        in_subset: is it in the open-access subset.
        license: PMC's code, such as `CC BY-NC`; None when there is none.
        retracted: has it been.
        has_xml: is there a full text.
        xml_md5: of the full text, hex; None when the JSON does not say.
    """

    in_subset: bool
    license: str | None
    retracted: bool
    has_xml: bool
    xml_md5: str | None


def parse_metadata(body: bytes) -> Metadata:
    """Read an article version's JSON.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        record: Any = json.loads(body)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(record, dict):
        raise ValueError("not an object")
    url, license_code = record.get("xml_url"), record.get("license_code")
    match = _MD5.search(url) if isinstance(url, str) else None
    return Metadata(
        in_subset=record.get("is_pmc_openaccess") is True,
        license=license_code if isinstance(license_code, str) else None,
        retracted=record.get("is_retracted") is True,
        has_xml=bool(url),
        xml_md5=match[1] if match else None,
    )


def why_not(metadata: Metadata, group: str) -> str | None:
    """The reason for leaving a version out, or None when it is wanted.

    The groups are `commercial`, `noncommercial` and `all`, which has every licence of the open-access subset.
    Retracted articles are wanted: their JSON says so, and leaving them out is a decision of the corpus.
    """
    if not metadata.in_subset:
        return "not in the open-access subset"
    if group != "all" and license_group(metadata.license) != group:
        return "another licence group"
    return None if metadata.has_xml else "no XML"
