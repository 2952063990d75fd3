"""Only rank 0 speaks on the console; what any rank says is on disk in `OUTPUT/logs/rank-NNNNN.log`.

On ranks other than 0 standard output and error themselves go to the rank's log, so that it has everything:
the libraries' logging, warnings, what NCCL, gloo or glibc print from C++. Rank 0 keeps the console, where a
terminal stays a terminal, and has its warnings and the libraries' logging in its log as well.
"""

import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from data_tools.errors import UserError

# Loggers of libraries that keep their records from the root logger.
_SEPARATE_LOGGERS = ("DeepSpeed", "transformers")


@contextmanager
def rank_log(logs: Path, rank: int) -> Iterator[int]:
    """Send this rank's words to its log, a line at a time, while the block runs.

    Args:
        logs: directory of the logs, made if missing. A log is appended to.
        rank: of this process.

    Yields:
        A file descriptor of the console's standard error, for what must be seen whichever rank says it.

    Raises:
        UserError: the log cannot be written.
    """
    path = logs / f"rank-{rank:05d}.log"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1)
    except OSError as error:
        raise UserError(f"output: {path} cannot be written: {error.strerror}; name another.") from error
    with log, ExitStack() as undo:
        log.write(f"{time.strftime('%F %T')} rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
        if rank == 0:
            undo.enter_context(_also_in(log))
            yield 2
        else:
            undo.enter_context(_into(log, sys.stdout, 1))
            yield undo.enter_context(_into(log, sys.stderr, 2))


@contextmanager
def _into(log: TextIO, stream: TextIO, descriptor: int) -> Iterator[int]:
    """Have the log behind a standard stream and its descriptor; yields a descriptor of what was there."""
    stream.flush()
    if isinstance(stream, TextIOWrapper):  # not where pytest or a notebook has replaced it
        stream.reconfigure(line_buffering=True)
    console = os.dup(descriptor)
    os.dup2(log.fileno(), descriptor)
    try:
        yield console
    finally:
        stream.flush()
        os.dup2(console, descriptor)
        os.close(console)


@contextmanager
def _also_in(log: TextIO) -> Iterator[None]:
    """Copy Python's logging and warnings to the log."""
    handlers = {logging.getLogger(name): logging.StreamHandler(log) for name in (None, *_SEPARATE_LOGGERS)}
    show = warnings.showwarning

    def show_and_log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        show(message, category, filename, lineno, file, line)
        if file is None:
            log.write(warnings.formatwarning(message, category, filename, lineno, line))

    for logger, handler in handlers.items():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        if logger.parent:  # until its library is imported, it passes its records on to the root logger
            handler.addFilter(_KeptFromRoot(logger))
        logger.addHandler(handler)
    warnings.showwarning = show_and_log
    try:
        yield
    finally:
        warnings.showwarning = show
        for logger, handler in handlers.items():
            logger.removeHandler(handler)


class _KeptFromRoot(logging.Filter):
    """Lets records pass only while their logger keeps them from the root logger."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger

    def filter(self, record: logging.LogRecord) -> bool:
        return not self._logger.propagate
