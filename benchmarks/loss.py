"""Ways to the cross-entropy and its gradient from hidden states: time, memory, and how exact they are.

    ours       `pmc_llama.model.summed_cross_entropy`: the gradient along with the loss, in the logits' place
    plain      torch's cross_entropy of the fp32 logits of all rows
    chunks     the same of 1,024 rows at a time, whose fp32 logits backward computes again
    linear     torch.nn.functional.linear_cross_entropy in chunks, where torch has it

Time is the least of some repetitions of forward and backward, the output layer included; memory the most that
torch's CPU allocator held beyond weights, hidden states and their gradients; errors are relative to the
largest element of what fp64 gives.

    python -m benchmarks.loss
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from pmc_llama.model import LOSS_CHUNK, summed_cross_entropy

_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Print a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(options.rows, options.hidden, generator=draw).to(dtype)
        weight = (0.02 * torch.randn(options.vocabulary, options.hidden, generator=draw)).to(dtype)
        labels = torch.randint(options.vocabulary, (options.rows,), generator=draw)
        exact = _run(_plain, hidden.double(), weight.double(), labels)
        print(f"{dtype}: {options.rows} rows x {options.hidden}, vocabulary {options.vocabulary}")
        for name, loss in _LOSSES.items():
            _print(name, loss, (hidden, weight, labels), exact, options.repetitions)


def _print(
    name: str, loss: _Loss, arguments: tuple[Tensor, Tensor, Tensor], exact: list[Tensor], count: int
) -> None:
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        found = _run(loss, *arguments)
        seconds.append(time.perf_counter() - begin)
    errors = [
        float((one.double() - true).abs().max() / true.abs().max())
        for one, true in zip(found, exact, strict=True)
    ]
    print(
        f"    {name:8} {min(seconds):7.3f} s  {_peak(loss, arguments) / 1e6:6.0f} MB   errors: "
        f"loss {errors[0]:.0e}  of hidden {errors[1]:.0e}  of weight {errors[2]:.0e}",
        flush=True,
    )


def _run(loss: _Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss and both gradients."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
    found = loss(hidden, weight, labels)
    return [found.detach(), *torch.autograd.grad(found, [hidden, weight])]


def _peak(loss: _Loss, arguments: tuple[Tensor, Tensor, Tensor]) -> float:
    """Bytes, by the allocations and frees that torch's profiler sees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _run(loss, *arguments)
    now = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in arguments[:2])
    return most - gradients


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum"
    )


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return summed_cross_entropy(functional.linear(hidden, weight)[None], labels[None])


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    def one(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), targets, reduction="sum")

    logits = torch.split(functional.linear(hidden, weight), LOSS_CHUNK)
    parts = zip(logits, torch.split(labels, LOSS_CHUNK), strict=True)
    return torch.stack([checkpoint(one, *part, use_reentrant=False) for part in parts]).sum()


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    )


_LOSSES: dict[str, _Loss] = {"ours": _ours, "plain": _plain, "chunks": _chunks}
if hasattr(functional, "linear_cross_entropy"):
    _LOSSES["linear"] = _linear


if __name__ == "__main__":
    main()
