"""The perplexity that is told is transformers' own, however texts are cut, batched and shared out."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pmc_llama.evaluate.perplexity import batches_of, log_likelihoods, summarize, windows_of
from tests.ranks import run_on_ranks

VOCABULARY = 131


def tiny() -> LlamaForCausalLM:
    """Weights large enough that a token's likelihood depends on those before it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def texts(*lengths: int) -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: np.ndarray, context: int = 0) -> float:
    """transformers' own loss of a text, of the targets after its first `context` tokens."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    labels = ids.clone()
    labels[:, :context] = -100
    return float(model(input_ids=ids, labels=labels).loss)


def test_a_text_in_one_window_has_the_loss_that_transformers_gives_it(alone: None) -> None:
    model, some = tiny(), texts(40, 2, 17, 63, 40)
    found = log_likelihoods(model, some, window=64, stride=32, batch_tokens=100)
    for nats, tokens in zip(found, some, strict=True):
        assert nats / (len(tokens) - 1) == pytest.approx(mean_loss(model, tokens), rel=1e-5)


def test_a_longer_text_is_what_the_strides_of_transformers_guide_make_it(alone: None) -> None:
    model, window, stride = tiny(), 16, 6
    [tokens] = texts(75)
    wanted, done = 0.0, 1
    while done < len(tokens):
        end = min(len(tokens), done + (window if done == 1 else stride))
        begin = max(0, end - window - 1)
        wanted += mean_loss(model, tokens[begin:end], done - begin) * (end - done)
        done = end
    [found] = log_likelihoods(model, [tokens], window, stride, batch_tokens=64)
    assert found == pytest.approx(wanted, rel=1e-5)
    [disjoint] = log_likelihoods(model, [tokens], window, window, batch_tokens=64)
    assert disjoint != pytest.approx(wanted, rel=1e-3)


@given(
    lengths=st.lists(st.integers(1, 60), max_size=8),
    window=st.integers(1, 20),
    stride=st.integers(1, 20),
    most=st.integers(1, 50),
)
def test_every_target_counts_once_with_the_context_that_its_window_has_room_for(
    lengths: list[int], window: int, stride: int, most: int
) -> None:
    stride = min(stride, window)
    found = windows_of(lengths, window, stride)
    targets = [(one.text, place) for one in found for place in range(one.end - one.counted + 1, one.end + 1)]
    assert targets == [(text, place) for text, length in enumerate(lengths) for place in range(1, length)]
    for one in found:
        assert 1 <= one.counted <= one.inputs <= window
        assert one.begin == 0 or (one.inputs == window and one.counted <= stride)
    batches = batches_of(found, most)
    assert sorted(number for batch in batches for number in batch) == list(range(len(found)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(found[number].inputs for number in batch) <= most


def test_the_batch_size_changes_no_likelihood(alone: None) -> None:
    model, some = tiny(), texts(40, 3, 17, 75, 8)
    one = log_likelihoods(model, some, 16, 8, batch_tokens=1)
    assert log_likelihoods(model, some, 16, 8, batch_tokens=1000) == pytest.approx(one, rel=1e-6)


def _on_a_rank(directory: Path) -> None:
    found = log_likelihoods(tiny(), texts(40, 3, 17, 75, 8, 8), 16, 8, batch_tokens=48)
    np.save(directory / f"{dist.get_world_size()}-{dist.get_rank()}.npy", found)


@pytest.mark.slow
def test_the_number_of_ranks_does_not_change_a_bit(tmp_path: Path) -> None:
    for ranks in (1, 2):
        run_on_ranks(ranks, _on_a_rank, tmp_path)
    alone, *others = [np.load(path) for path in sorted(tmp_path.iterdir())]
    assert len(others) == 2
    assert all((other == alone).all() for other in others)


def test_perplexities_are_of_all_tokens_and_all_bytes_together() -> None:
    found = summarize(np.array([20.0, 100.0]), np.array([10, 30]), np.array([50, 110]))
    assert (found.texts, found.tokens, found.bytes, found.bytes_per_token) == (2, 40, 160, 4.0)
    assert found.per_token.value == pytest.approx(math.exp(120 / 40))
    assert found.per_byte.value == pytest.approx(math.exp(120 / 160))
    assert found.bits_per_byte.value == pytest.approx(120 / 160 / math.log(2))
    # Of two texts a sample has one, the other, or both.
    assert (found.per_token.low, found.per_token.high) == pytest.approx((math.exp(2), math.exp(100 / 30)))


def test_the_interval_is_as_wide_as_the_spread_of_the_texts_makes_it() -> None:
    draw = np.random.default_rng(3)
    nats = draw.normal(300, 20, 400)  # of a mean of 3 nats a token with a standard error of 0.01
    found = summarize(nats, np.full(400, 100), np.full(400, 500))
    half = (math.log(found.per_token.high) - math.log(found.per_token.low)) / 2
    assert half == pytest.approx(1.96 * 20 / 100 / 20, rel=0.1)
    same = summarize(np.full(9, 30.0), np.full(9, 10), np.full(9, 50))
    assert same.per_token.low == pytest.approx(same.per_token.high) == pytest.approx(math.exp(3))
