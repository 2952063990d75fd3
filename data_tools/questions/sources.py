"""What a build of questions reads: files and datasets with their splits, and the questions in each."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from data_tools.errors import UserError
from data_tools.files import checksum
from data_tools.questions.forms import NotChosen, medmcqa_counts_from, read_question
from data_tools.questions.question import BadQuestion, Question
from data_tools.questions.records import Record, read_records
from data_tools.questions.tables import read_table, table_files

SPLITS = ("train", "dev", "test")
_SPLIT_WORDS = {
    "train": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}
_WORDS = re.compile(r"[a-z]+")
_EXAMPLES = 3  # bad questions that an error names


@dataclass(frozen=True)
class Source:
    """A file, or a split of a dataset: a Parquet file or a directory of `save_to_disk`.

    Attributes:
        path: of it.
        name: for people and records: without the directories above what was given.
        split: `train`, `dev` or `test`, told by the user or by the name; None when neither tells.
    """

    path: Path
    name: str
    split: str | None

    def files(self) -> list[Path]:
        """What is read of it."""
        return sorted(self.path.glob("*.arrow")) if self.path.is_dir() else [self.path]


@dataclass(frozen=True)
class Placed:
    """A question and where it belongs: its set and split; file and line that it was read from."""

    question: Question
    set: str
    split: str
    file: str
    line: int


@dataclass(frozen=True)
class Rejected:
    """A record that is no question: where it stands, and why."""

    file: str
    line: int
    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class SourceRead:
    """What was found in a source.

    Attributes:
        file: its name.
        bytes: of all its files.
        checksum: XXH3-128 of the file, or of its files' checksums in their order; 32 hex digits.
        questions: sound ones.
        rejected: bad ones by reason.
        not_chosen: sound records of kinds that are not asked for, by reason.
        medmcqa_cop_from: what MedMCQA's `cop` counts from, None of other sets.
    """

    file: str
    bytes: int
    checksum: str
    questions: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    not_chosen: dict[str, int] = field(default_factory=dict)
    medmcqa_cop_from: int | None = None


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """The sources of `PATH` and `SPLIT=PATH` arguments, in order; a directory is a Hugging Face dataset.

    Raises:
        UserError: a path does not exist, a directory is no dataset, or a file is given twice.
    """
    found: list[Source] = []
    for given in inputs:
        told, path = _told_split(given)
        if not path.exists():
            raise UserError(f"The questions {path} do not exist.")
        paths = table_files(path) if path.is_dir() else [path]
        for one in paths:
            name = str(one.relative_to(path.parent))
            found.append(Source(one, name, told or split_of(one.stem)))
    for source, times in Counter(source.path.resolve() for source in found).items():
        if times > 1:
            raise UserError(f"The questions {source} are given {times} times; give each file once.")
    return found


def split_of(name: str) -> str | None:
    """The split that a file's name tells: of its words exactly one is the name of a split."""
    told = {_SPLIT_WORDS[word] for word in _WORDS.findall(name.lower()) if word in _SPLIT_WORDS}
    return told.pop() if len(told) == 1 else None


def read_test_ids(path: Path) -> frozenset[str]:
    """PubMedQA's test ids: the keys of `test_ground_truth.json`, a JSON array, or a text file of one a line.

    Raises:
        UserError: it cannot be read, or holds something else than PubMed ids.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The test ids {path} cannot be read: {error}.") from error
    try:
        ids = [str(one) for one in json.loads(content)]
    except (ValueError, TypeError):
        ids = content.split()
    wrong = [one for one in ids if not one.isdecimal()]
    if wrong or not ids:
        found = repr(wrong[0][:40]) if wrong else "nothing"
        raise UserError(
            f"{path} holds {found}, expected PubMed ids: PubMedQA's test_ground_truth.json, a JSON array, or "
            "an id a line."
        )
    return frozenset(ids)


def read_source(
    source: Source,
    test_ids: frozenset[str] = frozenset(),
    cop_from: int | None = None,
    count: Callable[[int, int], None] = lambda questions, size: None,
) -> tuple[list[Placed], list[Rejected], SourceRead]:
    """Read the questions of a source.

    Args:
        source: what to read.
        test_ids: ids of PubMedQA's test questions; its others are for training, unless the source says else.
        cop_from: what MedMCQA's `cop` counts from, 0 or 1; found out from the source when None.
        count: told the questions and bytes that are behind, for progress.

    Returns:
        Its questions in order, its bad ones, and what is to be noted of it.

    Raises:
        UserError: it cannot be read, holds nothing, does not tell its split, or does not tell what `cop`
            counts from.
    """
    records, cop_from = _records(source, cop_from)
    size = sum(path.stat().st_size for path in source.files())
    placed: list[Placed] = []
    rejected: list[Rejected] = []
    not_chosen: Counter[str] = Counter()
    for record in records:
        try:
            if isinstance(record.value, BadQuestion):
                raise record.value
            name, question = read_question(record.value, record.id, cop_from)
        except NotChosen as error:
            not_chosen[error.reason] += 1
            continue
        except BadQuestion as error:
            rejected.append(Rejected(source.name, record.line, record.id, error.reason, error.detail))
            continue
        split = _split(source, name, question, test_ids)
        placed.append(Placed(question, _set_name(name, source), split, source.name, record.line))
        count(len(placed), size * (len(placed) + len(rejected)) // len(records))
    found = SourceRead(
        source.name,
        size,
        _checksum(source),
        len(placed),
        dict(sorted(Counter(one.reason for one in rejected).items())),
        dict(not_chosen),
        cop_from if any(one.set == "medmcqa" for one in placed) else None,
    )
    count(len(placed), size)
    return placed, rejected, found


def require_few_rejected(found: SourceRead, rejected: list[Rejected], limit: float) -> None:
    """Refuse a source of which too much is bad: it is another file than it was taken for.

    Args:
        found: of the source.
        rejected: its bad questions.
        limit: share of its records that may be bad.

    Raises:
        UserError: more are bad, or it holds no question; naming the first ones by file and line.
    """
    records = found.questions + len(rejected)
    if found.questions and len(rejected) <= limit * records:
        return
    examples = "; ".join(f"line {one.line}: {one.reason}, {one.detail}" for one in rejected[:_EXAMPLES])
    if not rejected:
        others = sum(found.not_chosen.values())
        raise UserError(f"{found.file} holds no question; {others} records were of kinds that are not read.")
    raise UserError(
        f"{len(rejected)} of {records} questions of {found.file} are bad ({examples}); expected at most "
        f"{limit:.0%}: give the file as its publisher made it, or raise --max-rejected."
    )


def _told_split(given: str) -> tuple[str | None, Path]:
    split, separator, path = given.partition("=")
    return (split, Path(path)) if separator and split in SPLITS else (None, Path(given))


def _records(source: Source, cop_from: int | None) -> tuple[list[Record], int | None]:
    """All records, and what `cop` counts from where they have one."""
    rows: Iterator[Record]
    if source.path.is_dir() or source.path.suffix == ".parquet":
        rows, labelled = read_table(source.path)
        cop_from = 0 if labelled else cop_from
    else:
        rows = read_records(source.path)
    records = list(rows)
    values = [record.value for record in records if isinstance(record.value, dict)]
    cops = [value.get("cop") for value in values if "opa" in value]
    if cop_from is None and any(cop not in (None, -1) for cop in cops):
        cop_from = medmcqa_counts_from(cops)
        if cop_from is None:
            found = ", ".join(str(value) for value in sorted(set(map(str, cops))))
            raise UserError(
                f"{source.name} does not tell whether its `cop` counts the options from 0 or from 1: its "
                f"values are {found}; say so by --medmcqa-cop-from."
            )
    return records, cop_from


def _split(source: Source, name: str, question: Question, test_ids: frozenset[str]) -> str:
    if name == "pubmedqa" and test_ids:
        return "test" if question.id in test_ids else source.split or "train"
    if source.split:
        return source.split
    ids = ", or give PubMedQA's test_ground_truth.json by --test-ids" if name == "pubmedqa" else ""
    raise UserError(
        f"The name {source.name} does not tell a split; give it as train=PATH, dev=PATH or test=PATH{ids}."
    )


def _set_name(name: str, source: Source) -> str:
    """The set; MMLU's CSV has its subject in the name of the file, before the split's."""
    if name != "mmlu":
        return name
    words = [word for word in _WORDS.findall(source.path.stem.lower()) if word not in _SPLIT_WORDS]
    return "_".join(["mmlu", *words])


def _checksum(source: Source) -> str:
    sums = [checksum(path) for path in source.files()]
    return sums[0] if len(sums) == 1 else xxhash.xxh3_128_hexdigest("".join(sums).encode())
