"""A question as a document to train on: prompt and answer in token ids, and where the answer begins."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_tools.errors import UserError
from data_tools.prompts import Prompt, make_prompt
from data_tools.prompts import PromptId as PromptId
from data_tools.questions import Question
from data_tools.tokenizer import Tokenizer, Tokens

Overlong = Literal["drop", "cut_context", "refuse"]
Loss = Literal["answer", "all"]


@dataclass(frozen=True)
class PromptRecipe:
    """How questions become a corpus.

    Attributes:
        prompt: id of the template.
        sets: whose questions; empty for all that have some to train on.
        number: training questions to draw, all when neither this nor `fraction` is given.
        fraction: share of the training questions to draw, above 0 and up to 1.
        seed: of the draw: fewer are always among more.
        max_tokens: of a document, BOS and EOD included.
        overlong: what happens to a longer one: `drop` it, `cut_context` until it fits, or `refuse` to go on.
        loss: on the `answer` and the EOD, or on `all` of a document but its first token.
    """

    prompt: PromptId
    sets: tuple[str, ...] = ()
    number: int | None = None
    fraction: float | None = None
    seed: int = 0
    max_tokens: int = 2048
    overlong: Overlong = "drop"
    loss: Loss = "answer"


@dataclass(frozen=True)
class PromptDocument:
    """A question in tokens.

    Attributes:
        tokens: `[n]` of the tokenizer's dtype: BOS where it has one, the prompt, the answer, EOD.
        answer: index of the first token that is not the prompt's; the answer and the EOD follow from there.
        text: prompt and answer.
        cut: words of the question's context that were left out.
    """

    tokens: Tokens
    answer: int
    text: str
    cut: int = 0


@dataclass(frozen=True)
class NotUsable:
    """Why a question makes no document: `no_answer` or `too_long`, and how many tokens it has."""

    reason: str
    detail: str
    tokens: int = 0


def prompt_document(
    question: Question, prompt: PromptId, tokenizer: Tokenizer, max_tokens: int, cut_context: bool = False
) -> PromptDocument | NotUsable:
    """Write a question by a template and encode it.

    Args:
        question: with its answer.
        prompt: id of the template.
        tokenizer: of the model that is to be trained.
        max_tokens: of a document, BOS and EOD included.
        cut_context: of a question that is longer leave out words of the context, from its end, and no more
            than must be.

    Raises:
        UserError: there is no such template, or it is not for this kind of question.
    """

    def encode(words: int | None = None) -> PromptDocument:
        asked = question if words is None else _with_context(question, words)
        return _encode(make_prompt(asked, prompt), tokenizer)

    if make_prompt(question, prompt).right is None:
        return NotUsable("no_answer", "the answer is not told")
    whole = encode()
    if len(whole.tokens) <= max_tokens:
        return whole
    if cut_context:
        words = sum(len(paragraph.split(" ")) for paragraph in question.context)
        kept = _most(words, lambda number: len(encode(number).tokens) <= max_tokens)
        if kept is not None:
            return replace(encode(kept), cut=words - kept)
    return NotUsable("too_long", f"{len(whole.tokens)} tokens, at most {max_tokens}", len(whole.tokens))


def document_of(question: Question, tokenizer: Tokenizer, recipe: PromptRecipe) -> PromptDocument | NotUsable:
    """A question as the recipe has it."""
    return prompt_document(
        question, recipe.prompt, tokenizer, recipe.max_tokens, recipe.overlong == "cut_context"
    )


def require_possible(recipe: PromptRecipe) -> None:
    """Refuse values out of range.

    Raises:
        UserError: naming the option.
    """
    for holds, otherwise in (
        (recipe.number is None or recipe.number >= 1, f"--number is {recipe.number}; give 1 or more."),
        (
            recipe.fraction is None or 0 < recipe.fraction <= 1,
            f"--fraction is {recipe.fraction}; give more than 0, and 1 at most.",
        ),
        (recipe.number is None or recipe.fraction is None, "Give --number or --fraction, not both."),
        (0 <= recipe.seed < 2**64, f"--seed is {recipe.seed}; give a whole number from 0 to 2^64 - 1."),
        (recipe.max_tokens >= 2, f"--max-tokens is {recipe.max_tokens}; give 2 or more."),
    ):
        if not holds:
            raise UserError(otherwise)


def _encode(prompt: Prompt, tokenizer: Tokenizer) -> PromptDocument:
    """Prompt and answer are encoded in one, as the text that a model reads.

    The answer begins at the first token that the prompt alone would not have there. That is the first one of
    the answer, or one in which the tokenizer joins the prompt's last letters with the answer's first.
    """
    text = "".join(segment.text for segment in prompt.segments)
    ids, alone = tokenizer.encode_document(text), tokenizer.encode(prompt.context)
    length = min(len(ids) - 1, len(alone))
    differ = np.flatnonzero(ids[:length] != alone[:length])
    answer = int(differ[0]) if len(differ) else length
    if tokenizer.bos < 0:
        return PromptDocument(ids, max(answer, 1), text)
    first = np.array([tokenizer.bos], tokenizer.dtype)
    return PromptDocument(np.concatenate([first, ids]), answer + 1, text)


def _with_context(question: Question, words: int) -> Question:
    """The question with the first words of its context only; words are what stands between spaces."""
    kept = []
    for paragraph in question.context:
        pieces = paragraph.split(" ")
        if words > 0:
            kept.append(" ".join(pieces[:words]))
        words -= len(pieces)
    return replace(question, context=tuple(kept))


def _most(last: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of the numbers from 0 to `last` that fits, when all below it do; None when 0 does not."""
    number = bisect_left(range(last + 1), True, key=lambda words: not fits(words)) - 1
    return number if number >= 0 else None
