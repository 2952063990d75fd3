"""Questions that stand in what is trained on and in what is evaluated on: they are removed from the first.

Two questions are the same when their texts are, and also their options or their right answers: so a question
is found again with its options in another order, with a wrong one left out (MedQA's four options of five) or
with another label, and `Which of the following is true?` is not one question. An instruction's text includes
its input. Texts are compared without case, punctuation and white space.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import xxhash

from data_tools.questions.question import Question
from data_tools.questions.sources import Placed

_WORDS = re.compile(r"\w+")


def same_as(question: Question) -> frozenset[bytes]:
    """What another question shares with this one when both are the same: one of two hashes, XXH3-128."""
    asked = [question.question] if question.options else [question.question, *question.context]
    texts = [sorted(map(_plain, question.options))]
    if question.answer is not None:
        texts.append([_plain(question.options[question.answer])])
    return frozenset(
        xxhash.xxh3_128_digest("\n".join([*map(_plain, asked), *others]).encode()) for others in texts
    )


def remove_from_train(placed: list[Placed]) -> tuple[list[Placed], list[tuple[Placed, frozenset[str]]]]:
    """Leave out the training questions that stand in a dev or test split of any set.

    Returns:
        The others in their order; and those, each with where it stands, as `SET.SPLIT`.
    """
    evaluated: dict[bytes, set[str]] = {}
    for one in placed:
        if one.split != "train":
            for key in same_as(one.question):
                evaluated.setdefault(key, set()).add(f"{one.set}.{one.split}")
    kept: list[Placed] = []
    removed: list[tuple[Placed, frozenset[str]]] = []
    for one in placed:
        if one.split == "train" and (where := _found(one, evaluated)):
            removed.append((one, where))
        else:
            kept.append(one)
    return kept, removed


def repeated(placed: Iterable[Placed]) -> Counter[tuple[str, str]]:
    """How many questions stand earlier in their own split already, by (set, split)."""
    seen: dict[tuple[str, str], set[bytes]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for one in placed:
        before, keys = seen.setdefault((one.set, one.split), set()), same_as(one.question)
        counts[one.set, one.split] += not keys.isdisjoint(before)
        before |= keys
    return counts


def _found(one: Placed, evaluated: dict[bytes, set[str]]) -> frozenset[str]:
    return frozenset().union(*(evaluated.get(key, set()) for key in same_as(one.question)))


def _plain(text: str) -> str:
    """Its words; of a text without any, such as a formula's sign, all but the white space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORDS.findall(text)) or "".join(text.split())
