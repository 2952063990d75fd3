"""Which questions stand in the corpus that a model was trained on, from what the build of the corpus kept."""

from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.question_table import read_question_table
from pmc_llama.evaluate.results import SetScore


@dataclass(frozen=True)
class LookedFor:
    """A test set that the build of a corpus looked for.

    Attributes:
        ids: of its questions.
        overlapping: that a document of the train split overlaps.
        too_short: that cannot be found.
    """

    ids: frozenset[str]
    overlapping: frozenset[str]
    too_short: frozenset[str]


def read_looked_for(directory: Path) -> dict[str, LookedFor]:
    """The test sets that the build of a corpus looked for, by the names that its recipe gives them.

    Raises:
        UserError: it is no corpus, or no questions were looked for.
    """
    corpus = Corpus.open(directory)
    if "questions.parquet" not in corpus.manifest.files:
        raise UserError(
            f"The build of {directory} looked for no questions; name their files in its recipe "
            "(measures.test_sets) and build again."
        )
    table = read_question_table(corpus.manifest.path(directory, "questions.parquet"))
    found: dict[str, LookedFor] = {}
    for name in {question.set for question in table.questions}:
        of_set = [number for number, question in enumerate(table.questions) if question.set == name]
        found[name] = LookedFor(
            frozenset(table.questions[number].id for number in of_set),
            frozenset(table.questions[number].id for number in of_set if table.train[number] > 0),
            frozenset(table.questions[number].id for number in of_set if not table.questions[number].matched),
        )
    return found


def find_set(looked_for: dict[str, LookedFor], score: SetScore) -> LookedFor | None:
    """The questions of a set among those looked for: the set of its name that has all of them, if any.

    Its name is that of the set, with or without the split (`medqa_4options`, `medqa_4options.test`,
    `medqa_4options_test`), or the first word of it (`medqa`).
    """
    ids = {answer.id for answer in score.answers}
    names = (f"{score.set}.{score.split}", f"{score.set}_{score.split}", score.set, score.set.split("_")[0])
    for name in names:
        if name in looked_for and ids <= looked_for[name].ids:
            return looked_for[name]
    return None
