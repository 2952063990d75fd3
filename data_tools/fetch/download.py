"""One large file: resumed to the byte, its link renewed when it has expired, checked, then named."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import requests
import xxhash

from data_tools.errors import UserError
from data_tools.fetch.web import TryAgainError, Web
from data_tools.files import aside, publish

_BLOCK = 1 << 20
_RENEWALS_WITHOUT_A_BYTE = 3
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_PLAIN_MD5 = re.compile(r"[0-9a-f]{32}")
Result = TypeVar("Result")


class _RefusedError(Exception):
    """The server refuses a link."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class Link(Protocol):
    """Where a file can be had, for as long as the link lasts."""

    def url(self, expired: str | None = None) -> str:
        """The link; a new one when `expired` is the one in hand."""
        ...


@dataclass(frozen=True)
class Remote:
    """What a server says about a file.

    Attributes:
        bytes: its size.
        etag: as the server writes it; "" when it gives none.
    """

    bytes: int
    etag: str


@dataclass(frozen=True)
class Downloaded:
    """A finished file.

    Attributes:
        bytes: its size.
        xxh3_128: checksum of its bytes, hex.
        etag: what the server called it.
    """

    bytes: int
    xxh3_128: str
    etag: str


def look(web: Web, link: Link, name: str) -> Remote:
    """Size and ETag of a file, from an answer that is not read: pre-signed links are for GET alone.

    Raises:
        UserError: the server does not give the file, or not its size.
    """

    def attempt(url: str) -> Remote:
        with web.answer(url, {"Range": "bytes=0-0"}) as response:
            _require_file(response, name)
            size = _total(response)
            if size is None:
                raise UserError(f"The server of {name} does not say how large it is.")
            return Remote(size, response.headers.get("ETag", ""))

    return _renewing(web, link, name, attempt, lambda: 0)


def download(
    web: Web, link: Link, path: Path, remote: Remote, count: Callable[[int], None] = lambda _: None
) -> Downloaded:
    """Fetch a file to `path`, going on behind what an earlier run left.

    The bytes that are there are kept only while the server has the same ETag (If-Range, RFC 9110, 13.1.5);
    a server without ranges sends all of it again. The whole is compared with the size and, where the ETag is
    an MD5, with that.

    Args:
        web: how requests are made.
        link: to the file.
        path: the name it gets when it is whole, fsynced and checked.
        remote: from `look`.
        count: told how many of its bytes there are.

    Raises:
        UserError: it never came whole.
        OSError: the disk is full.
    """
    begun, tag = aside(path), _tag(path)
    if have(path, remote) == 0:
        begun.unlink(missing_ok=True)
        tag.write_text(remote.etag)

    def attempt(url: str) -> Downloaded:
        _receive(web, url, path, remote, count)
        return _checked(begun, remote)

    done = _renewing(web, link, path.name, attempt, lambda: _size(begun))
    publish(path)
    tag.unlink()
    return done


def have(path: Path, remote: Remote) -> int:
    """Bytes that an earlier run left of the same file: one with the same ETag, and no larger."""
    tag, size = _tag(path), _size(aside(path))
    same = bool(remote.etag) and tag.exists() and tag.read_text() == remote.etag
    return size if same and size <= remote.bytes else 0


def _receive(web: Web, url: str, path: Path, remote: Remote, count: Callable[[int], None]) -> None:
    begun = aside(path)
    begin = have(path, remote)
    if begin == remote.bytes:
        return
    headers = {"Range": f"bytes={begin}-", "If-Range": remote.etag} if begin else {}
    with web.answer(url, headers) as response:
        _require_file(response, path.name)
        if _total(response) not in (None, remote.bytes) or response.headers.get("ETag", "") != remote.etag:
            raise UserError(f"{path.name} changed on the server while it was fetched; run the command again.")
        if response.status_code != 206 or _first(response) != begin:
            begin = 0
        with begun.open("r+b" if begin else "wb") as file:
            file.seek(begin)
            for block in response.raw.stream(_BLOCK, decode_content=False):
                web.go_on()
                file.write(block)
                count(file.tell())
    if _size(begun) < remote.bytes:
        raise TryAgainError("the answer was cut off")


def _checked(path: Path, remote: Remote) -> Downloaded:
    digest, plain = xxhash.xxh3_128(), hashlib.md5(usedforsecurity=False)
    expected = remote.etag.strip('"')
    known = bool(_PLAIN_MD5.fullmatch(expected))
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if known:
                plain.update(block)
    size = _size(path)
    if size != remote.bytes or (known and plain.hexdigest() != expected):
        path.unlink()
        raise TryAgainError("its bytes do not have the size or the checksum that the server gives")
    return Downloaded(size, digest.hexdigest(), remote.etag)


def _renewing(
    web: Web, link: Link, name: str, attempt: Callable[[str], Result], progress: Callable[[], int]
) -> Result:
    """What `attempt` returns, with a new link each time that the server refuses the one in hand."""
    url, refused, furthest = link.url(), 0, progress()
    while True:
        try:
            return web.patiently(name, partial(attempt, url), progress)
        except _RefusedError as error:
            refused = 1 if progress() > furthest else refused + 1
            furthest = max(furthest, progress())
            if refused > _RENEWALS_WITHOUT_A_BYTE:
                raise UserError(
                    f"The server refuses {name} ({error.status}), with new links too; try again later."
                ) from error
            url = link.url(expired=url)


def _require_file(response: requests.Response, name: str) -> None:
    # S3 answers 403 for a link past its time, 400 where the credentials that signed it are.
    if response.status_code in (400, 401, 403):
        raise _RefusedError(response.status_code)
    if response.status_code not in (200, 206):
        raise UserError(f"The server of {name} answers {response.status_code} where a file was expected.")


def _total(response: requests.Response) -> int | None:
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match:
        return int(match[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and response.status_code == 200 else None


def _first(response: requests.Response) -> int:
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(path: Path) -> Path:
    return path.with_name(f".{path.name}.etag")
