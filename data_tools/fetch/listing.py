"""Which articles PMC's bucket holds: a listing on disk that a killed run goes on with."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from data_tools.fetch.bucket import Bucket
from data_tools.files import aside, publish

_PREFIX = "metadata/"
_KEY = re.compile(r"metadata/(PMC\d+\.\d+)\.json")


@dataclass(frozen=True)
class Article:
    """An article and its versions.

    Attributes:
        versions: their names, such as `PMC13901.2`, the newest first.
        modified: the day on which one of them last changed, `YYYY-MM-DD`.
    """

    versions: tuple[str, ...]
    modified: str


def list_articles(bucket: Bucket, directory: Path, most: int | None, report: Callable[[int], None]) -> Path:
    """Write the article versions of the bucket to `.listing.tsv`, a line each: name and day of change.

    The bucket has a JSON object for each version below `metadata/`, about 8 million of them (its README.txt),
    so some 8,000 requests. What is listed is kept as it comes; a later call goes on behind it.

    Args:
        bucket: PMC's.
        directory: where the file goes.
        most: stop when so many articles are known; None for all.
        report: told the number of versions listed so far.

    Returns:
        The file; under the name of one that is not finished when `most` was reached.
    """
    path = directory / ".listing.tsv"
    if path.exists():
        return path
    partial = aside(path)
    versions, articles, last = _known(partial)
    pages = bucket.pages(_PREFIX, f"{_PREFIX}{last}.json" if last else "")
    with partial.open("a") as file:
        # One article more than wanted, so that all versions of the last wanted one are known.
        while most is None or articles <= most:
            page = next(pages, None)
            if page is None:
                break
            for entry in page:
                if match := _KEY.fullmatch(entry.key):
                    versions += 1
                    articles += _article(match[1]) != _article(last)
                    last = match[1]
                    file.write(f"{last}\t{entry.modified}\n")
            file.flush()
            report(versions)
        else:
            return partial
    publish(path)
    return path


def read_articles(listing: Path) -> Iterator[Article]:
    """The articles of a listing in the order of their keys, which keeps the versions of one together."""
    with listing.open() as file:
        lines = (line.rstrip("\n").split("\t") for line in file)
        for _, group in groupby(lines, key=lambda line: _article(line[0])):
            versions = list(group)
            names = sorted((name for name, _ in versions), key=_number, reverse=True)
            yield Article(tuple(names), max(modified for _, modified in versions))


def chosen(listing: Path, since: str | None, most: int | None) -> Iterator[Article]:
    """The articles that are looked at: the first `most` of those changed on `since` or later."""
    for article in islice(read_articles(listing), most):
        if since is None or article.modified >= since:
            yield article


def _known(partial: Path) -> tuple[int, int, str]:
    """Versions, articles and the last name in a listing that was begun; a torn last line is cut off."""
    if not partial.exists():
        return 0, 0, ""
    versions = articles = whole = 0
    last = ""
    with partial.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            name = line.split(b"\t")[0].decode()
            articles += _article(name) != _article(last)
            versions, last, whole = versions + 1, name, whole + len(line)
    os.truncate(partial, whole)
    return versions, articles, last


def _article(name: str) -> str:
    return name.partition(".")[0]


def _number(name: str) -> int:
    return int(name.partition(".")[2])
