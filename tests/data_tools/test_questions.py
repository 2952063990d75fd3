"""Published questions become one form; what is no question is named with its line and its reason."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from data_tools.errors import UserError
from data_tools.questions import Question
from data_tools.questions.sources import Placed, Rejected, find_sources, read_source, read_test_ids, split_of
from tests.data_tools.sources import write_jsonl

OPTIONS = {"A": "aspirin", "B": "rest", "C": "surgery", "D": "none of these"}
FOUR = tuple(OPTIONS.values())
ABSTRACT = {"QUESTION": "Does it help?", "CONTEXTS": ["We asked.", "We saw."], "LONG_ANSWER": "It does."}


def medqa(**other: Any) -> dict[str, Any]:
    return {"question": "What is next?", "options": OPTIONS, "answer_idx": "B", "answer": "rest", **other}


def medmcqa(number: int, cop: int | None, **other: Any) -> dict[str, Any]:
    options = {f"op{letter}": f"{letter}{number}" for letter in "abcd"}
    right = {} if cop is None else {"cop": cop}
    return {"id": f"m{number}", "question": f"Which of {number}?", **options, **right, **other}


def read(path: Path, **options: Any) -> tuple[list[Placed], list[Rejected]]:
    placed, rejected = [], []
    for source in find_sources([str(path)]):
        good, bad, _ = read_source(source, **options)
        placed += good
        rejected += bad
    return placed, rejected


def questions(path: Path, **options: Any) -> list[Question]:
    placed, rejected = read(path, **options)
    assert not rejected
    return [one.question for one in placed]


def test_medqa_is_read_in_both_layouts_with_four_and_five_options(tmp_path: Path) -> None:
    five = {**OPTIONS, "E": "all"}
    listed = [{"key": key, "value": value} for key, value in OPTIONS.items()]
    endings = {f"ending{place}": option for place, option in enumerate(FOUR)}
    rows = [
        medqa(),
        medqa(options=five, answer_idx="E", answer="all"),
        medqa(options=listed),
        {"id": "train-7", "sent1": "What is next?", "sent2": "", **endings, "label": 2},
    ]
    placed, _ = read(write_jsonl(tmp_path / "train.jsonl", rows))
    assert [one.question for one in placed] == [
        Question("1", "What is next?", FOUR, 1),
        Question("2", "What is next?", (*FOUR, "all"), 4),
        Question("3", "What is next?", FOUR, 1),
        Question("train-7", "What is next?", FOUR, 2),
    ]
    assert [one.set for one in placed] == [f"medqa_{n}options" for n in (4, 5, 4, 4)]
    assert {(one.split, one.file) for one in placed} == {("train", "train.jsonl")}


@pytest.mark.parametrize("first", [0, 1])
def test_what_cop_counts_from_is_seen_in_the_values_of_the_file(first: int, tmp_path: Path) -> None:
    rows = [medmcqa(number, first + number % 4) for number in range(8)]
    found = questions(write_jsonl(tmp_path / "dev.json", rows))
    assert [one.answer for one in found] == [0, 1, 2, 3] * 2


def test_one_wrong_cop_does_not_turn_the_others(tmp_path: Path) -> None:
    rows = [medmcqa(number, 1 + number % 4) for number in range(800)]
    rows[7]["cop"] = 0
    placed, rejected = read(write_jsonl(tmp_path / "dev.json", rows))
    assert [one.question.answer for one in placed[:4]] == [0, 1, 2, 3]
    assert [(one.line, one.id, one.reason) for one in rejected] == [(8, "8", "answer_out_of_range")]


@pytest.mark.parametrize("cops", [[1, 2, 3], [0, 1, 4, 4], [0, 0]])
def test_a_file_that_does_not_tell_what_cop_counts_from_is_asked_about(
    cops: list[int], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "dev.json", [medmcqa(number, cop) for number, cop in enumerate(cops)])
    with pytest.raises(UserError, match=r"does not tell whether its `cop` counts.*--medmcqa-cop-from"):
        read(path)
    if 4 not in cops and 0 not in cops:
        assert [one.answer for one in questions(path, cop_from=1)] == [0, 1, 2]
        assert [one.answer for one in questions(path, cop_from=0)] == [1, 2, 3]


def test_medmcqa_without_answers_is_read_without_answers(tmp_path: Path) -> None:
    for cop in (None, -1):
        path = write_jsonl(tmp_path / "test.json", [medmcqa(number, cop) for number in range(3)])
        assert [one.answer for one in questions(path)] == [None] * 3


@pytest.mark.parametrize("indent", [None, 4])
def test_pubmedqa_is_divided_by_its_test_ids(indent: int | None, tmp_path: Path) -> None:
    records = {str(pmid): {**ABSTRACT, "final_decision": "no"} for pmid in (11, 22, 33)}
    (tmp_path / "ori_pqal.json").write_text(json.dumps(records, indent=indent))
    for written in ('{"22": "no"}', '["22"]', "22\n", "[22]"):
        (tmp_path / "ids.json").write_text(written)
        placed, _ = read(tmp_path / "ori_pqal.json", test_ids=read_test_ids(tmp_path / "ids.json"))
        assert [(one.question.id, one.split) for one in placed] == [
            ("11", "train"),
            ("22", "test"),
            ("33", "train"),
        ]
    options = ("yes", "no", "maybe")
    assert placed[0].question == Question(
        "11", "Does it help?", options, 1, ("We asked.", "We saw."), "It does."
    )
    with pytest.raises(UserError, match=r"ori_pqal.json does not tell a split.*test_ground_truth.json"):
        read(tmp_path / "ori_pqal.json")
    (tmp_path / "ids.json").write_text("PMC22")
    with pytest.raises(UserError, match="expected PubMed ids"):
        read_test_ids(tmp_path / "ids.json")


def test_mmlu_has_its_subject_and_split_from_the_name_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "college_medicine_test.csv"
    path.write_text('"Of these, ""which""\nis first?",a,b,c,d,C\nWhich?,1,2,3,4,A\n')
    placed, rejected = read(path)
    assert not rejected
    assert [(one.set, one.split, one.line) for one in placed] == [
        ("mmlu_college_medicine", "test", 1),
        ("mmlu_college_medicine", "test", 3),
    ]
    assert placed[0].question == Question("1", 'Of these, "which"\nis first?', ("a", "b", "c", "d"), 2)


def test_of_bioasq_the_yes_or_no_questions_are_read_and_the_others_counted(tmp_path: Path) -> None:
    yes = {
        "id": "5a",
        "type": "yesno",
        "body": "Is it?",
        "exact_answer": "Yes",
        "ideal_answer": ["It is."],
        "snippets": [{"text": "It was."}],
    }
    (tmp_path / "test.json").write_text(
        json.dumps({"questions": [yes, {"id": "5b", "type": "list", "body": "Which?"}]}, indent=1)
    )
    placed, rejected, found = read_source(find_sources([str(tmp_path / "test.json")])[0])
    assert [one.question for one in placed] == [
        Question("5a", "Is it?", ("yes", "no"), 0, ("It was.",), "It is.")
    ]
    assert (placed[0].set, placed[0].line, rejected) == ("bioasq_yesno", 3, [])
    assert found.not_chosen == {"not_yes_or_no": 1}


@pytest.mark.parametrize("as_array", [False, True])
def test_instructions_are_read_with_their_input_and_response(as_array: bool, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Choose.", "input": "A or B?", "output": "A", "sample_id": 12},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
    ]
    path = tmp_path / "train.json"
    write_jsonl(path, rows)
    if as_array:
        path.write_text(json.dumps(rows, indent=2))
    assert questions(path) == [
        Question("12", "Choose.", (), None, ("A or B?",), "A"),
        Question("2", "Greet.", (), None, (), "Hello."),
    ]


def test_datasets_on_disk_are_read_by_split_and_their_labels_count_from_0(tmp_path: Path) -> None:
    rows = {"id": ["x", "y"], "question": ["Q?", "R?"], "opa": ["1", "5"], "opb": ["2", "6"]}
    rows |= {"opc": ["3", "7"], "opd": ["4", "8"], "cop": [1, -1]}
    label = datasets.ClassLabel(names=["a", "b", "c", "d"])
    texts = {name: datasets.Value("string") for name in rows if name != "cop"}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({**texts, "cop": label}))
    abstract = {"contexts": ["We asked."], "labels": ["AIM"]}
    pqa = {"pubid": [7], "question": ["Is it?"], "context": [abstract], "long_answer": ["Yes."]}
    pubmedqa = datasets.Dataset.from_dict({**pqa, "final_decision": ["yes"]})
    datasets.DatasetDict({"validation": made, "test": pubmedqa}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "repository" / "data").mkdir(parents=True)
    made.to_parquet(str(tmp_path / "repository" / "data" / "validation-00000-of-00001.parquet"))
    wanted = [Question("x", "Q?", ("1", "2", "3", "4"), 1), Question("y", "R?", ("5", "6", "7", "8"), None)]
    placed, _ = read(tmp_path / "saved")
    assert [one.question for one in placed] == [
        Question("7", "Is it?", ("yes", "no", "maybe"), 0, ("We asked.",), "Yes."),
        *wanted,
    ]
    assert [one.split for one in placed] == ["test", "dev", "dev"]
    placed, _ = read(tmp_path / "repository")
    assert [one.question for one in placed] == wanted
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no Hugging Face dataset"):
        read(tmp_path / "empty")


BAD: Sequence[tuple[object, str]] = (
    (medqa(options={**OPTIONS, "C": " "}), "missing_option"),
    (medqa(options={key: OPTIONS[key] for key in "ABD"}), "missing_option"),
    (medqa(answer_idx="E"), "answer_out_of_range"),
    (medqa(answer="surgery"), "answer_disagrees"),
    (medqa(question=" \n"), "empty_text"),
    (medqa(question=None), "missing_field"),
    (medqa(question=["x"]), "wrong_type"),
    (medqa(question="a\ud800b"), "not_unicode"),
    (medmcqa(1, 5), "answer_out_of_range"),
    (medmcqa(1, 1, opc=None), "missing_option"),
    ({"sent1": "Q?", "ending0": "a", "ending1": "b", "label": 2}, "answer_out_of_range"),
    ({"sent1": "Q?", "ending0": "a", "ending2": "b", "label": 0}, "missing_option"),
    ({**ABSTRACT, "final_decision": "perhaps"}, "answer_out_of_range"),
    ({**ABSTRACT, "CONTEXTS": "We asked."}, "wrong_type"),
    ({"instruction": "Greet.", "output": ""}, "empty_text"),
    ({"text": "A paper."}, "unknown_form"),
    (["a", "list"], "wrong_structure"),
)


def test_bad_questions_are_named_by_line_and_reason_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(medmcqa(0, 4)), '{"question": "cut', *(json.dumps(record) for record, _ in BAD)]
    path.write_text("\n".join([*lines, json.dumps(medqa())]) + "\n")
    placed, rejected = read(path)
    assert [one.line for one in placed] == [1, len(lines) + 1]
    assert [(one.file, one.line, one.reason) for one in rejected] == [
        ("train.jsonl", line, reason)
        for line, reason in enumerate(["not_json", *(r for _, r in BAD)], start=2)
    ]
    csv = tmp_path / "anatomy_test.csv"
    csv.write_text("Q?,a,b,c,d,E\nQ?,a,b\nQ?,a,,c,d,A\n,a,b,c,d,A\nQ?,a,b,c,d,A\n")
    placed, rejected = read(csv)
    assert [(one.line, one.reason) for one in rejected] == [
        (1, "answer_out_of_range"),
        (2, "missing_option"),
        (3, "missing_option"),
        (4, "empty_text"),
    ]
    assert [one.line for one in placed] == [5]


@pytest.mark.parametrize("content", ['{"1": {"QUESTION": "Q?"}, "2', "[{}, {", '{\n "1": 5', "<html>"])
def test_a_file_that_is_cut_short_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(UserError, match=r"test\.json are cut short or damaged.*copy the file again"):
        read(tmp_path / "test.json")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("phrases_no_exclude_train", "train"),
        ("medmcqa_dev_first2000", "dev"),
        ("validation-00000-of-00001", "dev"),
        ("anatomy_val", "dev"),
        ("test_set", "test"),
        ("ori_pqal", None),
        ("train_test", None),
        ("latest", None),
    ],
)
def test_the_split_is_a_word_of_the_name_and_not_guessed(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count", "answers"),
    [
        # Answers as counted by their letters in the published files.
        ("pubmedqa_ori_pqal.json", 1000, [552, 338, 110]),
        ("medmcqa_dev_first2000.json", 2000, [637, 525, 445, 393]),
        ("medqa_usmle_4opt_dev.jsonl", 1272, [330, 316, 352, 274]),
    ],
)
def test_the_published_files_are_read_whole(name: str, count: int, answers: list[int], shared: Path) -> None:
    source = find_sources([f"dev={shared / 'qa' / name}"])[0]
    placed, rejected, found = read_source(source)
    assert (len(placed), rejected, found.questions) == (count, [], count)
    assert [sum(one.question.answer == place for one in placed) for place in range(len(answers))] == answers
