"""`questions.parquet` of a corpus: every test question looked for, and how many documents overlap it."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.columns import column
from data_tools.contamination import TestQuestion
from data_tools.errors import UserError
from data_tools.facts import Facts

_SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("id", pa.string()),
        ("matched", pa.bool_()),
        ("documents", pa.int32()),
        ("train", pa.int32()),
        ("heldout", pa.int32()),
    ]
)


@dataclass(frozen=True)
class QuestionTable:
    """The questions in the order of their numbers, and the documents that overlap each, int32 `[questions]`.

    `documents` counts all, those left out as well; `train` and `heldout` those of the split.
    """

    questions: list[TestQuestion]
    documents: NDArray[np.int32]
    train: NDArray[np.int32]
    heldout: NDArray[np.int32]


def question_table(
    questions: list[TestQuestion], facts: Facts, splits: dict[str, NDArray[np.bool_]]
) -> bytes:
    """The bytes of `questions.parquet`.

    Args:
        questions: in the order of their numbers.
        facts: of all documents.
        splits: which documents are in `train` and `heldout`, `[documents]`.
    """
    every = np.ones(len(facts), np.bool_)
    counts = {
        name: np.bincount(facts.overlap_questions[chosen[facts.overlap_documents]], minlength=len(questions))
        for name, chosen in {"documents": every, **splits}.items()
    }
    values = {
        "set": [question.set for question in questions],
        "id": [question.id for question in questions],
        "matched": [question.matched for question in questions],
        **{name: found.tolist() for name, found in counts.items()},
    }
    table = pa.Table.from_arrays(
        [column(values[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA
    )
    buffer = BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_question_table(path: Path) -> QuestionTable:
    """Read `questions.parquet`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        table = pq.read_table(path, schema=_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a table of questions ({error}).") from error
    rows = table.select(["set", "id", "matched"]).to_pylist()
    return QuestionTable(
        [TestQuestion(**row) for row in rows],
        *(table[name].to_numpy() for name in ("documents", "train", "heldout")),
    )
