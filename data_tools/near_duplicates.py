"""Which documents repeat an earlier one nearly, from the signatures in the tables."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.columns import given
from data_tools.documents import read_table
from data_tools.minhash import BANDS, VALUES, Signatures, band_keys, similarities
from data_tools.words import Hashes

Mask = NDArray[np.bool_]
Documents = NDArray[np.int64]

_PAIRS = 1 << 16  # compared at once: 29 MB of signatures


def near_duplicates(
    paths: Sequence[Path],
    among: Mask,
    similarity: float,
    report: Callable[[float], None] = lambda _: None,
) -> Mask:
    """Which documents are left out as near-duplicates.

    In the order of the documents, one is left out when it is a candidate of an earlier one that is not left
    out, and their estimated similarity reaches `similarity`. Candidates share a band. A document without
    signature is nobody's candidate.

    Two readings of the tables: 112 bytes a document are in memory at once, and the signatures of candidates.

    Args:
        paths: the tables of all parts, in order.
        among: which documents are asked about, `[documents]`.
        similarity: above 0, up to 1.
        report: told the share of the work that is done.

    Returns:
        `[documents]`.

    Raises:
        UserError: a table cannot be read.
    """
    members = np.empty(int(among.sum()), np.int64)
    keys = np.empty((BANDS, len(members)), np.uint64)
    filled = 0
    for number, (rows, signatures) in enumerate(_signatures(paths, among), start=1):
        members[filled : filled + len(rows)] = rows
        keys[:, filled : filled + len(rows)] = band_keys(signatures)
        filled += len(rows)
        report(0.3 * number / len(paths))
    groups, places = _groups(keys[:, :filled], lambda share: report(0.3 + 0.4 * share))
    del keys
    candidates, places = np.unique(places, return_inverse=True)
    documents = members[:filled][candidates]
    wanted = np.zeros(len(among), np.bool_)
    wanted[documents] = True
    signatures = np.empty((len(documents), VALUES), np.uint16)
    filled = 0
    for number, (rows, found) in enumerate(_signatures(paths, wanted), start=1):
        signatures[filled : filled + len(rows)] = found
        filled += len(rows)
        report(0.7 + 0.2 * number / len(paths))
    repeated = np.zeros(len(among), np.bool_)
    repeated[documents[repeats(groups, places, signatures, similarity)]] = True
    report(1.0)
    return repeated


def repeats(groups: Documents, members: Documents, signatures: Signatures, similarity: float) -> Mask:
    """Which candidates are left out, by the rule of `near_duplicates`.

    In each round those that come first in all their groups are kept, since nothing earlier is left that could
    leave them out, and compared with the others of their groups; those are gone or closer to the front in the
    next round.

    Args:
        groups: the group of each membership, ascending, `[memberships]`.
        members: the candidate of each, ascending within a group, `[memberships]`.
        signatures: of the candidates, `[candidates, 112]`.
        similarity: from which the later of two is left out.

    Returns:
        `[candidates]`.
    """
    count = len(signatures)
    left_out = np.zeros(count, np.bool_)
    while len(groups):
        is_first = np.append(True, groups[1:] != groups[:-1])
        firsts = members[is_first][np.cumsum(is_first) - 1]
        times_first = np.bincount(members[is_first], minlength=count)
        leads = times_first == np.bincount(members, minlength=count)
        compared = leads[firsts] & ~is_first & ~left_out[members]
        pairs = np.unique(firsts[compared] * count + members[compared])
        for start in range(0, len(pairs), _PAIRS):
            first, second = np.divmod(pairs[start : start + _PAIRS], count)
            same = similarities(signatures[first], signatures[second]) >= similarity
            left_out[second[same]] = True
        remain = ~(leads[members] | left_out[members])
        groups, members = _without_single(groups[remain], members[remain])
    return left_out


def _signatures(paths: Sequence[Path], among: Mask) -> Any:
    """Of each table: the numbers of the documents asked for that have a signature, and their signatures."""
    start = 0
    for path in paths:
        rows = pq.read_metadata(path).num_rows
        chosen = np.flatnonzero(among[start : start + rows])
        if len(chosen):
            column = read_table(path, ["signature"])["signature"].combine_chunks()
            chosen = chosen[given(column)[chosen]]
            content = np.frombuffer(column.buffers()[1], "<u2").reshape(-1, VALUES)
            yield chosen + start, content[column.offset : column.offset + rows][chosen]
        else:
            yield chosen, np.empty((0, VALUES), np.uint16)
        start += rows


def _groups(keys: Hashes, report: Callable[[float], None]) -> tuple[Documents, Documents]:
    """Documents with the same key in a band: (group, document) of each membership, groups of two or more."""
    groups, members, before = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for number, band in enumerate(keys if keys.size else [], start=1):
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        numbers = before + np.cumsum(np.append(False, ordered[1:] != ordered[:-1]))
        found, documents = _without_single(numbers, order)
        groups.append(found)
        members.append(documents)
        before += len(band)
        report(number / len(keys))
    return np.concatenate(groups), np.concatenate(members)


def _without_single(groups: Documents, members: Documents) -> tuple[Documents, Documents]:
    """Memberships of groups that have at least two."""
    if not len(groups):
        return groups, members
    differs = np.append(groups[1:] != groups[:-1], True)
    alone = differs & np.append(True, differs[:-1])
    return groups[~alone], members[~alone]
