"""Input shard to part: read, select, clean and tokenize the papers of some files, in one streaming pass."""

import fcntl
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.documents import DocumentTable, row
from data_tools.errors import UserError
from data_tools.files import checksum, locked, write_published
from data_tools.inputs import InputFile, describe
from data_tools.manifest import (
    Counts,
    FileInfo,
    Inputs,
    PartInfo,
    counts_from_json,
    part_from_json,
    to_json,
)
from data_tools.measures import Measured, Measurer
from data_tools.papers import Paper, Rejected
from data_tools.recipe import Recipe
from data_tools.rejected import RejectedFile
from data_tools.rules import RULES_VERSION, apply, chain
from data_tools.rules.base import Dropped, Rule
from data_tools.rules.normalize import normalize_text
from data_tools.rules.texts import text_of
from data_tools.shards import ShardReader
from data_tools.streams import is_url
from data_tools.token_files import TokenFileWriter
from data_tools.tokenizer import Tokenizer
from data_tools.workers import Report

EXAMPLES = 5
"""How many left-out records of each reason a part and a corpus name."""
_LONGEST_DETAIL = 200  # characters
_CHECKED_ONE_IN = 1024
"""One document in so many, chosen by its text, is compared with sentencepiece, which takes 2% of a build."""
ENCODED_TOGETHER = 1 << 21
"""Characters of documents that are encoded one after another."""
_CLOCKS_APART = 600 * 10**9
"""Nanoseconds by which the clocks of two file servers may differ: twice what Kerberos accepts between clocks
(RFC 4120, 8.2)."""


@dataclass(frozen=True)
class PartTask:
    """A part to make.

    Attributes:
        name: of the part, such as `part-00000`.
        files: its input.
        directory: the `parts` directory.
        tokenizer: path of the SentencePiece model.
        recipe: of the corpus.
        fixed: the corpus is finished, so the input must be what the part was made from.
    """

    name: str
    files: tuple[InputFile, ...]
    directory: Path
    tokenizer: Path
    recipe: Recipe
    fixed: bool


@dataclass(frozen=True)
class Part:
    """A finished part and the counts of its records."""

    info: PartInfo
    counts: Counts


def make_part(task: PartTask, report: Report) -> Part:
    """Make a part, or find it already made from the same input with the same rules and tokenizer.

    Its files are published one by one and its record, `NAME.json`, last: a part with a record is complete.

    Raises:
        UserError: the input cannot be read, the part cannot be written, or there is already a part that was
            made in another way.
    """
    tokenizer = Tokenizer(task.tokenizer)
    # A build that takes over from a killed one waits for this lock, so no two ever write a part.
    with locked(task.directory, fcntl.LOCK_SH):
        found = find_part(task, tokenizer)
        if found is not None:
            report(found.counts.read, found.info.inputs.bytes)
            return found
        return write_part(task, tokenizer, report)


def find_part(task: PartTask, tokenizer: Tokenizer, trusted_from: float = math.inf) -> Part | None:
    """The part as it is already there, whole; None when it has to be made.

    Args:
        task: the part.
        tokenizer: that of the task, loaded.
        trusted_from: seconds since the epoch; a record at least as new was written by a process of this very
            build, so the bytes of the input are not looked at again.

    Raises:
        UserError: it was made with another tokenizer or rules, or a finished corpus has it from other input.
    """
    try:
        made = os.stat(record_path(task)).st_mtime_ns
        content = json.loads(record_path(task).read_bytes())
        found = Part(part_from_json(content["part"]), counts_from_json(content["counts"]))
        found_with = content["made_with"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if found_with != _made_with(task.recipe, tokenizer):
        raise UserError(
            f"{task.directory} holds parts made with another tokenizer or another recipe; "
            "build into another directory."
        )
    if _is_input_of(task, found.info.inputs, made, made >= trusted_from * 1e9):
        return found if _is_whole(task.directory, found.info) else None
    if task.fixed:
        raise UserError(
            f"The input {task.files[0].name} has changed since the corpus {task.directory.parent} was built; "
            "build into another directory."
        )
    return None


def _is_input_of(task: PartTask, inputs: Inputs, made: int, trusted: bool) -> bool:
    """Whether a finished part was made from these very files; `made` is the time of its record.

    Their bytes are read only where they may have changed since: when the time of a file's last change, which
    no copying tool can set back, is not clearly before the time of the part's record. The two times come from
    two clocks where input and output lie on different servers. A URL tells no such time.
    """
    files = task.files
    if (inputs.first, inputs.files, inputs.bytes) != (files[0].name, len(files), sum(f.bytes for f in files)):
        return False
    if trusted:
        return True
    changes = _last_changes(task)
    if all(change is not None and change + _CLOCKS_APART < made for change in changes):
        return True
    return describe(files) == inputs


def _last_changes(task: PartTask) -> list[int | None]:
    """When each file of the input last changed, its ctime in nanoseconds; None for a URL.

    Raises:
        UserError: a file is gone.
    """
    paths = [part.path for file in task.files for part in file.parts()]
    try:
        return [None if is_url(path) else os.stat(path).st_ctime_ns for path in paths]
    except OSError as error:
        raise UserError(f"The input {error.filename} cannot be read: {error.strerror}.") from error


def write_part(task: PartTask, tokenizer: Tokenizer, report: Report) -> Part:
    """Make a part, whatever is there.

    Raises:
        UserError: the input cannot be read, or the part cannot be written.
    """
    try:
        record_path(task).unlink(missing_ok=True)
        part = _write(task, tokenizer, report)
        record = {
            "made_with": _made_with(task.recipe, tokenizer),
            "part": asdict(part.info),
            "counts": asdict(part.counts),
        }
        write_published(record_path(task), to_json(record))
    except OSError as error:
        raise UserError(f"{task.directory}/{task.name} cannot be written: {error}.") from error
    return part


def add_counts(counts: list[Counts]) -> Counts:
    """The sum of several counts, with the first examples of each reason."""
    total = Counts()
    for one in counts:
        total = replace(total, read=total.read + one.read, kept=total.kept + one.kept)
        for reason, number in one.left_out.items():
            total.left_out[reason] = total.left_out.get(reason, 0) + number
            known = total.examples.setdefault(reason, [])
            known += one.examples.get(reason, [])[: EXAMPLES - len(known)]
    return total


def _write(task: PartTask, tokenizer: Tokenizer, report: Report) -> Part:
    prefix = task.directory / task.name
    table_path = task.directory / f"{task.name}.documents.parquet"
    changed = _last_changes(task)
    shard = ShardReader(task.files)
    rules, measure = chain(task.recipe.rules), Measurer(task.recipe.measures)
    counts, read = Counts(), 0
    retracts: list[str] = []
    with (
        TokenFileWriter(prefix, tokenizer.dtype) as tokens,
        DocumentTable(table_path) as table,
        RejectedFile(task.directory / f"{task.name}.rejected.jsonl") as set_aside,
    ):
        documents = _Documents(tokenizer, tokens, table)
        for record in shard:
            read += 1
            report(read, shard.position)
            if isinstance(record, Paper):
                retracts += record.retracts
            selected = _select(record, task.recipe, rules)
            if isinstance(selected, Rejected):
                _leave_out(counts, selected)
                set_aside.add(selected)
                continue
            paper, text = selected
            documents.add(paper, text, measure(text))
        documents.write()
    if _last_changes(task) != changed:
        raise UserError(f"The input {task.files[0].name} changed while it was read; run the command again.")
    files = {
        "bin": FileInfo(tokens.tokens * tokenizer.dtype.itemsize, tokens.bin_checksum),
        "idx": FileInfo(Path(f"{prefix}.idx").stat().st_size, tokens.idx_checksum),
        "documents.parquet": FileInfo(table_path.stat().st_size, checksum(table_path)),
        "rejected.jsonl": FileInfo(set_aside.bytes, set_aside.checksum),
    }
    info = PartInfo(task.name, documents.written, tokens.tokens, shard.inputs(), files, retracts)
    return Part(info, replace(counts, read=read, kept=documents.written))


class _Documents:
    """Encodes documents and writes them, in order, those of `ENCODED_TOGETHER` characters at a time.

    The tokenizer's tables fill a processor's cache, and what reads and cleans a paper puts them out of it.

    Attributes:
        written: documents written.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: TokenFileWriter, table: DocumentTable) -> None:
        self._tokenizer, self._tokens, self._table = tokenizer, tokens, table
        self._waiting: list[tuple[Paper, str, Measured]] = []
        self._characters = 0
        self.written = 0

    def add(self, paper: Paper, text: str, measured: Measured) -> None:
        """Take a document, to be written with others."""
        self._waiting.append((paper, text, measured))
        self._characters += len(text)
        if self._characters >= ENCODED_TOGETHER:
            self.write()

    def write(self) -> None:
        """Write what was taken and is not written yet."""
        for paper, text, measured in self._waiting:
            ids = self._tokenizer.encode_document(text)
            document = row(paper, text, len(ids), measured)
            if self.written == 0 or int.from_bytes(document.text_hash) % _CHECKED_ONE_IN == 0:
                self._tokenizer.check(text, ids, paper.source)
            self._tokens.add(ids)
            self._table.add(document)
            self.written += 1
        self._waiting.clear()
        self._characters = 0


def _select(record: Paper | Rejected, recipe: Recipe, rules: Sequence[Rule]) -> tuple[Paper, str] | Rejected:
    if isinstance(record, Rejected):
        return record
    if recipe.require_pmc_id and record.pmc_id is None:
        return Rejected("no_pmc_id", record.source)
    paper = apply(rules, record)
    if isinstance(paper, Dropped):
        return Rejected(paper.reason, record.source, paper.detail)
    text = text_of(paper).training_text  # that of the rules
    return (paper, text) if text else Rejected("no_text", record.source)


def _leave_out(counts: Counts, rejected: Rejected) -> None:
    """Count a record that is left out, and name it among the first of its reason."""
    counts.left_out[rejected.reason] = counts.left_out.get(rejected.reason, 0) + 1
    examples = counts.examples.setdefault(rejected.reason, [])
    if len(examples) < EXAMPLES:
        detail = normalize_text(rejected.detail)[:_LONGEST_DETAIL]
        examples.append(f"{rejected.source} {detail}".rstrip())


def _made_with(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a part depends on besides its input; what is decided later is not among it."""
    return {
        "rules_version": RULES_VERSION,
        "require_pmc_id": recipe.require_pmc_id,
        "rules": recipe.rules,
        "measures": Measurer(recipe.measures).identity,
        "tokenizer": tokenizer.sha256,
    }


def record_path(task: PartTask) -> Path:
    """The path of a part's record, without which it is not finished."""
    return task.directory / f"{task.name}.json"


def _is_whole(directory: Path, part: PartInfo) -> bool:
    paths = {directory / f"{part.name}.{suffix}": file.bytes for suffix, file in part.files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
