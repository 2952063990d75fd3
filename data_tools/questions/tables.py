"""Hugging Face datasets on disk: what `save_to_disk` wrote, or the Parquet files of a repository."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.questions.records import Record

_SAVED = ("dataset_dict.json", "state.json")


def table_files(directory: Path) -> list[Path]:
    """The Parquet files below a directory, or the directories of `save_to_disk` in it, a split each.

    Raises:
        UserError: there is neither.
    """
    if (directory / "state.json").is_file():
        return [directory]
    if (directory / "dataset_dict.json").is_file():
        return sorted(path.parent for path in directory.glob("*/state.json"))
    found = sorted(directory.rglob("*.parquet"))
    if not found:
        raise UserError(
            f"{directory} holds no Hugging Face dataset: neither Parquet files nor {' or '.join(_SAVED)}; "
            "of other files give each, not their directory."
        )
    return found


def read_table(path: Path) -> tuple[Iterator[Record], bool]:
    """The rows of a Parquet file, or of one split as `save_to_disk` writes it.

    Returns:
        The rows; and whether MedMCQA's `cop` is a ClassLabel, which counts from 0 by definition.

    Raises:
        UserError: the package `datasets` is not installed, or the table cannot be read.
    """
    try:
        # It takes a second to import, and pandas with it.
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"{path} is read by the package datasets ({error}); pip install 'pmc-llama[questions]'."
        ) from error
    try:
        found = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset(pq.read_table(path))
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable dataset ({error}); copy it again.") from error
    return _rows(found), isinstance(found.features.get("cop"), datasets.ClassLabel)


def _rows(dataset: Any) -> Iterator[Record]:
    for number, row in enumerate(dataset, start=1):
        yield Record(number, str(number), row)
