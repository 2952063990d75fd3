"""Fetching a release of S2ORC through Semantic Scholar's Datasets API."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from data_tools.errors import UserError
from data_tools.fetch import disk, request
from data_tools.fetch.download import Downloaded, Remote, download, have, look
from data_tools.fetch.release import DatasetsApi
from data_tools.fetch.web import Web, refuse_credentials
from data_tools.files import checksum, write_published
from data_tools.progress import Progress

API = "https://api.semanticscholar.org"
DATASETS = ("s2orc_v2", "s2orc")


@dataclass(frozen=True)
class S2orcFetched:
    """What a directory holds after a fetch.

    Attributes:
        release: the one that it was begun with.
        newer: a later one that there is by now, or None.
        files: all of the release.
        fetched: of these, in this run.
        bytes: of all files.
    """

    release: str
    newer: str | None
    files: int
    fetched: int
    bytes: int


def fetch_s2orc(
    output: Path,
    key: str,
    *,
    dataset: str = "s2orc_v2",
    release: str = "latest",
    endpoint: str = API,
    connections: int = 4,
    console: Console,
    web: Web | None = None,
    interval: float = 1.0,
) -> S2orcFetched:
    """Fetch every file of a dataset of a release.

    Args:
        output: a directory; the same one goes on with the release that it was begun with.
        key: of the API; it is sent to the endpoint and kept nowhere.
        dataset: `s2orc_v2` or `s2orc`.
        release: its date, or `latest`.
        endpoint: of the API.
        connections: files at once.
        console: for progress.
        web: how requests are made; with `connections` connections when not given.
        interval: seconds between requests to the API.

    Raises:
        UserError: the endpoint holds a password, the API or a file cannot be had, the key is refused, the
            directory was begun with something else or is in use, a file name is not plain, or the disk is too
            small.
    """
    refuse_credentials(endpoint)
    web = web or Web(connections)
    api = DatasetsApi(endpoint, key, web, interval)
    with request.held(output), disk.full_disk_told(output):
        begun = request.recorded(output).get("release")
        newest = api.latest() if release == "latest" else release
        wanted = begun if begun and release == "latest" else newest
        links = _Links(api, wanted, dataset)
        request.require_same(
            output, {"source": "s2orc", "endpoint": endpoint, "dataset": dataset, "release": wanted}
        )
        manifest = _Manifest(output / f"{dataset}.manifest")
        fetched = _fetch(output, links, manifest, web, console)
        names = links.names()
    return S2orcFetched(
        wanted,
        newest if newest != wanted else None,
        len(names),
        fetched,
        sum(manifest.files[name].bytes for name in names),
    )


def _fetch(output: Path, links: "_Links", manifest: "_Manifest", web: Web, console: Console) -> int:
    missing = [name for name in links.names() if not manifest.has(output / name)]
    with web.workers() as workers:
        remotes = dict(zip(missing, workers.map(partial(_look, web, links), missing), strict=True))
        _adopt(output, remotes, manifest)
        to_come = {name: remote for name, remote in remotes.items() if not manifest.has(output / name)}
        if not to_come:
            return 0
        left = {name: remote.bytes - have(output / name, remote) for name, remote in to_come.items()}
        _tell(output, len(to_come), sum(left.values()), console)
        disk.require(output, sum(left.values()))
        with Progress(sum(left.values()), "files", console) as progress:
            under_way = {}
            for number, (name, remote) in enumerate(to_come.items()):
                progress.report(number, 0, 0)
                count = partial(_count, progress, number, remote.bytes - left[name])
                task = workers.submit(download, web, links.of(name), output / name, remote, count)
                under_way[task] = number, name
            for task in as_completed(under_way):
                number, name = under_way[task]
                manifest.add(name, task.result())
                progress.report(number, 1, left[name])
    return len(to_come)


def _look(web: Web, links: "_Links", name: str) -> Remote:
    return look(web, links.of(name), name)


def _count(progress: Progress, number: int, before: int, there: int) -> None:
    progress.report(number, 0, max(0, there - before))


def _adopt(output: Path, remotes: dict[str, Remote], manifest: "_Manifest") -> None:
    """Note files that a killed run had named but not yet noted; anything else in their place is not ours."""
    for name, remote in remotes.items():
        path = output / name
        if not path.exists():
            continue
        if path.stat().st_size != remote.bytes:
            raise UserError(
                f"{path} is in the way: it has {path.stat().st_size} bytes, the file of that name in the "
                f"release has {remote.bytes}; remove it or choose another --output."
            )
        manifest.add(name, Downloaded(remote.bytes, checksum(path), remote.etag))


def _tell(output: Path, files: int, size: int, console: Console) -> None:
    console.print(
        f"{files} files, {disk.gigabytes(size)}, are still to come; "
        f"the disk of {output} has {disk.gigabytes(disk.free(output))} free.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


class _Links:
    """The links of a release, renewed for all files at once when one has expired."""

    def __init__(self, api: DatasetsApi, release: str, dataset: str) -> None:
        self._ask: Callable[[], dict[str, str]] = partial(api.links, release, dataset)
        self._lock = threading.Lock()
        self._links = self._ask()

    def names(self) -> list[str]:
        return list(self._links)

    def of(self, name: str) -> "_Link":
        return _Link(self, name)

    def url(self, name: str, expired: str | None) -> str:
        with self._lock:
            if self._links[name] == expired:
                renewed = self._ask()
                if renewed.keys() != self._links.keys():
                    raise UserError("The API names other files for the release than before; try again later.")
                self._links = renewed
            return self._links[name]


@dataclass(frozen=True)
class _Link:
    links: _Links
    name: str

    def url(self, expired: str | None = None) -> str:
        return self.links.url(self.name, expired)


class _Manifest:
    """The finished files: a JSON line each with size, XXH3-128 and ETag, sorted by name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.files: dict[str, Downloaded] = {}
        try:
            for line in path.read_text().splitlines() if path.exists() else ():
                record = json.loads(line)
                name = record.pop("name")
                self.files[name] = Downloaded(**record)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged; remove it, and the finished files are checked again."
            ) from error

    def has(self, path: Path) -> bool:
        known = self.files.get(path.name)
        return known is not None and path.exists() and path.stat().st_size == known.bytes

    def add(self, name: str, file: Downloaded) -> None:
        self.files[name] = file
        lines = (json.dumps({"name": name} | asdict(self.files[name])) for name in sorted(self.files))
        write_published(self._path, "".join(f"{line}\n" for line in lines).encode())
