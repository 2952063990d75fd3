"""Which questions become prompts: of which sets, all of a split or a draw by seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from data_tools.errors import UserError
from data_tools.prompt_documents import PromptDocument, PromptRecipe, document_of
from data_tools.questions import Question
from data_tools.questions.written import QuestionSets
from data_tools.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """A question, and where it stands: the set, and the line of the file of its split, from 1."""

    set: str
    line: int
    question: Question


def chosen_sets(found: QuestionSets, recipe: PromptRecipe) -> list[str]:
    """The sets that are trained on.

    Raises:
        UserError: one has no training questions, or none has.
    """
    sets = list(recipe.sets) or [name for name, info in found.manifest.sets.items() if "train" in info.splits]
    for name in sets:
        found.path(name, "train")
    if not sets:
        raise UserError(f"The questions {found.directory} have no train split of any set.")
    return sets


def read_asked(found: QuestionSets, sets: Sequence[str], split: str) -> list[Asked]:
    """The questions of a split of some sets, in order; those that have no such split have none."""
    return [
        Asked(name, line, question)
        for name in sets
        if split in found.manifest.sets[name].splits
        for line, question in enumerate(found.read(name, split), start=1)
    ]


def draw(asked: Sequence[Asked], number: int, seed: int, usable: Callable[[Asked], bool]) -> list[Asked]:
    """The questions to be looked at so that `number` of them are usable, in the order given.

    A question's place in the draw is a hash of its set, its id and the seed alone. So a draw of fewer is part
    of a draw of more, also when other sets are drawn from.

    Raises:
        UserError: there are not so many.
    """
    places = [xxhash.xxh3_64_intdigest(f"{one.set}\0{one.question.id}".encode(), seed=seed) for one in asked]
    order = sorted(range(len(asked)), key=lambda place: (places[place], place))
    looked: list[int] = []
    left = number
    for place in order:
        if left == 0:
            break
        looked.append(place)
        left -= usable(asked[place])
    if left:
        raise UserError(
            f"{number:,} questions are asked for, but of {len(asked):,} only {number - left:,} can be "
            "used; ask for fewer."
        )
    return [asked[place] for place in sorted(looked)]


def wanted(asked: list[Asked], tokenizer: Tokenizer, recipe: PromptRecipe) -> list[Asked]:
    """The training questions that the recipe wants."""
    if recipe.number is None and recipe.fraction in (None, 1):
        return asked
    number = recipe.number or max(1, round((recipe.fraction or 0) * len(asked)))
    return draw(
        asked,
        number,
        recipe.seed,
        lambda one: isinstance(document_of(one.question, tokenizer, recipe), PromptDocument),
    )
