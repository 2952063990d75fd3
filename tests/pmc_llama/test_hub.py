"""An export reaches a Hub as it is, by huggingface_hub itself; the server here speaks what that needs."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pmc_llama.hub import listing

TOKEN = "hf_of_nobody"  # noqa: S105


class Hub:
    """Repositories in memory: large files by LFS' basic transfer, small ones inside the commit.

    Attributes:
        files: of each repository, by name, as of its last commit.
        private: whether each was made private.
        cuts: how many uploads of large files break off in the middle from now on.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.cuts = 0
        self._objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._answer(401, {"error": "Invalid credentials"})
                    return
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(200, hub.answer(self.path, body))

            def do_GET(self) -> None:
                self._answer(200, {"sha": "0" * 40, "siblings": []})

            def do_PUT(self) -> None:
                size = int(self.headers["Content-Length"])
                if hub.cuts:
                    hub.cuts -= 1
                    self.rfile.read(size // 2)
                    self.connection.close()
                    self.close_connection = True
                    return
                hub.keep(self.rfile.read(size))
                self._answer(200, {})

            def _answer(self, status: int, content: object) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What the Hub says to a POST."""
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.files.setdefault(name, {})
            return {"url": f"{self.url}/{name}", "name": name}
        if path.endswith("/info/lfs/objects/batch"):
            return {
                "transfer": "basic",
                "objects": [self._action(one) for one in json.loads(body)["objects"]],
            }
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [self._mode(file["path"]) for file in files]}
        if "/commit/" in path:
            self._commit(name, body)
            return {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
        return {}

    def keep(self, content: bytes) -> None:
        self._objects[hashlib.sha256(content).hexdigest()] = content

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _action(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self._objects:  # nothing to do for what is there
            return {"oid": one["oid"], "size": one["size"]}
        return {**one, "actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self._objects[value["oid"]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A directory like an export's: a file for LFS, and small ones."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(os.urandom(300_000))
    (directory / "config.json").write_text("{}")
    (directory / "README.md").write_text("# model\n")
    return directory


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Of a user of that Hub; huggingface_hub reads it when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    there = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return {**kept, **there, **({"HF_TOKEN": token} if token else {})}


def upload(
    directory: Path, hub: Hub, home: Path, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from pathlib import Path; from pmc_llama.hub import upload\n"
        "print(upload(Path(sys.argv[1]), 'clinic/model', private=True))"
    )
    command = [sys.executable, "-c", program, str(directory)]
    return subprocess.run(
        command, env=environment(hub, home, token), capture_output=True, text=True, check=False
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_file_goes_up_as_it_is_into_a_private_repository(
    hub: Hub, export: Path, tmp_path: Path
) -> None:
    done = upload(export, hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert hub.files == {"clinic/model": contents(export)}
    assert hub.private == {"clinic/model": True}
    assert done.stdout.strip().endswith("clinic/model")


@pytest.mark.slow  # huggingface_hub tries for a while
def test_a_connection_that_breaks_is_one_sentence_and_the_next_try_sends_the_rest(
    hub: Hub, export: Path, tmp_path: Path
) -> None:
    hub.cuts = 100
    broken = upload(export, hub, tmp_path / "home")
    assert broken.returncode != 0
    assert f"the model stays in {export}" in broken.stderr
    assert hub.files["clinic/model"] == {}, "nothing half-written is published"
    hub.cuts = 0
    assert upload(export, hub, tmp_path / "home").returncode == 0
    assert hub.files["clinic/model"] == contents(export)


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_without_a_token_that_may_write_nothing_goes_up(
    token: str | None, hub: Hub, export: Path, tmp_path: Path
) -> None:
    done = upload(export, hub, tmp_path / "home", token)
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert hub.files == {}


def test_the_listing_has_every_file_and_the_sum(export: Path) -> None:
    text = listing(export, "clinic/model")
    assert "300,000  model.safetensors" in text
    assert "300,010  bytes in all" in text
