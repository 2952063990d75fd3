"""A question with its answer, in the one form that the rest of the package knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question with a choice of answers, or an instruction with its response.

    Attributes:
        id: as the set has it, else the line in its file, from 1.
        question: what is asked; of a case, with its description; the instruction.
        options: the answers to choose from, in order; none of an instruction.
        answer: place of the right one in `options`, from 0, or None where the set does not tell.
        context: paragraphs given with the question (PubMedQA's abstract without its conclusion, BioASQ's
            snippets, an instruction's input).
        conclusion: the right answer in sentences, "" where the set has none (PubMedQA's long answer, an
            instruction's response).
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    context: tuple[str, ...] = ()
    conclusion: str = ""


class BadQuestion(ValueError):
    """A record that is no question.

    Attributes:
        reason: one of a few words, to count by: `missing_option`, `answer_out_of_range`, `empty_text`,
            `missing_field`, `wrong_type`, `answer_disagrees`, `unknown_form`, `not_json`, `not_unicode`,
            `wrong_structure`.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
