"""What ranks tell rank 0 and hear from it, through the store where they met; nothing here waits for ever.

A store is all that has to work: not NCCL, not gloo, not a file system. So what is wrong with those can be
told.
"""

import json
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pmc_llama.ranks import Ranks

_CLOCK_SECONDS = 0.2  # between two times of rank 0 in the store


class Board:
    """The store of the ranks as a notice board. Every value goes as JSON.

    Args:
        store: of all ranks.
        ranks: this process among them.
    """

    def __init__(self, store: dist.Store, ranks: Ranks) -> None:
        self._store, self._ranks = store, ranks
        self._closing = threading.Event()
        if ranks.rank == 0 and ranks.world_size > 1:
            # Its own connection, since a store serves one wait at a time.
            clock: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
            threading.Thread(target=self._tell_time, args=(clock,), daemon=True).start()

    def tell(self, topic: str, value: Any) -> None:
        """Tell rank 0."""
        self._store.set(_key(topic, self._ranks.rank), json.dumps(value))

    def hear(self, topic: str, seconds: float) -> dict[int, Any]:
        """What each rank has told within so many seconds; for rank 0."""
        keys = {rank: _key(topic, rank) for rank in range(self._ranks.world_size)}
        try:
            self._store.wait([*keys.values()], timedelta(seconds=seconds))
        except dist.DistStoreError:
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items()}

    def publish(self, topic: str, value: Any) -> None:
        """Tell all ranks."""
        self._store.set(_key(topic, "all"), json.dumps(value))

    def read(self, topic: str, seconds: float) -> Any:
        """What was published.

        Raises:
            TimeoutError: nothing was within so many seconds, or the store is gone, as when rank 0 has died.
        """
        key = _key(topic, "all")
        try:
            self._store.wait([key], timedelta(seconds=seconds))
            return json.loads(self._store.get(key))
        except dist.DistError as error:
            raise TimeoutError(topic) from error

    def seconds_off(self) -> float:
        """By how much this rank's clock is ahead of rank 0's; too large by up to a second, as that is old."""
        if self._ranks.rank == 0:
            return 0.0
        offsets = []
        for _ in range(3):
            offsets.append(time.time() - float(self._store.get(_key("clock", "all"))))
            time.sleep(_CLOCK_SECONDS)
        return min(offsets, key=abs)

    def close(self) -> None:
        """Before the process ends. The store is rank 0's and ends with it, so it leaves last, if soon."""
        self._closing.set()
        try:
            gone = self._store.add(_key("closed", "all"), 1)
            until = time.monotonic() + 3
            while self._ranks.rank == 0 and gone < self._ranks.world_size and time.monotonic() < until:
                time.sleep(0.05)
                gone = self._store.add(_key("closed", "all"), 0)
        except dist.DistError:
            return

    def _tell_time(self, store: dist.Store) -> None:
        while not self._closing.wait(_CLOCK_SECONDS):
            store.set(_key("clock", "all"), str(time.time()))


def _key(topic: str, whose: int | str) -> str:
    return f"pmc_llama/preflight/{topic}/{whose}"
