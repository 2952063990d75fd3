"""Checkpoints: written aside, published by rename, found, verified, loaded, pruned.

A checkpoint is a torch.distributed.checkpoint directory with `manifest.json` beside the tensors. A directory
called `step-NNNNNNNN` is complete by construction: it gets that name only when every byte is on disk.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, StorageReader
from torch.distributed.checkpoint.api import CheckpointException

from data_tools.errors import UserError
from data_tools.files import checksum, sync
from pmc_llama.base_weights import Base
from pmc_llama.checksummed_files import ChecksummedFiles
from pmc_llama.checksummed_files import FileTable as FileTable
from pmc_llama.progress import ByteProgress
from pmc_llama.snapshot import local_bytes

ALL_WEIGHTS, ADAPTERS = 1, 2
"""The formats: of all weights, and of adapters, which versions that know the first alone would misread."""
FORMAT = ADAPTERS
"""The newest that is read."""

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TOKENIZERS = (TOKENIZER, "tokenizer.json")
"""The names that a checkpoint's tokenizer may have: a SentencePiece model, or a Hugging Face tokenizer."""

_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".writing"
_REPLACED = ".replaced-"
_REMOVING = ".removing-"
_DAMAGED = "damaged-"

Result = TypeVar("Result")


class NewerFormat(UserError):
    """A checkpoint that only a later version of this package can read; it is not damaged."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, beside its tensors.

    Args:
        step: steps made.
        updates: of those, how many changed the weights; the others were skipped.
        samples: sequences consumed; with the corpus and the recipe, the whole state of the data.
        tokens: inputs consumed, padding included.
        data: how the samples came, and what of each corpus they covered (`TrainingData.history`).
        guard: what the numerical guard remembers (`Guard.state`).
        recipe: the recipe that made it, as plain data.
        model_config: the transformers configuration, as plain data.
        corpus: fingerprint of the corpus, or of a blend's first.
        versions: of the packages that wrote it.
        files: `bytes` and `xxh3_128` of every other file of the directory.
        base: the frozen weights that the tensors are adapters of; None when they are all weights.
        format: of the checkpoint, see `FORMAT`.
    """

    step: int
    updates: int
    samples: int
    tokens: int
    data: dict[str, Any]
    guard: dict[str, Any]
    recipe: dict[str, Any]
    model_config: dict[str, Any]
    corpus: str
    versions: dict[str, str]
    files: FileTable
    base: Base | None = None
    format: int = ALL_WEIGHTS


# --- writing ---------------------------------------------------------------------------------------------


def save(
    state: Mapping[str, Tensor],
    root: Path,
    describe: Callable[[FileTable], Manifest],
    tokenizer: Path,
    group: dist.ProcessGroup,
) -> Path:
    """Write a checkpoint aside and publish it. Collective over `group`.

    Args:
        state: of a backend (`Backend.state`), or a copy of it (`Snapshot.take`).
        root: the run's `checkpoints` directory, on a filesystem that all ranks share.
        describe: makes the manifest from the table of files.
        tokenizer: kept with the weights under the name of its kind, so that an export needs nothing else.
        group: a gloo group over all ranks.

    Returns:
        The published directory.

    Raises:
        UserError: on every rank, when the disk refuses on any (full, read-only). Nothing half-written stays,
            and earlier checkpoints are as they were.
    """
    aside = root / _ASIDE
    files = ChecksummedFiles(_progress(state, root, group))
    try:
        on_first_rank(group, lambda: _prepare(aside, tokenizer, files))
        _write_together(state, aside, files, group)
        tables: list[FileTable] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(tables, files.table, group)
        table = {name: entry for part in tables for name, entry in part.items()}
        return on_first_rank(group, lambda: _publish(aside, root, describe(table)))
    except UserError:
        # One rank removes: the others might meet the directory of the next attempt.
        if dist.get_rank(group) == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _prepare(aside: Path, tokenizer: Path, files: ChecksummedFiles) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    sync(aside.parent.parent)  # which may just have got the directory of checkpoints
    name = TOKENIZERS[tokenizer.suffix == ".json"]
    with files.create_stream(aside / name, "wb") as copy:
        copy.write(tokenizer.read_bytes())


def _write_together(
    state: Mapping[str, Tensor], aside: Path, files: ChecksummedFiles, group: dist.ProcessGroup
) -> None:
    # `files` syncs. Copying ahead is for tensors on a GPU, and would use its default stream from any thread.
    writer = FileSystemWriter(aside, sync_files=False, per_thread_copy_ahead=0)
    writer.fs = files
    try:
        dcp.save(dict(state), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise UserError(
            f"The checkpoint could not be written to {aside.parent}{_room(aside.parent)}: {_cause(error)}; "
            "free or mend the disk."
        ) from error


def _room(directory: Path) -> str:
    try:
        return f", where {shutil.disk_usage(directory).free / 1e9:.2f} GB are free now"
    except OSError:
        return ", which cannot be reached"


def _progress(state: Mapping[str, Tensor], root: Path, group: dist.ProcessGroup) -> Callable[[int], None]:
    """Tells how far a long save is, by the part of the rank that speaks."""
    if dist.get_rank(group) != 0:
        return lambda _: None
    left = total = sum(local_bytes(tensor) for tensor in state.values())
    progress = ByteProgress(f"writing rank 0's part of a checkpoint to {root}", total)

    def count(written: int) -> None:
        nonlocal left
        told = max(0, min(written, left - 1))  # never the whole: who saves says when it is done
        left -= told
        progress.advance(told)

    return count


def _publish(aside: Path, root: Path, manifest: Manifest) -> Path:
    path = aside / MANIFEST
    path.write_text(json.dumps(_plain(manifest), indent=1, sort_keys=True) + "\n")
    sync(path)
    sync(aside)
    final = root / f"step-{manifest.step:08d}"
    replaced = root / f"{_REPLACED}{final.name}"
    if final.exists():
        final.rename(replaced)
    try:
        aside.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    # Killed before here, `tidy` of the next start puts the replaced one back.
    sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _plain(manifest: Manifest) -> dict[str, Any]:
    values = asdict(manifest)
    if manifest.format == ALL_WEIGHTS:  # whose first versions knew no such key
        del values["base"]
    return values


def prune(root: Path, keep_last: int, keep_every: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those at multiples of `keep_every` steps.

    The one just published is always the newest: see `newest_sound` and `tidy`.
    """
    for path in list_checkpoints(root)[:-keep_last]:
        if not keep_every or _step(path) % keep_every:
            # The name goes first, so that an interrupted removal leaves nothing that looks complete.
            doomed = root / f"{_REMOVING}{path.name}"
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(path.rename(doomed), ignore_errors=True)


def tidy(root: Path) -> None:
    """Clear away what a killed run left half done, before anything is found or written. One rank calls it."""
    for path in root.glob(f"{_REPLACED}*"):
        final = root / path.name.removeprefix(_REPLACED)
        if not final.exists():
            path.rename(final)
    for pattern in (_ASIDE, f"{_REPLACED}*", f"{_REMOVING}*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# --- finding and reading ---------------------------------------------------------------------------------


def list_checkpoints(root: Path) -> list[Path]:
    """The published checkpoints of a run's `checkpoints` directory, oldest first."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def newest_sound(root: Path, group: dist.ProcessGroup, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint without damage; every damaged one on the way is named to `say`.

    Once a sound one is found, the damaged ones above it are renamed `damaged-...`, so that what is published
    from here on is the newest. Collective over `group`; the ranks share the reading.

    Raises:
        UserError: there are checkpoints and all of them are damaged, or the newest needs a later version.
    """
    damaged: list[Path] = []
    for path in reversed(on_first_rank(group, lambda: list_checkpoints(root))):
        damage = verify_together(path, group)
        if damage is None:
            on_first_rank(group, lambda: _set_aside(damaged))
            return path
        say(f"{damage}; going on from the checkpoint before it")
        damaged.append(path)
    if damaged:
        raise UserError(f"Every checkpoint in {root} is damaged; remove them to start again from step 0.")
    return None


def _set_aside(damaged: list[Path]) -> None:
    for path in damaged:
        target = path.with_name(f"{_DAMAGED}{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        NewerFormat: it was written by a version that writes another format.
        UserError: the directory is not a checkpoint, or its manifest is damaged.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text())
        _check_format(directory, values.get("format", ALL_WEIGHTS), values.get("versions", {}))
        base = values.pop("base", None)
        manifest = Manifest(**values, base=base and Base(**base))
        _check_table(manifest.files)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{directory} is not a checkpoint: it has no {MANIFEST}; name a step-NNNNNNNN directory."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); use an earlier checkpoint.") from error
    return manifest


def _check_format(directory: Path, found: int, versions: dict[str, str]) -> None:
    if found > FORMAT:
        writer = versions.get("pmc-llama", "of an unknown version")
        raise NewerFormat(
            f"{directory} has format {found}, written by pmc-llama {writer}; this version reads format "
            f"{FORMAT}; install that version or a later one."
        )


def _check_table(files: FileTable) -> None:
    """Every entry is whole, and the files without which nothing can be read are listed."""
    for name, entry in files.items():
        if not isinstance(entry["bytes"], int) or not isinstance(entry["xxh3_128"], str):
            raise ValueError(f"the entry of {name} is not a size and a checksum")
    if ".metadata" not in files or not files.keys() & {*TOKENIZERS}:
        raise ValueError(".metadata or the tokenizer is not listed")


def verify(directory: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UserError: names the first file that is missing, of another size or of another content.
    """
    manifest = read_manifest(directory)
    total = sum(file["bytes"] for file in manifest.files.values())
    progress = ByteProgress(f"checking {directory}", total)
    for name in sorted(manifest.files):
        _verify_file(directory, name, manifest.files[name], progress.advance)
    return manifest


def verify_together(directory: Path, group: dist.ProcessGroup) -> str | None:
    """What is wrong with a checkpoint, or None; each rank of `group` reads its share of the files.

    Raises:
        NewerFormat: on every rank; there is nothing wrong with it.
    """
    damage: str | None = None
    try:
        manifest = read_manifest(directory)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        for name in sorted(manifest.files)[rank::world_size]:
            _verify_file(directory, name, manifest.files[name])
    except NewerFormat:
        raise  # each rank reads the manifest, so each finds this
    except UserError as error:
        damage = str(error)
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, damage, group)
    return next((text for text in found if text), None)


def load(state: dict[str, Tensor], directory: Path, group: dist.ProcessGroup) -> None:
    """Read a checkpoint into `state` in place, whatever backend and world size wrote it."""
    read_weights(state, FileSystemReader(directory), group)


def read_weights(state: dict[str, Tensor], reader: StorageReader, group: dist.ProcessGroup) -> None:
    """Fill tensors from any storage reader, each rank its own part. Collective over `group`.

    Raises:
        UserError: on every rank, when a tensor is missing, has another shape or cannot be read on any.
    """
    try:
        dcp.load(state, storage_reader=reader, process_group=group)
    except CheckpointException as error:
        raise UserError(f"the weights could not be loaded: {_cause(error)}") from error


def find_tokenizer(directory: Path) -> Path:
    """The tokenizer of a checkpoint that is whole."""
    return next(directory / name for name in TOKENIZERS if (directory / name).exists())


# --- the small parts -------------------------------------------------------------------------------------


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's trouble if data or disk can cause it; anything else is a bug, and raised."""
    cause, _ = next(iter(error.failures.values()))
    if not isinstance(cause, OSError | ValueError | RuntimeError):
        raise error
    return cause


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _verify_file(
    directory: Path, name: str, expected: dict[str, Any], count: Callable[[int], None] = lambda _: None
) -> None:
    path = directory / name
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise UserError(f"checkpoint {directory} is damaged: {name} is missing")
    if found != expected["bytes"]:
        raise UserError(
            f"checkpoint {directory} is damaged: {name} has {found} bytes, expected {expected['bytes']}"
        )
    if checksum(path, count) != expected["xxh3_128"]:
        raise UserError(f"checkpoint {directory} is damaged: the content of {name} fails its checksum")


def on_first_rank(group: dist.ProcessGroup, action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and give its result to every rank. Collective over `group`.

    Raises:
        UserError: on every rank, the trouble that rank 0 had with the disk.
        RuntimeError: on the other ranks, when rank 0 failed of anything else.
    """
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = action()
        except OSError as error:
            sentence = f"{error.filename or 'checkpoint'}: {error.strerror or error}; free or mend the disk."
            outcome[1], own = UserError(sentence), error
        except Exception as error:
            outcome[1], own = RuntimeError(f"rank 0 failed: {error!r}"), error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if own and not isinstance(own, OSError):
        raise own
    if outcome[1]:
        raise outcome[1] from own
    result: Result = outcome[0]
    return result
