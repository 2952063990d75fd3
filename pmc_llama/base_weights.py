"""The frozen weights that adapters belong to: recognized again by a checksum over their files."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import xxhash

from data_tools.errors import UserError
from pmc_llama.progress import ByteProgress

_BLOCK = 64 << 20  # bytes; small enough that ranks share even a single file evenly


@dataclass(frozen=True)
class Base:
    """Frozen weights.

    Attributes:
        path: absolute, of the Hugging Face directory.
        fingerprint: hex; changes with any byte, name or size of its safetensors files.
    """

    path: str
    fingerprint: str


def identify(path: Path, group: dist.ProcessGroup | None) -> Base:
    """Read all weights of a directory once, each rank its share. Collective over `group`.

    The fingerprint is XXH3-128 over each file's name and size and the XXH3-128 of its blocks of 64 MiB.

    Args:
        path: checked (`huggingface.check_directory`).
        group: who shares the reading; None reads alone.

    Raises:
        UserError: a file cannot be read.
    """
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    files = sorted(path.glob("*.safetensors"))
    sizes = {file: file.stat().st_size for file in files}
    blocks = [(file, start) for file in files for start in range(0, sizes[file], _BLOCK)]
    mine = blocks[rank::ranks]
    progress = ByteProgress(f"checking {path}", sum(min(_BLOCK, sizes[file] - start) for file, start in mine))
    digests: dict[str, str] = {}
    for file, start in mine:
        digests[f"{file.name}/{start}"] = _digest(file, start)
        if rank == 0:
            progress.advance(min(_BLOCK, sizes[file] - start))
    if group:
        parts: list[dict[str, str]] = [{}] * ranks
        dist.all_gather_object(parts, digests, group)
        digests = {place: digest for part in parts for place, digest in part.items()}
    whole = xxhash.xxh3_128()
    for file in files:
        whole.update(f"{file.name}/{sizes[file]}\n".encode())
    for file, start in blocks:
        whole.update(f"{digests[f'{file.name}/{start}']}\n".encode())
    return Base(str(path.resolve()), whole.hexdigest())


def require_same(found: Base, expected: Base, checkpoint: Path) -> None:
    """Adapters go with the weights that they were trained on.

    Args:
        found: the weights that are there.
        expected: what the checkpoint's manifest says.
        checkpoint: told to the user.

    Raises:
        UserError: these are others.
    """
    if found.fingerprint != expected.fingerprint:
        raise UserError(
            f"The adapters of {checkpoint} were trained on other weights than those in {found.path} now "
            f"(fingerprint {found.fingerprint}, expected {expected.fingerprint}); use those that were in "
            f"{expected.path} then."
        )


def _digest(file: Path, start: int) -> str:
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            left = _BLOCK
            while left and (data := stream.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; copy it again.") from error
    return digest.hexdigest()
