"""Questions of made-up words, and corpora of prompts made of them by the real tools."""

import json
from pathlib import Path

from data_tools.prompt_documents import PromptRecipe
from data_tools.prompted import make_prompts
from data_tools.questions.build import build_questions
from tests.data_tools.sources import prose

TRAIN, DEV = 60, 11


def medqa(number: int) -> dict[str, object]:
    """A question as MedQA has them, longer with its number."""
    options = {letter: prose(1000 + 4 * number + place, 2) for place, letter in enumerate("ABCD")}
    right = "ABCD"[number % 4]
    return {
        "question": prose(number, 4 + number % 23),
        "options": options,
        "answer_idx": right,
        "answer": options[right],
        "id": f"q{number}",
    }


def pubmedqa(number: int, words: int) -> dict[str, object]:
    """A question as PubMedQA has them, with an abstract of two paragraphs of so many words each."""
    return {
        "pubid": 9000 + number,
        "question": prose(3000 + number, 7),
        "context": {"contexts": [prose(4000 + number, words), prose(5000 + number, words)]},
        "long_answer": prose(6000 + number, 5),
        "final_decision": ("yes", "no", "maybe")[number % 3],
    }


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def questions(directory: Path) -> Path:
    """60 questions of MedQA to train on and 11 to hold out, and 12 of PubMedQA with ever longer contexts."""
    sources = directory / "sources"
    sources.mkdir(parents=True)
    write_jsonl(sources / "medqa_train.jsonl", [medqa(number) for number in range(TRAIN)])
    write_jsonl(sources / "medqa_dev.jsonl", [medqa(number) for number in range(500, 500 + DEV)])
    write_jsonl(sources / "pubmedqa_train.jsonl", [pubmedqa(number, 5 + 8 * number) for number in range(12)])
    build_questions([str(path) for path in sorted(sources.iterdir())], directory / "questions")
    return directory / "questions"


def prompts(directory: Path, tokenizer: Path, recipe: PromptRecipe | None = None) -> Path:
    """A corpus of the MedQA questions, or as the recipe says, in `directory / "prompts"`."""
    recipe = recipe or PromptRecipe("pmc-llama", ("medqa_4options",))
    make_prompts(questions(directory), tokenizer, directory / "prompts", recipe)
    return directory / "prompts"
