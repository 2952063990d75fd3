"""Question sets in one format: PubMedQA, MedMCQA, MedQA and MMLU, each as its publisher's files have it."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

_LETTERS = "ABCDE"
_MEDMCQA_OPTIONS = ("opa", "opb", "opc", "opd")


@dataclass(frozen=True)
class Question:
    """A question with a choice of answers.

    Attributes:
        id: as the set has it, else the line in its file, from 1.
        question: what is asked; of a case, with its description.
        options: the answers to choose from, in order.
        answer: place of the right one in `options`, or None where the set does not tell.
        context: paragraphs given with the question (PubMedQA's abstract without its conclusion).
        conclusion: the right answer in sentences, "" where the set has none (PubMedQA's long answer).
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    context: tuple[str, ...] = ()
    conclusion: str = ""


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order.

    Known are PubMedQA's `ori_pqal.json`, MedMCQA's files of a question a line, MedQA's in the original layout
    and in that of `sent1` and `ending0`, and MMLU's CSV without header.

    Raises:
        UserError: the file cannot be read, or is in none of these forms; naming the line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The questions {path} cannot be read: {error}.") from error
    read = _from_csv if path.suffix == ".csv" else _from_json
    questions: list[Question] = []
    try:
        for question in read(content):
            questions.append(question)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(
            f"Question {len(questions) + 1} of {path} is in no known form ({type(error).__name__}: {error}); "
            "expected PubMedQA, MedMCQA, MedQA or MMLU as published."
        ) from error
    if not questions:
        raise UserError(f"The file {path} holds no question.")
    return questions


def _from_csv(content: str) -> Iterator[Question]:
    """MMLU: question, four options, letter of the answer."""
    for number, row in enumerate(csv.reader(StringIO(content), strict=True), start=1):
        question, *options, answer = row
        yield Question(str(number), question, tuple(options), _LETTERS.index(answer))


def _from_json(content: str) -> Iterator[Question]:
    by_id = _by_id(content)
    if by_id is not None:
        for identity, record in by_id.items():
            yield _pubmedqa(identity, record)
        return
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines cuts at U+2028, too
        if line.strip():
            record = json.loads(line)
            yield _form_of(record)(record, str(number))


def _by_id(content: str) -> dict[str, Any] | None:
    """Records by their ids, when the text is one such object; None when it is something else."""
    try:
        whole = json.loads(content)
    except ValueError:
        return None
    is_one = isinstance(whole, dict) and all(isinstance(record, dict) for record in whole.values())
    return whole if is_one else None


def _pubmedqa(identity: str, record: dict[str, Any]) -> Question:
    options = ("yes", "no", "maybe")
    decision = record.get("final_decision")
    return Question(
        identity,
        record["QUESTION"],
        options,
        None if decision is None else options.index(decision),
        tuple(record["CONTEXTS"]),
        record.get("LONG_ANSWER", ""),
    )


def _form_of(record: dict[str, Any]) -> Callable[[dict[str, Any], str], Question]:
    if "opa" in record:
        return _medmcqa
    return _medqa_endings if "sent1" in record else _medqa


def _medmcqa(record: dict[str, Any], number: str) -> Question:
    options = tuple(record[key] for key in _MEDMCQA_OPTIONS)
    # `cop` counts from 1; the test split has none, or 0 or less.
    right = record.get("cop") or 0
    answer = right - 1 if 1 <= right <= len(options) else None
    return Question(str(record.get("id", number)), record["question"], options, answer)


def _medqa(record: dict[str, Any], number: str) -> Question:
    """`options` as an object by letter, or as a list of `{"key", "value"}`."""
    options = record["options"]
    if isinstance(options, list):
        options = {option["key"]: option["value"] for option in options}
    keys = sorted(options)
    answer = record.get("answer_idx")
    return Question(
        str(record.get("id", number)),
        record["question"],
        tuple(options[key] for key in keys),
        None if answer is None else keys.index(answer),
    )


def _medqa_endings(record: dict[str, Any], number: str) -> Question:
    endings = sorted(key for key in record if key.startswith("ending"))
    question = f"{record['sent1']} {record.get('sent2', '')}".strip()
    options = tuple(record[key] for key in endings)
    return Question(str(record.get("id", number)), question, options, record.get("label"))
