"""`pmc-data questions`: one format, nothing trained on that is evaluated on, nothing lost without a count."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.cli import main
from data_tools.errors import UserError
from data_tools.questions import Question
from data_tools.questions.build import build_questions
from data_tools.questions.written import QuestionSets
from tests.data_tools.sources import write_jsonl

OPTIONS = ("aspirin", "rest", "surgery", "none of these")


def medqa(question: str, options: tuple[str, ...] = OPTIONS, right: int = 1) -> dict[str, Any]:
    letters = dict(zip("ABCDE", options, strict=False))
    return {"question": question, "options": letters, "answer_idx": "ABCDE"[right]}


def made(tmp_path: Path, **splits: list[dict[str, Any]]) -> QuestionSets:
    inputs = [str(write_jsonl(tmp_path / f"{split}.jsonl", rows)) for split, rows in splits.items()]
    return build_questions(inputs, tmp_path / "made")


def test_what_is_written_is_read_again_with_set_split_and_place(tmp_path: Path) -> None:
    sets = made(tmp_path, train=[medqa("First?")], test=[medqa("Second\u2028line?", right=3)])
    again = QuestionSets.open(tmp_path / "made")
    assert again == sets
    assert again.read("medqa_4options", "test") == [Question("1", "Second\u2028line?", OPTIONS, 3)]
    row = json.loads(again.path("medqa_4options", "train").read_text())
    assert row == {
        "set": "medqa_4options",
        "split": "train",
        "id": "1",
        "question": "First?",
        "options": list(OPTIONS),
        "answer": 1,
        "context": [],
        "conclusion": "",
        "file": "train.jsonl",
        "line": 1,
    }
    info = again.manifest.sets["medqa_4options"]
    assert info.license.startswith("MIT")
    assert info.splits["test"].answers == {"3": 1}
    with pytest.raises(UserError, match=r"have no medqa_4options.dev; expected one of medqa_4options.test"):
        again.read("medqa_4options", "dev")


def test_training_questions_that_are_evaluated_on_are_left_out_and_counted(tmp_path: Path) -> None:
    five = (*OPTIONS, "all of these")
    train = [
        medqa("Which is  NEXT"),  # other case, spaces and punctuation
        medqa("Which is next?", OPTIONS[::-1], right=2),  # other order
        medqa("Which is next?", five),  # another option
        medqa("Which is next?", right=0),  # another label
        medqa("Which is next?", ("a", "b", "c", "d")),  # another question
        medqa("Which is last?"),
        medqa("Which is last?"),  # stands in train twice, and stays
        medqa("Which of 2?"),
    ]
    medmcqa = {
        "id": "m",
        "question": "Which of 2?",
        "opa": "x",
        "opb": "y",
        "opc": "z",
        "opd": "Rest",
        "cop": 4,
    }
    sets = made(tmp_path, train=train, test=[medqa("Which is next?")], dev=[medmcqa])
    kept = [one.question for one in sets.read("medqa_4options", "train")]
    assert kept == ["Which is next?", "Which is last?", "Which is last?"]
    four = sets.manifest.sets["medqa_4options"].splits["train"]
    assert (four.questions, four.removed, four.repeated) == (3, 4, 1)
    assert "medqa_5options" not in sets.manifest.sets
    found = {(one.train, one.evaluated): one.questions for one in sets.manifest.duplicates}
    assert found == {
        ("medqa_4options", "medqa_4options.test"): 3,
        ("medqa_5options", "medqa_4options.test"): 1,
        ("medqa_4options", "medmcqa.dev"): 1,
    }


def test_bad_questions_are_set_aside_and_too_many_end_it_with_nothing_written(tmp_path: Path) -> None:
    rows: list[Any] = [medqa(f"Which is {number}?") for number in range(99)]
    rows.insert(40, medqa("", right=0))
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    sets = build_questions([str(path)], tmp_path / "made")
    assert sets.manifest.sources[0]["rejected"] == {"empty_text": 1}
    rejected = [json.loads(line) for line in (tmp_path / "made" / "rejected.jsonl").read_text().splitlines()]
    assert [(one["file"], one["line"], one["reason"]) for one in rejected] == [
        ("train.jsonl", 41, "empty_text")
    ]
    with pytest.raises(UserError, match=r"1 of 100 questions of train.jsonl are bad \(line 41: empty_text"):
        build_questions([str(path)], tmp_path / "other", max_rejected=0.001)
    papers = write_jsonl(tmp_path / "dev.jsonl", [{"text": "A paper."}] * 3)
    with pytest.raises(UserError, match=r"3 of 3 questions of dev.jsonl are bad \(line 1: unknown_form"):
        build_questions([str(path), str(papers)], tmp_path / "other")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["dev.jsonl", "made", "train.jsonl"]


def test_the_same_questions_have_the_same_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    prints = []
    for name, right in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        prints.append(made(tmp_path / name, test=[medqa("Which?", right=right)]).manifest.fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert (tmp_path / "a/made/questions.json").read_text() == (
        tmp_path / "b/made/questions.json"
    ).read_text()


def test_a_changed_file_of_questions_is_found_out(tmp_path: Path) -> None:
    sets = made(tmp_path, test=[medqa("Which?")])
    path = sets.path("medqa_4options", "test")
    path.write_text(path.read_text().replace("Which", "Where"))
    with pytest.raises(UserError, match=r"is not what questions.json describes"):
        sets.read("medqa_4options", "test")
    (tmp_path / "made" / "questions.json").write_text("{}")
    with pytest.raises(UserError, match=r"questions.json is damaged"):
        QuestionSets.open(tmp_path / "made")
    with pytest.raises(UserError, match="holds no questions"):
        QuestionSets.open(tmp_path)


def test_test_ids_of_other_questions_are_refused_and_missing_ones_counted(tmp_path: Path) -> None:
    record = {"QUESTION": "Is it?", "CONTEXTS": ["c"], "final_decision": "yes"}
    (tmp_path / "pqal.json").write_text(json.dumps({"1": record, "2": {**record, "QUESTION": "Was it?"}}))
    (tmp_path / "ids").write_text("2 3")
    sets = build_questions([str(tmp_path / "pqal.json")], tmp_path / "made", tmp_path / "ids")
    assert sets.manifest.test_ids_not_found == 1
    assert [one.id for one in sets.read("pubmedqa", "test")] == ["2"]
    (tmp_path / "ids").write_text("8 9")
    with pytest.raises(UserError, match="None of the 2 ids"):
        build_questions([str(tmp_path / "pqal.json")], tmp_path / "other", tmp_path / "ids")


def test_the_command_tells_counts_licences_and_duplicates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [medqa("One?"), medqa("Two?")])
    test = write_jsonl(tmp_path / "held.jsonl", [medqa("Two?")])
    arguments = ["questions", "--input", str(train), f"test={test}", "--output", str(tmp_path / "made")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "medqa_4options: MIT" in said
    assert "1 of medqa_4options's training questions stand in medqa_4options.test" in said
    assert main(arguments) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "other")
    assert main([*arguments, "--test-ids", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.shared
def test_the_published_sets_make_one_directory(shared: Path, tmp_path: Path) -> None:
    qa = shared / "qa"
    names = ("medmcqa_dev_first2000.json", "medqa_usmle_4opt_dev.jsonl")
    ids = json.loads((qa / "pubmedqa_ori_pqal.json").read_text())
    (tmp_path / "ids").write_text("\n".join(list(ids)[::2]))
    inputs = [*(str(qa / name) for name in names), str(qa / "pubmedqa_ori_pqal.json")]
    sets = build_questions(inputs, tmp_path / "made", tmp_path / "ids")
    counts = {
        (name, split): info.questions
        for name, of_set in sets.manifest.sets.items()
        for split, info in of_set.splits.items()
    }
    assert counts == {
        ("medmcqa", "dev"): 2000,
        ("medqa_4options", "dev"): 1272,
        ("pubmedqa", "test"): 500,
        ("pubmedqa", "train"): 500,
    }
    assert sets.read("pubmedqa", "test")[0].conclusion == ids["21645374"]["LONG_ANSWER"]
