"""Verification of a corpus: every byte against its checksum, every index, and a sample of documents."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_tools.corpus import Corpus, Split
from data_tools.documents import read_documents, table_path, text_hash
from data_tools.errors import UserError
from data_tools.files import checksum
from data_tools.manifest import PART_FILES, FileInfo, counts_from_json, part_from_json
from data_tools.progress import Progress
from data_tools.splits import read_reasons
from data_tools.token_files import TokenFile
from data_tools.tokenizer import Tokenizer, Tokens

_SAMPLES_A_PART = 16


@dataclass(frozen=True)
class Verified:
    """What was checked, when all of it held.

    `samples` documents were decoded and encoded again to the same ids; of these, `same_text` also decode to
    the very text that was read (its hash is in the table), which a tokenizer without byte fallback or with
    a text normalization cannot promise.
    """

    files: int
    bytes: int
    documents: int
    tokens: int
    samples: int
    same_text: int


def verify(directory: Path) -> Verified:
    """Check a corpus.

    Raises:
        UserError: naming the first file that is damaged and what does not hold.
    """
    corpus = Corpus.open(directory)
    tokenizer = Tokenizer(corpus.tokenizer_path)
    files = _files(corpus)
    _check_files(files)
    for name in corpus.manifest.splits:
        _check_split(corpus.split(name))
        _check_loss_starts(corpus.split(name))
    _check_reasons(corpus)
    sampled = [_check_part(corpus, number, tokenizer) for number in range(len(corpus.manifest.parts))]
    _check_records(corpus)
    return Verified(
        files=len(files),
        bytes=sum(info.bytes for info in files.values()),
        documents=sum(part.documents for part in corpus.manifest.parts),
        tokens=sum(part.tokens for part in corpus.manifest.parts),
        samples=sum(samples for samples, _ in sampled),
        same_text=sum(same for _, same in sampled),
    )


def _files(corpus: Corpus) -> dict[Path, FileInfo]:
    manifest, directory = corpus.manifest, corpus.directory
    found = {manifest.path(directory, f"{name}.npy"): split.file for name, split in manifest.splits.items()}
    found |= {manifest.path(directory, name): file for name, file in manifest.files.items()}
    for part in corpus.manifest.parts:
        for suffix in PART_FILES:
            found[corpus.directory / "parts" / f"{part.name}.{suffix}"] = part.files[suffix]
    return found


def _check_files(files: dict[Path, FileInfo]) -> None:
    """Read every byte, in view of the user."""
    with Progress(sum(info.bytes for info in files.values()), "files") as progress:
        done = 0
        for number, (path, info) in enumerate(files.items(), start=1):
            found = checksum(path, partial(_report, progress, number, done))
            if found != info.checksum:
                raise UserError(
                    f"{path} is damaged: its checksum is not that of corpus.json; build it again."
                )
            done += info.bytes


def _report(progress: Progress, number: int, done: int, size: int) -> None:
    progress.report(0, number, done + size)


def _check_split(split: Split) -> None:
    starts, positions = np.asarray(split.starts), np.asarray(split.positions)
    lengths, room = np.diff(starts), np.diff(positions)
    if starts[0] != 0 or (lengths <= 0).any() or (room < lengths).any():
        raise UserError(f"{split.path} is damaged: its documents overlap or are unordered.")


def _check_loss_starts(split: Split) -> None:
    """Check that the loss of each document begins in it, behind its first token."""
    begins, ends = split.starts[:-1], split.starts[1:]
    found = split.loss_starts(begins)
    if split.has_prompts and ((found <= begins) | (found >= ends)).any():
        raise UserError(f"The loss starts of {split.corpus.location} are damaged: make the prompts again.")


def _check_reasons(corpus: Corpus) -> None:
    """Check that the documents without a reason against them are those of the splits."""
    manifest = corpus.manifest
    path = manifest.path(corpus.directory, "reasons.npy")
    reasons = read_reasons(path, sum(part.documents for part in manifest.parts))
    counted = sum(split.documents for split in manifest.splits.values())
    found = np.bincount(reasons, minlength=len(manifest.decisions) + 1).tolist()
    if found != [counted, *(decision.documents for decision in manifest.decisions)]:
        raise UserError(f"{path} is damaged: its reasons are not those that corpus.json counts.")


def _check_records(corpus: Corpus) -> None:
    """Check the records of the parts, from which decisions are taken again and a build goes on."""
    read = 0
    for part in corpus.manifest.parts:
        path = corpus.directory / "parts" / f"{part.name}.json"
        try:
            content = json.loads(path.read_bytes())
            same = part_from_json(content["part"]) == part
            read += counts_from_json(content["counts"]).read
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            same = False
        if not same:
            raise UserError(f"{path} is damaged: it is not the record of its part; build it again.")
    if read != corpus.manifest.counts.read:
        raise UserError(
            f"The records of the parts of {corpus.directory} count {read} papers that were read, corpus.json "
            f"{corpus.manifest.counts.read}; build it again."
        )


def _check_part(corpus: Corpus, number: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """Check a part's index and table against each other, and a sample of its documents."""
    prefix = corpus.part_prefix(number)
    path = table_path(corpus.directory, prefix.name)
    table = read_documents([path], ["tokens", "text_hash"])
    with TokenFile(prefix) as tokens:
        tokens.verify()
        if not np.array_equal(table["tokens"].to_numpy(), tokens.lengths):
            raise UserError(f"{path} does not fit its token file: the lengths of the documents differ.")
        documents = np.unique(np.linspace(0, len(tokens.lengths) - 1, _SAMPLES_A_PART).astype(int)).tolist()
        if not len(tokens.lengths):
            return 0, 0
        same = []
        begins = int("prompts.json" in corpus.manifest.files and tokenizer.bos >= 0)  # with a BOS
        for document in documents:
            text = _decode(tokens.document(document)[begins:], tokenizer)
            if text is None:
                raise UserError(
                    f"Document {document} of {prefix}.bin is not what its tokenizer makes of its text."
                )
            same.append(text_hash(text) == table["text_hash"][document].as_py())
    return len(same), sum(same)


def _decode(ids: Tokens, tokenizer: Tokenizer) -> str | None:
    """The text of a document, or None when the text does not encode to the same ids again.

    Ids that stand for pieces unknown to the tokenizer cannot come back and are not asked to.
    """
    text = tokenizer.decode(ids[:-1])
    if ids[-1] != tokenizer.eos:
        return None
    same = tokenizer.unk in ids or np.array_equal(tokenizer.encode_document(text), ids)
    return text if same else None
