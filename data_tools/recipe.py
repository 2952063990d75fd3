"""The recipe of a corpus: what is selected, cleaned, measured and decided."""

from dataclasses import dataclass, field
from typing import Any


def _default_rules() -> list[dict[str, Any]]:
    return [{"rule": "normalize"}, {"rule": "sections"}]


@dataclass(frozen=True)
class Measures:
    """What a build measures of every document, so that it can be decided later without the text.

    Attributes:
        near_duplicates: keep a MinHash signature of each document.
        test_sets: question files by name; the questions that each document overlaps are kept.
    """

    near_duplicates: bool = False
    test_sets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """Which documents count. All of it can be changed on a finished corpus, without reading a text again.

    Attributes:
        near_duplicates: the estimated Jaccard similarity from which the later of two documents is left out;
            none to keep both.
        contamination: how many overlapping test questions leave a document out; none to keep it.
        licenses: the licence groups that count (`commercial`, `noncommercial`, `other`, `unknown`); none for
            all.
        heldout: share of the papers held out.
    """

    near_duplicates: float | None = None
    contamination: int | None = None
    licenses: list[str] | None = None
    heldout: float = 0.01


@dataclass(frozen=True)
class Recipe:
    """How papers become a corpus.

    Attributes:
        require_pmc_id: leave out records without a PMC id.
        rules: the cleaning chain, in order: each an object whose `rule` names it, with its parameters.
        measures: what is kept of each document for later decisions.
        decisions: which documents count.
        max_bad: the share of damaged records (`papers.BAD_RECORDS`) above which a build fails.
    """

    require_pmc_id: bool = True
    rules: list[dict[str, Any]] = field(default_factory=_default_rules)
    measures: Measures = field(default_factory=Measures)
    decisions: Decisions = field(default_factory=Decisions)
    max_bad: float = 0.01
