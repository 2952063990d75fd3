"""Patience: how long is waited, for what, and what a user is told."""

import pytest

from data_tools.errors import UserError
from data_tools.fetch.release import DatasetsApi
from data_tools.fetch.web import Web
from tests.data_tools.fetch.servers import Answer, SemanticScholar, Server


class Noting(Web):
    """Notes its pauses in place of making them."""

    def __init__(self, attempts: int = 8) -> None:
        super().__init__(1, attempts, backoff=0.5)
        self.pauses: list[float] = []

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


def read(web: Web, url: str) -> bytes:
    def attempt() -> bytes:
        with web.answer(url) as response:
            body: bytes = response.raw.read()
            return body

    return web.patiently(url, attempt)


def test_the_pause_that_a_server_asks_for_is_made():
    answers = [
        Answer(429, headers={"Retry-After": "7"}),
        Answer(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Answer(200, b"here"),
    ]
    web = Noting()
    with Server(lambda path, headers: answers.pop(0)).running() as server:
        assert read(web, server.url) == b"here"
    assert web.pauses == [7.0, 0.0]


@pytest.mark.parametrize("asked", ["3601", "9" * 400])
def test_a_pause_of_more_than_an_hour_is_told_and_not_made(asked: str):
    web = Noting()
    busy = Server(lambda path, headers: Answer(503, headers={"Retry-After": asked}))
    with busy.running(), pytest.raises(UserError, match="asks to wait for"):
        read(web, busy.url)
    assert web.pauses == []


def test_pauses_grow_to_a_minute_and_are_drawn_so_that_many_do_not_come_back_together():
    web = Noting(attempts=40)
    with (
        Server(lambda path, headers: Answer(500)).running() as server,
        pytest.raises(UserError, match="in 40 attempts: the server answers 500"),
    ):
        read(web, server.url)
    bounds = [min(60.0, 0.5 * 2**number) for number in range(39)]
    assert all(0 <= pause <= bound for pause, bound in zip(web.pauses, bounds, strict=True))
    assert len(set(web.pauses)) == 39
    assert max(web.pauses) > 30


def test_a_url_with_a_signature_is_not_shown():
    with pytest.raises(UserError) as caught:
        read(Noting(), "htp://host/file?X-Amz-Signature=secret")
    assert "secret" not in str(caught.value)


def test_a_redirect_is_not_followed_so_that_a_key_stays_with_its_host():
    elsewhere = Server(lambda path, headers: Answer(200, b"{}"))
    with elsewhere.running():
        moved = Server(lambda path, headers: Answer(302, headers={"Location": elsewhere.url}))
        with moved.running(), pytest.raises(UserError, match="answers 302"):
            DatasetsApi(moved.url, "the-key", Noting()).latest()
    assert elsewhere.requests == []


def test_the_api_is_asked_no_more_often_than_allowed():
    web = Noting()
    scholar = SemanticScholar({"a.gz": b""})
    with scholar.server.running():
        api = DatasetsApi(scholar.server.url, "the-key", web, interval=1000.0)
        api.latest()
        api.latest()
    assert web.pauses[0] <= 0
    assert 900 < web.pauses[1] <= 1000
