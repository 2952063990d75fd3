"""Test questions are found in a document that holds them and in no other, in every published layout."""

import csv
import json
import re
from pathlib import Path

import pytest

from data_tools.build import build
from data_tools.contamination import MOST_QUESTIONS, TestSets
from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.finalize import decide_again
from data_tools.measures import Measurer
from data_tools.question_table import read_question_table
from data_tools.questions import Question, read_questions
from data_tools.recipe import Decisions, Measures, Recipe
from data_tools.stats import statistics
from data_tools.words import word_hashes
from tests.data_tools.sources import prose, simple_record, write_jsonl

LONG = "A 34-year-old woman has had fever and joint pain for six days after travel abroad; what is next?"
SHORT = "Which nerve supplies the skin over the lateral forearm?"
TINY = "Drug of choice?"
OPTIONS = {"A": "aspirin", "B": "rest", "C": "surgery", "D": "none of these"}


def medqa(path: Path, *questions: str) -> Path:
    return write_jsonl(
        path,
        [{"question": one, "options": OPTIONS, "answer_idx": "B"} for one in questions],
    )


def overlaps(sets: TestSets, text: str) -> tuple[int, ...]:
    return sets.overlaps(word_hashes(text))


def test_every_published_layout_is_read(tmp_path: Path) -> None:
    five = {**OPTIONS, "E": "all"}
    rows = [
        {"question": LONG, "options": five, "answer_idx": "E"},
        {
            "question": LONG,
            "options": [{"key": k, "value": v} for k, v in OPTIONS.items()],
            "answer_idx": "A",
        },
        {"id": "d1", "sent1": LONG, "sent2": "", "ending0": "x", "ending1": "y", "label": 1},
        {
            "id": "m1",
            "question": SHORT,
            "opa": "a",
            "opb": "b",
            "opc": "c",
            "opd": "d",
            "cop": 4,
            "exp": None,
        },
        {"id": "m2", "question": SHORT, "opa": "a", "opb": "b", "opc": "c", "opd": "d"},
    ]
    abc = tuple(OPTIONS.values())
    assert read_questions(write_jsonl(tmp_path / "q.json", rows)) == [
        Question("1", LONG, (*abc, "all"), 4),
        Question("2", LONG, abc, 0),
        Question("d1", LONG, ("x", "y"), 1),
        Question("m1", SHORT, ("a", "b", "c", "d"), 3),
        Question("m2", SHORT, ("a", "b", "c", "d"), None),
    ]
    record = {"QUESTION": "Q?", "CONTEXTS": ["c"], "LONG_ANSWER": "L.", "final_decision": "maybe"}
    for indent in (None, 4):
        (tmp_path / "p.json").write_text(json.dumps({"123": record}, indent=indent))
        found = read_questions(tmp_path / "p.json")
        assert found == [Question("123", "Q?", ("yes", "no", "maybe"), 2, ("c",), "L.")]
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerow(['Of these, "which"\nis first?', "a", "b", "c", "d", "C"])
    found = read_questions(tmp_path / "m.csv")
    assert found == [Question("1", 'Of these, "which"\nis first?', ("a", "b", "c", "d"), 2)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"question": "x"}\n', "Question 1 of .* is in no known form"),
        ("a.json", '{"question": "x", "options": {"A": "a", "B": "b"}}\nbroken\n', "Question 2 of"),
        ("a.json", "", "holds no question"),
        ("a.json", "{}", "holds no question"),
        ("a.csv", "only,three,fields\n", "Question 1 of"),
    ],
)
def test_a_file_of_no_known_layout_is_one_sentence(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        TestSets({"missing": str(tmp_path / "missing.json")})


def test_a_line_separator_inside_a_question_does_not_cut_its_line(tmp_path: Path) -> None:
    odd = "Which of these\u2028is the \u0085first?"
    row = {"question": odd, "options": OPTIONS, "answer_idx": "A"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "q.csv").write_text(f"{odd},a,b,c,d,A\n", encoding="utf-8")
    for name in ("q.jsonl", "q.csv"):
        assert [question.question for question in read_questions(tmp_path / name)] == [odd]


def test_planted_questions_are_found_and_nothing_else(tmp_path: Path) -> None:
    sets = TestSets({"medqa": str(medqa(tmp_path / "q.jsonl", LONG, SHORT, TINY))})
    around = prose(1, 500), prose(2, 500)
    assert overlaps(sets, " ".join(around)) == ()
    assert overlaps(sets, f"{around[0]} {LONG} {around[1]}") == (0,)
    assert overlaps(sets, f"{around[0]} {LONG.upper().replace(' ', chr(10))}") == (0,)
    assert overlaps(sets, f"{SHORT} {LONG}") == (0, 1)
    assert overlaps(sets, " ".join(LONG.split()[:10])) == ()  # 34-year-old is three words
    assert overlaps(sets, " ".join(LONG.split()[-12:])) == ()
    assert overlaps(sets, " ".join(LONG.split()[1:12])) == (0,)
    assert overlaps(sets, " ".join(SHORT.split()[:-1])) == ()
    assert overlaps(sets, f"{TINY} {' '.join(OPTIONS.values())}") == (2,)
    assert overlaps(sets, "") == ()


def test_a_question_with_too_few_words_is_counted_as_not_matched(tmp_path: Path) -> None:
    row = {"question": "Best drug?", "options": {"A": "a", "B": "b"}}
    sets = TestSets(
        {"s": str(write_jsonl(tmp_path / "q.jsonl", [row])), "r": str(medqa(tmp_path / "r", LONG))}
    )
    assert [(one.set, one.matched) for one in sets.questions] == [("r", True), ("s", False)]


def test_a_phrase_of_many_questions_proves_nothing(tmp_path: Path) -> None:
    phrase = "which of the following is the most likely cause of the findings in this patient"
    questions = [f"{prose(number, 20)} {phrase}" for number in range(MOST_QUESTIONS + 1)]
    sets = TestSets({"many": str(medqa(tmp_path / "many.jsonl", *questions))})
    assert overlaps(sets, f"{prose(99, 50)} Then: {phrase}, again {prose(98, 50)}") == ()
    assert 3 in overlaps(sets, questions[3])
    fewer = TestSets({"few": str(medqa(tmp_path / "few.jsonl", *questions[:MOST_QUESTIONS]))})
    assert overlaps(fewer, phrase) == tuple(range(MOST_QUESTIONS))


def test_of_pubmedqa_the_question_and_the_conclusion_count_and_the_contexts_do_not(tmp_path: Path) -> None:
    context, conclusion = prose(5, 40), prose(6, 40)
    record = {"QUESTION": SHORT, "CONTEXTS": [context], "LONG_ANSWER": conclusion, "final_decision": "no"}
    (tmp_path / "p.json").write_text(json.dumps({"9": record}))
    sets = TestSets({"pubmedqa": str(tmp_path / "p.json")})
    assert overlaps(sets, context) == ()
    assert overlaps(sets, conclusion) == overlaps(sets, SHORT) == (0,)


def test_what_a_part_was_made_with_changes_with_the_questions_and_not_with_their_place(
    tmp_path: Path,
) -> None:
    paths = [medqa(tmp_path / name, *questions) for name, questions in (("a", [LONG]), ("b", [LONG, SHORT]))]
    moved = tmp_path / "moved"
    moved.write_bytes(paths[0].read_bytes())
    first, second, third = (
        Measurer(Measures(test_sets={"s": str(path)})).identity for path in (paths[0], paths[1], moved)
    )
    assert first == third != second


def test_a_moved_question_file_makes_the_same_corpus_and_no_path_is_in_it(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [simple_record(number) for number in range(5)])
    written = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        measures = Measures(test_sets={"medqa": str(medqa(tmp_path / name / f"{name}.jsonl", LONG))})
        build([source], tiny_tokenizer, tmp_path / name / "c", Recipe(measures=measures), 1)
        written.append((tmp_path / name / "c" / "corpus.json").read_bytes())
    assert written[0] == written[1]
    assert str(tmp_path).encode() not in written[0]
    build([source], tiny_tokenizer, tmp_path / "here" / "c", Recipe(measures=measures), 1)  # the same build


def test_a_corpus_says_which_questions_its_splits_overlap_and_leaves_out_what_is_decided(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    records = [simple_record(number) for number in range(20)]
    for number, question in ((4, LONG), (11, SHORT), (12, SHORT)):
        record = records[number]
        assert isinstance(record, dict)
        content = record["content"]
        place = content["text"].index("Results") - 1
        content["text"] = (
            content["text"][: place - len(question) - 1] + " " + question + content["text"][place:]
        )
    source = write_jsonl(tmp_path / "x.jsonl", records)
    questions = medqa(tmp_path / "q.jsonl", LONG, SHORT, prose(77, 30))
    measures = Measures(test_sets={"medqa": str(questions)})
    build(
        [source], tiny_tokenizer, tmp_path / "c", Recipe(measures=measures, decisions=Decisions(heldout=0)), 1
    )
    corpus = Corpus.open(tmp_path / "c")
    table = read_question_table(corpus.manifest.path(corpus.directory, "questions.parquet"))
    assert (table.documents.tolist(), table.train.tolist()) == ([1, 2, 0], [1, 2, 0])
    questions.unlink()  # nothing but the tables is needed from here on
    manifest = decide_again(tmp_path / "c", Decisions(contamination=1, heldout=0))
    assert manifest.counts.left_out == {"contaminated": 3}
    overlap = statistics(Corpus.open(tmp_path / "c")).overlaps["medqa"]
    assert (overlap.questions, overlap.overlapping, overlap.train, overlap.ids) == (3, 2, 0, [])
    decide_again(tmp_path / "c", Decisions(heldout=0))
    assert statistics(Corpus.open(tmp_path / "c")).overlaps["medqa"].ids == ["1", "2"]


@pytest.mark.shared
def test_the_published_sets_are_read_whole_and_nearly_all_can_be_matched(shared: Path) -> None:
    names = ("pubmedqa_ori_pqal.json", "medmcqa_dev_first2000.json", "medqa_usmle_4opt_dev.jsonl")
    sets = TestSets({name: str(shared / "qa" / name) for name in names})
    assert len(sets.questions) == 1000 + 2000 + 1272
    assert sum(not question.matched for question in sets.questions) < 10
    for name in names:
        found = read_questions(shared / "qa" / name)
        assert all(one.answer is not None and 0 <= one.answer < len(one.options) for one in found)


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["pubmedqa_ori_pqal.json", "medmcqa_dev_first2000.json", "medqa_usmle_4opt_dev.jsonl"]
)
def test_a_published_question_is_found_in_other_case_punctuation_and_lines(name: str, shared: Path) -> None:
    sets = TestSets({name: str(shared / "qa" / name)})
    for number, question in enumerate(read_questions(shared / "qa" / name)):
        if not sets.questions[number].matched or number % 5:
            continue
        text = " ".join((question.question, *question.options))
        # Capitals of other scripts are other words (`words.py`), so ASCII alone changes case.
        upper = re.sub("[a-z]", lambda letter: letter[0].upper(), text)
        for written in (text, upper, re.sub("[ ,.;:?]+", " \u2014\n", text)):
            assert number in overlaps(sets, f"{prose(1, 50)} {written} {prose(2, 50)}"), written
