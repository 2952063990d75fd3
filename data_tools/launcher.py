"""Which of how many tasks am I: what mpirun, srun or a SLURM array says in the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from data_tools.errors import UserError


@dataclass(frozen=True)
class Task:
    """This process among those that were started together.

    Attributes:
        rank: from 0.
        size: tasks.
    """

    rank: int
    size: int


_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, srun --mpi=pmi2
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),  # srun --mpi=pmix
)


def discover(environment: Mapping[str, str] = os.environ) -> Task:
    """This process among all, a process alone being task 0 of 1.

    A job array whose tasks start several processes each counts them all. An MPI launcher inside a SLURM job
    leaves SLURM_PROCID at a value that is right for no rank, so it is asked first. A batch script's own shell
    has SLURM_PROCID and SLURM_NTASKS, too, but is one process: only those that srun started have
    SLURM_STEP_ID.
    """
    step = _step(environment)
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return step
    number, first, stride, count = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
    )
    # An array like 0,7,100 has no stride: the number is a hint where to begin, no more.
    index = (number - first) // max(stride, 1) % count
    return Task(index * step.size + step.rank, count * step.size)


def require_alone(task: Task) -> None:
    """Refuse a build alone where several were started.

    Raises:
        UserError: there is more than one task.
    """
    if task.size > 1:
        raise UserError(
            f"This is task {task.rank} of {task.size} that were started together, and each would build "
            "alone; add --shared, with which those that have the same output build it together."
        )


def _step(environment: Mapping[str, str]) -> Task:
    for rank, size in _MPI:
        if rank in environment:
            number = int(environment[rank])
            return Task(number, int(environment.get(size, number + 1)))
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
        return Task(int(environment["SLURM_PROCID"]), int(tasks))
    return Task(0, 1)
