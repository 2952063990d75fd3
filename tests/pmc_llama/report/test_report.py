"""`pmc-llama report`: one table of models by sets, beside what was published."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from data_tools.build import build
from data_tools.errors import UserError
from data_tools.recipe import Decisions, Measures, Recipe
from pmc_llama.cli import main
from pmc_llama.evaluate.results import FORMAT, VERSION, Answer, Scores, SetScore, Setting
from pmc_llama.report.command import report
from pmc_llama.report.significance import mcnemar, wilson
from tests.data_tools.sources import prose, simple_article

N = 40


def answers(right: Sequence[bool], invalid: int = 0) -> tuple[Answer, ...]:
    """Answers A to questions of which those given as right are; the last wrong ones are invalid."""
    wrong = [number for number, one in enumerate(right) if not one]
    none = set(wrong[len(wrong) - invalid :])
    return tuple(
        Answer(f"q{number}", 0 if one else 1, None if number in none else 0, 50)
        for number, one in enumerate(right)
    )


def score(name: str, given: tuple[Answer, ...], checksum: str = "same") -> SetScore:
    split = "dev" if name == "medmcqa" else "test"
    return SetScore(name, split, checksum, 0.3, 0, 0, given)


def write(path: Path, name: str, sets: Sequence[SetScore], setting: Setting | None = "full") -> Path:
    scores = Scores(
        format=FORMAT,
        version=VERSION,
        name=name,
        setting=setting,
        model=f"models/{name}",
        weights=f"models/{name}",
        adapter=None,
        questions="questions",
        fingerprint="0" * 32,
        prompt="pmc-llama",
        method="generated",
        dtype="fp32",
        device="cpu",
        ranks=1,
        batch_size=8,
        seconds=1.0,
        versions={},
        sets=tuple(sets),
    )
    path.write_bytes(msgspec.json.encode({"scores": scores}))
    return path


FIRST = [number % 2 == 0 for number in range(N)]
SECOND = [number % 2 == 0 or number % 5 == 1 for number in range(N)]


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    medmcqa = score("medmcqa", answers([True] * 10))
    first = write(tmp_path / "1.json", "first", [score("medqa_4options", answers(FIRST, 3)), medmcqa])
    second = write(
        tmp_path / "2.json", "second", [score("medqa_4options", answers(SECOND))], "data-efficient"
    )
    return [str(first), str(second)]


def test_every_form_has_the_same_figures(
    results: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *results, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    data = json.loads((out / "report.json").read_text())
    with (out / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    markdown = (out / "report.md").read_text()
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    row, interval = data["rows"][0], wilson(20, N)
    assert (row["accuracy"]["share"], row["invalid"], row["majority"]) == (0.5, 3, 0.3)
    assert row["accuracy"]["interval"] == {"low": interval.low, "high": interval.high}
    assert (float(lines[0]["accuracy"]), float(lines[0]["low"])) == (0.5, interval.low)
    assert [line["set"] for line in lines] == ["medqa_4options", "medmcqa", "medqa_4options"]
    cell = f"50.00 ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    assert cell in markdown
    assert cell in said
    assert "second - first, points" in said  # in a file or pipe, tables are not folded


def test_published_figures_stand_by_the_setting_they_are_of(results: list[str], tmp_path: Path) -> None:
    report([*results, "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert rows[0]["published"] == {"LLaMA-7B": 0.4455, "PMC-LLaMA-7B": 0.447}
    assert rows[1]["published"] == {"LLaMA-7B": 0.4815, "PMC-LLaMA-7B": 0.5054}
    assert rows[2]["published"] == {"LLaMA-7B": 0.3566, "PMC-LLaMA-7B": 0.4061}
    table = (tmp_path / "out" / "report.md").read_text().splitlines()
    begin = table.index("| full fine-tuning |  |  |")
    assert table[begin + 1].startswith("| first |")
    assert table[begin + 2 : begin + 4] == [
        "| LLaMA-7B, published | 44.55 | 48.15 |",
        "| PMC-LLaMA-7B, published | 44.70 | 50.54 |",
    ]


def test_figures_published_for_another_split_are_not_put_beside(tmp_path: Path) -> None:
    dev = msgspec.structs.replace(score("medqa_4options", answers(FIRST)), split="dev")
    report([str(write(tmp_path / "1.json", "first", [dev])), "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert row["published"] == {}
    assert "published |" not in (tmp_path / "out" / "report.md").read_text()


def test_two_models_are_compared_on_the_questions_that_both_were_asked(
    results: list[str], tmp_path: Path
) -> None:
    report([*results, "--output", str(tmp_path / "out")])
    (pair,) = json.loads((tmp_path / "out" / "report.json").read_text())["pairs"]
    wanted = mcnemar(FIRST, SECOND)
    assert (pair["set"], pair["first"], pair["second"]) == ("medqa_4options", "first", "second")
    assert (pair["test"]["p"], pair["test"]["only_second"]) == (wanted.p, wanted.only_second)
    assert wanted.only_second > 0


def test_answers_to_other_questions_are_not_paired(results: list[str], tmp_path: Path) -> None:
    other = write(tmp_path / "3.json", "third", [score("medqa_4options", answers(SECOND), "other")])
    report([results[0], str(other), "--output", str(tmp_path / "out")])
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["pairs"] == []
    assert any("other questions" in note for note in data["notes"])


def test_results_of_one_name_can_be_told_apart(results: list[str], tmp_path: Path) -> None:
    report([results[0], results[0], "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert len({row["label"] for row in rows}) == 2


def test_the_score_without_questions_in_the_corpus_is_told(tiny_tokenizer: Path, tmp_path: Path) -> None:
    questions: list[dict[str, Any]] = [
        {
            "id": f"q{number}",
            "question": prose(700 + number, 20),
            "options": {letter: prose(9000 + 4 * number + place, 2) for place, letter in enumerate("ABCD")},
            "answer_idx": "A",
        }
        for number in range(N)
    ]
    (tmp_path / "medqa.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in questions))
    papers = tmp_path / "papers"
    papers.mkdir()
    for number in range(4):  # the first four questions stand in a paper each
        article = simple_article(number, words=30)
        planted = article.replace("</p>", f" {questions[number]['question']}</p>", 1)
        (papers / f"PMC{number}.xml").write_text(planted)
    recipe = Recipe(
        measures=Measures(test_sets={"medqa_4options": str(tmp_path / "medqa.jsonl")}),
        decisions=Decisions(heldout=0),
    )
    build([papers], tiny_tokenizer, tmp_path / "corpus", recipe, workers=1)
    result = write(tmp_path / "1.json", "first", [score("medqa_4options", answers(FIRST))])
    report([str(result), "--corpus", str(tmp_path / "corpus"), "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert row["clean"]["overlapping"] == 4
    rest = FIRST[4:]
    assert (row["clean"]["accuracy"]["right"], row["clean"]["accuracy"]["questions"]) == (
        sum(rest),
        len(rest),
    )


def test_what_cannot_be_reported_is_one_sentence(
    results: list[str], tiny_corpus: Path, tmp_path: Path
) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(UserError) as caught:
            report(list(options))
        return str(caught.value)

    assert "cannot be read" in refused(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"perplexity": {}}')
    assert "holds no scores" in refused(str(tmp_path / "bad.json"))
    later = json.loads(Path(results[0]).read_text())
    later["scores"]["version"] = VERSION + 1
    (tmp_path / "later.json").write_text(json.dumps(later))
    assert f"expected {FORMAT} {VERSION}" in refused(str(tmp_path / "later.json"))
    assert "looked for no questions" in refused(results[0], "--corpus", str(tiny_corpus))
    assert "--help" in refused()
