"""A public S3 bucket over plain HTTPS: its listing and its objects, unsigned."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lxml import etree

from data_tools.errors import UserError
from data_tools.fetch.web import TryAgainError, Web

_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"
_PLAIN_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Entry:
    """A line of a listing.

    Attributes:
        key: of the object.
        modified: the day on which it last changed, `YYYY-MM-DD`, UTC.
    """

    key: str
    modified: str


class Bucket:
    """Reads a bucket that needs no credentials.

    Args:
        url: of the bucket, such as `https://NAME.s3.us-east-1.amazonaws.com`.
        web: how requests are made.
    """

    def __init__(self, url: str, web: Web) -> None:
        self.url = url.rstrip("/")
        self._web = web

    def pages(self, prefix: str, after: str) -> Iterator[list[Entry]]:
        """The listing below a prefix, from behind a key on, 1,000 entries a page, in byte order of the keys.

        Each page is asked for by the last key of the one before (ListObjectsV2, `start-after`), so any key
        that was kept is a place to go on from; continuation tokens expire.

        Raises:
            UserError: the bucket does not answer as S3 does.
        """
        truncated = True
        while truncated:
            entries, truncated = self._page(prefix, after)
            if truncated and (not entries or entries[-1].key <= after):
                raise UserError(f"The listing of {self.url} does not advance beyond {after}.")
            if entries:
                after = entries[-1].key
                yield entries

    def get(self, key: str) -> bytes | None:
        """The bytes of an object, checked against its ETag where that is an MD5; None when there is none.

        Raises:
            UserError: the bucket refuses, or the bytes never come whole.
        """
        url = f"{self.url}/{key}"

        def attempt() -> bytes | None:
            with self._web.answer(url) as response:
                if response.status_code == 404:
                    return None
                if response.status_code != 200:
                    raise UserError(f"{url} cannot be fetched: the bucket answers {response.status_code}.")
                body: bytes = response.raw.read(decode_content=False)
            etag = response.headers.get("ETag", "").strip('"')
            if _PLAIN_MD5.fullmatch(etag) and md5(body) != etag:
                raise TryAgainError("its bytes do not have the checksum that the bucket gives")
            return body

        return self._web.patiently(url, attempt)

    def _page(self, prefix: str, after: str) -> tuple[list[Entry], bool]:
        query = {"list-type": "2", "prefix": prefix, "start-after": after}

        def attempt() -> bytes:
            with self._web.answer(self.url + "/", params=query) as response:
                if response.status_code != 200:
                    raise UserError(
                        f"{self.url} answers {response.status_code} where the listing of a bucket "
                        "was expected; check --endpoint."
                    )
                body: bytes = response.raw.read(decode_content=False)
                return body

        return self._parsed(self._web.patiently(f"The listing of {self.url}", attempt))

    def _parsed(self, body: bytes) -> tuple[list[Entry], bool]:
        parser = etree.XMLParser(resolve_entities=False, no_network=True)
        try:
            root = etree.fromstring(body, parser)
        except etree.XMLSyntaxError:
            root = None
        if root is None or root.tag != f"{_NAMESPACE}ListBucketResult":
            raise UserError(f"{self.url} does not answer with the listing of a bucket; check --endpoint.")
        entries = [
            Entry(
                item.findtext(f"{_NAMESPACE}Key", default=""),
                item.findtext(f"{_NAMESPACE}LastModified", default="")[:10],
            )
            for item in root.iter(f"{_NAMESPACE}Contents")
        ]
        return entries, root.findtext(f"{_NAMESPACE}IsTruncated") == "true"


def md5(body: bytes) -> str:
    """The MD5 of bytes in hex, which is what S3 and PMC's metadata give: against damage, not forgery."""
    return hashlib.md5(body, usedforsecurity=False).hexdigest()
