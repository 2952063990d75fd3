"""One Megatron token file of the documents that count."""

import fcntl
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.corpus import Corpus, Split
from data_tools.errors import UserError
from data_tools.files import aside, locked, publish, write_published
from data_tools.manifest import FileInfo, from_json, to_json
from data_tools.progress import Progress
from data_tools.token_files import bin_path, idx_path, index_file

_BLOCK = 1 << 23  # bytes copied at once


@dataclass(frozen=True)
class Merged:
    """A token file and what it was made of, as `PREFIX.json` has it; `files` by suffix, `bin` and `idx`."""

    fingerprint: str
    split: str
    documents: int
    tokens: int
    files: dict[str, FileInfo]


def merge(directory: Path, prefix: Path, split: str = "train") -> Merged:
    """Write the documents of a split as one token file, `PREFIX.bin` and `PREFIX.idx`.

    The same bytes as if those documents were written one after another. The `.bin` is copied in blocks of
    8 MB, with a checksum over them; memory holds 60 bytes a document and nothing else that grows. The
    `.idx` gets its name last, so a pair is complete; what is killed before starts over with the same command.
    `PREFIX.json` says what the files are of: when all are there, nothing is to be done.

    Raises:
        UserError: the directory holds no corpus, there is no such split or it is empty, other files have
            these names, or a file cannot be read or written.
    """
    corpus = Corpus.open(directory)
    documents = corpus.split(split)
    if not documents.documents:
        raise UserError(f"The split {split!r} of {directory} has no documents to merge.")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with locked(prefix.parent, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return _find(prefix, corpus, split) or _write(corpus, documents, prefix)
    except BlockingIOError as error:
        raise UserError(f"Another merge is at work in {prefix.parent}; wait for it or end it.") from error
    except OSError as error:
        raise UserError(f"The token file {prefix} cannot be written: {error}.") from error


def _find(prefix: Path, corpus: Corpus, split: str) -> Merged | None:
    """What an earlier merge of these documents made, or None when it has to be made, or made again.

    Raises:
        UserError: files of other documents have these names.
    """
    files = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    found = _recorded(prefix)
    if found is None:
        taken = [path for path in (*files.values(), _record(prefix)) if path.exists()]
    else:
        same = (found.fingerprint, found.split) == (corpus.fingerprint, split)
        taken = [] if same else [_record(prefix)]
    if taken:
        raise UserError(
            f"{taken[0]} is already there and of other documents; give another name or remove it."
        )
    whole = found and all(
        path.is_file() and path.stat().st_size == found.files[name].bytes for name, path in files.items()
    )
    return found if whole else None


def _recorded(prefix: Path) -> Merged | None:
    try:
        merged: Merged = from_json(Merged, json.loads(_record(prefix).read_bytes()), "merged")
        return merged
    except (OSError, ValueError, RecursionError):
        return None


def _write(corpus: Corpus, split: Split, prefix: Path) -> Merged:
    files = (bin_path(prefix), idx_path(prefix))
    index = index_file(corpus.dtype, np.diff(split.starts).astype(np.int32))
    try:
        checksum = _copy(split, corpus.dtype.itemsize, aside(files[0]))
        aside(files[1]).write_bytes(index)
        infos = {
            "bin": FileInfo(split.tokens * corpus.dtype.itemsize, checksum),
            "idx": FileInfo(len(index), xxhash.xxh3_128_hexdigest(index)),
        }
        merged = Merged(corpus.fingerprint, split.name, split.documents, split.tokens, infos)
        write_published(_record(prefix), to_json(asdict(merged)))
        files[1].unlink(missing_ok=True)  # an index must never stand beside other ids
        for path in files:
            publish(path)
    finally:
        for path in files:
            aside(path).unlink(missing_ok=True)
    return merged


def _copy(split: Split, itemsize: int, path: Path) -> str:
    """Write the stream of a split to `path`; its XXH3-128, hex."""
    digest, step = xxhash.xxh3_128(), _BLOCK // itemsize
    with path.open("wb") as file, Progress(split.tokens * itemsize, "blocks") as progress:
        for number, start in enumerate(range(0, split.tokens, step), start=1):
            (tokens,) = split.read([(start, min(start + step, split.tokens))])
            content = np.ascontiguousarray(tokens).view(np.uint8).data
            digest.update(content)
            file.write(content)
            progress.report(0, number, min(start + step, split.tokens) * itemsize)
    return digest.hexdigest()


def _record(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")
