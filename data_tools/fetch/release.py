"""Semantic Scholar's Datasets API: which release there is, and links to the files of a dataset."""

import json
import re
import threading
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

from data_tools.errors import UserError
from data_tools.fetch.web import Web, host

_SECONDS_BETWEEN_REQUESTS = 1.0
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_KEY = re.compile(r"[!-~]+")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class DatasetsApi:
    """Asks the API, one request a second, the rate that a key is given.

    Source: https://api.semanticscholar.org/api-docs/datasets and .../product/api.

    Args:
        endpoint: such as `https://api.semanticscholar.org`.
        key: sent as `x-api-key`, over TLS or to this machine only; it is not written anywhere.
        web: how requests are made.
        interval: seconds between requests.

    Raises:
        UserError: the key would travel in the clear, or holds what no header can.
    """

    def __init__(
        self, endpoint: str, key: str, web: Web, interval: float = _SECONDS_BETWEEN_REQUESTS
    ) -> None:
        if not endpoint.startswith("https://") and host(endpoint) not in _LOOPBACK:
            raise UserError(
                f"The key would travel unencrypted to {endpoint}; give an endpoint that begins with https://."
            )
        if not _KEY.fullmatch(key):
            raise UserError(
                "The key in S2_API_KEY has characters that no key has, such as blanks or typographic quotes; "
                "copy it again."
            )
        self._base = f"{endpoint.rstrip('/')}/datasets/v1/release"
        self._headers = {"x-api-key": key}
        self._web = web
        self._interval = interval
        self._lock = threading.Lock()
        self._next = 0.0

    def latest(self) -> str:
        """The id of the newest release, such as `2026-09-17`.

        Raises:
            UserError: the API cannot be reached or does not answer as expected.
        """
        release = self._ask("latest").get("release_id")
        if not isinstance(release, str) or not _SAFE_NAME.fullmatch(release):
            raise UserError(f"{self._base}/latest does not name a release.")
        return release

    def links(self, release: str, dataset: str) -> dict[str, str]:
        """Pre-signed URLs, which expire, of the files of a dataset, by the name each is to have here.

        Raises:
            UserError: the key is refused, there is no such release or dataset, or a file has a name that is
                not plain.
        """
        if not _SAFE_NAME.fullmatch(release):
            raise UserError(f"{release!r} is not a release; give a date such as 2026-09-17, or latest.")
        path = f"{release}/dataset/{dataset}"
        files = self._ask(path).get("files")
        if not isinstance(files, list) or not files or not all(isinstance(url, str) for url in files):
            raise UserError(f"{self._base}/{path} names no files.")
        links = {local_name(url): url for url in files}
        if len(links) < len(files):
            raise UserError(f"{self._base}/{path} names two files alike.")
        return dict(sorted(links.items()))

    def _ask(self, path: str) -> dict[str, Any]:
        url = f"{self._base}/{path}"

        def attempt() -> tuple[int, bytes]:
            self._wait_for_turn()
            with self._web.answer(url, self._headers) as response:
                return response.status_code, response.raw.read(decode_content=True)

        status, body = self._web.patiently(url, attempt)
        if status in (401, 403):
            raise UserError(
                f"{url} refuses the key in S2_API_KEY ({status}); "
                "keys are given at https://www.semanticscholar.org/product/api#api-key-form."
            )
        if status == 404:
            raise UserError(f"{url} does not exist; check --release and --dataset.")
        try:
            answer = json.loads(body) if status == 200 else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{url} answers {status} without the JSON that was expected; check --endpoint.")
        return answer

    def _wait_for_turn(self) -> None:
        with self._lock:
            self._web.pause(self._next - monotonic())
            self._next = monotonic() + self._interval


def local_name(url: str) -> str:
    """The name that the file of a URL gets here: its last component, plain, and telling what is in it.

    The files are JSON lines; their names end in `.gz` alone, and get the `.jsonl` by which a build
    knows them.

    Raises:
        UserError: the name is hidden or has more in it than letters, digits, dots, dashes and underscores.
    """
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    encoded = urlsplit(url).path.rpartition("/")[2]
    if name != encoded or not _SAFE_NAME.fullmatch(name):
        raise UserError(
            f"The API names a file {encoded!r}, which is not a plain file name; nothing was fetched."
        )
    stem = name.removesuffix(".gz")
    return name if stem == name or stem.endswith(".jsonl") else f"{stem}.jsonl.gz"
