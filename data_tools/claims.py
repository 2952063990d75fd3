"""Claims: files by which processes on any number of machines divide work in a directory that they share.

A claim is a file that its holder created with O_CREAT | O_EXCL, which every file system in use on clusters
(NFS from version 3, Lustre, GPFS, BeeGFS) does in one step. While the holder lives, a thread touches the
file. A claim that is not touched for `stale_seconds` is taken over; so is at once that of a process of this
machine that is gone. Times are compared with that of a file which the comparing process touches itself, so it
is the file server's clock that judges. (Where the server takes times from its clients, as Lustre's does,
their clocks have to agree to much less than `stale_seconds`.)

No claim is a lock: a holder that was stopped or cut off, wrongly thought lost, comes back and goes on beside
the one that took over. What is done under a claim therefore has to be harmless when done twice: written in a
place of its own and published by rename, the same bytes by everyone. The races:

- Two take over the same stale claim. Each renames it to a name of its own; one rename succeeds, the other
  finds nothing. Whoever then creates the claim, which one process alone can, holds it.
- One has judged a claim stale, the other has meanwhile taken it over: the first then renames away the new,
  living claim. It looks at what it renamed, sees that it is not what it judged, and links it back.
- A third creates the claim between that rename and the link: the link fails, and two do the same work.
- The holder comes back after it was replaced. It touches and removes by its open file, not by the name, so it
  keeps no one else's claim alive; it removes the name only where that is still its own file.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

PREFIX = ".shared-"
"""Of the names of all files that processes leave for each other. They belong to no corpus."""
STALE_SECONDS = 120.0
"""Longer than NFS clients keep the times of a file (60 s), and than a server takes to fail over."""
_BEATS = 8  # in `stale_seconds`
_STUCK = 30
"""After so many `stale_seconds` without a sign of life a holder that still runs counts as lost."""


class Claims:
    """The claims of one process in a directory.

    Args:
        directory: exists, and is shared by all.
        stale_seconds: after which a claim that is not touched is lost.

    Attributes:
        owner: a name for this process that no other has, fit for the name of a file.
    """

    def __init__(self, directory: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._directory = directory
        self._stale_seconds = stale_seconds
        self._content = json.dumps({"owner": self.owner, "machine": _machine(), "pid": os.getpid()})
        self._offset, self._measured = 0.0, -float("inf")
        self._alive_until: dict[str, float] = {}

    def file_name(self, name: str) -> str:
        """The name of the file of a claim."""
        return f"{PREFIX}{name}.claim"

    def take(self, name: str, seen: bool = False) -> "Claim | None":
        """Take a claim that is free, or whose holder is lost; None when another process holds it.

        Args:
            name: of what is claimed.
            seen: the directory listed the claim just now, which spares the server the attempt to create it.

        Raises:
            OSError: the directory cannot be written.
        """
        descriptor = None if seen else self._create(name)
        if descriptor is None and self._is_cleared(name):
            descriptor = self._create(name)
        if descriptor is None:
            return None
        return Claim(self._path(name), descriptor, self._stale_seconds)

    def now(self) -> float:
        """The file server's time, seconds since the epoch."""
        if monotonic() - self._measured > self._stale_seconds / 4:
            path = self._directory / f"{PREFIX}clock.{self.owner}"
            descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
            try:
                os.utime(descriptor)
                self._measured = monotonic()
                self._offset = os.fstat(descriptor).st_mtime - self._measured
            finally:
                os.close(descriptor)
                path.unlink(missing_ok=True)
        return self._offset + monotonic()

    def _create(self, name: str) -> int | None:
        try:
            descriptor = os.open(self._path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        try:
            os.write(descriptor, self._content.encode())
        except OSError:  # a full disk; the claim would be in the way until it is stale
            os.close(descriptor)
            self._path(name).unlink(missing_ok=True)
            raise
        return descriptor

    def _is_cleared(self, name: str) -> bool:
        """Whether a claim that was in the way is a lost one and now gone."""
        now = self.now()
        if now < self._alive_until.get(name, 0.0):
            return False
        try:
            # An NFS client asks the server for the times of a file when it opens it.
            with self._path(name).open("rb") as file:
                content, touched = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False  # it was given up just now
        holder = _holder(content)
        here = holder.get("machine") == _machine()
        if now - touched < self._stale_seconds and not (here and _is_gone(holder.get("pid"))):
            if not here:  # spares the server: sooner it cannot be stale
                self._alive_until[name] = touched + self._stale_seconds
            return False
        return self._move_away(name, content)

    def _move_away(self, name: str, judged: bytes) -> bool:
        path = self._path(name)
        moved = path.with_name(f"{PREFIX}{name}.{self.owner}.lost")
        try:
            os.rename(path, moved)
            same = moved.read_bytes() == judged
        except FileNotFoundError:
            return False  # another process was quicker
        if not same:
            _link_back(moved, path)
        moved.unlink(missing_ok=True)
        return same

    def _path(self, name: str) -> Path:
        return self._directory / self.file_name(name)


class Claim:
    """A claim that is held, kept fresh by a thread until it is released. A context manager."""

    def __init__(self, path: Path, descriptor: int, stale_seconds: float) -> None:
        self._path = path
        self._descriptor = descriptor
        self._stuck_seconds = _STUCK * stale_seconds
        self._last_sign = monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(stale_seconds / _BEATS,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def sign_of_life(self) -> None:
        """Say that the work goes on: a holder that hangs must not keep its claim for ever."""
        self._last_sign = monotonic()

    def release(self) -> None:
        """Give the claim up."""
        self._released.set()
        self._thread.join()
        _quietly(self._remove)
        os.close(self._descriptor)

    def _beat(self, seconds: float) -> None:
        while not self._released.wait(seconds) and monotonic() - self._last_sign < self._stuck_seconds:
            _quietly(lambda: os.utime(self._descriptor))

    def _remove(self) -> None:
        if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
            self._path.unlink()


def _quietly(act: Callable[[], None]) -> None:
    """Do what may fail because another process took the claim over, or the server is away for a while."""
    try:
        act()
    except OSError:
        return


def _link_back(moved: Path, path: Path) -> None:
    try:
        os.link(moved, path)
    except OSError:
        return  # a third process has it now, or the file system knows no links: two do the same work


def _holder(content: bytes) -> dict[str, Any]:
    """What a claim says of its holder; nothing where it was killed before it had written that."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@cache
def _machine() -> str:
    """A name that two processes share if they see each other's numbers.

    Machines may have one name (`localhost`), and the containers of one machine have processes of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"  # then claims are lost by their age alone


def _is_gone(pid: object) -> bool:
    """Whether no process that this one could see has that number."""
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
