"""Where the ranks of a run meet, under whatever launcher: a store that all of them have reached.

Who does not come is named, so that a node that is down is known by its name and not by a timeout.
"""

import json
import os
import socket
import subprocess
import time
from datetime import timedelta
from types import ModuleType

import torch.distributed as dist

from data_tools.errors import UserError
from pmc_llama.ranks import Ranks, as_ranges

_HERE, _COUNT, _MET, _READ = (f"pmc_llama/meeting/{name}" for name in ("here", "count", "met", "read"))


class NoMeeting(UserError):
    """Ranks are missing where all should meet. Raised on every rank that did come."""


def meet(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """Wait until all ranks are there; the store that they share.

    It is held by rank 0, or by torchrun. A world of one has one of its own, without network.

    Args:
        ranks: what `discover` found.
        timeout: longest wait for the others, and of every access to the store.

    Raises:
        UserError: as `connect`.
        NoMeeting: some did not come in time; it names them and, under SLURM, their nodes. Those who came hear
            it at one moment.
    """
    if ranks.world_size == 1:
        return dist.HashStore()
    if ranks.launcher in ("openmpi", "mpich"):
        _set_meeting_place_by_mpi(ranks)
    elif ranks.launcher == "slurm":
        _set_meeting_place_by_slurm()
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"RANK and WORLD_SIZE are set but {' and '.join(missing)} is not; set both.")
    try:
        store = _open_store(ranks, timeout)
        _call_roll(store, ranks, timeout)
    except (dist.DistError, ValueError) as error:  # ValueError: of a port that is none
        raise NoMeeting(
            f"Rank {ranks.rank} of {ranks.world_size}, on {socket.gethostname()}, did not meet the others at "
            f"{_place()} within {timeout}: {str(error).splitlines()[0]}"
        ) from error
    return store


def _set_meeting_place(host: str, port: int) -> None:
    """What the start command has set stays."""
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))


def _place_is_set() -> bool:
    return {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _set_meeting_place_by_slurm() -> None:
    """The first host of the job step, where rank 0 is, and a port of the job's own.

    Ports 20000 to 29999 are below those that Linux hands out itself; two jobs share one only when both run
    on that host and their numbers are equal modulo 10,000.
    """
    if not _place_is_set():
        _set_meeting_place(_slurm_hosts()[0], 20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000)


def _slurm_hosts() -> list[str]:
    """The hosts of this job step, in the order of the ranks."""
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"`{' '.join(command)}`, which names the hosts of this job step, failed ({error}); "
            "set MASTER_ADDR and MASTER_PORT."
        ) from error


def _set_meeting_place_by_mpi(ranks: Ranks) -> None:
    """Rank 0's host and a free port there, told to the others by an MPI broadcast, unless set.

    MPI is asked even where the place is set, when it can be: variables of another start, such as those of a
    shell that mpirun started, name ranks that are not there.
    """
    try:
        mpi = _initialized_mpi(ranks)
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        if _place_is_set():
            return
        raise UserError(
            f"mpirun named no meeting place and mpi4py cannot be asked for one ({error}); install "
            "pmc-llama[mpi], name mpirun's libmpi.so in MPI4PY_LIBMPI, or set MASTER_ADDR and MASTER_PORT."
        ) from error
    world = mpi.COMM_WORLD
    if (world.size, world.rank) != (ranks.world_size, ranks.rank):
        raise UserError(
            f"mpirun says that this is rank {ranks.rank} of {ranks.world_size}, but mpi4py says rank "
            f"{world.rank} of {world.size}: it uses another MPI than mpirun's, or this shell was itself "
            "started by mpirun; name mpirun's libmpi.so in MPI4PY_LIBMPI, or start from a fresh shell."
        )
    if not _place_is_set():
        _set_meeting_place(*world.bcast((socket.gethostname(), _free_port()) if ranks.rank == 0 else None))


def _initialized_mpi(ranks: Ranks) -> ModuleType:
    """mpi4py with an MPI that mpirun's ranks can use.

    The library is looked at before MPI_Init, since one that mpirun does not know makes a world of one of
    every process (Open MPI under MPICH's mpirun) or ends it (MPICH under Open MPI's).

    Raises:
        ImportError, RuntimeError: there is none.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False  # see `disconnect`
    from mpi4py import MPI

    vendor = MPI.get_vendor()[0]
    if (vendor == "Open MPI") != (ranks.launcher == "openmpi"):
        mpirun = "Open MPI" if ranks.launcher == "openmpi" else "MPICH or Intel MPI"
        raise RuntimeError(f"mpirun is of {mpirun}, but mpi4py loads {vendor}")
    if not MPI.Is_initialized():
        MPI.Init_thread()
    module: ModuleType = MPI
    return module


def _free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _open_store(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """The store at the meeting place: opened by rank 0, or by torchrun, reached by the others."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks.world_size,
        is_master=ranks.rank == 0 and not by_torchrun,
        timeout=timeout,
        wait_for_workers=False,  # `_call_roll` knows who is missing
        multi_tenant=not by_torchrun,
    )


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR and MASTER_PORT)"


def _call_roll(store: dist.Store, ranks: Ranks, timeout: timedelta) -> None:
    """Wait for all ranks. The last to come lets all go on; the first to lose patience tells all why not."""
    store.set(f"{_HERE}/{ranks.rank}", socket.gethostname())
    if store.add(_COUNT, 1) == ranks.world_size:
        store.compare_set(_MET, "", "[]")
    everyone = range(ranks.world_size)
    try:
        store.wait([_MET], timeout)
    except dist.DistStoreError:
        absent = [rank for rank in everyone if not store.check([f"{_HERE}/{rank}"])]
        store.compare_set(_MET, "", json.dumps(absent))
    absent = json.loads(store.get(_MET))
    if not absent:
        return
    present = sorted({*everyone} - {*absent})
    hosts = list(dict.fromkeys(store.get(f"{_HERE}/{rank}").decode() for rank in present))
    store.add(_READ, 1)
    if ranks.rank == 0:  # it holds the store, from which the others have yet to read this
        _wait_until_read(store, len(present))
    raise NoMeeting(
        f"{as_ranges(absent)} of {ranks.world_size} did not come to {_place()} within {timeout}; "
        f"{as_ranges(present)} came, from {', '.join(hosts)}{_absent_hosts(ranks, hosts)}."
    )


def _wait_until_read(store: dist.Store, readers: int) -> None:
    for _ in range(30):
        if store.add(_READ, 0) >= readers:
            return
        time.sleep(0.1)


def _absent_hosts(ranks: Ranks, present: list[str]) -> str:
    """The hosts from which nobody came, as far as the launcher names its hosts."""
    if ranks.launcher != "slurm":
        return ""
    try:
        hosts = _slurm_hosts()
    except UserError:
        return ""
    short = {host.partition(".")[0] for host in present}
    absent = [host for host in hosts if host.partition(".")[0] not in short]
    return f"; nobody came from {', '.join(absent)}" if absent else ""
