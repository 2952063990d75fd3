"""The published forms of questions: which form a record has, and the question in it.

Sources of the forms: github.com/pubmedqa/pubmedqa, github.com/medmcqa/medmcqa, github.com/jind11/MedQA,
github.com/hendrycks/test and participants-area.bioasq.org; on huggingface.co qiaojin/PubMedQA,
openlifescienceai/medmcqa, GBaker/MedQA-USMLE-4-options, GBaker/MedQA-USMLE-4-options-hf and cais/mmlu.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from data_tools.questions.question import BadQuestion, Question

LETTERS = "ABCDE"
MEDMCQA_OPTIONS = ("opa", "opb", "opc", "opd")
YES_NO_MAYBE = ("yes", "no", "maybe")
YES_NO = ("yes", "no")
_RARE = 0.01
"""Share of the more frequent value below which the other one is an error and no evidence."""

Fields = dict[str, Any]


class NotChosen(BadQuestion):
    """A sound record of a kind that is not asked for: BioASQ's questions other than yes or no."""


def read_question(
    value: Fields | list[str], number: str, cop_from: int | None = None
) -> tuple[str, Question]:
    """The question of a record, and the name of its set.

    Args:
        value: the record: an object, or a row of MMLU's CSV.
        number: its id, unless it has one of its own.
        cop_from: what MedMCQA's `cop` counts from, 0 or 1; None when that is not known, so that its
            questions have no answer.

    Returns:
        `pubmedqa`, `medmcqa`, `medqa_4options` or `medqa_5options`, `mmlu` (`mmlu_SUBJECT` where the record
        names its subject), `bioasq_yesno` or `instructions`; and the question.

    Raises:
        BadQuestion: it is in none of the forms, lacks something, or its answer is none of its options.
        NotChosen: it is no yes-or-no question of BioASQ.
    """
    name, question = _in_its_form(value, number, cop_from)
    texts = (question.id, question.question, *question.options, *question.context, question.conclusion)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadQuestion("not_unicode", f"half a character, at {error.start} of its texts") from error
    return name, question


def medmcqa_counts_from(values: Iterable[Any]) -> int | None:
    """What MedMCQA's `cop` counts from, by the values that a file holds.

    The files of the authors count 1 to 4, their copies on Hugging Face 0 to 3: a 4 shows the first, a 0 among
    other values the second. None when neither is there, or both in earnest.
    """
    counts = Counter(value for value in values if type(value) is int and value >= 0)
    zeros, last = counts[0], counts[len(MEDMCQA_OPTIONS)]
    if last and zeros <= _RARE * last:
        return 1
    return 0 if len(counts) > 1 and zeros and last <= _RARE * zeros else None


def _in_its_form(value: Fields | list[str], number: str, cop_from: int | None) -> tuple[str, Question]:
    if isinstance(value, list):
        return "mmlu", _mmlu_row(value, number)
    if "opa" in value:
        return "medmcqa", _medmcqa(value, number, cop_from)
    for key, read in _FORMS.items():
        if key in value:
            return read(value, number)
    raise BadQuestion("unknown_form", f"an object with the keys {', '.join(sorted(value))[:100]}")


def _pubmedqa(value: Fields, number: str) -> tuple[str, Question]:
    decision = value.get("final_decision")
    if "QUESTION" in value:
        identity, asked, context = number, _text(value, "QUESTION"), value.get("CONTEXTS")
        conclusion = value.get("LONG_ANSWER")
    else:
        identity, asked = str(value.get("pubid", number)), _text(value, "question")
        context = value["context"].get("contexts") if isinstance(value.get("context"), dict) else ()
        conclusion = value.get("long_answer")
    answer = None if decision in (None, "") else _place(decision, YES_NO_MAYBE, "final_decision")
    if not isinstance(conclusion, str | None):
        raise BadQuestion("wrong_type", f"the long answer is {type(conclusion).__name__}, expected text")
    question = Question(identity, asked, YES_NO_MAYBE, answer, _texts(context, "contexts"), conclusion or "")
    return "pubmedqa", question


def _medmcqa(value: Fields, number: str, cop_from: int | None) -> Question:
    options = _options([value.get(key) for key in MEDMCQA_OPTIONS])
    right = value.get("cop")
    # Files without answers have no `cop`, or -1.
    answer = None
    if right is not None and right != -1 and cop_from is not None:
        answer = _in_range(right, len(options), "cop", cop_from)
    return Question(str(value.get("id", number)), _text(value, "question"), options, answer)


def _medqa(value: Fields, number: str) -> tuple[str, Question]:
    """`options` as an object by letter, or as a list of `{"key", "value"}`."""
    options = value["options"]
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        options = {option.get("key"): option.get("value") for option in options}
    if not isinstance(options, dict):
        raise BadQuestion("wrong_type", f"options is {type(options).__name__}, expected options by letter")
    letters = tuple(LETTERS[: len(options)])
    if tuple(sorted(map(str, options))) != letters:
        found = ", ".join(map(str, options))
        raise BadQuestion("missing_option", f"options have the letters {found}, expected A to D or A to E")
    texts = _options([options[letter] for letter in letters])
    letter = value.get("answer_idx")
    answer = None if letter is None else _place(letter, letters, "answer_idx")
    told = value.get("answer")
    if answer is not None and isinstance(told, str) and told.strip() != texts[answer].strip():
        raise BadQuestion("answer_disagrees", f"answer_idx {letter} is {texts[answer]!r}, answer is {told!r}")
    question = Question(str(value.get("id", number)), _text(value, "question"), texts, answer)
    return f"medqa_{len(texts)}options", question


def _medqa_endings(value: Fields, number: str) -> tuple[str, Question]:
    endings = sorted(key for key in value if key.startswith("ending"))
    if endings != [f"ending{place}" for place in range(len(endings))]:
        raise BadQuestion("missing_option", f"the options are {', '.join(endings)}, expected ending0 and on")
    options = _options([value[key] for key in endings])
    asked = f"{_text(value, 'sent1')} {value.get('sent2') or ''}".strip()
    label = value.get("label")
    answer = None if label is None or label == -1 else _in_range(label, len(options), "label")
    return f"medqa_{len(options)}options", Question(str(value.get("id", number)), asked, options, answer)


def _mmlu_row(row: list[str], number: str) -> Question:
    """A row of MMLU: question, four options, letter of the answer."""
    if len(row) != 6:
        raise BadQuestion("missing_option", f"a row of {len(row)} fields, expected 6")
    asked, *options, letter = row
    if not asked.strip():
        raise BadQuestion("empty_text", "the question is empty")
    texts = _options(options)
    return Question(number, asked, texts, _place(letter, tuple(LETTERS[: len(texts)]), "the last field"))


def _mmlu(value: Fields, number: str) -> tuple[str, Question]:
    options = _options(value["choices"])
    answer = value.get("answer")
    place = None if answer is None or answer == -1 else _in_range(answer, len(options), "answer")
    subject = value.get("subject")
    name = f"mmlu_{subject}" if isinstance(subject, str) and subject.isidentifier() else "mmlu"
    return name, Question(number, _text(value, "question"), options, place)


def _bioasq(value: Fields, number: str) -> tuple[str, Question]:
    if value.get("type") != "yesno":
        raise NotChosen("not_yes_or_no", f"a question of type {value.get('type')}")
    right = value.get("exact_answer")
    if isinstance(right, list) and len(right) == 1:
        right = right[0]
    answer = None if right is None else _place(str(right).lower(), YES_NO, "exact_answer")
    snippets = [one.get("text") if isinstance(one, dict) else one for one in value.get("snippets") or []]
    ideal = value.get("ideal_answer") or ""
    conclusion = ideal[0] if isinstance(ideal, list) else ideal
    question = Question(
        str(value.get("id", number)),
        _text(value, "body"),
        YES_NO,
        answer,
        _texts(snippets, "snippets"),
        conclusion if isinstance(conclusion, str) else "",
    )
    return "bioasq_yesno", question


def _instruction(value: Fields, number: str) -> tuple[str, Question]:
    given = value.get("input") or ""
    if not isinstance(given, str):
        raise BadQuestion("wrong_type", f"input is {type(given).__name__}, expected text")
    identity = str(value.get("sample_id", value.get("id", number)))
    context = (given,) if given.strip() else ()
    return "instructions", Question(
        identity, _text(value, "instruction"), (), None, context, _text(value, "output")
    )


# By the key that tells a form from those below it; MedMCQA's, `opa`, comes first of all.
_FORMS: dict[str, Callable[[Fields, str], tuple[str, Question]]] = {
    "QUESTION": _pubmedqa,
    "final_decision": _pubmedqa,
    "sent1": _medqa_endings,
    "choices": _mmlu,
    "options": _medqa,
    "body": _bioasq,
    "instruction": _instruction,
}


def _text(value: Fields, key: str) -> str:
    text = value.get(key)
    if text is None:
        raise BadQuestion("missing_field", f"there is no {key}")
    if not isinstance(text, str):
        raise BadQuestion("wrong_type", f"{key} is {type(text).__name__}, expected text")
    if not text.strip():
        raise BadQuestion("empty_text", f"{key} is empty")
    return text


def _texts(values: Any, key: str) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise BadQuestion("wrong_type", f"{key} are no list of texts")
    return tuple(values)


def _options(values: Any) -> tuple[str, ...]:
    """Two options or more, none of them missing."""
    if not isinstance(values, list) or not all(one is None or isinstance(one, str) for one in values):
        raise BadQuestion("wrong_type", "the options are no texts")
    missing = [str(place) for place, one in enumerate(values, start=1) if not (one or "").strip()]
    if missing or len(values) < 2:
        which = f"option {', '.join(missing)} of" if missing else "all but"
        raise BadQuestion("missing_option", f"{which} {len(values)} is empty")
    return tuple(values)


def _place(value: Any, among: tuple[str, ...], key: str) -> int:
    if value not in among:
        raise BadQuestion("answer_out_of_range", f"{key} is {value!r}, expected one of {', '.join(among)}")
    return among.index(value)


def _in_range(value: Any, options: int, key: str, first: int = 0) -> int:
    if type(value) is not int or not first <= value < first + options:
        raise BadQuestion(
            "answer_out_of_range", f"{key} is {value!r}, expected {first} to {first + options - 1}"
        )
    return value - first
