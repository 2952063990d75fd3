"""What a corpus has gained: the papers that an earlier one lacks."""

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus import Corpus, Split
from data_tools.documents import table_path
from data_tools.facts import NONE, Facts, read_facts

_IDENTITIES = ("text", "pmc_id", "doi", "corpus_id")


def new_documents(split: Split, old: Corpus) -> NDArray[np.int64]:
    """The documents of a split that share no text and no identifier with any that counts in `old`.

    So a paper whose text was revised is not new, and one that `old` held out is never trained on. Reads the
    tables of both corpora.

    Returns:
        int64, ascending numbers of documents of `split`, as `Split.only` takes them.

    Raises:
        UserError: a corpus is at a URL, or a table cannot be read.
    """
    facts, before = _facts(split.corpus), _facts(old)
    rows = _rows(split, facts)
    known_rows = np.concatenate([_rows(old.split(name), before) for name in ("train", "heldout")])
    known = np.zeros(len(rows), np.bool_)
    for identity in _IDENTITIES:
        ours, theirs = getattr(facts, identity)[rows], getattr(before, identity)[known_rows]
        known |= (ours != NONE) & np.isin(ours, theirs)
    return np.flatnonzero(~known)


def _facts(corpus: Corpus) -> Facts:
    return read_facts([table_path(corpus.directory, part.name) for part in corpus.manifest.parts])


def _rows(split: Split, facts: Facts) -> NDArray[np.int64]:
    """The row in the tables of each document of a split: int64 `[documents]`."""
    starts = np.cumsum(facts.tokens) - facts.tokens
    return np.searchsorted(starts, split.positions[:-1])
