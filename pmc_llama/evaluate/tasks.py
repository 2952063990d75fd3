"""Questions as tasks of lm-evaluation-harness: prompts and answers by our templates, data from our files.

A task is made of a dictionary of the keys that lm-eval's YAML files have. Its data is given in memory, so
nothing is looked for on a hub.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from data_tools.prompts import Prompt
from pmc_llama.evaluate.results import Method

NEW_TOKENS = 16
"""That an answer may have: a letter or a word, and white space or a bracket around it."""
_AROUND = " \t\n\"'*(["
_LETTER_ENDS = re.compile(r"\s*$|\s*\n|[^\w\s]")
_WORD_ENDS = re.compile(r"$|\W")


def make_task(name: str, prompts: Sequence[Prompt], method: Method) -> ConfigurableTask:
    """A task of lm-eval.

    Under `likelihood` the option with the most likely continuation of the prompt is the answer, as in
    lm-eval's own medqa_4options, medmcqa and pubmedqa; under `generated` it is read by `chosen`.

    Args:
        name: of the task.
        prompts: at least one, each with its right answer.
        method: how an answer is had.
    """
    rows = datasets.Dataset.from_list([asdict(prompt) for prompt in prompts])
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "doc_to_text": lambda row: row["context"],
        "metric_list": [metric],
        "num_fewshot": 0,
    }
    if method == "likelihood":
        config |= {
            "output_type": "multiple_choice",
            "doc_to_target": lambda row: row["right"],
            "doc_to_choice": lambda row: list(row["answers"]),
            "target_delimiter": "",  # our answers begin with their space
        }
    else:
        config |= {
            "output_type": "generate_until",
            "doc_to_target": lambda row: row["answers"][row["right"]],
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
            "process_results": _judge,
        }
    return ConfigurableTask(config=config)


def chosen(generated: str, answers: Sequence[str]) -> int | None:
    """The option that a generated text begins with, or None: then the answer is invalid.

    Quotes, brackets and white space before it are passed over. A letter has to stand alone or before a
    punctuation mark, so that "A patient" is no A; a word, such as yes, in any case, may begin a sentence.

    Args:
        generated: after the prompt.
        answers: of the prompt, in the options' order.
    """
    text = generated.lstrip(_AROUND)
    for place, answer in enumerate(answer.strip() for answer in answers):
        letter = len(answer) == 1
        head, rest = text[: len(answer)], text[len(answer) :]
        same = head == answer if letter else head.lower() == answer.lower()
        if same and (_LETTER_ENDS if letter else _WORD_ENDS).match(rest):
            return place
    return None


def _judge(row: dict[str, Any], generated: Sequence[str]) -> dict[str, float]:
    return {"acc": float(chosen(generated[0], row["answers"]) == row["right"])}
