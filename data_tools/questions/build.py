"""From question files as published to one directory of questions."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from data_tools.errors import UserError
from data_tools.progress import Progress
from data_tools.questions.duplicates import remove_from_train
from data_tools.questions.sources import (
    Placed,
    Rejected,
    SourceRead,
    find_sources,
    read_source,
    read_test_ids,
    require_few_rejected,
)
from data_tools.questions.written import QuestionSets, require_free, write

_QUIET_SECONDS = 2.0


def build_questions(
    inputs: Iterable[str],
    output: Path,
    test_ids: Path | None = None,
    cop_from: int | None = None,
    max_rejected: float = 0.05,
) -> QuestionSets:
    """Read questions, leave out of train what is evaluated on, and write them.

    They are held in memory: some 2 GB for all of PubMedQA, MedMCQA and MedQA.

    Args:
        inputs: `PATH` or `SPLIT=PATH` each, see `sources.find_sources`.
        output: directory to make.
        test_ids: file of PubMedQA's test ids.
        cop_from: what MedMCQA's `cop` counts from, where its files do not tell.
        max_rejected: share of a file's questions that may be bad.

    Raises:
        UserError: anything that its owner can mend; nothing is written then.
    """
    require_free(output)
    sources = find_sources(inputs)
    ids = read_test_ids(test_ids) if test_ids else frozenset()
    placed: list[Placed] = []
    rejected: list[Rejected] = []
    read: list[SourceRead] = []
    size = sum(path.stat().st_size for source in sources for path in source.files())
    with Progress(size, "questions", quiet=_QUIET_SECONDS) as progress:
        for number, source in enumerate(sources):
            good, bad, found = read_source(source, ids, cop_from, partial(progress.report, number))
            require_few_rejected(found, bad, max_rejected)
            placed += good
            rejected += bad
            read.append(found)
    not_found = len(ids - {one.question.id for one in placed if one.set == "pubmedqa"})
    if ids and not_found == len(ids):
        raise UserError(
            f"None of the {len(ids)} ids of {test_ids} is an id of the questions given; give PubMedQA's "
            "ori_pqal.json with them."
        )
    kept, removed = remove_from_train(placed)
    return write(output, kept, removed, rejected, read, not_found)
