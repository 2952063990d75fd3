"""A real SLURM cluster on this machine for the tests: several nodes with fake GPUs, by `cluster.sh`."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Layout = Literal["namespaces", "one-host"]

_SCRIPT = Path(__file__).with_name("cluster.sh")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
_LOOK = 0.2  # seconds
# Of a job or a launcher around the tests, which must not reach theirs.
_FOREIGN = ("SLURM_", "SBATCH_", "PMC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "PMI", "OMPI_")
_STATES_AT_THE_END = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE"}


class Missing(Exception):
    """Why no cluster can be had here, in a sentence."""


class Job:
    """A job of the cluster."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self.cluster, self.number = cluster, number

    def field(self, name: str) -> str:
        """What `scontrol show job` has under a name."""
        shown = self.cluster.run("scontrol", "show", "job", str(self.number))
        words = (word.partition("=") for word in shown.split())
        return next(value for key, _, value in words if key == name)

    @property
    def state(self) -> str:
        """Such as RUNNING."""
        return self.field("JobState")

    def wait(self, happened: Callable[[], object], seconds: float = 300) -> None:
        """Wait for something that the job shall bring about."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.state not in _STATES_AT_THE_END, f"{self.state}\n{self.output()}"
            assert time.monotonic() < deadline, f"{self.state} after {seconds} s\n{self.output()}"
            time.sleep(_LOOK)

    def end(self, seconds: float = 300) -> str:
        """Wait for the end of the job; its exit status, `STATUS:SIGNAL`."""
        deadline = time.monotonic() + seconds
        while self.state not in _STATES_AT_THE_END:
            assert time.monotonic() < deadline, f"{self.state} after {seconds} s\n{self.output()}"
            time.sleep(_LOOK)
        return self.field("ExitCode")

    def output(self) -> str:
        """What the job has said so far."""
        file = Path(self.field("StdOut"))
        return file.read_text() if file.exists() else ""


class Cluster:
    """A running cluster.

    Args:
        directory: of its state; its name is in the names of the nodes.
        layout: of `cluster.sh`.
        nodes: how many.
    """

    def __init__(self, directory: Path, layout: Layout, nodes: int) -> None:
        self.layout = layout
        self.nodes = [f"{directory.name}-{number}" for number in range(1, nodes + 1)]
        self._caches = directory / "tmp"
        self._command = [str(_SCRIPT), layout, str(directory), str(nodes)]

    def run(
        self, *command: str | Path, directory: Path | None = None, status: int = 0, **environment: str
    ) -> str:
        """Run a command as a user at the controller; its output.

        Args:
            command: words.
            directory: to run it in.
            status: that it has to end with.
            environment: of the command, beside that of the tests.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        done = subprocess.run(
            [*self._command, "run", *map(str, command)],
            cwd=directory,
            env={**inherited, "PMC_NODE_TMP": str(self._caches), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def submit(self, *command: str | Path, directory: Path, **environment: str) -> Job:
        """`sbatch` with these arguments."""
        said = self.run("sbatch", "--parsable", *command, directory=directory, **environment)
        return Job(self, int(said))

    def power(self, node: str, state: Literal["on", "off"]) -> None:
        """Switch a node, with all that runs on it."""
        subprocess.run([*self._command, state, node], check=True)

    def up(self) -> None:
        """Start the daemons and wait for the nodes."""
        subprocess.run([*self._command, "up"], check=True)

    def down(self) -> None:
        """Stop every daemon and node."""
        subprocess.run([*self._command, "down"], check=False)


def _possible_layout() -> Layout:
    if absent := [program for program in _PROGRAMS if shutil.which(program) is None]:
        raise Missing(f"{', '.join(absent)} not found; `make test-cluster` as root on Debian installs SLURM")
    if os.geteuid() != 0:
        raise Missing("SLURM's daemons for several nodes are started as root, and this is another user")
    probe = f"pmc{os.getpid()}-probe"
    ip, unshare = shutil.which("ip"), shutil.which("unshare")
    if ip and _works(ip, "netns", "add", probe):
        subprocess.run([ip, "netns", "del", probe], check=True)
        return "namespaces"
    if unshare and _works(unshare, "--mount", "true"):
        return "one-host"
    raise Missing("neither network nor mount namespaces can be made here, so nodes would have no names")


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def running_cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster that is taken down, with all that it left, when the block ends.

    Raises:
        Missing: none can be had here.
    """
    layout = _possible_layout()
    directory = Path("/tmp") / f"pmc{os.getpid()}"  # noqa: S108  # short: a socket's path is of 108 characters at most
    directory.mkdir(mode=0o711)
    cluster = Cluster(directory, layout, nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(directory, ignore_errors=True)
