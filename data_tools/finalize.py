"""Parts to corpus: which documents count, decided from the tables alone, and decided again."""

import fcntl
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.contamination import TestQuestion
from data_tools.decide import REASONS, decide, require_possible
from data_tools.documents import read_table, table_path
from data_tools.errors import UserError
from data_tools.facts import Facts, read_facts
from data_tools.files import locked, published, write_published
from data_tools.manifest import (
    Counts,
    Decision,
    FileInfo,
    Manifest,
    PartInfo,
    SplitInfo,
    TokenizerInfo,
    counts_from_json,
    read_manifest,
    write_manifest,
)
from data_tools.measures import Measurer
from data_tools.near_duplicates import near_duplicates
from data_tools.papers import BAD_RECORDS, Source
from data_tools.parts import EXAMPLES, Part, add_counts
from data_tools.progress import Progress
from data_tools.question_table import question_table, read_question_table
from data_tools.recipe import Decisions, Recipe
from data_tools.rules import RULES_VERSION
from data_tools.splits import Mask, array_file, divide, split_file
from data_tools.tokenizer import Tokenizer

_DECIDED_FILE = re.compile(r"\.?(train|heldout|reasons|questions)-[0-9a-f]{16}\.(npy|parquet)(\.partial)?")
_QUIET = 3.0  # seconds
_COPY_BLOCK = 1 << 22


def finalize(directory: Path, parts: Sequence[Part], tokenizer: Tokenizer, recipe: Recipe) -> Manifest:
    """Decide which documents count, and write what makes a corpus of the parts, corpus.json last.

    Raises:
        UserError: too many records are damaged, a decision cannot be made, or no document counts.
    """
    counts = add_counts([part.counts for part in parts])
    require_sound(counts, recipe.max_bad)
    infos = [part.info for part in parts]
    questions = Measurer(recipe.measures).test_sets.questions
    decided = _decide(directory, infos, counts, recipe, questions)
    write_published(directory / tokenizer.file_name, tokenizer.model)
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            tokenizer.sha256,
            tokenizer.vocab_size,
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.unk,
            tokenizer.file_name,
        ),
        dtype=tokenizer.dtype.name,
        rules_version=RULES_VERSION,
        recipe=recorded(recipe),
        counts=decided.counts,
        decisions=decided.decisions,
        splits=decided.splits,
        files={**decided.files, "rejected.jsonl": _gather_rejected(directory, infos)},
        parts=infos,
    )
    _publish(directory, manifest, decided)
    return manifest


def decide_again(directory: Path, decisions: Decisions) -> Manifest:
    """Decide anew which documents of a finished corpus count. Only tables are read.

    Killed at any instant, it leaves the corpus as it was or as it is to be.

    Raises:
        UserError: the directory holds no corpus or another process is at work in it, a decision cannot be
            made, or no document would count.
    """
    read_manifest(directory)
    try:
        with locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return _decide_again(directory, decisions)
    except BlockingIOError as error:
        raise UserError(f"A build is at work in {directory}; wait for it or end it.") from error
    except OSError as error:
        raise UserError(f"The corpus {directory} cannot be decided again: {error}.") from error


def recorded(recipe: Recipe) -> Recipe:
    """A recipe as corpus.json has it: the checksum of each test set in place of the path of its file.

    Raises:
        UserError: a test set cannot be read.
    """
    checksums = Measurer(recipe.measures).test_sets.checksums
    return replace(recipe, measures=replace(recipe.measures, test_sets=checksums))


def require_papers(counts: Counts) -> None:
    """Refuse to make a corpus of nothing.

    Raises:
        UserError: no document is kept.
    """
    if counts.kept == 0:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.left_out.items()))
        left_out = f", left out {reasons}" if reasons else ""
        raise UserError(f"No paper is left for a corpus: {counts.read} records read{left_out}.")


def require_sound(counts: Counts, max_bad: float) -> None:
    """Refuse to make a corpus of input of which too much is damaged.

    Raises:
        UserError: more than the share `max_bad` of the records read is; with the reasons and an example.
    """
    bad = {reason: number for reason, number in counts.left_out.items() if reason in BAD_RECORDS}
    total = sum(bad.values())
    if total <= max_bad * counts.read:
        return
    first, *_ = by_number = sorted(bad, key=lambda reason: (-bad[reason], reason))
    reasons = ", ".join(f"{bad[reason]} {reason}" for reason in by_number[:3])
    raise UserError(
        f"{total} of {counts.read} records are damaged ({total / counts.read:.1%}), and max_bad allows "
        f"{max_bad:.1%}: {reasons}; the first {first} is {counts.examples[first][0]}; mend the input, or "
        "raise max_bad, and build again (the parts are kept, and their rejected.jsonl list every one)."
    )


@dataclass(frozen=True)
class _Decided:
    """What the decisions make of the parts; `contents` are the decided files by name."""

    counts: Counts
    decisions: list[Decision]
    splits: dict[str, SplitInfo]
    files: dict[str, FileInfo]
    contents: dict[str, bytes]


def _decide_again(directory: Path, decisions: Decisions) -> Manifest:
    manifest = read_manifest(directory)
    if "prompts.json" in manifest.files:
        raise UserError(f"{directory} is of prompts, whose splits are those of their questions.")
    counts = add_counts([_part_counts(directory, part.name) for part in manifest.parts])
    recipe = replace(manifest.recipe, decisions=decisions)
    questions: list[TestQuestion] = []
    if "questions.parquet" in manifest.files:
        questions = read_question_table(manifest.path(directory, "questions.parquet")).questions
    decided = _decide(directory, manifest.parts, counts, recipe, questions)
    manifest = replace(
        manifest,
        recipe=recipe,
        counts=decided.counts,
        decisions=decided.decisions,
        splits=decided.splits,
        files={**manifest.files, **decided.files},
    )
    _publish(directory, manifest, decided)
    return manifest


def _decide(
    directory: Path, parts: Sequence[PartInfo], counts: Counts, recipe: Recipe, questions: list[TestQuestion]
) -> _Decided:
    require_possible(recipe.decisions, recipe.measures)
    paths = [table_path(directory, part.name) for part in parts]
    facts = _read_facts(paths, parts)

    def find_near_duplicates(among: Mask, similarity: float) -> Mask:
        # Bytes stand for work here, so that there is a rate: the signatures are read twice.
        size = sum(path.stat().st_size for path in paths)
        with Progress(size, "documents compared", quiet=_QUIET) as progress:
            return near_duplicates(
                paths,
                among,
                similarity,
                lambda share: progress.report(0, int(share * len(facts)), int(share * size)),
            )

    retracts = [identifier for part in parts for identifier in part.retracts]
    reasons = decide(facts, retracts, recipe.decisions, find_near_duplicates)
    counts = _with_decisions(counts, paths, parts, reasons)
    require_papers(counts)
    chosen = divide(facts, reasons == 0, recipe.decisions.heldout)
    firsts = np.cumsum([0, *(part.documents for part in parts)])[:-1]
    contents = {f"{name}.npy": split_file(facts.tokens, mask, firsts) for name, mask in chosen.items()}
    contents["reasons.npy"] = array_file(reasons)
    if questions:
        contents["questions.parquet"] = question_table(questions, facts, chosen)
    infos = {name: _file_info(content) for name, content in contents.items()}
    return _Decided(
        counts=counts,
        decisions=[
            Decision(reason, int((reasons == number).sum()), int(facts.tokens[reasons == number].sum()))
            for number, reason in enumerate(REASONS, start=1)
        ],
        splits={
            name: SplitInfo(int(mask.sum()), int(facts.tokens[mask].sum()), infos.pop(f"{name}.npy"))
            for name, mask in chosen.items()
        },
        files=infos,
        contents=contents,
    )


def _read_facts(paths: Sequence[Path], parts: Sequence[PartInfo]) -> Facts:
    """The facts of the tables at `paths`, which have to be those of the parts.

    Raises:
        UserError: a table cannot be read, or has other documents than its part.
    """
    tables = iter(zip(paths, parts, strict=True))
    documents, size = 0, 0
    with Progress(sum(path.stat().st_size for path in paths), "documents", quiet=_QUIET) as progress:

        def check(facts: Facts) -> None:
            nonlocal documents, size
            path, part = next(tables)
            if (len(facts), int(facts.tokens.sum())) != (part.documents, part.tokens):
                raise UserError(f"{path} is not the table of its part; build the corpus again.")
            documents, size = documents + len(facts), size + path.stat().st_size
            progress.report(0, documents, size)

        return read_facts(paths, check)


def _with_decisions(
    counts: Counts, paths: Sequence[Path], parts: Sequence[PartInfo], reasons: NDArray[np.uint8]
) -> Counts:
    """The counts of the records read, with those that the decisions left out and the first of each."""
    left_out, examples = dict(counts.left_out), dict(counts.examples)
    starts = np.cumsum([0, *(part.documents for part in parts)])
    for number, reason in enumerate(REASONS, start=1):
        documents = np.flatnonzero(reasons == number)
        if not len(documents):
            continue
        left_out[reason] = left_out.get(reason, 0) + len(documents)
        known = examples.get(reason, [])
        first = documents[: EXAMPLES - len(known)]
        examples[reason] = known + [_source(paths, starts, int(document)) for document in first]
    return replace(counts, kept=int((reasons == 0).sum()), left_out=left_out, examples=examples)


def _source(paths: Sequence[Path], starts: NDArray[np.int64], document: int) -> str:
    part = int(np.searchsorted(starts, document, side="right")) - 1
    table = read_table(paths[part], ["source_file", "source_position"])
    return str(Source(*table.slice(document - int(starts[part]), 1).to_pylist()[0].values()))


def _gather_rejected(directory: Path, parts: Sequence[PartInfo]) -> FileInfo:
    """All records set aside, one part after another, in `rejected.jsonl`."""
    digest, done = xxhash.xxh3_128(), 0
    total = sum(part.files["rejected.jsonl"].bytes for part in parts)
    with (
        published(directory / "rejected.jsonl") as path,
        path.open("wb") as output,
        Progress(total, "parts' rejected records", quiet=_QUIET) as progress,
    ):
        for number, part in enumerate(parts, start=1):
            with (directory / "parts" / f"{part.name}.rejected.jsonl").open("rb") as file:
                while block := file.read(_COPY_BLOCK):
                    digest.update(block)
                    output.write(block)
                    done += len(block)
                    progress.report(0, number, done)
    return FileInfo(done, digest.hexdigest())


def _part_counts(directory: Path, name: str) -> Counts:
    """What a part's record counts.

    Raises:
        UserError: the record is missing or damaged.
    """
    path = directory / "parts" / f"{name}.json"
    try:
        return counts_from_json(json.loads(path.read_bytes())["counts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"The record {path} of a part cannot be read ({error}); build the corpus again."
        ) from error


def _publish(directory: Path, manifest: Manifest, decided: _Decided) -> None:
    """Write the decided files beside those of other decisions, then corpus.json, then remove the others."""
    current = {manifest.path(directory, name): content for name, content in decided.contents.items()}
    for path, content in current.items():
        write_published(path, content)
    write_manifest(directory, manifest)
    for path in directory.iterdir():
        if _DECIDED_FILE.fullmatch(path.name) and path not in current:
            path.unlink()


def _file_info(content: bytes) -> FileInfo:
    return FileInfo(len(content), xxhash.xxh3_128_hexdigest(content))
