"""A model's answers to questions, by lm-evaluation-harness, on any number of ranks.

Each rank has the whole model and every so-many-th question. The ranks' answers meet on rank 0.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from data_tools.errors import UserError
from data_tools.prompts import Prompt, PromptId, make_prompt
from data_tools.questions import Question
from data_tools.questions.written import QuestionSets
from pmc_llama.evaluate.results import Answer, Method, SetScore
from pmc_llama.evaluate.tasks import NEW_TOKENS, chosen, make_task
from pmc_llama.evaluate.weights import ModelSource
from pmc_llama.huggingface_tokenizer import write_tokenizer

_CPU_BATCH = 8


@dataclass(frozen=True)
class AskedSet:
    """The questions of one split of a set that have an answer.

    Attributes:
        set: its name.
        split: which.
        questions: to be asked.
        unanswerable: how many are not, since their right answer is not told.
        checksum: XXH3-128 of their file.
        majority: share of the most frequent right answer in the whole split.
    """

    set: str
    split: str
    questions: tuple[Question, ...]
    unanswerable: int
    checksum: str
    majority: float


def read_sets(
    found: QuestionSets, names: Sequence[str], split: str | None, limit: int | None
) -> list[AskedSet]:
    """The questions to ask.

    Args:
        found: a directory of questions.
        names: of the sets; all with options and a split to test on when empty.
        split: `test` or `dev`; of each set its test split, and dev where it has none, when None.
        limit: questions of each set at most, its first ones.

    Raises:
        UserError: there is no such set or split, it has no options, or no answers.
    """
    asked = [
        _read_set(found, name, _split(found, name, split), limit) for name in _names(found, names, split)
    ]
    if not asked:
        raise UserError(f"The questions {found.directory} have no split {split or 'test or dev'} to ask.")
    return asked


def open_model(model: LlamaForCausalLM, source: ModelSource, batch_size: int | None) -> HFLM:
    """The model as lm-eval knows one, with its tokenizer.

    Args:
        model: on the device to compute on.
        source: where it is from, with its tokenizer.
        batch_size: prompts at once; when None 8 on a CPU, on a GPU 64 or what fits of the longest prompt.

    Raises:
        UserError: the tokenizer is missing or damaged.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it warns of is counted in the result
    automatic = _CPU_BATCH if model.device.type == "cpu" else "auto"
    return HFLM(
        pretrained=model,
        tokenizer=read_tokenizer(source),
        batch_size=batch_size or automatic,
        softmax_dtype=torch.float32,
    )


def read_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer as transformers has it; that of a checkpoint is converted as an export is.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not source.is_checkpoint:
        return _from_directory(source.path)
    tokenizers = source.tokenizers()
    if not tokenizers:
        source.tokenizer()  # says what is missing
    with TemporaryDirectory() as directory:
        first = next(iter(tokenizers.values()))
        write_tokenizer(first, Path(directory), source.config.max_position_embeddings)
        return _from_directory(Path(directory))


def answer(lm: HFLM, asked: Sequence[AskedSet], prompt: PromptId, method: Method) -> list[SetScore]:
    """Ask the questions. Collective over the default group.

    Returns:
        On rank 0 the answers of all ranks, sets and questions in their order; on others nothing.

    Raises:
        UserError: the prompt does not fit the questions, or there is no room for an answer.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if method == "generated" and lm.max_length <= NEW_TOKENS:
        raise UserError(f"The model reads {lm.max_length} tokens, no more than an answer of {NEW_TOKENS}.")
    share = {
        one.set: [make_prompt(question, prompt) for question in one.questions[rank::world]] for one in asked
    }
    with contextlib.nullcontext() if rank == 0 else _silence():
        found = _evaluate(lm, share, method)
    everyone: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(found, everyone)
    if everyone is None:
        return []
    return [_joined(one, [answers[one.set] for answers in everyone], lm, method) for one in asked]


def _names(found: QuestionSets, names: Sequence[str], split: str | None) -> list[str]:
    if names:
        return list(dict.fromkeys(names))
    wanted = {split} if split else {"test", "dev"}
    sets = found.manifest.sets
    return [name for name in sets if name != "instructions" and wanted & sets[name].splits.keys()]


def _split(found: QuestionSets, name: str, split: str | None) -> str:
    if split or name not in found.manifest.sets:
        return split or "test"
    info = found.manifest.sets[name].splits.get("test")
    # MedMCQA's test answers are hidden: its dev split is what everyone tests on.
    return "test" if info and any(place != "none" for place in info.answers) else "dev"


def _read_set(found: QuestionSets, name: str, split: str, limit: int | None) -> AskedSet:
    questions = found.read(name, split)
    known = [question for question in questions if question.options and question.answer is not None]
    if not known:
        raise UserError(f"No question of {found.path(name, split)} has options and a right answer.")
    info = found.manifest.sets[name].splits[split]
    counts = [number for place, number in info.answers.items() if place != "none"]
    return AskedSet(
        name,
        split,
        tuple(known[:limit]),
        len(questions) - len(known),
        info.checksum,
        max(counts) / sum(counts),
    )


def _from_directory(directory: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} has no tokenizer that transformers reads: {error}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """lm-eval's progress and its words about batch sizes are for one rank to say."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _evaluate(lm: HFLM, share: dict[str, list[Prompt]], method: Method) -> dict[str, list[Any]]:
    """This rank's answers of each set: predicted place, tokens, likelihoods, text."""
    # A set with fewer questions than ranks leaves some without any, and lm-eval has no empty tasks.
    tasks = {name: make_task(name, prompts, method) for name, prompts in share.items() if prompts}
    if not tasks:
        return {name: [] for name in share}
    told = evaluator.evaluate(lm, {"tasks": tasks, "groups": {}}, bootstrap_iters=0)["samples"]
    found: dict[str, list[Any]] = {name: [] for name in share}
    for name in tasks:
        in_order = sorted(told[name], key=lambda sample: sample["doc_id"])
        for prompt, sample in zip(share[name], in_order, strict=True):
            found[name].append(_read_sample(lm, prompt, sample, method))
    return found


def _read_sample(lm: HFLM, prompt: Prompt, sample: dict[str, Any], method: Method) -> tuple[Any, ...]:
    if method == "generated":
        text = sample["filtered_resps"][0]
        return chosen(text, prompt.answers), len(lm.tok_encode(prompt.context)), (), text
    likelihoods = tuple(float(value) for value, _ in sample["filtered_resps"])
    tokens = len(lm.tok_encode(prompt.context + max(prompt.answers, key=len)))
    return int(np.argmax(likelihoods)), tokens, likelihoods, None


def _joined(one: AskedSet, shares: Sequence[Sequence[Any]], lm: HFLM, method: Method) -> SetScore:
    """The ranks' shares, put in the order of the questions."""
    answers = []
    for number, question in enumerate(one.questions):
        predicted, tokens, likelihoods, text = shares[number % len(shares)][number // len(shares)]
        assert question.answer is not None  # noqa: S101
        answers.append(Answer(question.id, question.answer, predicted, tokens, likelihoods, text))
    # The last token of a prompt with its answer is no input.
    most = lm.max_length + 1 if method == "likelihood" else lm.max_length - NEW_TOKENS
    cut = sum(found.tokens > most for found in answers)
    return SetScore(one.set, one.split, one.checksum, one.majority, one.unanswerable, cut, tuple(answers))
