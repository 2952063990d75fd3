"""Which rank am I: the same answer under torchrun, srun, mpirun or alone, read from the environment.

Every start command leaves other variables behind. They are read here and nowhere else.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from data_tools.errors import UserError

Launcher = Literal["torchrun", "openmpi", "mpich", "slurm", "alone"]

# Variables of a process's rank, of the number of processes, and of its rank on its machine, by launcher.
_VARIABLES: dict[Launcher, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
# Each says that there are several processes, when none of the launchers above has told them apart.
_SIZES_WITHOUT_RANKS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_ONE = ("", "0", "1")
# Step numbers from here on are not those of steps that srun started but of a batch script, an interactive
# allocation or the like (SLURM_MAX_NORMAL_STEP_ID in slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int  # 0 .. world_size - 1
    world_size: int
    local_rank: int  # among the processes of this machine, from 0
    launcher: Launcher


def discover(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read from the environment who started this process.

    The order matters, since launchers nest: torchrun runs under srun, and mpirun inside a SLURM job leaves
    SLURM_PROCID at a value that is right for no rank. `mpich` stands for Intel MPI and MVAPICH as well. `srun
    --mpi=pmi2` sets PMI_RANK without MPI_LOCALRANKID and counts as SLURM. A SLURM batch script has
    SLURM_PROCID too, but only processes of a job step, started by srun, have the number of one.

    Raises:
        UserError: the variables contradict each other, or say that there are several processes without
            saying which of them this is. Each would train alone, and all would write to one directory.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        return _found("torchrun", environment)
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _found("openmpi", environment)
    if {"PMI_RANK", "MPI_LOCALRANKID"} <= environment.keys():
        return _found("mpich", environment)
    if int(environment.get("SLURM_STEP_ID", _FIRST_SPECIAL_STEP)) < _FIRST_SPECIAL_STEP:
        return _found("slurm", environment)
    _refuse_lost_ranks(environment)
    return Ranks(rank=0, world_size=1, local_rank=0, launcher="alone")


def as_ranges(ranks: Collection[int]) -> str:
    """Ranks in words, in order: `rank 3`, `ranks 0-3, 6`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    named = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"


def _found(launcher: Launcher, environment: Mapping[str, str]) -> Ranks:
    names = _VARIABLES[launcher]
    for name in names:
        if not environment.get(name, "").isdecimal():
            raise UserError(
                f"{name} is {environment.get(name) or 'not set'}, expected a whole number: {names[0]} says "
                "that a launcher started this rank."
            )
    rank, world_size, local_rank = (int(environment[name]) for name in names)
    if rank >= world_size:
        raise UserError(f"{names[0]} is {rank}, expected less than {names[1]}, which is {world_size}.")
    return Ranks(rank, world_size, local_rank, launcher)


def _refuse_lost_ranks(environment: Mapping[str, str]) -> None:
    """Nobody said which rank this is; then nothing may say that there are others."""
    several = [name for name in _SIZES_WITHOUT_RANKS if environment.get(name, "1") not in _ONE]
    if "PMIX_RANK" in environment:
        several.append("PMIX_RANK")
    if several:
        found = " and ".join(f"{name}={environment[name]}" for name in several)
        raise UserError(
            f"{found} says that this is one of several processes, but not which; each would train alone. "
            "Start them by torchrun, srun, or the mpirun of Open MPI, MPICH or Intel MPI."
        )
    if environment.get("SLURM_NTASKS", "1") not in _ONE:
        raise UserError(
            f"This is one process in the allocation of SLURM job {environment.get('SLURM_JOB_ID')}, which is "
            f"for {environment['SLURM_NTASKS']} tasks (SLURM_NTASKS); start all of them, by `srun pmc-llama "
            "...`, or one alone by `srun --ntasks=1 pmc-llama ...`."
        )
