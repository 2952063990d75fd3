"""Fetching S2ORC: every byte of a release, whatever the network, the links and the user do meanwhile."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
from rich.console import Console

from data_tools.errors import UserError
from data_tools.fetch.release import local_name
from data_tools.fetch.s2orc import S2orcFetched, fetch_s2orc
from tests.data_tools.fetch import commands
from tests.data_tools.fetch.conftest import quick_web
from tests.data_tools.fetch.servers import Answer, SemanticScholar

SIZE = 3_000_000


def content(seed: int) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(SIZE)


FILES = {f"20260917_0000{number}_abcde.gz": content(number) for number in range(3)}
FIRST = min(FILES)
LOCAL = {name.replace(".gz", ".jsonl.gz"): body for name, body in FILES.items()}
FIRST_LOCAL = min(LOCAL)


@pytest.fixture
def scholar() -> Iterator[SemanticScholar]:
    made = SemanticScholar(dict(FILES))
    with made.server.running():
        yield made


@pytest.fixture
def fetch(scholar: SemanticScholar, tmp_path: Path) -> Callable[..., S2orcFetched]:
    def run(output: Path = tmp_path / "out", key: str = "the-key", **options: object) -> S2orcFetched:
        console = Console(file=io.StringIO(), width=200)
        settings = {"endpoint": scholar.server.url, "web": quick_web(2), "interval": 0.0} | options
        return fetch_s2orc(output, key, console=console, **settings)

    return run


def got(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.jsonl.gz")}


def command(scholar: SemanticScholar, output: Path) -> list[str]:
    """A command that names its release: one request to the API, so it has no second's pause."""
    where = ["--output", str(output), "--endpoint", scholar.server.url]
    return ["fetch", "s2orc", "--release", scholar.latest, *where]


def served(scholar: SemanticScholar) -> int:
    """Bytes of files, without the looks at their size."""
    return sum(size for path, size in scholar.server.bodies.items() if path.startswith("/staging/"))


def cut_after(whole: bytes, begin: int, size: int, etag: str | None = None) -> Answer:
    """A right answer for the bytes from `begin` on, whose connection breaks after `size` of them."""
    etag = etag or f'"{hashlib.md5(whole, usedforsecurity=False).hexdigest()}"'
    headers = {"ETag": etag}
    if begin:
        headers["Content-Range"] = f"bytes {begin}-{len(whole) - 1}/{len(whole)}"
    return Answer(206 if begin else 200, whole[begin:], headers, cut=size)


def test_every_file_of_the_release_arrives_under_a_name_that_a_build_knows(fetch, tmp_path):
    done = fetch()
    assert got(tmp_path / "out") == LOCAL
    assert (done.release, done.newer, done.files, done.fetched) == ("2026-09-17", None, 3, 3)
    assert done.bytes == 3 * SIZE


def test_the_manifest_has_size_and_checksums_of_every_file(fetch, tmp_path):
    fetch()
    lines = (tmp_path / "out" / "s2orc_v2.manifest").read_text().splitlines()
    records = {record["name"]: record for record in map(json.loads, lines)}
    assert list(records) == sorted(LOCAL)
    for name, body in LOCAL.items():
        assert records[name]["bytes"] == len(body)
        assert records[name]["xxh3_128"] == xxhash.xxh3_128_hexdigest(body)


def test_a_finished_release_is_not_downloaded_again(fetch, scholar):
    fetch()
    before = served(scholar)
    assert fetch().fetched == 0
    assert served(scholar) == before


def test_a_cut_connection_is_resumed_at_the_byte(fetch, scholar, tmp_path):
    begun = []

    def breaks(name, begin):
        if name == FIRST:
            begun.append(begin)
            if len(begun) < 4:
                return cut_after(FILES[name], begin, 700_000)
        return None

    scholar.on_file = breaks
    fetch()
    assert got(tmp_path / "out") == LOCAL
    assert begun == [0, 700_000, 1_400_000, 2_100_000]
    assert served(scholar) == 3 * SIZE + 3  # and a byte of each, to know the sizes


def test_more_cuts_than_attempts_do_not_end_a_fetch_that_advances(fetch, scholar, tmp_path):
    scholar.on_file = lambda name, begin: (
        cut_after(FILES[name], begin, 200_000) if begin < 2_500_000 else None
    )
    fetch()
    assert got(tmp_path / "out") == LOCAL


def test_busy_servers_are_asked_again(fetch, scholar, tmp_path):
    api = "/datasets/v1/release/2026-09-17/dataset/s2orc_v2"
    scholar.faults = {
        "/datasets/v1/release/latest": [Answer(429, headers={"Retry-After": "0"}), Answer(500)],
        api: [Answer(504), Answer(429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})],
        f"/staging/2026-09-17/{FIRST}": [Answer(503), None, Answer(500), Answer(503)],
    }
    fetch()
    assert not any(scholar.faults.values())
    assert got(tmp_path / "out") == LOCAL


def test_links_that_expire_in_the_middle_are_renewed_and_nothing_is_sent_twice(fetch, scholar, tmp_path):
    expired = []

    def expires(name, begin):
        if name == FIRST and not expired:
            expired.append(name)
            scholar.signature += 1  # every link so far is refused from now on
            return cut_after(FILES[name], begin, 1_000_000)
        return None

    scholar.on_file = expires
    fetch()
    assert got(tmp_path / "out") == LOCAL
    refusals = len([path for path, _ in scholar.server.requests if "X-Amz=1" in path])
    assert refusals >= 4  # three looks and the body that was cut
    bodies = sum(size for path, size in scholar.server.bodies.items() if path.endswith(FIRST))
    assert bodies < SIZE + 1_000  # with the look and what the refusals said


def test_links_that_are_refused_for_good_are_one_sentence_without_the_signature(fetch, scholar):
    scholar.on_file = lambda name, begin: Answer(403)
    with pytest.raises(UserError, match=r"refuses .*\(403\), with new links too") as caught:
        fetch()
    assert "X-Amz" not in str(caught.value)


def test_a_server_without_ranges_sends_the_file_again(fetch, scholar, tmp_path):
    scholar.ranges = False
    cuts = [700_000, None]  # of the second request for the file; the first one looks at its size

    def breaks(name, begin):
        return cut_after(FILES[name], 0, cut) if name == FIRST and cuts and (cut := cuts.pop()) else None

    scholar.on_file = breaks
    fetch()
    assert got(tmp_path / "out") == LOCAL


def test_a_wrong_checksum_is_found_and_the_file_fetched_again(fetch, scholar, tmp_path):
    wrong = [True]

    def flips(name, begin):
        if name == FIRST and wrong:
            wrong.pop()
            answer = cut_after(FILES[name], begin, SIZE)
            answer.body, answer.cut = bytes([answer.body[0] ^ 1]) + answer.body[1:], None
            return answer
        return None

    scholar.on_file = flips
    fetch()
    assert got(tmp_path / "out") == LOCAL


def test_a_checksum_that_stays_wrong_leaves_no_file(fetch, scholar, tmp_path):
    scholar.etags[FIRST] = '"' + "0" * 32 + '"'
    with pytest.raises(UserError, match="do not have the size or the checksum"):
        fetch()
    assert FIRST_LOCAL not in got(tmp_path / "out")


def test_a_file_of_another_length_than_promised_leaves_no_file(fetch, scholar, tmp_path):
    short = FILES[FIRST][:1000]
    etag = f'"{hashlib.md5(FILES[FIRST], usedforsecurity=False).hexdigest()}"'
    scholar.on_file = lambda name, begin: Answer(200, short, {"ETag": etag}) if name == FIRST else None
    with pytest.raises(UserError, match="changed on the server while it was fetched"):
        fetch()
    assert FIRST_LOCAL not in got(tmp_path / "out")


def test_what_was_begun_of_another_file_is_not_continued(fetch, scholar, tmp_path):
    # ETags of objects stored in pieces are no checksums: nothing but their change tells of the other file.
    scholar.etags = dict.fromkeys(FILES, '"before-3"')
    scholar.on_file = lambda name, begin: (
        cut_after(FILES[name], begin, 1_000, '"before-3"') if begin < 4_000 else Answer(500)
    )
    with pytest.raises(UserError, match="attempts"):
        fetch()
    scholar.on_file = lambda name, begin: None
    scholar.files = {name: body[::-1] for name, body in FILES.items()}
    scholar.etags = dict.fromkeys(FILES, '"after-3"')
    fetch()
    assert got(tmp_path / "out") == {name: body[::-1] for name, body in LOCAL.items()}


def test_a_killed_fetch_goes_on_to_the_same_bytes_without_sending_finished_ones_again(
    fetch, scholar, tmp_path
):
    fetch(tmp_path / "undisturbed")
    scholar.server.bodies.clear()
    output = tmp_path / "killed"
    run = [sys.executable, "-m", "tests.data_tools.fetch.commands"]
    run += [*command(scholar, output), "--connections", "1"]
    environment = os.environ | {"S2_API_KEY": "the-key"}
    second = sorted(FILES)[1]
    # The second file stops in its middle, and stays so until the command is killed.
    scholar.on_file = lambda name, begin: (
        cut_after(FILES[name], begin, 1_000_000) if name == second and not begin else None
    )
    scholar.faults = {
        f"/staging/2026-09-17/{second}": [None, None, Answer(503, headers={"Retry-After": "60"})]
    }
    process = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while scholar.faults[f"/staging/2026-09-17/{second}"]:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    scholar.on_file = lambda name, begin: None
    finished = subprocess.run(run, env=environment, check=True, capture_output=True, text=True)
    assert got(output) == LOCAL
    manifest = "s2orc_v2.manifest"
    assert (output / manifest).read_bytes() == (tmp_path / "undisturbed" / manifest).read_bytes()
    assert scholar.server.bodies[f"/staging/2026-09-17/{FIRST}"] == SIZE + 1
    assert scholar.server.bodies[f"/staging/2026-09-17/{second}"] == SIZE + 2
    assert "2 of them were fetched now" in finished.stdout
    assert "ODC-BY" in finished.stdout


def test_a_file_named_just_before_a_kill_is_not_fetched_again(fetch, scholar, tmp_path):
    fetch()
    manifest = tmp_path / "out" / "s2orc_v2.manifest"
    whole = manifest.read_text()
    manifest.write_text(whole.splitlines(keepends=True)[0])
    before = served(scholar)
    assert fetch().fetched == 0
    assert served(scholar) == before + 2
    assert manifest.read_text() == whole


def test_a_file_of_the_users_is_not_overwritten(fetch, tmp_path):
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / FIRST_LOCAL
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="is in the way: it has 4 bytes"):
        fetch()
    assert mine.read_bytes() == b"mine"


def test_the_release_that_was_begun_goes_on_and_a_newer_one_is_told(fetch, scholar):
    fetch()
    scholar.latest = "2026-10-01"
    done = fetch()
    assert (done.release, done.newer) == ("2026-09-17", "2026-10-01")
    with pytest.raises(UserError, match="begun with release 2026-09-17, not 2026-10-01"):
        fetch(release="2026-10-01")


def test_the_key_is_sent_to_the_api_alone_and_written_nowhere(scholar, tmp_path, monkeypatch, capsys):
    secret = "s3cr3t-k3y"  # noqa: S105
    scholar.key = secret
    monkeypatch.setenv("S2_API_KEY", secret)
    output = tmp_path / "out"
    assert commands.main(command(scholar, output)) == 0
    captured = capsys.readouterr()
    assert secret not in captured.out + captured.err
    for path in output.iterdir():
        assert secret.encode() not in path.read_bytes()
        assert b"X-Amz" not in path.read_bytes()
    for path, headers in scholar.server.requests:
        assert (headers.get("x-api-key") == secret) == path.startswith("/datasets/")
        assert headers["user-agent"].startswith("pmc-llama/")


@pytest.mark.parametrize("key", ["", "wrong"])
def test_a_missing_or_refused_key_is_one_sentence(key, scholar, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("S2_API_KEY", key)
    assert commands.main(command(scholar, tmp_path / "out")) == 2
    assert "S2_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["a key", "\u201cquoted\u201d", "two\nlines"])
def test_a_key_that_no_header_can_hold_is_one_sentence_without_it(key, fetch, scholar):
    with pytest.raises(UserError, match="S2_API_KEY has characters") as caught:
        fetch(key=key)
    assert key not in str(caught.value)
    assert scholar.server.requests == []


def test_the_key_does_not_travel_unencrypted(fetch):
    with pytest.raises(UserError, match="unencrypted"):
        fetch(endpoint="http://example.invalid")


@pytest.mark.parametrize(
    "path",
    ["/a/..", "/a/.hidden", "/a/..%2F..%2Fetc%2Fpasswd", "/a/%2Fetc%2Fpasswd", "/a/", "/a/x y", "/a/x%00y"],
)
def test_a_name_that_is_not_plain_is_refused(path):
    with pytest.raises(UserError, match="not a plain file name"):
        local_name(f"https://host{path}?X-Amz-Signature=1")


def test_a_release_that_does_not_exist_is_one_sentence(fetch):
    with pytest.raises(UserError, match="is not a release"):
        fetch(release="../../secrets")


def test_too_small_a_disk_is_told_before_anything_is_fetched(fetch, scholar, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**7, 0, 1000))
    with pytest.raises(UserError, match=r"9\.0 MB are still to come to .* has 0\.0 MB free"):
        fetch()
    assert served(scholar) == 3


def test_two_fetches_do_not_write_to_one_directory(fetch, scholar, tmp_path):
    inner: list[str] = []

    def other(name, begin):
        if not inner:
            inner.append("begun")
            with pytest.raises(UserError, match="Another fetch is writing"):
                fetch()
            inner.append("refused")

    scholar.on_file = other
    fetch()
    assert inner == ["begun", "refused"]
