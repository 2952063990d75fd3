"""How well a model predicts texts: the log-likelihood of each, and perplexities with their uncertainty.

A text of n tokens is n targets, the first predicted from the prefix alone. A text longer than the
window is read in several: the first predicts all its targets, each later one the next `stride` targets, with
the tokens before them as context, as in transformers' guide to the perplexity of fixed-length models. With
stride equal to the window this is lm-evaluation-harness' rolling log-likelihood.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from pmc_llama.model import LOSS_CHUNK

DRAWS = 2000
"""Of the bootstrap."""
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Window:
    """A piece of a text that is computed in one go.

    Attributes:
        text: number of the text.
        begin: place of its first input.
        end: after its last input; its last target is the token there.
        counted: how many of its targets count, its last ones.
    """

    text: int
    begin: int
    end: int
    counted: int

    @property
    def inputs(self) -> int:
        """Tokens that are computed."""
        return self.end - self.begin


@dataclass(frozen=True)
class Estimate:
    """A value, and the ends of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Perplexity:
    """How well texts are predicted, over all of them together; the intervals are over the choice of texts.

    Attributes:
        texts: how many.
        tokens: targets in them.
        bytes: of the texts in UTF-8.
        per_token: exp of the mean negative log-likelihood a token.
        per_byte: exp of the negative log-likelihood a byte, which does not depend on the tokenizer.
        bits_per_byte: the binary logarithm of `per_byte`.
        bytes_per_token: of the tokenizer on these texts.
    """

    texts: int
    tokens: int
    bytes: int
    per_token: Estimate
    per_byte: Estimate
    bits_per_byte: Estimate
    bytes_per_token: float


def windows_of(lengths: Sequence[int], window: int, stride: int) -> list[Window]:
    """The windows of texts, in their order, such that each target counts exactly once.

    Args:
        lengths: of each text its tokens, the prefix included.
        window: inputs of a window at most.
        stride: targets that each window after the first adds, at most `window`.
    """
    found: list[Window] = []
    for text, length in enumerate(lengths):
        done = 0
        while done < length - 1:
            end = min(length - 1, done + (stride if done else window))
            found.append(Window(text, max(0, end - window), end, end - done))
            done = end
    return found


def batches_of(windows: Sequence[Window], most: int) -> list[list[int]]:
    """Numbers of windows in batches of like lengths, the longest first.

    Args:
        windows: what to divide.
        most: inputs of a batch, padding included; a window alone may have more.
    """
    order = sorted(range(len(windows)), key=lambda number: -windows[number].inputs)
    batches: list[list[int]] = []
    for number in order:
        if not batches or (len(batches[-1]) + 1) * windows[batches[-1][0]].inputs > most:
            batches.append([])
        batches[-1].append(number)
    return batches


def log_likelihoods(
    model: LlamaForCausalLM,
    texts: Sequence[NDArray[np.int32]],
    window: int,
    stride: int,
    batch_tokens: int,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float64]:
    """The negative log-likelihood of each text in nats, `[texts]`, equal on every rank and any world size.

    Collective over the default group: the ranks take batches in turn, each with a whole model.

    Args:
        model: in evaluation mode, on the device to compute on.
        texts: of each its tokens, the prefix first.
        window: inputs at once.
        stride: new targets of each window after the first.
        batch_tokens: inputs of a batch.
        count: told this rank's inputs done and in all, for progress.
    """
    windows = windows_of([len(text) for text in texts], window, stride)
    mine = batches_of(windows, batch_tokens)[dist.get_rank() :: dist.get_world_size()]
    total, done = sum(windows[number].inputs for batch in mine for number in batch), 0
    device = model.get_input_embeddings().weight.device
    # Each window is one rank's, so that the sum over the ranks adds zeros only, and is exact.
    found = torch.zeros(len(windows), dtype=torch.float64, device=device)
    for batch in mine:
        chosen = [windows[number] for number in batch]
        found[batch] = _losses(model, chosen, texts, device)
        done += sum(one.inputs for one in chosen)
        count(done, total)
    dist.all_reduce(found)
    nats = np.zeros(len(texts))
    np.add.at(nats, [one.text for one in windows], found.cpu().numpy())
    return nats


def summarize(nats: NDArray[np.float64], tokens: NDArray[Any], sizes: NDArray[Any]) -> Perplexity:
    """Perplexities over all texts, with percentile bootstrap intervals over the texts (Efron 1979).

    Args:
        nats: negative log-likelihood of each text, `[texts]`.
        tokens: targets of each, `[texts]`.
        sizes: bytes of each, `[texts]`.
    """
    values = np.stack([nats, tokens, sizes], axis=1).astype(np.float64)
    draws = np.array([drawn.sum(axis=0) for drawn in _resampled(values)])
    whole = values.sum(axis=0)
    per_token = _estimate(whole[0] / whole[1], draws[:, 0] / draws[:, 1])
    per_byte = _estimate(whole[0] / whole[2], draws[:, 0] / draws[:, 2])
    bits = [value / math.log(2) for value in per_byte]
    return Perplexity(
        len(values),
        int(whole[1]),
        int(whole[2]),
        Estimate(*map(math.exp, per_token)),
        Estimate(*map(math.exp, per_byte)),
        Estimate(*bits),
        float(whole[2] / whole[1]),
    )


def _resampled(values: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    draw = np.random.default_rng(0)
    for _ in range(DRAWS):
        yield values[draw.integers(len(values), size=len(values))]


def _estimate(value: float, draws: NDArray[np.float64]) -> tuple[float, float, float]:
    rest = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(draws, [rest, 1 - rest])
    return float(value), float(low), float(high)


@torch.inference_mode()
def _losses(
    model: LlamaForCausalLM,
    windows: Sequence[Window],
    texts: Sequence[NDArray[np.int32]],
    device: torch.device,
) -> Tensor:
    """Negative log-likelihood of the counted targets of each window, fp64 `[windows]`, from fp32 logits."""
    longest = max(one.inputs for one in windows)
    # Padding comes after the text, where causal attention does not see it.
    inputs = torch.zeros(len(windows), longest, dtype=torch.int64)
    labels = torch.full((len(windows), longest), -100)
    for row, one in enumerate(windows):
        tokens = torch.from_numpy(texts[one.text][one.begin : one.end + 1].astype(np.int64))
        inputs[row, : one.inputs] = tokens[:-1]
        labels[row, one.inputs - one.counted : one.inputs] = tokens[1:][-one.counted :]
    inputs, labels = inputs.to(device), labels.to(device)
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    rows, places = torch.nonzero(labels >= 0, as_tuple=True)
    losses = torch.zeros(len(windows), dtype=torch.float64, device=device)
    for some, there in zip(torch.split(rows, LOSS_CHUNK), torch.split(places, LOSS_CHUNK), strict=True):
        logits = model.lm_head(hidden[some, there]).float()
        each = functional.cross_entropy(logits, labels[some, there], reduction="none")
        losses.index_add_(0, some, each.double())
    return losses
