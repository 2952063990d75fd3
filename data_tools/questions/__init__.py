"""Questions in one format: PubMedQA, MedMCQA, MedQA, MMLU, BioASQ and instructions, as published."""

from pathlib import Path

from data_tools.errors import UserError
from data_tools.questions.forms import NotChosen, medmcqa_counts_from, read_question
from data_tools.questions.question import BadQuestion, Question
from data_tools.questions.records import read_records

__all__ = ["BadQuestion", "Question", "read_questions"]


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON or CSV file, in its order, when all of them are sound.

    MedMCQA's come without answers when the file does not tell from what its `cop` counts.

    Raises:
        UserError: the file cannot be read, holds no question, or one that is in no known form; naming it.
    """
    questions: list[Question] = []
    records = list(read_records(path))
    cop_from = medmcqa_counts_from(r.value.get("cop") for r in records if isinstance(r.value, dict))
    for record in records:
        try:
            if isinstance(record.value, BadQuestion):
                raise record.value
            questions.append(read_question(record.value, record.id, cop_from)[1])
        except NotChosen:
            continue
        except BadQuestion as error:
            raise UserError(
                f"Question {len(questions) + 1} of {path}, line {record.line}, is in no known form "
                f"({error}); expected PubMedQA, MedMCQA, MedQA, MMLU, BioASQ or instructions as published."
            ) from error
    if not questions:
        raise UserError(f"The file {path} holds no question.")
    return questions
