"""corpus.json: what a corpus is made of, as dataclasses and as JSON."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.files import write_published

FORMAT = "pmc-llama corpus"
VERSION = 1


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids."""

    sha256: str
    vocab_size: int
    bos: int
    eos: int
    unk: int


@dataclass(frozen=True)
class Options:
    """What a build was asked for, and the version of the rules that turn a paper into text."""

    text_rules: int
    require_pmc_id: bool
    heldout: float


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
    """A part: `files` by suffix (`bin`, `idx`, `documents.parquet`)."""

    name: str
    documents: int
    tokens: int
    inputs: Inputs
    files: dict[str, FileInfo]


@dataclass(frozen=True)
class SplitInfo:
    """A split file `NAME.npy` and what it counts."""

    documents: int
    tokens: int
    file: FileInfo


@dataclass(frozen=True)
class Manifest:
    """The whole of corpus.json. Nothing in it depends on time, worker count or absolute paths."""

    tokenizer: TokenizerInfo
    dtype: str
    options: Options
    counts: Counts
    splits: dict[str, SplitInfo]
    parts: list[PartInfo]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the tokenizer, every part's ids and every split's decisions."""
        identity = {
            "tokenizer": self.tokenizer.sha256,
            "dtype": self.dtype,
            "parts": [
                [part.name, part.files["bin"].checksum, part.files["idx"].checksum] for part in self.parts
            ],
            "splits": {name: split.file.checksum for name, split in self.splits.items()},
        }
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
    path = directory / "corpus.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{directory} is not a corpus: corpus.json cannot be read ({error.strerror}); "
            "`pmc-data build` makes one."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}); build the corpus again.") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} is not the description of a corpus of version {VERSION}.")
    try:
        return _manifest(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); build the corpus again.") from error


def part_from_json(content: dict[str, Any]) -> PartInfo:
    """A `PartInfo` from its JSON form."""
    files = {suffix: FileInfo(**file) for suffix, file in content["files"].items()}
    return PartInfo(**{**content, "inputs": Inputs(**content["inputs"]), "files": files})


def to_json(content: object) -> bytes:
    """The one JSON form in which the tools write, the same bytes for the same content."""
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _manifest(content: dict[str, Any]) -> Manifest:
    return Manifest(
        tokenizer=TokenizerInfo(**content["tokenizer"]),
        dtype=content["dtype"],
        options=Options(**content["options"]),
        counts=Counts(**content["counts"]),
        splits={
            name: SplitInfo(**{**split, "file": FileInfo(**split["file"])})
            for name, split in content["splits"].items()
        },
        parts=[part_from_json(part) for part in content["parts"]],
    )
