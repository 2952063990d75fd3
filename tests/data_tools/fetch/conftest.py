"""A bucket in the layout of PMC's, served by moto, with a front that counts and can fail."""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import boto3
import pytest
from moto.server import ThreadedMotoServer
from rich.console import Console

from data_tools.fetch.web import Web
from tests.data_tools.fetch.servers import Answer, Server, forward
from tests.data_tools.sources import simple_article

BUCKET = "pmc-oa-opendata"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def quick_web(connections: int = 4) -> Web:
    """A client whose pauses are short."""
    return Web(connections, attempts=5, backoff=0.001)


def xml_of(name: str) -> bytes:
    return simple_article(int(name[3:].split(".")[0]), words=30).encode()


def json_of(name: str, license: str | None, **changes: object) -> bytes:
    """An article version's JSON, with the keys of the bucket's README.txt."""
    pmcid, _, version = name.partition(".")
    digest = hashlib.md5(xml_of(name), usedforsecurity=False).hexdigest()
    record: dict[str, object] = {
        "pmcid": pmcid,
        "version": int(version),
        "pmid": 1,
        "doi": f"10.1/{name}",
        "title": name,
        "citation": "J. 2020",
        "is_pmc_openaccess": True,
        "is_manuscript": False,
        "is_historical_ocr": False,
        "is_retracted": False,
        "license_code": license,
        "xml_url": f"s3://{BUCKET}/{name}/{name}.xml?md5={digest}",
        "text_url": f"s3://{BUCKET}/{name}/{name}.txt?md5={digest}",
        "pdf_url": None,
        "media_urls": [],
    }
    return json.dumps(record | changes).encode()


def objects() -> dict[str, bytes]:
    """Everything in the bucket, by key."""
    made: dict[str, bytes] = {"README.txt": b"PMC", "metadata/README": b"not an article"}

    def add(name: str, metadata: bytes, xml: bytes | None) -> None:
        made[f"metadata/{name}.json"] = made[f"{name}/{name}.json"] = metadata
        made[f"{name}/{name}.txt"] = b"text"
        if xml is not None:
            made[f"{name}/{name}.xml"] = xml

    def plain(name: str, license: str | None, **changes: object) -> None:
        add(name, json_of(name, license, **changes), xml_of(name))

    plain("PMC1.1", "CC BY")
    plain("PMC2.1", "CC BY")
    plain("PMC2.2", "CC BY")
    plain("PMC3.9", "CC0")
    plain("PMC3.10", "CC BY-SA")
    plain("PMC4.1", "CC BY-NC-ND")
    plain("PMC5.1", "CC BY-ND", is_retracted=True)
    add("PMC6.1", json_of("PMC6.1", "CC BY"), None)
    plain("PMC7.1", "CC BY", xml_url=f"s3://{BUCKET}/PMC7.1/PMC7.1.xml?md5={'0' * 32}")
    plain("PMC8.1", "TDM", is_pmc_openaccess=False, is_manuscript=True)
    plain("PMC9.1", None)
    plain("PMC10.1", "CC BY")
    plain("PMC10.2", "TDM", is_pmc_openaccess=False, is_manuscript=True)
    add("PMC11.1", b'{"pmcid": "PMC11", ', xml_of("PMC11.1"))
    plain("PMC12.1", "CC BY", xml_url=None)
    made["PMC13.1/PMC13.1.xml"] = xml_of("PMC13.1")  # without metadata its licence is unknown
    for number in range(20, 26):
        plain(f"PMC{number}.1", "CC BY")
    return made


COMMERCIAL = [
    *("PMC1.1", "PMC10.1", "PMC2.2"),
    *(f"PMC{number}.1" for number in range(20, 26)),
    *("PMC3.10", "PMC5.1"),
]


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """URL of the filled bucket at moto."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",  # noqa: S106
    )
    client.create_bucket(Bucket=BUCKET, ACL="public-read")
    for key, body in objects().items():
        client.put_object(Bucket=BUCKET, Key=key, Body=body, ACL="public-read")
    yield f"{url}/{BUCKET}"
    server.stop()


@dataclass
class Front:
    """Stands before the bucket.

    Attributes:
        server: counts what passes.
        faults: answers sent instead, a list by path, the first one first.
        page: entries in a page of a listing.
    """

    moto: str
    faults: dict[str, list[Answer | str]] = field(default_factory=dict)
    page: int = 1000

    def __post_init__(self) -> None:
        self.server = Server(self._answer)

    def _answer(self, path: str, _: dict[str, str]) -> Answer:
        short, _, query = path.partition("?")
        fault = self.faults[short].pop(0) if self.faults.get(short) else None
        if isinstance(fault, Answer):
            return fault
        answer = forward(f"{self.moto}{path}{f'&max-keys={self.page}' if query else ''}")
        if fault == "cut":
            answer.cut = len(answer.body) // 2
        if fault == "flip":
            answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]
        return answer


@pytest.fixture
def front(moto: str) -> Iterator[Front]:
    made = Front(moto)
    with made.server.running():
        yield made
