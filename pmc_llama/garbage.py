"""Python's garbage collector runs between steps, on every rank at the same ones, and never within one.

By itself it runs when a count of objects is reached, on every rank at another moment, and all ranks wait for
each: tens of milliseconds once torch and DeepSpeed are loaded. torchtitan's `GarbageCollection` is the model.
"""

import gc
from types import TracebackType
from typing import Self

COLLECT_EVERY = 100
"""Steps between collections. Tensors do not wait for them: their reference counts free them."""


class GarbageCollection:
    """Switches automatic collection off while it is entered."""

    def __enter__(self) -> Self:
        gc.disable()
        self._frozen = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.unfreeze()
        gc.enable()

    def step_made(self, step: int) -> None:
        """Collect where it is time to.

        After the first step what there is, modules and model, is there to stay: it is not looked at again,
        and a collection takes a few milliseconds.
        """
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True
        elif step % COLLECT_EVERY == 0:
            gc.collect()
