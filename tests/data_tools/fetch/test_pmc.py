"""Fetching PMC: the right versions of the right articles, whatever the network and the user do meanwhile."""

import errno
import hashlib
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_tools.build import build
from data_tools.errors import UserError
from data_tools.fetch.bucket import Bucket
from data_tools.fetch.listing import Article
from data_tools.fetch.metadata import parse_metadata
from data_tools.fetch.packages import Package
from data_tools.fetch.pmc import PmcFetched, fetch_pmc
from data_tools.fetch.s2orc import fetch_s2orc
from data_tools.fetch.web import StoppedError
from data_tools.recipe import Recipe
from tests.data_tools.fetch import commands
from tests.data_tools.fetch.conftest import COMMERCIAL, Front, objects, quick_web
from tests.data_tools.fetch.servers import Answer


@pytest.fixture
def fetch(front: Front, console: Console, tmp_path: Path) -> Callable[..., PmcFetched]:
    def run(output: Path = tmp_path / "out", group: str = "commercial", **options: object) -> PmcFetched:
        settings = {"endpoint": front.server.url, "articles_per_package": 5, "web": quick_web()} | options
        return fetch_pmc(output, group, console=console, **settings)

    return run


def members(directory: Path) -> dict[str, bytes]:
    """What the packages hold, in their order."""
    found = {}
    for path in sorted(directory.glob("*.tar.gz")):
        with tarfile.open(path) as archive:
            for info in archive:
                file = archive.extractfile(info)
                assert file is not None
                found[info.name] = file.read()
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_packages_hold_the_newest_wanted_version_of_each_article_json_before_xml(fetch, tmp_path):
    done = fetch()
    expected = {}
    bucket = objects()
    for name in COMMERCIAL:
        for suffix in ("json", "xml"):
            key = f"{name}/{name}.{suffix}"
            expected[key] = bucket[key]
    found = members(tmp_path / "out")
    assert list(found) == list(expected)
    assert found == expected
    assert (done.articles, done.retracted) == (len(COMMERCIAL), 1)


def test_a_build_reads_the_packages_with_what_their_json_says(fetch, tmp_path, tiny_tokenizer):
    fetch()
    build([tmp_path / "out"], tiny_tokenizer, tmp_path / "corpus", Recipe(), workers=1)
    tables = sorted((tmp_path / "corpus" / "parts").glob("*.documents.parquet"))
    rows = pa.concat_tables([pq.read_table(path, columns=["license", "retracted"]) for path in tables])
    assert rows.num_rows == len(COMMERCIAL)
    assert rows["retracted"].to_pylist().count(True) == 1
    assert rows["license"].to_pylist().count("CC BY-SA") == 1


def test_what_is_left_out_is_counted_and_listed_with_its_reason(fetch, tmp_path):
    done = fetch()
    assert done.left_out == {
        "another checksum than its metadata says": 1,
        "another licence group": 2,
        "metadata that is not JSON": 1,
        "no XML": 2,
        "not in the open-access subset": 1,
    }
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "out").glob("*.manifest"))
        for line in path.read_text().splitlines()
    ]
    reasons = {line["article"]: line["left_out"] for line in lines if "left_out" in line}
    assert reasons["PMC7.1"] == "another checksum than its metadata says"
    assert reasons["PMC4.1"] == "another licence group"


def test_a_manifest_has_the_checksum_and_size_of_every_member(fetch, tmp_path):
    fetch()
    found = members(tmp_path / "out")
    noted = {}
    for path in (tmp_path / "out").glob("*.manifest"):
        for line in map(json.loads, path.read_text().splitlines()):
            if "member" in line:
                noted[line["member"]] = (line["md5"], line["bytes"])
    assert noted == {
        name: (hashlib.md5(body, usedforsecurity=False).hexdigest(), len(body))
        for name, body in found.items()
    }


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("noncommercial", ["PMC4.1"]),
        ("all", sorted([*COMMERCIAL, "PMC4.1", "PMC9.1"], key=lambda name: name.split(".")[0] + ".")),
    ],
)
def test_a_licence_group_holds_its_articles_and_no_other(fetch, tmp_path, group, names):
    fetch(group=group)
    assert [name.split("/")[0] for name in members(tmp_path / "out") if name.endswith(".xml")] == names


def test_the_bytes_do_not_depend_on_connections_or_pages(fetch, front, tmp_path):
    fetch(tmp_path / "a")
    front.page = 3
    fetch(tmp_path / "b", web=quick_web(1))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_second_run_fetches_nothing(fetch, front):
    first = fetch()
    front.server.requests.clear()
    assert fetch() == first
    assert front.server.requests == []


def test_faults_of_the_network_change_nothing(fetch, front, tmp_path):
    fetch(tmp_path / "calm")
    front.faults = {
        "/": [Answer(503, b"<Error><Code>SlowDown</Code></Error>"), "cut"],
        "/metadata/PMC1.1.json": [Answer(429, headers={"Retry-After": "0"}), "cut"],
        "/PMC1.1/PMC1.1.xml": ["cut", Answer(500), "flip", "cut"],
        "/PMC20.1/PMC20.1.xml": [Answer(503, headers={"Retry-After": "0"}), "flip"],
    }
    fetch(tmp_path / "stormy")
    assert not any(front.faults.values())
    assert files(tmp_path / "calm") == files(tmp_path / "stormy")


def test_a_server_that_stays_broken_is_one_sentence_and_the_same_command_goes_on(fetch, front, tmp_path):
    front.faults = {"/PMC25.1/PMC25.1.xml": [Answer(500)] * 5}
    with pytest.raises(UserError, match=r"PMC25\.1\.xml could not be fetched in 5 attempts: .* 500"):
        fetch()
    before = front.server.bodies["/PMC1.1/PMC1.1.xml"]
    fetch()
    assert next(iter(members(tmp_path / "out"))) == "PMC1.1/PMC1.1.json"
    assert len(members(tmp_path / "out")) == 2 * len(COMMERCIAL)
    assert front.server.bodies["/PMC1.1/PMC1.1.xml"] == before


def test_a_listing_that_broke_off_is_not_begun_again(fetch, front):
    front.page = 4
    answer, count = front.server.answer, 0

    def breaks(path, headers):
        nonlocal count
        count += path.startswith("/?")
        return Answer(500) if count > 3 and path.startswith("/?") else answer(path, headers)

    front.server.answer = breaks
    with pytest.raises(UserError, match="listing"):
        fetch()
    front.server.answer = answer
    front.server.requests.clear()
    fetch()
    listings = [path for path, _ in front.server.requests if path.startswith("/?")]
    assert len(listings) == 6 - 3  # 23 keys, 4 a page, 3 pages known
    assert all("start-after=&" not in path and "start-after=metadata" in path for path in listings)


def test_a_killed_fetch_goes_on_with_the_same_bytes_and_fetches_no_file_twice(fetch, front, tmp_path):
    fetch(tmp_path / "undisturbed")
    once = dict(front.server.bodies)
    front.server.bodies.clear()
    answer = front.server.answer

    def slowly(path, headers):
        time.sleep(0.01)  # so that there is a middle to be killed in
        return answer(path, headers)

    front.server.answer = slowly
    output = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "tests.data_tools.fetch.commands",
        "fetch",
        "pmc",
        "--group",
        "commercial",
    ]
    command += ["--output", str(output), "--endpoint", front.server.url, "--connections", "2"]
    command += ["--articles-per-package", "5"]
    for xmls in (3, 9):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while sum(path.endswith(".xml") for path in front.server.bodies) < xmls:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not all((output / f"pmc-commercial-{number:05}.manifest").exists() for number in range(5))
    subprocess.run(command, check=True, capture_output=True)
    mine = {name: body for name, body in files(output).items() if not name.startswith(".")}
    undisturbed = {n: b for n, b in files(tmp_path / "undisturbed").items() if not n.startswith(".")}
    assert mine == undisturbed
    assert [path for path in output.iterdir() if path.is_dir()] == []
    # The two requests under way at each kill may be repeated, nothing else of what a calm fetch served.
    # PMC7.1 has damage to find out about, which takes as many readings each time.
    again = {p for p in once if front.server.bodies[p] > once[p] and p != "/" and "PMC7.1" not in p}
    again -= {p for p in again if "PMC11.1" in p}
    assert len(again) <= 4


def test_an_interrupted_fetch_ends_soon_and_goes_on(fetch, front, tmp_path):
    answer = front.server.answer
    front.server.answer = lambda path, headers: (
        Answer(503, headers={"Retry-After": "600"}) if path.endswith("PMC25.1.xml") else answer(path, headers)
    )
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "tests.data_tools.fetch.commands",
        "fetch",
        "pmc",
        "--group",
        "commercial",
    ]
    command += ["--output", str(output), "--endpoint", front.server.url, "--articles-per-package", "5"]
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell started behind it would ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    signal.signal(signal.SIGINT, handler)
    while not any(path.endswith("PMC25.1.xml") for path in front.server.paths()):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in error
    front.server.answer = answer
    assert fetch().articles == len(COMMERCIAL)


def test_a_package_that_is_being_packed_when_the_command_ends_is_not_finished(front, tmp_path):
    web = quick_web()
    bucket = Bucket(front.server.url, web)
    package = Package(tmp_path, "p", "commercial", (Article(("PMC1.1",), "2026-01-01"),))
    package.staging.mkdir()
    outcome = package.stage(bucket, package.articles[0])
    with pytest.raises(KeyboardInterrupt), web.workers():
        raise KeyboardInterrupt
    with pytest.raises(StoppedError):
        package.pack([outcome], web.go_on)
    assert list(tmp_path.iterdir()) == [package.staging]


@pytest.mark.parametrize("damaged", [b"[]", b"null", b"[" * 100_000])
def test_json_that_is_no_object_is_told_and_not_a_crash(damaged, fetch, tmp_path):
    with pytest.raises(ValueError, match=r"object|nested"):
        parse_metadata(damaged)
    fetch()
    before = files(tmp_path / "out")
    (tmp_path / "out" / "pmc-commercial-00000.manifest").write_bytes(damaged + b"\n")
    fetch()
    assert files(tmp_path / "out") == before


def test_only_what_changed_since_a_day_is_looked_at(fetch):
    assert fetch(since="2999-01-01").articles == 0


def test_a_limit_looks_at_the_first_articles_only_and_can_be_raised(fetch, front, tmp_path):
    front.page = 4
    assert fetch(limit=3).articles == 2  # PMC1, PMC10, and PMC11 whose metadata is damaged
    assert len([path for path, _ in front.server.requests if path.startswith("/?")]) < 3
    assert fetch().articles == len(COMMERCIAL)


def test_a_directory_is_not_continued_with_other_options(fetch):
    fetch()
    with pytest.raises(UserError, match="begun with group commercial, not all"):
        fetch(group="all")


@pytest.mark.parametrize("secret", ["user:secret@", "secret@", "user:se/cret@"])
def test_an_endpoint_with_a_password_is_refused_and_written_nowhere(secret, tmp_path, console):
    for where in (f"https://{secret}127.0.0.1/bucket", f"https://127.0.0.1/{secret}?sig=x"):
        with pytest.raises(UserError, match="bare address of the server") as error:
            fetch_pmc(tmp_path / "out", "commercial", endpoint=where, console=console)
        assert "secret" not in str(error.value)
        with pytest.raises(UserError, match="bare address of the server"):
            fetch_s2orc(tmp_path / "out", "key", endpoint=where, console=console)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_clear_stop_and_can_be_continued(fetch, tmp_path, monkeypatch):
    write, written = Path.write_bytes, 0

    def full(path, body):
        nonlocal written
        written += 1
        if written > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, body)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"The disk of .* is full"):
            fetch()
    assert fetch().articles == len(COMMERCIAL)


def test_a_bucket_that_is_none_is_one_sentence(fetch, front):
    front.server.answer = lambda path, headers: Answer(200, b"<html>a portal</html>")
    with pytest.raises(UserError, match="does not answer with the listing of a bucket; check --endpoint"):
        fetch()


def test_without_a_network_the_error_is_one_sentence(tmp_path, capsys):
    status = commands.main(
        [
            "fetch",
            "pmc",
            "--group",
            "all",
            "--output",
            str(tmp_path),
            "--endpoint",
            "http://127.0.0.1:1/bucket",
        ]
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    assert "could not be fetched in 3 attempts: there is no connection to the server" in error


def test_the_command_says_what_it_got_and_the_terms(front, tmp_path, capsys):
    arguments = ["fetch", "pmc", "--group", "commercial", "--output", str(tmp_path / "out")]
    assert commands.main([*arguments, "--endpoint", front.server.url]) == 0
    captured = capsys.readouterr()
    assert f"{len(COMMERCIAL)} articles in 1 package in" in captured.out
    assert "left out: 2 another licence group" in captured.out
    assert "license_code" in captured.out
    assert "articles are to be looked at" in captured.err
