"""Requests that are polite and patient: bounded connections, one policy for trying again."""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from data_tools.errors import UserError

USER_AGENT = "pmc-llama/0.1 (pmc-data fetch)"
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 60.0
_LONGEST_ASKED = 3600.0
_ATTEMPTS_BEFORE_FIRST_ANSWER = 3
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
Result = TypeVar("Result")


class TryAgainError(Exception):
    """An attempt failed in a way that passes.

    Args:
        reason: in words, without the URL (which may hold a signature).
        wait: seconds that the server asked for, or None.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class StoppedError(Exception):
    """Work in a thread ends because the command does."""


class Web:
    """An HTTP client for many threads.

    Every attempt goes through `patiently`: connections that fail, answers that are cut off and the statuses
    408, 429 and 5xx are tried again, after the `Retry-After` that the server names or, without one, after a
    uniformly drawn share of a pause that doubles (exponential backoff with full jitter:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        connections: how many requests are under way at once, at most.
        attempts: how often a request is tried; fewer until a server has answered for the first time, so
            that a machine without a network hears of it soon.
        backoff: seconds; the longest first pause.
    """

    def __init__(self, connections: int, attempts: int = 8, backoff: float = 0.5) -> None:
        self._session = requests.Session()
        self._session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        adapter = HTTPAdapter(pool_maxsize=connections, pool_block=True, max_retries=0)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)
        self._connections = connections
        self._attempts = attempts
        self._backoff = backoff
        self._answered = False
        self._stop = threading.Event()

    @contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """A thread for each connection; when the block raises, all of them end soon."""
        pool = ThreadPoolExecutor(self._connections)
        try:
            yield pool
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def go_on(self) -> None:
        """Raise StoppedError when the command is ending; long work in a thread asks now and then."""
        if self._stop.is_set():
            raise StoppedError

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the command."""
        self._stop.wait(max(0.0, seconds))
        self.go_on()

    def patiently(
        self, what: str, attempt: Callable[[], Result], progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """What `attempt` returns, tried again while it raises TryAgainError.

        Args:
            what: names the thing in the error; holds no secret.
            attempt: one try.
            progress: how far the attempts have come; one that got further than any before is not counted.

        Raises:
            UserError: it never succeeded, or the server asks for more than an hour's pause.
            StoppedError: the command is ending.
        """
        tried, furthest = 0, progress()
        while True:
            self.go_on()
            try:
                return attempt()
            except TryAgainError as error:
                tried = 1 if progress() > furthest else tried + 1
                furthest = max(furthest, progress())
                most = self._attempts if self._answered else _ATTEMPTS_BEFORE_FIRST_ANSWER
                if tried >= min(most, self._attempts):
                    raise UserError(
                        f"{what} could not be fetched in {tried} attempts: {error}. "
                        "Run the same command again to go on."
                    ) from error
                self.pause(self._seconds(what, tried, error.wait))

    @contextmanager
    def answer(
        self, url: str, headers: Mapping[str, str] | None = None, params: Mapping[str, str] | None = None
    ) -> Iterator[requests.Response]:
        """An answer whose body is read from `raw`; what goes wrong while it is read is handled here too.

        Redirects are answers like any other: a key in the headers must not travel to another host.

        Raises:
            TryAgainError: no connection, a cut-off body, or a status that passes.
            UserError: the URL is none.
        """
        try:
            with self._session.get(
                url,
                headers=dict(headers or {}),
                params=dict(params or {}),
                stream=True,
                allow_redirects=False,
                timeout=(_CONNECT_SECONDS, _READ_SECONDS),
            ) as response:
                self._answered = True
                if response.status_code in _BUSY:
                    raise TryAgainError(f"the server answers {response.status_code}", _retry_after(response))
                yield response
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise UserError(f"{without_query(url)} is not a URL to fetch from.") from error
        except requests.exceptions.MissingSchema as error:
            raise UserError(f"{without_query(url)} is no URL: it has to begin with https://.") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise TryAgainError(_reason(error)) from error

    def _seconds(self, what: str, tried: int, asked: float | None) -> float:
        if asked is not None:
            if asked > _LONGEST_ASKED:
                raise UserError(
                    f"{what} is not to be had now: the server asks to wait for {asked:,.0f} seconds. "
                    "Run the same command then to go on."
                )
            return asked
        return random.uniform(0, min(_LONGEST_PAUSE, self._backoff * 2 ** (tried - 1)))  # noqa: S311


def refuse_credentials(endpoint: str) -> None:
    """Refuse an endpoint that would be recorded and shown with a password or a signature in it.

    Raises:
        UserError: it has a user, a password or a query; the sentence has not.
    """
    if "@" in endpoint or "?" in endpoint:
        raise UserError(
            "The --endpoint holds a user, a password or a query, which are not written down; give the bare "
            "address of the server (a user and password can stand in ~/.netrc)."
        )


def without_query(url: str) -> str:
    """A URL that can be shown: the query of a pre-signed one is a secret."""
    return url.partition("?")[0]


def host(url: str) -> str:
    """The host of a URL, for messages."""
    return urlsplit(url).hostname or url


def _retry_after(response: requests.Response) -> float | None:
    """Seconds asked for by Retry-After, which is a number or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _reason(error: Exception) -> str:
    """The failure in words; the libraries' own texts hold the whole URL."""
    text = str(error)
    if "NameResolutionError" in text or "Name or service" in text or "name resolution" in text:
        return "the name of its host cannot be resolved; is there a network"
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy of the environment does not let it through"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not accepted"
    if isinstance(error, requests.ConnectionError):
        return "there is no connection to the server"
    return "the answer was cut off"
