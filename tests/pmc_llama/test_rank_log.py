"""Only rank 0 speaks on the console, and what any rank says is in its log at once."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import UserError
from pmc_llama.rank_log import rank_log

# Speaks in every way there is; the process is killed, so only what is flushed survives.
PROGRAM = """
import logging, os, signal, sys, warnings
from pathlib import Path
from pmc_llama.rank_log import rank_log
with rank_log(Path(sys.argv[1]), rank=int(sys.argv[2])) as console:
    print("a print")
    warnings.warn("a warning")
    logging.getLogger("transformers").warning("a library's warning")
    os.system("echo a child process")
    os.write(console, b"must be seen\\n")
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
print("after the end")
"""


def speak(tmp_path: Path, rank: int, end: str = "return") -> tuple[str, str, str]:
    """Standard output, standard error and the rank's log."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "logs"), str(rank), end],
        capture_output=True,
        text=True,
    )
    return done.stdout, done.stderr, (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()


def test_a_rank_other_than_0_says_everything_to_its_log_and_nothing_to_the_console(tmp_path: Path) -> None:
    output, errors, log = speak(tmp_path, rank=3)
    assert (output, errors) == ("after the end\n", "must be seen\n")
    for said in ("a print", "a warning", "a library's warning", "a child process"):
        assert said in log


def test_rank_0_speaks_on_the_console_and_has_warnings_and_logging_in_its_log_too(tmp_path: Path) -> None:
    output, errors, log = speak(tmp_path, rank=0)
    assert sorted(output.splitlines()) == ["a child process", "a print", "after the end"]
    assert "a warning" in errors
    assert "must be seen" in errors
    assert "UserWarning: a warning" in log
    assert "WARNING transformers: a library's warning" in log


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_leaves_every_line_in_its_log_behind_those_of_earlier_starts(
    tmp_path: Path, rank: int
) -> None:
    speak(tmp_path, rank)
    _, _, log = speak(tmp_path, rank, end="kill")
    assert log.count("a library's warning") == 2
    assert log.count(f" rank {rank} on ") == 2


def test_logging_and_warnings_are_as_before_afterwards(tmp_path: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    with rank_log(tmp_path, rank=0):
        assert logging.getLogger().handlers != handlers
    assert logging.getLogger().handlers == handlers


def test_a_log_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=r"rank-00002\.log cannot be written"), rank_log(tmp_path / "logs", 2):
        pass
    assert len(os.listdir("/proc/self/fd")) == descriptors
