"""With isolated documents a packed sequence is worth as much as each of its documents alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pmc_llama.batches import MicroBatch, TrainingBatches, heldout_batches
from pmc_llama.model import LlamaForPretraining
from pmc_llama.sample_order import IsolatedOrder, sample_order
from tests.pmc_llama.small import VOCABULARY, odd_config
from tests.pmc_llama.streams import NumberedStream
from tests.pmc_llama.test_data import document_lengths

EOD = 2
LENGTHS = [700, 1, 350, 2, 1200, 417, 330]  # 3,000 tokens


class RandomStream(NumberedStream):
    """Documents of random tokens that end with EOD."""

    def read(self, ranges: list[tuple[int, int]]) -> list[NDArray[np.integer]]:
        tokens = np.random.default_rng(0).integers(3, VOCABULARY, self.tokens)
        tokens[self.starts[1:] - 1] = EOD
        return [tokens[start:stop] for start, stop in ranges]

    def document(self, number: int) -> Tensor:
        """int64 [1, tokens + 1]: the document after the EOD that precedes it."""
        start, stop = self.starts[number : number + 2].tolist()
        return torch.tensor([[EOD, *self.read([(start, stop)])[0].tolist()]])


@pytest.fixture(scope="module")
def model() -> LlamaForPretraining:
    torch.manual_seed(1)
    config = odd_config()
    config.max_position_embeddings = 4096
    return LlamaForPretraining(config)


def packed_row(stream: RandomStream) -> MicroBatch:
    [batch] = heldout_batches(stream, stream.tokens, 1, 0, 1, 1, isolate_documents=True)
    return batch


def test_the_logits_of_a_packed_stream_are_those_of_each_document_alone(model: LlamaForPretraining) -> None:
    stream = RandomStream(LENGTHS)
    batch = packed_row(stream)
    with torch.no_grad():
        packed = model.lm_head(model.hidden(batch.inputs, batch.positions))[0]
        alone = [model.lm_head(model.hidden(stream.document(n)[:, :-1]))[0] for n in range(stream.documents)]
        crossing = model.lm_head(model.hidden(batch.inputs))[0]
    assert len(packed) == 3000
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert (crossing - packed).abs().max() > 1e-3  # a model that does look across would be found out


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_loss_and_gradient_of_packed_rows_are_the_sums_of_those_of_their_documents(
    model: LlamaForPretraining, checkpointing: bool | None
) -> None:
    """`checkpointing`: activations are checkpointed the reentrant way or not; None: not at all."""
    stream = RandomStream([40, 1, 25, 3, 31])
    order = IsolatedOrder(sample_order(stream, "packed", 20, 5), stream.starts)
    batch = TrainingBatches(stream, order, 5, 5, 0, 1, positions=True).batch(0).micro_batches[0]
    assert batch.positions is not None
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model.zero_grad()
    loss = model(batch.inputs, batch.labels, batch.positions)
    torch.autograd.backward(loss)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.gradient_checkpointing_disable()

    model.zero_grad()
    losses = []
    for row, starts in enumerate(batch.positions == 0):
        bounds = [*torch.nonzero(starts).flatten().tolist(), len(starts)]
        for begin, end in itertools.pairwise(bounds):
            losses.append(
                model(batch.inputs[row : row + 1, begin:end], batch.labels[row : row + 1, begin:end])
            )
    torch.autograd.backward(torch.stack(losses).sum())
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    for ours, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-5)


def test_positions_of_one_document_leave_the_loss_as_it_is(model: LlamaForPretraining) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 31), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30).expand(2, -1)
    plain = model(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(model(tokens[:, :-1], tokens[:, 1:], positions), plain)


@given(lengths=document_lengths, length=st.integers(1, 50), sample=st.integers(0, 60))
def test_positions_begin_anew_where_the_target_begins_a_document_and_targets_stay(
    lengths: list[int], length: int, sample: int
) -> None:
    stream = NumberedStream(lengths)
    plain = sample_order(stream, "packed", length, 3)
    order = IsolatedOrder(plain, stream.starts)
    found = TrainingBatches(stream, order, 1, 1, 0, 1, positions=True).batch(sample).micro_batches[0]
    expected = TrainingBatches(stream, plain, 1, 1, 0, 1).batch(sample).micro_batches[0]
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.labels, expected.labels)
    assert found.positions is not None
    labels, positions = found.labels[0].tolist(), found.positions[0].tolist()
    begins = set(stream.starts.tolist())
    for place, label in enumerate(labels):
        if label >= 0:
            assert (positions[place] == 0) == (place == 0 or label in begins)
