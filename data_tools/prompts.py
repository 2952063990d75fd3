"""Prompts: a question as text to be continued, and the texts that answer it, a template for each prompt id.

`pmc-llama` is the template of the authors' own fine-tuning data (github.com/chaoyi-wu/Finetune_LLAMA,
Data_sample/tokenize_dataset.py), which they made of MedQA with four options. Where a question comes with a
context, as PubMedQA's do, ours begins with it; how the authors wrote that is not published. Yes, no and maybe
are options there like any others.

`plain` has MedQA's questions as lm-evaluation-harness has them in its task medqa_4options, and PubMedQA's as
in its task pubmedqa: a question that is answered by yes, no or maybe has no list of options, and the word
answers it, not a letter.

`alpaca` is for instructions: the template of Stanford Alpaca, with which PMC-LLaMA-13B was tuned
(github.com/chaoyi-wu/PMC-LLaMA, SFT/train.py); the response follows its last colon without a space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data_tools.errors import UserError
from data_tools.questions import Question

PromptId = Literal["pmc-llama", "plain", "alpaca"]

LETTERS = "ABCDE"
_WORDS = frozenset({"yes", "no", "maybe"})


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt: `context` is given, `answer` is what is to be said."""

    kind: Literal["context", "answer"]
    text: str


@dataclass(frozen=True)
class Prompt:
    """A question as a template writes it.

    Attributes:
        context: what is given; it ends without white space, since tokenizers put that before the next word.
        answers: what may follow, one text for each option, in their order, beginning with a space; of an
            instruction its response, as it is.
        right: place of the right one in `answers`, None where it is not known.
    """

    context: str
    answers: tuple[str, ...]
    right: int | None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The context and, where it is known, the right answer: together the text to train on.

        Loss on the answer is loss on the segments of kind `answer`; on the whole sequence, on all of them.
        """
        context = Segment("context", self.context)
        return (context,) if self.right is None else (context, Segment("answer", self.answers[self.right]))


def make_prompt(question: Question, prompt: PromptId) -> Prompt:
    """Write a question by a template.

    Raises:
        UserError: there is no such template, or it is for questions with options and this is an instruction,
            or the other way round.
    """
    if prompt not in TEMPLATES:
        raise UserError(f"There is no prompt {prompt!r}; expected one of {', '.join(TEMPLATES)}.")
    if (prompt == "alpaca") != (not question.options):
        kind = "a question with options" if question.options else "an instruction"
        wanted = "pmc-llama or plain" if question.options else "alpaca"
        raise UserError(f"The prompt {prompt} does not fit {question.id}, {kind}; expected {wanted}.")
    return TEMPLATES[prompt](question)


def _pmc_llama(question: Question) -> Prompt:
    given = "".join(f"{paragraph} " for paragraph in question.context)
    options = "".join(f" {letter}: {option}" for letter, option in _lettered(question))
    context = (
        "You are a doctor. According to the question, make a choice. "
        f"{given}Q: {question.question}{options} The Answer is:"
    )
    return Prompt(context, tuple(f" {letter}" for letter, _ in _lettered(question)), question.answer)


def _plain(question: Question) -> Prompt:
    given = f"Abstract: {chr(10).join(question.context)}\n" if question.context else ""
    if _WORDS.issuperset(question.options):
        options, answers = "", question.options
    else:
        options = "".join(f"{letter}. {option}\n" for letter, option in _lettered(question))
        answers = tuple(letter for letter, _ in _lettered(question))
    context = f"{given}Question: {question.question}\n{options}Answer:"
    return Prompt(context, tuple(f" {answer}" for answer in answers), question.answer)


def _alpaca(question: Question) -> Prompt:
    if question.context:
        head = (
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request."
        )
        given = f"### Input:\n{chr(10).join(question.context)}\n\n"
    else:
        head = (
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request."
        )
        given = ""
    context = f"{head}\n\n### Instruction:\n{question.question}\n\n{given}### Response:"
    return Prompt(context, (question.conclusion,), 0)


def _lettered(question: Question) -> list[tuple[str, str]]:
    return list(zip(LETTERS[: len(question.options)], question.options, strict=True))


TEMPLATES: dict[str, Callable[[Question], Prompt]] = {
    "pmc-llama": _pmc_llama,
    "plain": _plain,
    "alpaca": _alpaca,
}
