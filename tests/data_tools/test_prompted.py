"""A corpus of prompts: every question as a model will read it, none cut in silence, few among many."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.cli import main
from data_tools.corpus import Corpus, Split
from data_tools.errors import UserError
from data_tools.manifest import read_manifest
from data_tools.prompt_documents import NotUsable, PromptDocument, PromptRecipe, prompt_document
from data_tools.prompted import make_prompts
from data_tools.questions import Question
from data_tools.questions.build import build_questions
from data_tools.splits import array_file
from data_tools.tokenizer import Tokenizer
from data_tools.verify import verify
from tests.data_tools.prompt_corpora import DEV, TRAIN, prompts, questions, write_jsonl

MEDQA = ("medqa_4options",)
QUESTION = Question("q", "which gene", ("protein", "receptor"), 1, ("cells of the liver in serum",))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def corpus(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts(tmp_path_factory.mktemp("prompts"), tiny_tokenizer)


def documents(split: Split) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Of each document the tokens without loss and those with."""
    starts = split.starts
    tokens = split.read(list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)))
    answers = (split.loss_starts(starts[:-1]) - starts[:-1]).tolist()
    return [(one[:answer], one[answer:]) for one, answer in zip(tokens, answers, strict=True)]


def texts(directory: Path, split: str = "train") -> list[tuple[str, str]]:
    """Of each document the text without loss and that with."""
    corpus = Corpus.open(directory)
    decode = Tokenizer(corpus.tokenizer_path).decode
    return [(decode(prompt), decode(answer)) for prompt, answer in documents(corpus.split(split))]


# --- a document ---


def test_a_document_is_bos_prompt_answer_eos_in_the_ids_of_its_text_and_the_answer_begins_at_its_own_token(
    tokenizer: Tokenizer,
) -> None:
    document = prompt_document(QUESTION, "plain", tokenizer, 500)
    assert isinstance(document, PromptDocument)
    assert document.text.endswith("Answer: B")
    assert document.tokens[0] == tokenizer.bos
    assert np.array_equal(document.tokens[1:], tokenizer.encode_document(document.text))
    assert tokenizer.decode(document.tokens[: document.answer]) == document.text.removesuffix(" B")
    assert tokenizer.decode(document.tokens[document.answer :]).strip() == "B"


def test_a_longer_question_is_left_out_or_loses_no_more_of_its_context_than_it_must(
    tokenizer: Tokenizer,
) -> None:
    whole = prompt_document(QUESTION, "plain", tokenizer, 500)
    assert isinstance(whole, PromptDocument)
    size = len(whole.tokens)
    assert isinstance(prompt_document(QUESTION, "plain", tokenizer, size), PromptDocument)
    too_long = prompt_document(QUESTION, "plain", tokenizer, size - 1)
    assert too_long == NotUsable("too_long", f"{size} tokens, at most {size - 1}", size)
    cut = prompt_document(QUESTION, "plain", tokenizer, size - 1, cut_context=True)
    assert isinstance(cut, PromptDocument)
    assert 0 < cut.cut <= 2
    assert len(cut.tokens) < size
    kept = " ".join(["cells", "of", "the", "liver", "in", "serum"][: -cut.cut])
    assert cut.text == whole.text.replace("cells of the liver in serum", kept)
    bare = prompt_document(QUESTION, "plain", tokenizer, 20, cut_context=True)
    assert isinstance(bare, NotUsable)


def test_a_question_without_an_answer_makes_no_document(tokenizer: Tokenizer) -> None:
    found = prompt_document(replace(QUESTION, answer=None), "plain", tokenizer, 500)
    assert isinstance(found, NotUsable)
    assert found.reason == "no_answer"


# --- a corpus ---


def test_the_corpus_has_the_train_questions_to_train_on_and_the_dev_questions_held_out(corpus: Path) -> None:
    for split, number in (("train", TRAIN), ("heldout", DEV)):
        found = texts(corpus, split)
        assert len(found) == number
        assert all(prompt.startswith("You are a doctor.") for prompt, _ in found)
        assert all(prompt.endswith("The Answer is:") for prompt, _ in found)
        assert {answer.strip() for _, answer in found} == set("ABCD")
    opened = Corpus.open(corpus)
    assert all(answer[-1] == opened.eod for _, answer in documents(opened.split("train")))
    narrow = opened.split("train").only(np.array([3, 17, 40]))
    assert [a.tolist() for _, a in documents(narrow)] == [
        documents(opened.split("train"))[n][1].tolist() for n in (3, 17, 40)
    ]


def test_it_is_verified_and_inspected_like_any_corpus(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify(corpus)
    assert (found.documents, found.same_text) == (TRAIN + DEV, found.samples)
    assert main(["inspect", str(corpus), "--document", str(TRAIN)]) == 0
    shown = capsys.readouterr().out
    assert "medqa_4options.dev.jsonl:1" in shown
    assert "heldout" in shown
    assert main(["finalize", str(corpus)]) == 2
    assert "is of prompts" in capsys.readouterr().err


def test_a_damaged_loss_start_is_found(tiny_tokenizer: Path, tmp_path: Path) -> None:
    corpus = prompts(tmp_path, tiny_tokenizer)
    path = corpus / "loss_starts.npy"
    starts = np.load(path)
    path.write_bytes(array_file(np.append(starts[1:], starts[-1])))
    with pytest.raises(UserError, match="checksum"):
        verify(corpus)
    path.write_bytes(array_file(starts[1:]))
    with pytest.raises(UserError, match=r"loss_starts\.npy is damaged"):
        Corpus.open(corpus)


def test_the_fingerprint_tells_where_the_loss_is(asked: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    recipes = [PromptRecipe("plain", MEDQA, loss="answer"), PromptRecipe("plain", MEDQA, loss="all")]
    made = [make_prompts(asked, tiny_tokenizer, tmp_path / recipe.loss, recipe) for recipe in recipes]
    again = make_prompts(asked, tiny_tokenizer, tmp_path / "again", recipes[0])
    assert made[0].parts[0].files["bin"] == made[1].parts[0].files["bin"]
    assert made[0].fingerprint == again.fingerprint != made[1].fingerprint


def test_long_questions_are_counted_and_handled_as_asked(
    asked: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    recipe = PromptRecipe("plain", ("pubmedqa",), max_tokens=300)
    dropped = make_prompts(asked, tiny_tokenizer, tmp_path / "drop", recipe)
    left_out = dropped.counts.left_out["too_long"]
    assert 0 < left_out < 12
    assert dropped.counts.kept == 12 - left_out
    lines = (tmp_path / "drop" / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == left_out
    assert json.loads(lines[0])["file"] == "pubmedqa.train.jsonl"
    with pytest.raises(UserError, match=rf"{left_out} of 12 questions are longer than --max-tokens 300"):
        make_prompts(asked, tiny_tokenizer, tmp_path / "refuse", replace(recipe, overlong="refuse"))
    assert not (tmp_path / "refuse").exists()
    cut = make_prompts(asked, tiny_tokenizer, tmp_path / "cut", replace(recipe, overlong="cut_context"))
    assert cut.counts.kept == 12
    told = json.loads((tmp_path / "cut" / "prompts.json").read_text())
    assert told["splits"]["train"] == {"questions": 12, "documents": 12, "context_cut": left_out}
    lengths = np.diff(Corpus.open(tmp_path / "cut").split("train").starts)
    assert lengths.max() <= 300
    assert verify(tmp_path / "cut").documents == 12


def test_fewer_examples_of_a_seed_are_among_more_and_other_seeds_draw_others(
    asked: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    def drawn(name: str, **which: Any) -> set[tuple[str, str]]:
        make_prompts(asked, tiny_tokenizer, tmp_path / name, PromptRecipe("plain", max_tokens=300, **which))
        return set(texts(tmp_path / name))

    few, more = drawn("few", number=10, seed=4), drawn("more", number=25, seed=4)
    assert (len(few), len(more)) == (10, 25)
    assert few < more
    assert drawn("share", fraction=0.5, seed=4) > more
    assert drawn("other", number=10, seed=5) != few
    medqa = drawn("medqa", sets=MEDQA, number=40, seed=4)
    assert {one for one in more if "Abstract" not in one[0]} <= medqa
    assert read_manifest(tmp_path / "few").splits["heldout"].documents == DEV
    with pytest.raises(UserError, match=r"1,000 questions are asked for, but of 72 only \d+ can be used"):
        drawn("too_many", number=1000)


def test_instructions_are_trained_on_by_their_responses(tiny_tokenizer: Path, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"instruction": "name a gene", "input": "of the liver", "output": "insulin receptor"},
        {"instruction": "name a drug", "input": "", "output": "placebo"},
    ]
    path = write_jsonl(tmp_path / "train.jsonl", records)
    build_questions([str(path)], tmp_path / "questions")
    make_prompts(tmp_path / "questions", tiny_tokenizer, tmp_path / "corpus", PromptRecipe("alpaca"))
    (first, said), (_, then) = texts(tmp_path / "corpus")
    assert "of the liver" in first
    assert first.endswith("### Response:")
    assert (said, then) == ("insulin receptor", "placebo")
    assert verify(tmp_path / "corpus").same_text == 2


# --- the command ---


def test_the_command_makes_a_corpus_and_shows_a_prompt_with_what_is_trained_on(
    asked: Path, tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["prompts", "--questions", str(asked), "--tokenizer", str(tiny_tokenizer), "--prompt", "plain"]
    assert main([*common, "--sets", "medqa_4options", "--show-prompt", "2"]) == 0
    shown = capsys.readouterr().out
    assert "medqa_4options.train.jsonl:3, id q2" in shown
    assert "' C<EOS>'" in shown
    assert main([*common, "--output", str(tmp_path / "corpus"), "--number", "7"]) == 0
    assert "kept" in capsys.readouterr().out
    assert read_manifest(tmp_path / "corpus").splits["train"].documents == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sets", "mmlu"], "have no mmlu.train"),
        (["--number", "0"], "--number is 0"),
        (["--fraction", "1.5"], "--fraction is 1.5"),
        (["--max-tokens", "1"], "--max-tokens is 1"),
        (["--prompt", "none"], "no prompt 'none'"),
        (["--prompt", "alpaca"], "does not fit"),
        (["--max-tokens", "9"], "No question is left to train on"),
        (["--show-prompt", "99"], "no training question 99"),
        (["--tokenizer", "nowhere"], "cannot be read"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence_and_nothing_is_left(
    asked: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    common = ["--questions", str(asked), "--tokenizer", str(tiny_tokenizer), "--prompt", "plain"]
    assert main(["prompts", *common, "--output", str(tmp_path / "corpus"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
