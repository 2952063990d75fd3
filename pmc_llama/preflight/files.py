"""What training reads and writes: corpora, first weights, checkpoints, and the disk under them.

A check returns facts that have to be the same on every rank that finds them, and raises `UserError` for what
is wrong here.
"""

import hashlib
import math
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.files import sync
from pmc_llama import checkpoint, huggingface
from pmc_llama.data import TrainingData
from pmc_llama.preflight.board import Board
from pmc_llama.preflight.job import STATE_BYTES, Job
from pmc_llama.preflight.node import Facts
from pmc_llama.run_lock import only_writer

_PIECES, _PIECE_TOKENS = 16, 2048  # read of each corpus
_FILES, _FILE_BYTES = 4, 1 << 20  # read of a checkpoint, by each node


def corpora(job: Job) -> Facts:
    """Each corpus opens, is the same, and gives the same tokens at places drawn anew for each start."""
    facts = {}
    for source in job.sources:
        corpus = source.corpus
        facts[f"the corpus {source.asked.path}"] = f"of fingerprint {corpus.fingerprint[:12]}"
        facts[f"what is read of {source.asked.path}"] = f"of digest {_sample(corpus, job.draw)}"
    return facts


def first_weights(job: Job) -> Facts:
    """The weights that a start begins from can be read."""
    where = job.recipe.model.initialize_from
    if where and (job.recipe.lora or not job.source):  # adapters begin from them at every start
        huggingface.check_directory(where)
    return {}


def newest_checkpoint(job: Job) -> Facts:
    """The checkpoint that training goes on from is whole, as far as sizes and a few megabytes tell."""
    source = job.source
    if source is None:
        return {"the newest checkpoint": "none"}
    try:
        manifest = checkpoint.read_manifest(source)
        names = sorted(manifest.files)
        for name in names:
            if (source / name).stat().st_size != manifest.files[name]["bytes"]:
                raise UserError(f"{name} is not of the size that its manifest says")
        for name in names[job.ranks.rank % len(names) :: job.ranks.world_size][:_FILES]:
            _read_a_piece(source / name)
    except (OSError, UserError) as error:
        # Not an error where all nodes agree: training passes over a damaged one.
        return {"the newest checkpoint": f"{source.name}, damaged ({error}), so an earlier one"}
    return {"the newest checkpoint": source.name}


def recipe_fits(job: Job) -> Facts:
    """The batch can be cut for these ranks, and the disk holds the checkpoints to come; for rank 0.

    The peak is: those kept for good, the newest `keep_last`, and one that is being written before the oldest
    of those goes.
    """
    recipe, manifest = job.recipe, job.manifest
    history = (manifest.data, manifest.samples) if manifest else (None, 0)
    data = TrainingData(job.sources, recipe.data, recipe.seed, *history)
    data.batches(recipe.batch, 0, job.ranks.world_size)
    done = manifest.step if manifest else 0
    left = data.steps_left(recipe.schedule.epochs, history[1], recipe.batch.global_size)
    steps = recipe.schedule.steps or done + left
    with only_writer(recipe.output, rank=0):
        pass
    keep = recipe.checkpoint
    existing = [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(job.checkpoints)]
    more = checkpoints_to_come(done, steps, existing, keep.every_steps, keep.keep_last, keep.keep_every)
    each = STATE_BYTES * job.trained
    free = shutil.disk_usage(job.recipe.output).free
    if more * each > free:
        raise UserError(
            f"{job.checkpoints} has {free / 1e9:.2f} GB free, but {more} more checkpoints of "
            f"{each / 1e9:.2f} GB are to come by step {steps}; free {(more * each - free) / 1e9:.2f} GB, "
            "choose another --output, or change checkpoint.keep_last or checkpoint.keep_every"
        )
    to_come = f"{more} more checkpoint{'s' * (more != 1)}"
    return {"the disk": f"{free / 1e9:,.1f} GB free for {to_come} of {each / 1e9:.2f} GB"}


def checkpoints_to_come(
    done: int, steps: int, existing: list[int], every_steps: int, keep_last: int, keep_every: int
) -> int:
    """How many checkpoints will lie on the disk at once, at most, beyond those that do now.

    Args:
        done: steps made.
        steps: of the whole run.
        existing: steps of the checkpoints there are.
        every_steps: steps between checkpoints.
        keep_last: newest ones kept.
        keep_every: steps whose multiples are kept for good, or 0.
    """
    if done >= steps:
        return 0
    period = math.lcm(every_steps, keep_every) if keep_every else 0
    for_good = steps // period - done // period if period else 0
    passing = [step for step in existing if not keep_every or step % keep_every]
    to_publish = math.ceil(steps / every_steps) - done // every_steps
    return min(to_publish, for_good + max(0, keep_last + 1 - len(passing)))


# --- a directory that all nodes share --------------------------------------------------------------------


def shared_output(job: Job, board: Board, seconds: float) -> Facts:
    """The directory of the checkpoints takes what this node writes, and shows what the first node wrote.

    Whether the first node sees what the others wrote is asked by `unseen`. NFS asks the server for a name
    that is new to it, so no cache hides these.

    Args:
        job: to be started.
        board: of all ranks.
        seconds: longest wait for what another node writes.
    """
    if job.ranks.rank == 0:
        probe = f".preflight-{secrets.token_hex(8)}"
        _write(job.checkpoints / probe / _mark(0))
        board.publish("probe", probe)
        return {}
    try:
        probe = board.read("probe", seconds)
    except TimeoutError:
        return {}  # the first node could not write, and says so
    mark = job.checkpoints / probe / _mark(0)
    if not _until(mark.exists, seconds):
        raise UserError(
            f"{job.checkpoints} does not show what the first node wrote there; name an --output on a file "
            "system that all nodes share"
        )
    _write(job.checkpoints / probe / _mark(job.ranks.rank))
    return {}


def unseen(job: Job, board: Board, writers: list[int], seconds: float) -> list[int]:
    """Those of the ranks that wrote to the shared directory whose writing rank 0 does not see; for rank 0."""
    try:
        probe = job.checkpoints / board.read("probe", 0.1)
    except TimeoutError:
        return []
    missing = list(writers)

    def all_there() -> bool:
        missing[:] = [rank for rank in missing if not (probe / _mark(rank)).exists()]
        return not missing

    _until(all_there, seconds)
    shutil.rmtree(probe, ignore_errors=True)
    return missing


def _mark(rank: int) -> str:
    return f"rank-{rank:05d}"


def _write(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"preflight\n")
        sync(path)
    except OSError as error:
        raise UserError(
            f"{path.parents[1]} cannot be written to ({error.strerror}); mend its mount or its permissions, "
            "or choose another --output"
        ) from error


def _until(happened: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(0.1)
    return done


# --- reading ---------------------------------------------------------------------------------------------


def _sample(corpus: Corpus, draw: int) -> str:
    """A digest of pieces of the token files, at places that follow from `draw`."""
    ends = corpus.part_starts[1:]
    places = np.sort(np.random.default_rng(draw).integers(0, int(ends[-1]), size=_PIECES))
    parts = np.searchsorted(ends, places, side="right")
    lengths = np.minimum(_PIECE_TOKENS, ends[parts] - places)
    tokens = corpus.read(places, lengths)
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:12]


def _read_a_piece(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _FILE_BYTES))
        file.read(_FILE_BYTES)
