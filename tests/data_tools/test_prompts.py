"""Prompts are the published ones, letter for letter, and say which part of them is the answer."""

import pytest

from data_tools.errors import UserError
from data_tools.prompts import TEMPLATES, Segment, make_prompt
from data_tools.questions import Question

CASE = Question("1", "What is next?", ("aspirin", "rest", "surgery", "none"), 2)
ABSTRACT = Question("2", "Does it help?", ("yes", "no", "maybe"), 0, ("We asked.", "We saw."), "It does.")
INSTRUCTION = Question("3", "Choose.", (), None, ("A or B?",), "A")


def test_the_papers_prompt_is_that_of_its_authors_data() -> None:
    found = make_prompt(CASE, "pmc-llama")
    assert found.context == (
        "You are a doctor. According to the question, make a choice. Q: What is next? A: aspirin B: rest "
        "C: surgery D: none The Answer is:"
    )
    assert found.answers == (" A", " B", " C", " D")
    assert make_prompt(ABSTRACT, "pmc-llama").context == (
        "You are a doctor. According to the question, make a choice. We asked. We saw. Q: Does it help? "
        "A: yes B: no C: maybe The Answer is:"
    )


def test_the_plain_prompt_has_letters_for_options_and_words_for_yes_and_no() -> None:
    found = make_prompt(CASE, "plain")
    assert found.context == "Question: What is next?\nA. aspirin\nB. rest\nC. surgery\nD. none\nAnswer:"
    assert (found.answers, found.right) == ((" A", " B", " C", " D"), 2)
    found = make_prompt(ABSTRACT, "plain")
    assert found.context == "Abstract: We asked.\nWe saw.\nQuestion: Does it help?\nAnswer:"
    assert (found.answers, found.right) == ((" yes", " no", " maybe"), 0)


def test_instructions_have_the_prompt_that_the_13b_model_was_tuned_with() -> None:
    found = make_prompt(INSTRUCTION, "alpaca")
    assert found.context.startswith("Below is an instruction that describes a task, paired with an input")
    assert found.context.endswith("\n\n### Instruction:\nChoose.\n\n### Input:\nA or B?\n\n### Response:")
    assert found.segments[1] == Segment("answer", "A")
    bare = make_prompt(Question("3", "Greet.", (), None, (), "Hello."), "alpaca")
    assert bare.context.endswith("completes the request.\n\n### Instruction:\nGreet.\n\n### Response:")
    assert "Input" not in bare.context


@pytest.mark.parametrize("prompt", TEMPLATES)
def test_the_segments_are_the_text_to_train_on_and_the_last_is_the_right_answer(prompt: str) -> None:
    for question in (CASE, ABSTRACT) if prompt != "alpaca" else (INSTRUCTION,):
        found = make_prompt(question, prompt)
        context, answer = found.segments
        assert (context.kind, context.text) == ("context", found.context)
        assert found.right is not None
        assert (answer.kind, answer.text) == ("answer", found.answers[found.right])
        assert context.text == context.text.rstrip()
        assert len(found.answers) == max(len(question.options), 1)


def test_a_question_without_answer_has_no_segment_to_learn() -> None:
    found = make_prompt(Question("1", "What?", ("a", "b"), None), "plain")
    assert [segment.kind for segment in found.segments] == ["context"]
    assert found.answers == (" A", " B")


def test_the_right_answer_is_not_in_what_is_given() -> None:
    """PubMedQA's conclusion holds its answer."""
    for prompt in ("plain", "pmc-llama"):
        assert ABSTRACT.conclusion not in make_prompt(ABSTRACT, prompt).context


@pytest.mark.parametrize(
    ("question", "prompt", "message"),
    [
        (CASE, "plane", "no prompt 'plane'; expected one of pmc-llama, plain, alpaca"),
        (CASE, "alpaca", "does not fit 1, a question with options; expected pmc-llama or plain"),
        (INSTRUCTION, "plain", "does not fit 3, an instruction; expected alpaca"),
    ],
)
def test_a_prompt_that_is_not_there_or_does_not_fit_is_one_sentence(
    question: Question, prompt: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_prompt(question, prompt)
