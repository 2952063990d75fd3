"""corpus.json: what a corpus is made of, as dataclasses and as JSON."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from data_tools.errors import UserError
from data_tools.files import write_published
from data_tools.recipe import Recipe

FORMAT = "pmc-llama corpus"
VERSION = 3
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
"""A SentencePiece model, or a Hugging Face tokenizer."""
DTYPES = ("uint16", "int32")
PART_FILES = ("bin", "idx", "documents.parquet", "rejected.jsonl")
"""Suffixes of the files of a part."""
DECIDED_FILES = ("train.npy", "heldout.npy", "reasons.npy", "questions.parquet")
"""Files that depend on the decisions."""
PROMPT_FILES = ("loss_starts.npy", "prompts.json")
"""Files of a corpus of prompts; the first is not there when the loss is on all of a document."""
_PART_NAME = re.compile(r"part-\d{5,}")


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids, and the name of its file in the corpus."""

    sha256: str
    vocab_size: int
    bos: int
    eos: int
    unk: int
    file: str


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and XXH3-128 of a file."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Inputs:
    """The input files a part was made from: the first one's name, how many, and one checksum over all."""

    first: str
    files: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Counts:
    """Records read, documents kept, and records left out by reason, with the first examples of each."""

    read: int = 0
    kept: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class PartInfo:
    """A part: `files` by suffix, as in `PART_FILES`.

    `retracts` are the PMC ids and DOIs that the notices of retraction among its input name, kept or not.
    """

    name: str
    documents: int
    tokens: int
    inputs: Inputs
    files: dict[str, FileInfo]
    retracts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SplitInfo:
    """What a split counts, and its file, `NAME.npy` among the decided ones (`Manifest.path`)."""

    documents: int
    tokens: int
    file: FileInfo


@dataclass(frozen=True)
class Decision:
    """What one decision left out, of the documents that those before it had left."""

    reason: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """The whole of corpus.json. Nothing in it depends on time, worker count or absolute paths.

    Attributes:
        recipe: with the checksum of each test set in place of the path of its file.
        counts: of all records read, with everything that left one out.
        decisions: in their order; the number of the decision that left a document out, from 1, is its entry
            in `reasons.npy`, and 0 stands for a document that counts.
        files: by name: `reasons.npy` (uint8, an entry a document) and `rejected.jsonl`, and
            `questions.parquet` where test questions were looked for; of a corpus of prompts `prompts.json`,
            and `loss_starts.npy` where the loss is on the answers.
    """

    tokenizer: TokenizerInfo
    dtype: str
    rules_version: int
    recipe: Recipe
    counts: Counts
    decisions: list[Decision]
    splits: dict[str, SplitInfo]
    files: dict[str, FileInfo]
    parts: list[PartInfo]

    def path(self, directory: Path, name: str) -> Path:
        """Where a file of the corpus is, such as `train.npy` or `reasons.npy`.

        What depends on the decisions has a part of its checksum in its name: files of other decisions stand
        beside it, and the renaming of corpus.json passes from the ones to the others in one instant.
        """
        if name not in DECIDED_FILES:
            return directory / name
        stem, _, suffix = name.partition(".")
        split = self.splits.get(stem)
        file = split.file if split else self.files[name]
        return directory / f"{stem}-{file.checksum[:16]}.{suffix}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the tokenizer, every part's ids, every split's decisions, and where loss is."""
        identity: dict[str, Any] = {
            "tokenizer": self.tokenizer.sha256,
            "dtype": self.dtype,
            "parts": [
                [part.name, part.files["bin"].checksum, part.files["idx"].checksum] for part in self.parts
            ],
            "splits": {name: split.file.checksum for name, split in self.splits.items()},
        }
        if "loss_starts.npy" in self.files:
            identity["loss_starts"] = self.files["loss_starts.npy"].checksum
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write corpus.json, which makes the directory a corpus."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_published(directory / "corpus.json", to_json(content))


def read_manifest(directory: Path) -> Manifest:
    """Read corpus.json.

    Raises:
        UserError: the directory holds no corpus, or its corpus.json is damaged or of another version.
    """
    try:
        raw = (directory / "corpus.json").read_bytes()
    except OSError as error:
        raise UserError(
            f"{directory} is not a corpus: corpus.json cannot be read ({error.strerror}); "
            "`pmc-data build` makes one."
        ) from error
    return manifest_from_json(raw, f"{directory}/corpus.json")


def manifest_from_json(raw: bytes, path: str) -> Manifest:
    """The content of a corpus.json; `path` is named in errors.

    Raises:
        UserError: it is damaged or of another version.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}); build the corpus again.") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is not the description of a corpus of version {VERSION}.")
    try:
        del content["format"], content["version"]
        manifest: Manifest = from_json(Manifest, content, "corpus.json")
        _check(manifest)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; build the corpus again.") from error
    return manifest


def part_from_json(content: object) -> PartInfo:
    """A `PartInfo` from its JSON form.

    Raises:
        ValueError: something is missing, unknown or of another type.
    """
    part: PartInfo = from_json(PartInfo, content, "part")
    return part


def counts_from_json(content: object) -> Counts:
    """A `Counts` from its JSON form.

    Raises:
        ValueError: something is missing, unknown or of another type.
    """
    counts: Counts = from_json(Counts, content, "counts")
    return counts


def to_json(content: object) -> bytes:
    """The one JSON form in which the tools write, the same bytes for the same content."""
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def from_json(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as `kind`: a dataclass, list, dict by name, or plain type.

    Raises:
        ValueError: it is not one, named by its path.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise ValueError(f"{name} has to be an object with the keys {', '.join(hints)}")
        return kind(**{key: from_json(hint, value[key], f"{name}.{key}") for key, hint in hints.items()})
    if kind is Any:
        return value
    if isinstance(kind, UnionType):  # a type or none
        return None if value is None else from_json(get_args(kind)[0], value, name)
    container = get_origin(kind)
    if container is dict and isinstance(value, dict):
        return {key: from_json(get_args(kind)[1], item, f"{name}.{key}") for key, item in value.items()}
    if container is list and isinstance(value, list):
        return [from_json(get_args(kind)[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    # JSON writes a whole float like an int; a bool is an int to Python only.
    plain = (float, int) if kind is float else (kind,)
    if container is not None or type(value) not in plain:
        raise ValueError(f"{name} is not of type {getattr(container or kind, '__name__', kind)}")
    return value


@cache  # a corpus has hundreds of parts
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check(manifest: Manifest) -> None:
    """Require what every reader of a corpus takes for granted.

    Raises:
        ValueError: naming what does not hold.
    """
    numbers = [part.documents for part in manifest.parts] + [part.tokens for part in manifest.parts]
    splits = manifest.splits.values()
    for holds, otherwise in (
        (manifest.dtype in DTYPES, f"the dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}"),
        (manifest.tokenizer.vocab_size > 0, "the vocabulary is empty"),
        (
            manifest.tokenizer.file in TOKENIZER_FILES,
            f"the tokenizer is none of {', '.join(TOKENIZER_FILES)}",
        ),
        (0 <= manifest.tokenizer.eos < manifest.tokenizer.vocab_size, "the EOD is not in the vocabulary"),
        (manifest.splits.keys() == {"train", "heldout"}, "the splits are not train and heldout"),
        (bool(manifest.parts), "it names no parts"),
        (all(_PART_NAME.fullmatch(part.name) for part in manifest.parts), "a part is not named part-N"),
        (all(part.files.keys() == set(PART_FILES) for part in manifest.parts), "a part lacks a file"),
        (min(numbers, default=0) >= 0, "a part has a negative number of documents or tokens"),
        (all(split.documents >= 0 <= split.tokens for split in splits), "a split has a negative size"),
        (
            {"reasons.npy", "rejected.jsonl"}
            <= manifest.files.keys()
            <= {*DECIDED_FILES, *PROMPT_FILES, "rejected.jsonl"},
            "the files are not reasons.npy and rejected.jsonl",
        ),
        (
            sum(split.documents for split in splits) == manifest.counts.kept,
            "the documents of the splits are not those kept",
        ),
        (
            manifest.counts.read == manifest.counts.kept + sum(manifest.counts.left_out.values()),
            "the records kept and left out are not those read",
        ),
        (
            sum(split.tokens for split in splits) <= sum(part.tokens for part in manifest.parts),
            "the splits have more tokens than the parts",
        ),
    ):
        if not holds:
            raise ValueError(otherwise)
