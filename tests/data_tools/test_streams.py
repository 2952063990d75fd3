"""Input files are read whole or not at all, wherever they are and however they are compressed."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import xxhash
import zstandard

from data_tools.errors import UserError
from data_tools.streams import DamagedFile, opened, stored_checksum

CONTENT = b"".join(b"line %d of some length\n" % number for number in range(60_000))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda content: zstandard.compress(content),
    "txt": lambda content: content,
}


def read(path: Path | str) -> bytes:
    with opened(str(path)) as stream:
        return stream.read()


@pytest.mark.parametrize("kind", COMPRESS)
def test_lines_position_and_checksum_come_from_one_pass(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(COMPRESS[kind](CONTENT))
    with opened(str(path)) as stream:
        assert b"".join(stream) == CONTENT
        assert stream.position == path.stat().st_size
        assert stream.checksum() == xxhash.xxh3_128_hexdigest(path.read_bytes()) == stored_checksum(str(path))


@pytest.mark.parametrize("kind", COMPRESS)
def test_the_checksum_is_of_the_whole_file_wherever_reading_ended(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(COMPRESS[kind](CONTENT))
    with opened(str(path)) as stream:
        stream.readline()
        assert stream.checksum() == stored_checksum(str(path))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_file_of_several_members_or_frames_is_read_to_its_end(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"".join(COMPRESS[kind](part) for part in (CONTENT, b"", b"the end")))
    assert read(path) == CONTENT + b"the end"


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-3],
        lambda whole: whole[:-1],
        lambda whole: whole + whole[:20],
        lambda whole: whole[: len(whole) // 2] + bytes(50) + whole[len(whole) // 2 + 50 :],
        lambda whole: whole + b"something else",
        lambda whole: b"plain text",
        lambda whole: b"",
    ],
    ids=["half", "trailer cut", "a byte short", "second cut", "damaged", "followed", "plain", "empty"],
)
def test_damaged_compression_is_an_error_naming_the_file(
    kind: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"x.jsonl.{kind}"
    path.write_bytes(damage(COMPRESS[kind](CONTENT)))
    with pytest.raises(DamagedFile, match=rf"x\.jsonl\.{kind} is not a readable"):
        read(path)


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_url_is_read_as_a_local_file_is(kind: str) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/streams/x.{kind}", COMPRESS[kind](CONTENT))
    with opened(f"memory://streams/x.{kind}") as stream:
        assert stream.read() == CONTENT
        assert stream.checksum() == stored_checksum(f"memory://streams/x.{kind}")


def test_a_url_of_an_unknown_protocol_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"nonesuch://a/b cannot be read"):
        read("nonesuch://a/b")


def test_errors_of_a_remote_file_system_are_errors_of_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    class LostConnection(Exception):
        """As the clients of remote stores have of their own."""

    class Failing(io.BytesIO):
        def readinto(self, buffer: object) -> int:
            raise LostConnection("in the middle")

    files = fsspec.filesystem("memory")
    files.pipe("/lost.jsonl", CONTENT)
    monkeypatch.setattr(type(files), "_open", lambda *_, **__: Failing())
    with pytest.raises(OSError, match="LostConnection: in the middle"):
        read("memory://lost.jsonl")
