"""The directory of a build of questions: a JSONL file for each split of each set, and what is known of them.

SET.SPLIT.jsonl      a question a line: set, split, id, question, options, answer, context, conclusion,
                     file, line
rejected.jsonl       a bad question a line: file, line, id, reason, detail
questions.json       sets with licences and counts, sources with checksums, duplicates, fingerprint
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from data_tools.errors import UserError
from data_tools.files import aside, checksum, sync
from data_tools.questions.duplicates import repeated
from data_tools.questions.question import Question
from data_tools.questions.sources import Placed, Rejected, SourceRead

FORMAT = "pmc-llama questions"
VERSION = 1
MANIFEST = "questions.json"

LICENSES = {
    "pubmedqa": "MIT (github.com/pubmedqa/pubmedqa)",
    "medmcqa": "MIT (github.com/medmcqa/medmcqa)",
    "medqa": "MIT (github.com/jind11/MedQA)",
    "mmlu": "MIT (github.com/hendrycks/test)",
    "bioasq": "given after registration (see participants-area.bioasq.org)",
    "instructions": "not known: see where the file is from",
}
"""By the first word of a set's name, with where its publisher states it."""


class SplitInfo(msgspec.Struct, frozen=True):
    """A split of a set.

    Attributes:
        questions: how many.
        answers: how often each place of `options` is right, by place; questions without an answer by "none".
        repeated: of the questions, how many stand in the split before.
        removed: of the training questions read, how many were left out for standing in a dev or test split.
        bytes: of its file.
        checksum: XXH3-128 of its file, 32 hex digits.
    """

    questions: int
    answers: dict[str, int]
    repeated: int
    removed: int
    bytes: int
    checksum: str


class SetInfo(msgspec.Struct, frozen=True):
    """A set: its licence and its splits by name."""

    license: str
    splits: dict[str, SplitInfo]


class Duplicates(msgspec.Struct, frozen=True):
    """How many training questions of a set stand in an evaluated split, named `SET.SPLIT`."""

    train: str
    evaluated: str
    questions: int


class QuestionsManifest(msgspec.Struct, frozen=True):
    """`questions.json`; the fingerprint changes with every question."""

    format: str
    version: int
    fingerprint: str
    sets: dict[str, SetInfo]
    duplicates: list[Duplicates]
    test_ids_not_found: int
    sources: list[dict[str, Any]]


@dataclass(frozen=True)
class QuestionSets:
    """A directory that `pmc-data questions` made.

    Attributes:
        directory: where it is.
        manifest: its questions.json.
    """

    directory: Path
    manifest: QuestionsManifest

    @classmethod
    def open(cls, directory: Path) -> "QuestionSets":
        """Read its questions.json.

        Raises:
            UserError: there is none, or it is damaged or of another version.
        """
        path = directory / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=QuestionsManifest)
        except OSError as error:
            raise UserError(
                f"{directory} holds no questions, `pmc-data questions` makes such a directory: "
                f"{error.strerror} ({MANIFEST})."
            ) from error
        except msgspec.MsgspecError as error:
            raise UserError(f"{path} is damaged ({error}); make the questions again.") from error
        if (manifest.format, manifest.version) != (FORMAT, VERSION):
            raise UserError(
                f"{path} is {manifest.format} {manifest.version}, expected {FORMAT} {VERSION}; make the "
                "questions again."
            )
        return cls(directory, manifest)

    def path(self, name: str, split: str) -> Path:
        """The JSONL file of a split.

        Raises:
            UserError: there is no such set, or no such split of it.
        """
        splits = self.manifest.sets[name].splits if name in self.manifest.sets else {}
        if split not in splits:
            known = ", ".join(f"{s}.{p}" for s, info in self.manifest.sets.items() for p in info.splits)
            raise UserError(
                f"The questions {self.directory} have no {name}.{split}; expected one of {known}."
            )
        return self.directory / f"{name}.{split}.jsonl"

    def read(self, name: str, split: str) -> list[Question]:
        """The questions of a split.

        Raises:
            UserError: there is no such split, or its file is damaged.
        """
        path = self.path(name, split)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"The questions {path} cannot be read: {error.strerror}.") from error
        if xxhash.xxh3_128_hexdigest(content) != self.manifest.sets[name].splits[split].checksum:
            raise UserError(f"{path} is not what {MANIFEST} describes; make the questions again.")
        decoder = msgspec.json.Decoder(Question)
        return [decoder.decode(line) for line in content.splitlines()]


def write(
    directory: Path,
    placed: Sequence[Placed],
    removed: Sequence[tuple[Placed, frozenset[str]]],
    rejected: Iterable[Rejected],
    sources: Iterable[SourceRead],
    test_ids_not_found: int,
) -> QuestionSets:
    """Write a directory of questions; it appears under its name when it is complete.

    Args:
        directory: does not exist yet, or is empty.
        placed: the questions; those of a split in their order.
        removed: from train, as `duplicates.remove_from_train` tells.
        rejected: the bad ones.
        sources: what was read.
        test_ids_not_found: how many of the test ids no question has.

    Raises:
        UserError: the directory is in use, or the disk refuses.
    """
    require_free(directory)
    partial = aside(directory)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        sets = _write_sets(partial, placed, Counter(one.set for one, _ in removed))
        _write_lines(partial / "rejected.jsonl", (asdict(one) for one in rejected))
        manifest = QuestionsManifest(
            FORMAT,
            VERSION,
            _fingerprint(sets),
            sets,
            _duplicates(removed),
            test_ids_not_found,
            [asdict(one) for one in sources],
        )
        # As the standard library writes it, with a key a line, for people to read.
        text = json.dumps(msgspec.to_builtins(manifest), indent=2, ensure_ascii=False)
        (partial / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        os.replace(partial, directory)
        sync(directory.parent)
    except OSError as error:
        raise UserError(f"The questions cannot be written to {directory}: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return QuestionSets(directory, manifest)


def require_free(directory: Path) -> None:
    """Refuse to write over something.

    Raises:
        UserError: there is something of that name, and not an empty directory.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} is there already and not empty; choose another or remove it.")


def license_of(name: str) -> str:
    """The licence of a set."""
    return LICENSES[name.partition("_")[0]]


def _duplicates(removed: Iterable[tuple[Placed, frozenset[str]]]) -> list[Duplicates]:
    counts = Counter((one.set, split) for one, splits in removed for split in splits)
    return [Duplicates(*names, number) for names, number in sorted(counts.items())]


def _write_sets(directory: Path, placed: Sequence[Placed], removed: Counter[str]) -> dict[str, SetInfo]:
    splits: dict[tuple[str, str], list[Placed]] = {}
    for one in placed:
        splits.setdefault((one.set, one.split), []).append(one)
    sets: dict[str, SetInfo] = {}
    repeats = repeated(placed)
    for (name, split), questions in sorted(splits.items()):
        path = directory / f"{name}.{split}.jsonl"
        _write_lines(path, map(_row, questions))
        answers = Counter(one.question.answer for one in questions)
        info = SplitInfo(
            len(questions),
            {"none" if answer is None else str(answer): n for answer, n in sorted(answers.items(), key=str)},
            repeats[name, split],
            removed[name] if split == "train" else 0,
            path.stat().st_size,
            checksum(path),
        )
        sets.setdefault(name, SetInfo(license_of(name), {})).splits[split] = info
    return sets


def _row(one: Placed) -> dict[str, Any]:
    where = {"file": one.file, "line": one.line}
    return {"set": one.set, "split": one.split, **asdict(one.question), **where}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        for row in rows:
            file.write(msgspec.json.encode(row) + b"\n")


def _fingerprint(sets: dict[str, SetInfo]) -> str:
    sums = [f"{name}.{split}:{i.checksum}" for name, info in sets.items() for split, i in info.splits.items()]
    return xxhash.xxh3_128_hexdigest("\n".join(sums).encode())
