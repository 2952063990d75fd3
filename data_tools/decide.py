"""Which documents count, and why the others do not."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.facts import NONE, Facts, named
from data_tools.licenses import GROUPS
from data_tools.recipe import Decisions, Measures
from data_tools.words import Hashes

Mask = NDArray[np.bool_]

REASONS = (
    "retracted",
    "license",
    "contaminated",
    "duplicate_pmc_id",
    "duplicate_doi",
    "duplicate_corpus_id",
    "duplicate_text",
    "near_duplicate",
)
"""The decisions in their order. The three by identifier are one: documents of one paper, however linked."""

_IDENTIFIERS = ("pmc_id", "doi", "corpus_id")
_Links = tuple[NDArray[np.int64], NDArray[np.int64]]


def decide(
    facts: Facts,
    retracts: Sequence[str],
    decisions: Decisions,
    near_duplicates: Callable[[Mask, float], Mask],
) -> NDArray[np.uint8]:
    """Why each document does not count: 0 when it does, else 1 + its place in `REASONS`.

    Left out are, in this order: a paper that is retracted, by the mark of any of its documents or by a
    notice; a licence group not asked for; at least so many overlapping test questions; of the others all but
    the first document of each paper, and all but the first of what is left with each text; of the rest the
    later of two whose texts are near-duplicates. Filters come before duplicates, so that of two copies the
    one that may be used is kept.

    Documents that share a PMC id, DOI or corpus id are one paper, also by way of others: which papers count
    does not depend on the order of the documents. A text is compared with those that count alone, so none is
    left out for one that is not there.

    Args:
        facts: of all documents.
        retracts: the PMC ids and DOIs that notices of retraction name.
        decisions: of the recipe.
        near_duplicates: which of the marked documents repeat an earlier one, from the similarity given.

    Returns:
        uint8 `[documents]`.
    """
    reasons = np.zeros(len(facts), np.uint8)

    def leave_out(reason: str, which: Mask) -> None:
        reasons[which & (reasons == 0)] = 1 + REASONS.index(reason)

    leave_out("retracted", _retracted(facts, retracts))
    if decisions.licenses is not None:
        wanted = [GROUPS.index(name) for name in decisions.licenses]
        leave_out("license", ~np.isin(facts.license, np.array(wanted, np.uint8)))
    if decisions.contamination is not None:
        overlaps = np.bincount(facts.overlap_documents, minlength=len(facts))
        leave_out("contaminated", overlaps >= decisions.contamination)
    links = {name: _links(getattr(facts, name), reasons == 0) for name in _IDENTIFIERS}
    again = _papers(len(facts), links.values()) != np.arange(len(facts))
    for end in (1, 0):  # the reason is what is shared with an earlier document, or else with a later one
        for name in _IDENTIFIERS:
            leave_out(f"duplicate_{name}", again & _mask(len(facts), links[name][end]))
    leave_out("duplicate_text", _mask(len(facts), _links(facts.text, reasons == 0)[1]))
    if decisions.near_duplicates is not None:
        leave_out("near_duplicate", near_duplicates(reasons == 0, decisions.near_duplicates))
    return reasons


def require_possible(decisions: Decisions, measures: Measures) -> None:
    """Refuse decisions that nothing measured can answer, or that name no such thing.

    Raises:
        UserError: naming the key.
    """
    unknown = sorted(set(decisions.licenses or []) - set(GROUPS))
    similarity, questions = decisions.near_duplicates, decisions.contamination
    for holds, otherwise in (
        (not unknown, f"decisions.licenses names {', '.join(unknown)}; known are {', '.join(GROUPS)}."),
        (
            decisions.licenses is None or decisions.licenses,
            "decisions.licenses is empty, which leaves no paper; name a group, or give null for all.",
        ),
        (
            similarity is None or 0 < similarity <= 1,
            f"decisions.near_duplicates is {similarity}; give a similarity above 0 and up to 1, or null.",
        ),
        (
            similarity is None or measures.near_duplicates,
            "decisions.near_duplicates needs signatures, which this corpus was built without; build with "
            "measures.near_duplicates, or give null.",
        ),
        (
            questions is None or questions >= 1,
            f"decisions.contamination is {questions}; give a number of questions of at least 1, or null.",
        ),
        (
            questions is None or measures.test_sets,
            "decisions.contamination needs test questions, which this corpus was built without; build with "
            "measures.test_sets, or give null.",
        ),
        (0 <= decisions.heldout < 1, f"decisions.heldout is {decisions.heldout}; give 0 or more, below 1."),
    ):
        if not holds:
            raise UserError(otherwise)


def _retracted(facts: Facts, retracts: Sequence[str]) -> Mask:
    """Which documents are of a paper of which any document is marked or named by a notice."""
    every = np.ones(len(facts), np.bool_)
    papers = _papers(len(facts), [_links(getattr(facts, name), every) for name in _IDENTIFIERS])
    marked = facts.retracted | named(facts, retracts)
    return _mask(len(facts), papers[marked])[papers]


def _papers(count: int, links: Iterable[_Links]) -> NDArray[np.int64]:
    """The first document of the paper of each of `count` documents: `[documents]`.

    Connected components: each document takes the smallest number among its own and its neighbours', and what
    that one has come to, until none changes.
    """
    earlier, later = (np.concatenate(ends) for ends in zip(*links, strict=True))
    papers = np.arange(count)
    while True:
        smallest = np.minimum(papers[earlier], papers[later])
        found = papers.copy()
        np.minimum.at(found, earlier, smallest)
        np.minimum.at(found, later, smallest)
        found = found[found]
        if np.array_equal(found, papers):
            return papers
        papers = found


def _links(identifiers: Hashes, among: Mask) -> _Links:
    """Each document of `among` that has an identifier, and the last one before it with the same."""
    rows = np.flatnonzero(among & (identifiers != NONE))
    order = rows[np.argsort(identifiers[rows], kind="stable")]
    ordered = identifiers[order]
    same = ordered[1:] == ordered[:-1]
    return order[:-1][same], order[1:][same]


def _mask(count: int, documents: NDArray[np.int64]) -> Mask:
    mask = np.zeros(count, np.bool_)
    mask[documents] = True
    return mask
