"""Fetching PMC's open-access subset from its public bucket, as packages that a build reads."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console

from data_tools.fetch import disk, request
from data_tools.fetch.bucket import Bucket
from data_tools.fetch.listing import Article, chosen, list_articles
from data_tools.fetch.packages import Package
from data_tools.fetch.progress import ArticleProgress, ListingProgress
from data_tools.fetch.web import Web, refuse_credentials

BUCKET = "https://pmc-oa-opendata.s3.us-east-1.amazonaws.com"
ARTICLES_PER_PACKAGE = 10_000
# Of 1,033 articles under CC BY: 128 kB of XML each, 25.4 kB as tar.gz. Metadata is about 1 kB.
_PACKED_BYTES_PER_ARTICLE = 26_000


@dataclass(frozen=True)
class PmcFetched:
    """What a directory holds after a fetch.

    Attributes:
        packages: archives, those of earlier runs included.
        articles: in them.
        retracted: of these.
        bytes: of the archives' members, uncompressed.
        left_out: articles by the reason for leaving them out.
    """

    packages: int
    articles: int
    retracted: int
    bytes: int
    left_out: dict[str, int]


def fetch_pmc(
    output: Path,
    group: str,
    *,
    endpoint: str = BUCKET,
    connections: int = 32,
    since: str | None = None,
    limit: int | None = None,
    articles_per_package: int = ARTICLES_PER_PACKAGE,
    console: Console,
    web: Web | None = None,
) -> PmcFetched:
    """Fetch the newest wanted version of every article of a licence group, JSON and XML.

    The articles of the bucket's listing, in the order of their keys, are cut into packages, which do not
    depend on when a run was killed: finished ones stay, and of the one under way no whole file is fetched
    twice.

    Args:
        output: a directory; the same one goes on with what it has.
        group: `commercial`, `noncommercial` or `all`.
        endpoint: URL of the bucket.
        connections: requests at once.
        since: `YYYY-MM-DD`; only articles that changed on that day or later.
        limit: look at the first so many articles only.
        articles_per_package: articles looked at for each package.
        console: for progress.
        web: how requests are made; with `connections` connections when not given.

    Raises:
        UserError: the endpoint holds a password, the bucket cannot be reached or is none, the directory was
            begun with other options or is in use, or the disk is full.
    """
    refuse_credentials(endpoint)
    web = web or Web(connections)
    bucket = Bucket(endpoint, web)
    options = {"source": "pmc", "endpoint": endpoint, "group": group, "since": since or "ever"}
    with request.held(output), disk.full_disk_told(output):
        request.require_same(output, options | {"articles per package": str(articles_per_package)})
        with ListingProgress(console) as progress:
            listing = list_articles(bucket, output, limit, progress.listed)
        total = sum(1 for _ in chosen(listing, since, limit))
        _tell_estimate(output, total, console)
        packages = _packages(output, group, chosen(listing, since, limit), articles_per_package)
        return _fetch(packages, bucket, web, total, console)


def _fetch(packages: Iterator[Package], bucket: Bucket, web: Web, total: int, console: Console) -> PmcFetched:
    made: list[Counter[str]] = []
    packing: Future[Counter[str]] | None = None
    with (
        ArticleProgress(total, console) as progress,
        ThreadPoolExecutor(1) as packer,  # compresses one package while the next one is fetched
        web.workers() as workers,
    ):
        for package in packages:
            if counts := package.finished():
                package.tidy()  # killed just before it could
                made.append(counts)
                progress.found(len(package.articles))
                continue
            package.staging.mkdir(exist_ok=True)
            outcomes = []
            stage = partial(package.stage, bucket)
            for outcome in workers.map(stage, package.articles):
                outcomes.append(outcome)
                progress.looked_at(sum(member.bytes for member in outcome.members))
            if packing:
                made.append(packing.result())
            packing = packer.submit(package.pack, outcomes, web.go_on)
        if packing:
            made.append(packing.result())
    return _summary(made)


def _packages(output: Path, group: str, articles: Iterator[Article], size: int) -> Iterator[Package]:
    number = 0
    while several := tuple(islice(articles, size)):
        yield Package(output, f"pmc-{group}-{number:05}", group, several)
        number += 1


def _summary(made: list[Counter[str]]) -> PmcFetched:
    counts: Counter[str] = Counter()
    for package in made:
        counts.update(package)
    articles, retracted, size = (counts.pop(name, 0) for name in ("articles", "retracted", "bytes"))
    packages = sum(package["articles"] > 0 for package in made)
    return PmcFetched(packages, articles, retracted, size, dict(sorted(counts.items())))


def _tell_estimate(output: Path, articles: int, console: Console) -> None:
    size = articles * _PACKED_BYTES_PER_ARTICLE
    short = size > disk.free(output)
    console.print(
        f"{articles:,} articles are to be looked at, in {2 * articles:,} requests at most; if all were "
        f"wanted, they would take about {disk.gigabytes(size)}, and the disk of {output} has "
        f"{disk.gigabytes(disk.free(output))} free" + (": watch it, it may not be enough." if short else "."),
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
