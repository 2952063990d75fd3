"""Questions for the fine-tuning demonstration, in the layouts that the real sets are published in.

All of it is made up, and none of it is medicine. An abstract says plainly whether the tea helped; of the
options of a multiple-choice question the remedy that ends in -olin is right. A million parameters learn
little of that in the few steps of the demonstration, which shows the way and not a skill.
"""

import json
import random
from pathlib import Path
from typing import Any

_SYLLABLES = ("ba", "do", "fe", "gu", "ka", "le", "mi", "no", "pe", "ru", "sa", "ti")
_RIGHT, _WRONG = "olin", ("azem", "urex", "idone")
_COMPLAINTS = ("fever", "headache", "cough", "rash", "nausea", "fatigue", "insomnia", "vertigo")
_PLACES = ("hand", "knee", "back", "chest", "shoulder", "foot")
_FINDINGS = {
    "yes": "Those who drank the tea were well soon.",
    "no": "Nobody felt any change.",
    "maybe": "In one town it was better and in the other worse.",
}


def write_questions(directory: Path, train: int = 320, test: int = 80) -> list[str]:
    """Write a PubMedQA, a MedMCQA and a MedQA of so many questions, and the ids of PubMedQA's test.

    Returns:
        The files, for `pmc-data questions --input`; the ids are in `test_ids.json` beside them.
    """
    directory.mkdir(parents=True)
    draw = random.Random(0)  # noqa: S311 - questions, not secrets
    pubmedqa = {str(number): _pubmedqa(draw) for number in range(train + test)}
    (directory / "pubmedqa.json").write_text(json.dumps(pubmedqa, indent=1))
    ids = dict.fromkeys(list(pubmedqa)[train:], "")
    (directory / "test_ids.json").write_text(json.dumps(ids))
    files = [str(directory / "pubmedqa.json")]
    for name, make, last in (("medmcqa", _medmcqa, "dev"), ("medqa", _medqa, "test")):
        for split, number in (("train", train), (last, test)):
            path = directory / f"{name}_{split}.jsonl"
            path.write_text("".join(f"{json.dumps(make(draw, f'{split}-{n}'))}\n" for n in range(number)))
            files.append(str(path))
    return files


def _pubmedqa(draw: random.Random) -> dict[str, Any]:
    complaint, days = draw.choice(_COMPLAINTS), draw.randint(3, 90)
    decision = draw.choices(list(_FINDINGS), weights=[5, 4, 1])[0]
    return {
        "QUESTION": f"Does {_word(draw)} tea help against {complaint}?",
        "CONTEXTS": [f"We asked {days} persons with {complaint}.", _FINDINGS[decision]],
        "LONG_ANSWER": _FINDINGS[decision],
        "final_decision": decision,
    }


def _medmcqa(draw: random.Random, number: str) -> dict[str, Any]:
    options, right = _options(draw)
    complaint, place = draw.choice(_COMPLAINTS), draw.choice(_PLACES)
    return {
        "id": number,
        "question": f"Against {complaint} with {_word(draw)} of the {place} one takes",
        **dict(zip(("opa", "opb", "opc", "opd"), options, strict=True)),
        "cop": right + 1,
        "choice_type": "single",
        "exp": "",
        "subject_name": "Made up",
    }


def _medqa(draw: random.Random, number: str) -> dict[str, Any]:
    options, right = _options(draw)
    age, complaint, place = draw.randint(18, 90), draw.choice(_COMPLAINTS), draw.choice(_PLACES)
    person = f"A person of {age} years has {complaint} and a pain in the {place}."
    return {
        "id": number,
        "question": f"{person} What is to be given?",
        "options": dict(zip("ABCD", options, strict=True)),
        "answer_idx": "ABCD"[right],
        "answer": options[right],
    }


def _options(draw: random.Random) -> tuple[list[str], int]:
    """Four remedies, and the place of the right one."""
    options = [_word(draw) + ending for ending in (_RIGHT, *_WRONG)]
    order = draw.sample(range(4), 4)
    return [options[place] for place in order], order.index(0)


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(_SYLLABLES, k=2))
