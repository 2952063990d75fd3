"""Packages of articles: staged file by file, then packed into one tar.gz with a manifest beside it."""

import gzip
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.fetch.bucket import Bucket, md5
from data_tools.fetch.listing import Article
from data_tools.fetch.metadata import Metadata, parse_metadata, why_not
from data_tools.files import published, write_published

_READINGS = 3
_COMPRESSION = 6


@dataclass(frozen=True)
class Member:
    """A file of a package.

    Attributes:
        member: its name in the package, which is its key in the bucket.
        md5: hex.
        bytes: its size.
    """

    member: str
    md5: str
    bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of an article.

    Attributes:
        article: the name of the version, such as `PMC13901.1`.
        left_out: why it is not in the package; None when it is.
        retracted: has it been.
        members: its JSON and its XML, in this order, so that a reader of the stream has the JSON first.
    """

    article: str
    left_out: str | None
    retracted: bool = False
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Package:
    """Consecutive articles of the listing, and the files made of them.

    Attributes:
        directory: where it goes.
        name: such as `pmc-commercial-00000`.
        group: the licence group.
        articles: the articles looked at; those of other groups are left out.
    """

    directory: Path
    name: str
    group: str
    articles: tuple[Article, ...]

    @property
    def archive(self) -> Path:
        """The tar.gz; there is none when no article is wanted."""
        return self.directory / f"{self.name}.tar.gz"

    @property
    def manifest(self) -> Path:
        """Written last: a package that has one is finished. JSON lines: a head, then members and the rest."""
        return self.directory / f"{self.name}.manifest"

    @property
    def staging(self) -> Path:
        """The files of a package that is not finished."""
        return self.directory / f".{self.name}.staging"

    def finished(self) -> Counter[str] | None:
        """The counts of a package that is finished and holds these articles, else None."""
        try:
            with self.manifest.open() as file:
                head: dict[str, Any] = json.loads(file.readline())
            size = self.archive.stat().st_size if head["bytes"] else 0
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        same = head["range"] == self._range() and head["bytes"] == size
        return Counter(head["counts"]) if same else None

    def stage(self, bucket: Bucket, article: Article) -> Outcome:
        """Have the newest wanted version of an article among the staged files.

        Whole files of an earlier run are not fetched again.

        Raises:
            UserError: the bucket cannot be read.
        """
        outcomes = []
        for version in article.versions:
            outcomes.append(self._stage_version(bucket, version))
            if outcomes[-1].left_out is None:
                return outcomes[-1]
        return outcomes[0]

    def pack(self, outcomes: Sequence[Outcome], go_on: Callable[[], None] = lambda: None) -> Counter[str]:
        """Write the archive and the manifest, then let the staged files go; returns what was counted.

        The bytes depend on the articles alone: order, times, owners and modes are fixed. `go_on` is called
        before each member and raises when the command is ending.
        """
        counts = Counter(outcome.left_out or "articles" for outcome in outcomes)
        members = [member for outcome in outcomes for member in outcome.members]
        counts["retracted"] = sum(outcome.retracted for outcome in outcomes)
        counts["bytes"] = sum(member.bytes for member in members)
        if members:
            with published(self.archive) as partial:
                self._write_archive(partial, members, go_on)
        head = {
            "package": self.name,
            "range": self._range(),
            "bytes": self.archive.stat().st_size if members else 0,
            "counts": {name: number for name, number in sorted(counts.items()) if number},
        }
        lines = [head, *(asdict(member) for member in members)]
        lines += [
            {"article": outcome.article, "left_out": outcome.left_out}
            for outcome in outcomes
            if outcome.left_out
        ]
        write_published(self.manifest, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.tidy()
        return counts

    def tidy(self) -> None:
        """Let the staged files go."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _range(self) -> list[str | int]:
        return [self.articles[0].versions[0], self.articles[-1].versions[0], len(self.articles)]

    def _stage_version(self, bucket: Bucket, version: str) -> Outcome:
        # The metadata may change while its article is fetched: then both are read again.
        problem = ""
        for reading in range(_READINGS):
            body = self._object(bucket, f"metadata/{version}.json", f"{version}.json", anew=reading > 0)
            if body is None:
                return Outcome(version, "removed from the bucket")
            try:
                metadata = parse_metadata(body)
            except ValueError:
                problem = "metadata that is not JSON"
                continue
            if reason := why_not(metadata, self.group):
                return Outcome(version, reason)
            xml = self._xml(bucket, version, metadata)
            if xml is None:
                return Outcome(version, "no XML")
            if metadata.xml_md5 in (None, md5(xml)):
                return Outcome(
                    version,
                    None,
                    metadata.retracted,
                    (
                        Member(f"{version}/{version}.json", md5(body), len(body)),
                        Member(f"{version}/{version}.xml", md5(xml), len(xml)),
                    ),
                )
            (self.staging / f"{version}.xml").unlink()
            problem = "another checksum than its metadata says"
        return Outcome(version, problem)

    def _xml(self, bucket: Bucket, version: str, metadata: Metadata) -> bytes | None:
        anew = metadata.xml_md5 is None  # nothing to check a file of an earlier run against
        return self._object(bucket, f"{version}/{version}.xml", f"{version}.xml", anew)

    def _object(self, bucket: Bucket, key: str, name: str, anew: bool) -> bytes | None:
        path = self.staging / name
        if not anew and path.exists():
            return path.read_bytes()
        body = bucket.get(key)
        if body is not None:
            partial = path.with_name(f"{name}.partial")
            partial.write_bytes(body)
            os.replace(partial, path)
        return body

    def _write_archive(self, path: Path, members: Sequence[Member], go_on: Callable[[], None]) -> None:
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for member in members:
                go_on()
                body = (self.staging / Path(member.member).name).read_bytes()
                info = tarfile.TarInfo(member.member)
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
