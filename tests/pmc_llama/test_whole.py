"""Whole documents: each once an epoch, uncut, alone, with loss behind its prompt, the same on any ranks."""

import itertools
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.prompt_documents import PromptRecipe
from data_tools.tokenizer import Tokenizer
from pmc_llama import cli
from pmc_llama.batches import Batch, MicroBatch, TrainingBatches
from pmc_llama.blend import Blend, BlendedOrder, BlendedStream
from pmc_llama.config import BatchConfig, DataConfig
from pmc_llama.coverage import Coverage
from pmc_llama.data import TrainingData, heldout, open_sources
from pmc_llama.model import LlamaForPretraining
from pmc_llama.randomness import IntArray
from pmc_llama.sample_order import Mode, Stretch, sample_order
from pmc_llama.whole import Deal, WholeBatches, pack, require_short
from tests.data_tools.prompt_corpora import DEV, TRAIN, prompts
from tests.pmc_llama.runs import command_line, finish, kill, numbers, start
from tests.pmc_llama.small import odd_config
from tests.pmc_llama.streams import NumberedStream
from tests.pmc_llama.test_data import targets

document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)
modes = st.sampled_from(["window", "packed", "whole"])


@dataclass
class PromptedStream(NumberedStream):
    """Documents of these lengths, of which the first tokens are prompts."""

    prompts: list[int] = field(default_factory=list)  # tokens, at least 1 and less than the document has

    def loss_starts(self, begins: IntArray) -> IntArray:
        which = np.searchsorted(self.starts, begins)
        return cast(IntArray, begins + np.array(self.prompts)[which])


def prompted(lengths: list[int]) -> PromptedStream:
    return PromptedStream(lengths, prompts=[1 + length // 3 for length in lengths])


def step(
    stream: PromptedStream, first: int, size: int, row_length: int, micro_size: int, world_size: int
) -> list[Batch]:
    """One step, as each rank sees it."""
    order = sample_order(stream, "whole", row_length, 5)
    return [
        WholeBatches(stream, order, size, Deal(row_length, micro_size, rank, world_size)).batch(first)
        for rank in range(world_size)
    ]


def documents_of(batch: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each document, cut where positions begin anew; what is empty left out."""
    assert batch.positions is not None
    found = []
    rows = zip(batch.inputs.tolist(), batch.labels.tolist(), batch.positions.tolist(), strict=True)
    for inputs, labels, positions in rows:
        cuts = [*(place for place, position in enumerate(positions) if position == 0), len(inputs)]
        for begin, end in itertools.pairwise(cuts):
            last = max((place for place in range(begin, end) if labels[place] >= 0), default=begin - 1)
            if last >= begin:
                found.append((inputs[begin : last + 1], labels[begin : last + 1]))
    return found


# --- packing ---


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    row_length=st.integers(50, 120),
    multiple=st.integers(1, 9),
)
def test_rows_hold_every_document_whole_and_fill_evenly(
    lengths: list[int], row_length: int, multiple: int
) -> None:
    row, rows = pack(np.array(lengths), row_length, multiple)
    filled = np.bincount(row, lengths, rows)
    assert len(row) == len(lengths)
    assert row.min() >= 0
    assert len(filled) == rows
    assert rows % multiple == 0
    assert filled.max() <= row_length
    assert filled.max() - filled.min() <= max(lengths)
    assert np.all(np.diff(filled) <= 0)


def test_a_step_of_short_documents_takes_hardly_more_rows_than_its_tokens_fill() -> None:
    lengths = np.random.default_rng(0).integers(60, 400, 512)
    _, rows = pack(lengths, 2048, 4)
    assert rows <= -(-int(lengths.sum()) // (2048 * 4)) * 4 + 4


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    micro_size=st.integers(1, 3),
    world_size=st.integers(1, 5),
    size=st.integers(1, 12),
)
def test_an_epoch_has_every_document_once_whole_with_loss_behind_its_prompt_on_any_ranks(
    lengths: list[int], micro_size: int, world_size: int, size: int
) -> None:
    stream = prompted(lengths)
    order = sample_order(stream, "whole", 40, 5)
    spans = order.spans(np.arange(len(lengths)))
    assert sorted(spans.before.tolist()) == stream.starts[:-1].tolist()
    found = []
    for first in range(0, len(lengths), size):
        batches = step(stream, first, min(size, len(lengths) - first), 40, micro_size, world_size)
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        assert len({batch.targets for batch in batches}) == 1
        micro_batches = [micro for batch in batches for micro in batch.micro_batches]
        assert all(micro.inputs.shape[0] == micro_size for micro in micro_batches)
        assert all(micro.inputs.shape[1] <= 40 for micro in micro_batches)
        assert sum(int((micro.labels >= 0).sum()) for micro in micro_batches) == batches[0].targets
        of_step = [document for micro in micro_batches for document in documents_of(micro)]
        order_of_step = spans.before[first : first + size]
        assert sorted(inputs[0] for inputs, _ in of_step) == sorted(order_of_step.tolist())
        found += of_step
    for inputs, labels in found:
        number = int(np.searchsorted(stream.starts, inputs[0]))
        begin, end = stream.starts[number : number + 2].tolist()
        assert inputs == list(range(begin, end - 1))
        silent = stream.prompts[number] - 1
        assert labels == [-100] * silent + list(range(begin + 1 + silent, end))


def test_ranks_have_rows_of_about_the_same_length() -> None:
    stream = prompted(np.random.default_rng(1).integers(20, 300, 300).tolist())
    batches = step(stream, 0, 256, 1024, 2, 4)
    for together in zip(*(batch.micro_batches for batch in batches), strict=True):
        widths = [micro.inputs.shape[1] for micro in together]
        assert max(widths) - min(widths) <= 300
    inputs = sum(micro.inputs.numel() for batch in batches for micro in batch.micro_batches)
    tokens = WholeBatches(stream, sample_order(stream, "whole", 1024, 5), 256, Deal(1024, 2, 0, 4)).tokens(0)
    assert inputs <= 1.1 * tokens


def test_a_blend_of_prompts_takes_each_document_with_its_own_prompt() -> None:
    streams = [prompted([9, 14, 6]), prompted([20, 5])]
    sizes = [stream.tokens for stream in streams]
    orders = [sample_order(stream, "whole", 24, 5) for stream in streams]
    order, together = BlendedOrder(orders, sizes, Blend([3, 2])), BlendedStream(streams, sizes)
    batch = WholeBatches(together, order, 5, Deal(24, 1, 0, 1)).batch(0)
    assert batch.targets == sum(
        length - prompt
        for stream in streams
        for length, prompt in zip(stream.lengths, stream.prompts, strict=True)
    )


# --- loss and gradient ---


class RandomStream(PromptedStream):
    """Random tokens in the place of numbered ones."""

    def read(self, ranges: list[tuple[int, int]]) -> list[NDArray[np.integer]]:
        tokens = np.random.default_rng(0).integers(3, odd_config().vocab_size, self.tokens)
        return [tokens[start:stop] for start, stop in ranges]


def gradient(model: LlamaForPretraining, batches: list[MicroBatch]) -> tuple[float, torch.Tensor]:
    """The summed loss and its gradient."""
    loss = torch.stack([model(batch.inputs, batch.labels, batch.positions) for batch in batches]).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), torch.cat([one.flatten() for one in gradients])


@pytest.mark.parametrize("world_size", [1, 3])
def test_packed_rows_have_the_loss_and_the_gradient_of_each_document_alone(world_size: int) -> None:
    lengths = [12, 3, 30, 17, 2, 9, 25, 14]
    stream = RandomStream(lengths, prompts=[length // 2 for length in lengths])
    torch.manual_seed(1)
    model = LlamaForPretraining(odd_config())
    packed = [batch for rank in step(stream, 0, 8, 40, 2, world_size) for batch in rank.micro_batches]
    assert len(packed) * 2 < len(lengths) or world_size > 1
    alone = []
    for number, (begin, end) in enumerate(itertools.pairwise(stream.starts.tolist())):
        [tokens] = stream.read([(begin, end)])
        labels = tokens[1:].copy()
        labels[: stream.prompts[number] - 1] = -100
        alone.append(MicroBatch(torch.from_numpy(tokens[None, :-1]), torch.from_numpy(labels[None])))
    loss, gradients = gradient(model, packed)
    expected_loss, expected = gradient(model, alone)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


# --- what a run keeps of it ---


@settings(max_examples=80)
@given(
    lengths=document_lengths,
    changes=st.lists(st.tuples(modes, st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=5),
)
def test_coverage_is_what_a_bitmap_says_when_documents_were_taken_whole(
    lengths: list[int], changes: list[tuple[Mode, int, int]]
) -> None:
    stream = NumberedStream(lengths)
    bitmap = np.zeros(stream.tokens, bool)
    taken: list[Stretch] = []
    for mode, length, samples in changes:
        expected = []
        order = sample_order(stream, mode, length, 7, taken)
        for sample in range(samples):
            before = bitmap.sum()
            if mode == "whole":
                [begin], [end] = order.spans(np.array([sample]))[1::2]
                bitmap[begin:end] = True
            else:
                one = TrainingBatches(stream, order, 1, 1, 0, 1).batch(sample)
                bitmap[targets(one.micro_batches)] = True
            expected.append(int(bitmap.sum() - before))
        coverage = Coverage.of(stream, mode, length, 7, taken)
        assert coverage.new_targets(np.arange(samples)).tolist() == expected
        taken.append(Stretch(mode, length, samples))


@pytest.fixture(scope="module")
def corpus(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions to train on, 11 held out."""
    return prompts(tmp_path_factory.mktemp("prompts"), tiny_tokenizer)


def test_an_epoch_over_a_corpus_of_prompts_covers_all_of_it_and_trains_on_its_answers(corpus: Path) -> None:
    data = DataConfig(str(corpus), mode="whole", sequence_length=512)
    training = TrainingData(open_sources(data), data, seed=3)
    split = training.sources[0].split
    assert training.steps_left(3.0, 0, 16) == -(-3 * TRAIN // 16)
    batches = training.batches(BatchConfig(TRAIN, 1), 0, 1)
    assert batches.tokens(0) == split.tokens - TRAIN
    batch = batches.batch(0)
    documents = [labels for micro in batch.micro_batches for _, labels in documents_of(micro)]
    answers = [np.array([label for label in labels if label >= 0]) for labels in documents]
    assert batch.targets == sum(map(len, answers))
    assert all(answer[-1] == split.corpus.eod for answer in answers)
    said = sorted(Tokenizer(split.corpus.tokenizer_path).decode(answer[:-1]).strip() for answer in answers)
    assert "".join(said) == "".join(letter * (TRAIN // 4) for letter in "ABCD")
    assert training.covered_after((0,), 0, TRAIN) == (split.tokens,)
    assert training.covered_after((0,), 5, TRAIN) == (split.tokens - first_tokens(training, 5),)
    assert list(training.coverage((split.tokens,)).values()) == [1.0]


def first_tokens(training: TrainingData, documents: int) -> int:
    spans = training.order.spans(np.arange(documents))
    return int((spans.end - spans.before).sum())


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_heldout_questions_are_evaluated_whole_each_once(corpus: Path, world_size: int) -> None:
    data = DataConfig(str(corpus), mode="whole", sequence_length=512)
    split = Corpus.open(corpus).split("heldout")
    for most, documents in ((1000, DEV), (4, 4)):
        ranks = [list(heldout(split, data, 1, rank, world_size, most)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        found = [document for batches in ranks for batch in batches for document in documents_of(batch)]
        [*expected] = (
            tokens.tolist() for tokens in split.read(list(itertools.pairwise(split.starts.tolist())))
        )
        assert sorted([*inputs, labels[-1]] for inputs, labels in found) == sorted(expected[:documents])


def test_what_would_be_cut_or_trained_on_by_mistake_is_refused_with_a_cure(corpus: Path) -> None:
    def training(mode: Mode, length: int) -> TrainingData:
        data = DataConfig(str(corpus), mode=mode, sequence_length=length)
        return TrainingData(open_sources(data), data, seed=3)

    longest = int(np.diff(Corpus.open(corpus).split("train").starts).max())
    training("whole", longest - 1)
    with pytest.raises(
        UserError, match=rf"documents of .*longer.*{longest - 2}.*sequence_length to {longest - 1}"
    ):
        training("whole", longest - 2)
    for mode in ("packed", "window"):
        with pytest.raises(UserError, match=r"loss on their answers.*data\.mode to whole"):
            training(mode, 64)
    with pytest.raises(UserError, match="1 of 2 documents"):
        require_short(prompted([5, 9]), 7, "here")


def test_prompts_with_loss_on_all_are_a_corpus_for_every_mode(tiny_tokenizer: Path, tmp_path: Path) -> None:
    whole = prompts(tmp_path, tiny_tokenizer, PromptRecipe("plain", ("medqa_4options",), loss="all"))
    for mode in ("packed", "window", "whole"):
        data = DataConfig(str(whole), mode=mode, sequence_length=512)
        training = TrainingData(open_sources(data), data, seed=3)
        assert training.batches(BatchConfig(TRAIN, 1), 0, 1).batch(0).targets > 20 * TRAIN


# --- whole runs ---

STEPS = 6


@pytest.fixture(scope="module")
def options(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of odd shapes; steps of 7 documents, which end at odd places of rows and epochs."""
    size = tmp_path_factory.mktemp("model") / "config.json"
    config = odd_config()
    config.vocab_size = Corpus.open(corpus).vocab_size
    config.to_json_file(size)
    return {
        "--model.size": str(size),
        "--data.corpus": str(corpus),
        "--data.mode": "whole",
        "--data.sequence_length": "400",
        "--batch.global_size": "7",
        "--batch.micro_size": "1",
        "--schedule.steps": str(STEPS),
        "--optimizer.learning_rate": "0.003",
        "--checkpoint.every_steps": "3",
        "--checkpoint.keep_last": "9",
        "--evaluation.every_steps": "6",
        "--dry_run": "false",
    }


def test_a_run_that_ended_in_the_middle_goes_on_with_the_same_losses(
    options: dict[str, str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\n")
    run, again = tmp_path / "run", tmp_path / "again"
    arguments = command_line(recipe, options, "--backend", "fsdp")
    assert cli.main(["train", *arguments, "--output", str(run)]) == 0
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")  # as if it had been killed before
    assert cli.main(["train", *arguments, "--output", str(again), "--resume"]) == 0
    assert numbers(again) == numbers(run)
    records = numbers(run)
    assert [record["samples"] for record in records] == [7 * (n + 1) for n in range(STEPS)]
    lengths = np.diff([0, *(record["tokens"] for record in records)])
    assert len(set(lengths.tolist())) > 1  # documents are counted, not rows
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["heldout_loss"] < records[0]["heldout_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_two_ranks_killed_and_resumed_have_the_losses_of_a_run_that_never_was(
    options: dict[str, str], tmp_path: Path, backend: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\n")
    run, again = tmp_path / "run", tmp_path / "again"
    longer = {**options, "--schedule.steps": "16", "--dry_run": "true"}
    arguments = command_line(recipe, longer, "--backend", backend)
    finish([*arguments, "--output", str(run)])
    process = start([*arguments, "--output", str(again)])
    while not (again / "checkpoints" / "step-00000003").exists() and process.poll() is None:
        time.sleep(0.002)
    kill(process)
    process.communicate()
    assert len(numbers(again)) < 16, "the kill came too late to mean anything"
    finish([*arguments, "--output", str(again), "--resume"])
    assert numbers(again) == numbers(run)
