"""Input shard to part: read, select, clean and tokenize the papers of some files, in one streaming pass."""

import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.documents import DocumentTable, row
from data_tools.errors import UserError
from data_tools.files import checksum, locked, write_published
from data_tools.inputs import InputFile, describe, known_reader
from data_tools.manifest import (
    Counts,
    FileInfo,
    Inputs,
    PartInfo,
    counts_from_json,
    part_from_json,
    to_json,
)
from data_tools.measures import Measurer
from data_tools.papers import Paper, Rejected
from data_tools.recipe import Recipe
from data_tools.rejected import RejectedFile
from data_tools.render import training_text
from data_tools.rules import RULES_VERSION, apply, chain
from data_tools.rules.base import Dropped, Rule
from data_tools.rules.normalize import normalize_text
from data_tools.token_files import TokenFileWriter
from data_tools.tokenizer import Tokenizer
from data_tools.workers import Report

EXAMPLES = 5
"""How many left-out records of each reason a part and a corpus name."""
_LONGEST_DETAIL = 200  # characters


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
    inputs = describe(task.files)
    made_with = _made_with(task.recipe, tokenizer)
    # A build that takes over from a killed one waits for this lock, so no two ever write a part.
    with locked(task.directory, fcntl.LOCK_SH):
        found = _find(task, made_with, inputs)
        if found is not None:
            report(found.counts.read, inputs.bytes)
            return found
        try:
            return _make(task, tokenizer, inputs, made_with, report)
        except OSError as error:
            raise UserError(f"{task.directory}/{task.name} cannot be written: {error}.") from error


def _find(task: PartTask, made_with: dict[str, Any], inputs: Inputs) -> Part | None:
    """The part as it is already there, whole; None when it has to be made.

    Raises:
        UserError: it was made with another tokenizer or rules, or a finished corpus has it from other input.
    """
    try:
        content = json.loads(_record_path(task).read_bytes())
        found = Part(part_from_json(content["part"]), counts_from_json(content["counts"]))
        found_with = content["made_with"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if found_with != made_with:
        raise UserError(
            f"{task.directory} holds parts made with another tokenizer or another recipe; "
            "build into another directory."
        )
    if found.info.inputs == inputs:
        return found if _is_whole(task.directory, found.info) else None
    if task.fixed:
        raise UserError(
            f"The input {inputs.first} has changed since the corpus {task.directory.parent} was built; "
            "build into another directory."
        )
    return None


def _make(
    task: PartTask, tokenizer: Tokenizer, inputs: Inputs, made_with: dict[str, Any], report: Report
) -> Part:
    _record_path(task).unlink(missing_ok=True)
    part = _write(task, tokenizer, inputs, report)
    record = {"made_with": made_with, "part": asdict(part.info), "counts": asdict(part.counts)}
    write_published(_record_path(task), to_json(record))
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


def _write(task: PartTask, tokenizer: Tokenizer, inputs: Inputs, report: Report) -> Part:
    prefix = task.directory / task.name
    table_path = task.directory / f"{task.name}.documents.parquet"
    rejected_path = task.directory / f"{task.name}.rejected.jsonl"
    rules, measure = chain(task.recipe.rules), Measurer(task.recipe.measures)
    counts, read, kept = Counts(), 0, 0
    with (
        TokenFileWriter(prefix, tokenizer.dtype) as tokens,
        DocumentTable(table_path) as table,
        RejectedFile(rejected_path) as set_aside,
    ):
        for record in _records(task.files, report):
            read += 1
            selected = _select(record, task.recipe, rules)
            if isinstance(selected, Rejected):
                _leave_out(counts, selected)
                set_aside.add(selected)
                continue
            paper, text = selected
            ids = tokenizer.encode_document(text)
            tokens.add(ids)
            table.add(row(paper, text, len(ids), measure(text)))
            kept += 1
    files = {
        "bin": FileInfo(tokens.tokens * tokenizer.dtype.itemsize, tokens.bin_checksum),
        "idx": FileInfo(Path(f"{prefix}.idx").stat().st_size, tokens.idx_checksum),
        "documents.parquet": FileInfo(table_path.stat().st_size, checksum(table_path)),
        "rejected.jsonl": FileInfo(rejected_path.stat().st_size, checksum(rejected_path)),
    }
    info = PartInfo(task.name, kept, tokens.tokens, inputs, files)
    return Part(info, replace(counts, read=read, kept=kept))


def _records(files: tuple[InputFile, ...], report: Report) -> Iterator[Paper | Rejected]:
    read, consumed = 0, 0
    for file in files:
        try:
            with open(file.path, "rb") as stream:
                for record in known_reader(file.name).read(stream, file.name):
                    yield record
                    read += 1
                    report(read, consumed + min(stream.tell(), file.bytes))
        except OSError as error:
            raise UserError(f"The input {file.path} cannot be read: {error}.") from error
        consumed += file.bytes


def _select(record: Paper | Rejected, recipe: Recipe, rules: Sequence[Rule]) -> tuple[Paper, str] | Rejected:
    if isinstance(record, Rejected):
        return record
    if recipe.require_pmc_id and record.pmc_id is None:
        return Rejected("no_pmc_id", record.source)
    paper = apply(rules, record)
    if isinstance(paper, Dropped):
        return Rejected(paper.reason, record.source, paper.detail)
    text = training_text(paper)
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
        "measures": asdict(recipe.measures),
        "tokenizer": tokenizer.sha256,
    }


def _record_path(task: PartTask) -> Path:
    return task.directory / f"{task.name}.json"


def _is_whole(directory: Path, part: PartInfo) -> bool:
    paths = {directory / f"{part.name}.{suffix}": file.bytes for suffix, file in part.files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
