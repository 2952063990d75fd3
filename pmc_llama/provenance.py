"""Where a run's numbers come from: `run.json` has an entry for every start of the run, TensorBoard the last.

Nothing secret is kept: of the environment only variables of the listed families, and of those none whose name
or value looks like a credential.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from data_tools.files import write_published
from pmc_llama.distributed import Ranks

# What changes how ranks meet, talk, compute or are placed.
_FAMILIES = re.compile(
    r"(NCCL|TORCH|TORCHELASTIC|PYTORCH|CUDA|ROCR|HIP|GLOO|UCX|FI|OMP|MKL|KMP|OMPI_MCA|I_MPI|DS|TRITON|HF|"
    r"SLURM_(JOB|STEP|ARRAY|RESTART|NNODES|NTASKS|NODELIST|CPUS|GPUS|CLUSTER)|PBS_JOB|LSB_JOB|WANDB_MODE)(_|ID|$)"
    r"|(OMP_NUM_THREADS|MASTER_ADDR|MASTER_PORT|WORLD_SIZE)$"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|://[^/@]*@", re.IGNORECASE)
_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        time: UTC, ISO 8601.
        command: as the process was started, quoted for a shell.
        git_commit: of the code; None where it is known neither from a checkout nor from pip.
        git_dirty: whether tracked files differ from that commit; None when unknown.
        versions: of Python and of the packages that decide numbers.
        hosts: names of the machines by rank, one an entry where ranks share it.
        world_size: ranks.
        launcher: what started the ranks, see `Ranks`.
        job_id: the scheduler's number of the job; None without a scheduler.
        device: what rank 0 computes on.
        environment: variables that matter, without secrets.
    """

    time: str
    command: str
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    hosts: list[str]
    world_size: int
    launcher: str
    job_id: str | None
    device: str
    environment: dict[str, str]


def describe_start(
    ranks: Ranks,
    device: torch.device,
    versions: Mapping[str, str],
    group: dist.ProcessGroup | None = None,
) -> Start:
    """Describe this start; all ranks call it, since they tell each other where they run.

    Args:
        ranks: this process among all.
        device: what it computes on.
        versions: of the packages in use; Python's is added.
        group: all ranks, best over gloo; the default group when not given.
    """
    hosts: list[str] = [socket.gethostname()]
    if ranks.world_size > 1:
        of_ranks: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(of_ranks, hosts[0], group=group)
        hosts = list(dict.fromkeys(of_ranks))
    commit, dirty = _git_state()
    return Start(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(sys.orig_argv),
        git_commit=commit,
        git_dirty=dirty,
        versions={"python": sys.version.split()[0], **versions},
        hosts=hosts,
        world_size=ranks.world_size,
        launcher=ranks.launcher,
        job_id=next((os.environ[name] for name in _JOB_IDS if name in os.environ), None),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        environment=environment_that_matters(os.environ),
    )


def append_start(path: Path, start: Start) -> None:
    """Add a start to `run.json`, a JSON list with the oldest first; for rank 0 alone.

    Raises:
        UserError: the file is there and is not such a list, or cannot be written.
    """
    try:
        starts = json.loads(path.read_text()) if path.exists() else []
        if not isinstance(starts, list):
            raise ValueError("not a list")
        write_published(path, (json.dumps([*starts, asdict(start)], indent=2) + "\n").encode())
    except ValueError as error:
        raise UserError(
            f"{path} is not the list of a run's starts ({error}); move it away to go on without it."
        ) from error
    except OSError as error:
        raise UserError(f"output: {path} cannot be written: {error.strerror}.") from error


def environment_that_matters(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how ranks meet, talk, compute or are placed; without secrets, by name."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if _FAMILIES.match(name) and not _SECRET.search(name) and not _SECRET.search(value)
    }


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of this package's code, and whether tracked files of it have changed since."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        return commit, None if changes is None else changes != ""
    try:  # installed by pip from a repository: PEP 610
        installed = json.loads(distribution("pmc-llama").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None, None
    commit = installed.get("vcs_info", {}).get("commit_id")
    return commit, False if commit else None


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command; None where git or its answer cannot be had."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
