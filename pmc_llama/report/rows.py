"""Results as rows: each model on each set, each pair of models on the questions that both were asked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from pmc_llama.evaluate.results import Answer, Method, Scores, SetScore, Setting
from pmc_llama.report.contamination import LookedFor, find_set
from pmc_llama.report.paper import published
from pmc_llama.report.significance import Interval, McNemar, mcnemar, wilson


@dataclass(frozen=True)
class Accuracy:
    """Right answers among questions; share and its 95% interval are None without any question."""

    right: int
    questions: int
    share: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Clean:
    """A set and the corpus that the model was trained on.

    Attributes:
        overlapping: questions asked that a training document overlaps.
        too_short: questions asked that could not be looked for.
        accuracy: on those that no training document overlaps.
    """

    overlapping: int
    too_short: int
    accuracy: Accuracy


@dataclass(frozen=True)
class Row:
    """A model on a set.

    Attributes:
        label: of the model, different for every result.
        setting: how it was fine-tuned, or None.
        set: of questions.
        split: which.
        prompt: id of the template.
        method: likelihoods compared, or an answer generated.
        majority: share that the most frequent answer is right for.
        accuracy: of the model.
        invalid: answers that are none of the options; they count as wrong.
        cut: prompts whose beginning the model could not read.
        unanswerable: questions not asked, since their answer is not told.
        published: accuracies in print for this setting, by model.
        clean: overlap with the training corpus; None where the set was not looked for.
    """

    label: str
    setting: Setting | None
    set: str
    split: str
    prompt: str
    method: Method
    majority: float
    accuracy: Accuracy
    invalid: int
    cut: int
    unanswerable: int
    published: dict[str, float]
    clean: Clean | None


@dataclass(frozen=True)
class Pair:
    """Two models on the questions of a set that both were asked."""

    set: str
    split: str
    first: str
    second: str
    test: McNemar


@dataclass(frozen=True)
class Report:
    """All that is told.

    Attributes:
        rows: in the order of the results, then of their sets.
        pairs: all pairs of results that have a set in common.
        corpus: whose overlap is told, or None.
        notes: what a reader has to know, a sentence each.
    """

    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    corpus: str | None
    notes: tuple[str, ...]


def make_report(
    results: Sequence[Scores], corpus: str | None = None, looked_for: dict[str, LookedFor] | None = None
) -> Report:
    """Rows and pairs of results.

    Args:
        results: one or more.
        corpus: where the training corpus is.
        looked_for: in it, see `contamination.read_looked_for`.
    """
    labels = _labels(results)
    rows = tuple(
        _row(label, scores, one, looked_for or {})
        for label, scores in zip(labels, results, strict=True)
        for one in scores.sets
    )
    pairs: list[Pair] = []
    notes: list[str] = []
    for (first, left), (second, right) in combinations(zip(labels, results, strict=True), 2):
        others = {(one.set, one.split): one for one in right.sets}
        for one in left.sets:
            other = others.get((one.set, one.split))
            if other and other.checksum == one.checksum:
                pairs.append(Pair(one.set, one.split, first, second, _compare(one, other)))
            elif other:
                notes.append(
                    f"{first} and {second} were asked other questions of {one.set}.{one.split}: no pair."
                )
    if looked_for:
        missing = sorted({f"{row.set}.{row.split}" for row in rows if row.clean is None})
        notes += [f"The build of {corpus} did not look for all questions of {name}." for name in missing]
    return Report(rows, tuple(pairs), corpus, tuple(notes))


def _labels(results: Sequence[Scores]) -> list[str]:
    """Names that differ: what two results of one name differ in is added, then a number."""
    common = Counter(scores.name for scores in results)
    labels = [
        scores.name if common[scores.name] == 1 else f"{scores.name} ({scores.prompt}, {scores.method})"
        for scores in results
    ]
    seen: Counter[str] = Counter()
    for number, label in enumerate(labels):
        seen[label] += 1
        labels[number] = label if seen[label] == 1 else f"{label} #{seen[label]}"
    return labels


def _row(label: str, scores: Scores, one: SetScore, looked_for: dict[str, LookedFor]) -> Row:
    found = find_set(looked_for, one)
    return Row(
        label,
        scores.setting,
        one.set,
        one.split,
        scores.prompt,
        scores.method,
        one.majority,
        _accuracy(one.answers),
        one.invalid,
        one.cut,
        one.unanswerable,
        published(scores.setting, one.set, one.split),
        _clean(one, found) if found else None,
    )


def _accuracy(answers: Sequence[Answer]) -> Accuracy:
    right, questions = sum(answer.correct for answer in answers), len(answers)
    if not questions:
        return Accuracy(0, 0, None, None)
    return Accuracy(right, questions, right / questions, wilson(right, questions))


def _clean(one: SetScore, found: LookedFor) -> Clean:
    rest = [answer for answer in one.answers if answer.id not in found.overlapping]
    too_short = sum(answer.id in found.too_short for answer in one.answers)
    return Clean(len(one.answers) - len(rest), too_short, _accuracy(rest))


def _compare(first: SetScore, second: SetScore) -> McNemar:
    # Both are the first questions of one file.
    both = min(len(first.answers), len(second.answers))
    right = [[answer.correct for answer in one.answers[:both]] for one in (first, second)]
    return mcnemar(*right)
