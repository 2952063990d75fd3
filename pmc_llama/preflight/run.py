"""The order of a preflight: meet, look at the own machine, hear from all, decide, try the network, decide."""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from data_tools.errors import UserError
from pmc_llama.config import Recipe
from pmc_llama.distributed import disconnect, own_device
from pmc_llama.meeting import NoMeeting, meet
from pmc_llama.preflight import files, network, node
from pmc_llama.preflight.board import Board
from pmc_llama.preflight.job import Job
from pmc_llama.preflight.judgement import Findings, Problems, judge, lines, slow_nodes
from pmc_llama.preflight.node import Facts
from pmc_llama.ranks import Ranks, discover
from pmc_llama.recipe_file import RecipeParser, recipe_path

# What every rank looks at, what the first rank of each node does, and what rank 0 does for all.
EACH_RANK: dict[str, Callable[[Job], Facts]] = {"versions": node.versions, "the GPU": node.gpu}
EACH_NODE: dict[str, Callable[[Job], Facts]] = {
    "the corpus": files.corpora,
    "the first weights": files.first_weights,
    "the newest checkpoint": files.newest_checkpoint,
    "host memory": node.host_memory,
}
FOR_ALL: dict[str, Callable[[Job], Facts]] = {"the recipe and the disk": files.recipe_fits}

# Beyond the time for a check: for answers to come through a loaded store.
_GRACE_SECONDS = 10.0
# Of the time for the checks of a node: for its file system to show what another node wrote.
_TO_BE_SEEN = 1 / 3


def preflight(arguments: Sequence[str]) -> int:
    """Check every node before training: GPUs, versions, corpus, checkpoints, disk, memory, network.

    Args:
        arguments: those of `pmc-llama train`.

    Returns:
        Exit status, the same on all ranks: 0, or 2 with a line on standard error for each node that fails.

    Raises:
        UserError: the recipe is none, or the ranks are not to be known.
        NoMeeting: ranks are missing.
    """
    summary = (preflight.__doc__ or "").partition("\n")[0]
    parser = RecipeParser("pmc-llama preflight", recipe_path(arguments), summary)
    parser.add_argument(
        "--resume", nargs="?", const="latest", default="latest", metavar="CHECKPOINT", help="as of train"
    )
    parser.add_argument(
        "--meet_seconds", type=float, default=300.0, help="longest wait for ranks that have not started"
    )
    parser.add_argument(
        "--check_seconds",
        type=float,
        default=60.0,
        help="longest time for what a node looks at, and again for what the nodes try together",
    )
    recipe, options = parser.read(arguments)
    return run(recipe, discover(), options["resume"], options["meet_seconds"], options["check_seconds"])


def run(recipe: Recipe, ranks: Ranks, resume: str, meet_seconds: float, check_seconds: float) -> int:
    """All of it on one rank; see `preflight`."""
    begin = time.monotonic()
    store = meet(ranks, timedelta(seconds=meet_seconds))
    board = Board(store, ranks)
    job = _introduce(board, recipe, ranks, resume)
    try:
        looked = _look(job, board, check_seconds)
        all_is_well = _agree(board, job, "looked", looked, check_seconds, begin)
        if all_is_well:
            tried = replace(_try_network(job, store, check_seconds), facts=looked.facts)
            all_is_well = _agree(board, job, "tried", tried, check_seconds, begin)
    except TimeoutError:
        print(
            f"preflight: rank 0, on {job.nodes[0]}, has not answered for long: it, its node or its network "
            f"hangs; this is {job.node}",
            file=sys.stderr,
            flush=True,
        )
        all_is_well = False
    board.close()
    if all_is_well:
        disconnect()
    return 0 if all_is_well else 2


def _introduce(board: Board, recipe: Recipe, ranks: Ranks, resume: str) -> Job:
    """Each rank says on which machine it is, by the name that the scheduler knows that by."""
    # mpiexec hands the first node's variables on to the others.
    by_slurm = os.environ.get("SLURMD_NODENAME") if ranks.launcher in ("slurm", "torchrun") else None
    board.tell("node", by_slurm or socket.gethostname())
    if ranks.rank == 0:
        nodes = board.hear("node", _GRACE_SECONDS)
        everyone = [nodes.get(rank, "a node that is gone") for rank in range(ranks.world_size)]
        board.publish("job", {"nodes": everyone, "draw": secrets.randbits(32)})
    try:
        said = board.read("job", 2 * _GRACE_SECONDS)
    except TimeoutError as error:
        raise NoMeeting("Rank 0 came and is gone; look at its node.") from error
    return Job(recipe, resume, ranks, said["nodes"], said["draw"])


def _look(job: Job, board: Board, seconds: float) -> Findings:
    """What there is to find out on this machine."""
    more = Findings()

    def share() -> Facts:
        files.shared_output(job, board, seconds * _TO_BE_SEEN)
        more.wrote = True
        return {}

    def identify() -> Facts:
        more.gpu, more.seconds_off = node.gpu_identity(job), board.seconds_off()
        return {}

    checks = dict(EACH_RANK)
    if job.first_of_node:
        checks |= EACH_NODE
    bound: dict[str, Callable[[], Facts]] = {name: partial(check, job) for name, check in checks.items()}
    if job.first_of_node:
        bound = {"the directory of the checkpoints": share, **bound}
    found = _within(seconds, {**bound, "the GPU and the clock": identify})
    found = replace(found, gpu=more.gpu, seconds_off=more.seconds_off, wrote=more.wrote)
    if job.ranks.rank == 0 and not found.problems:
        of_all = _within(seconds, {name: partial(check, job) for name, check in FOR_ALL.items()})
        found = replace(found, facts=found.facts | of_all.facts, of_all=of_all.problems)
    return found


def _try_network(job: Job, store: dist.Store, seconds: float) -> Findings:
    """What this machine does together with the others."""
    speeds: dict[str, float] = {}

    def measure() -> Facts:
        device = own_device(job.ranks)
        speeds.update(asdict(network.measure(job, store, device, timedelta(seconds=seconds))))
        return {}

    found = _within(seconds, {"the all-reduce over all ranks": measure})
    return replace(found, seconds=dict(speeds))


def _within(seconds: float, checks: Mapping[str, Callable[[], Facts]]) -> Findings:
    """Make checks one after another in a thread that is waited for only so long: any of them may hang."""
    findings, doing, done = Findings(), [""], threading.Event()

    def work() -> None:
        for name, check in checks.items():
            doing[0] = name
            try:
                findings.facts.update(check())
            except UserError as error:
                findings.problems.append(str(error).rstrip("."))
            except Exception as error:  # what nobody thought of belongs to its node, too
                findings.problems.append(f"{name} cannot be checked: {error!r}")
        done.set()

    threading.Thread(target=work, name="preflight", daemon=True).start()
    in_time = done.wait(seconds)
    found = Findings(list(findings.problems), facts=dict(findings.facts))
    if not in_time:
        found.problems.append(f"{doing[0]}: not done within {seconds:.0f} s; look for what hangs")
    return found


# --- deciding --------------------------------------------------------------------------------------------


def _agree(board: Board, job: Job, stage: str, own: Findings, seconds: float, begin: float) -> bool:
    """Rank 0 hears from all ranks, speaks, and tells all whether to go on.

    Raises:
        TimeoutError: rank 0 has not said.
    """
    board.tell(stage, asdict(own))
    if job.ranks.rank == 0:
        told = board.hear(stage, seconds + _GRACE_SECONDS)
        found = {rank: Findings(**values) for rank, values in told.items()}
        problems = judge(found, job.nodes, seconds)
        if stage == "looked":
            writers = [rank for rank, findings in found.items() if findings.wrote]
            for rank in files.unseen(job, board, writers, seconds * _TO_BE_SEEN):
                sentence = (
                    f"the first node does not see what it wrote in {job.checkpoints}; name an --output on a "
                )
                problems.setdefault(rank, []).append(f"{sentence}file system that all nodes share")
        if problems or own.of_all:
            _complain(problems, own.of_all, job)
        elif stage == "tried":
            _praise(job, found, time.monotonic() - begin)
        board.publish(f"{stage} and well", not (problems or own.of_all))
    well: bool = board.read(f"{stage} and well", 3 * (seconds + _GRACE_SECONDS))
    return well


def _complain(problems: Problems, of_all: Sequence[str], job: Job) -> None:
    told = lines(problems, job.nodes)
    for line in [*told, *(f"the job, on any node: {sentence}" for sentence in of_all)]:
        print(f"preflight: {line}", file=sys.stderr)
    if told:
        print(f"preflight: {len(told)} of {len(set(job.nodes))} nodes fail", file=sys.stderr)
    print("preflight: nothing was started", file=sys.stderr, flush=True)


def _praise(job: Job, found: Mapping[int, Findings], seconds: float) -> None:
    nodes, first = list(dict.fromkeys(job.nodes)), found[0]
    slowest: dict[str, dict[str, float]] = {}
    for name, words in (("product", "a product of matrices"), ("exchange", "an exchange with a neighbour")):
        taken = {nd: max(found[r].seconds[name] for r in found if job.nodes[r] == nd) for nd in nodes}
        if all(taken.values()):
            slowest[words] = taken
    for hint in slow_nodes(slowest):
        print(f"preflight: hint: {hint}")
    parts = [
        f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {len(job.nodes)} ranks, {first.facts['the device']}",
        f"go on from {first.facts['the newest checkpoint']}",
        first.facts["the disk"],
    ]
    if job.ranks.world_size > 1:
        taken_by_all = max(findings.seconds["all_reduce"] for findings in found.values())
        size = network.message_bytes(own_device(job.ranks))
        speed = network.bus_bandwidth(size, taken_by_all, job.ranks.world_size)
        parts.append(
            f"all-reduce of {size >> 20} MiB in {taken_by_all * 1e3:.2f} ms, {speed / 1e9:.2f} GB/s of bus "
            "bandwidth"
        )
    print(f"preflight: all is well in {seconds:.1f} s: {'; '.join(parts)}", flush=True)
