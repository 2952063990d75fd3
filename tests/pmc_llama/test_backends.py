"""The promises of the backend protocol that a whole run does not show: a step can be taken back."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pmc_llama.backends.base import Backend, clip_divisor, gradient_norm
from pmc_llama.backends.fsdp import FsdpBackend
from pmc_llama.config import BackendName, Recipe, ShardingConfig
from tests.pmc_llama.small import (
    CPU,
    gathered_config,
    local_state,
    micro_batches,
    seeded_backend,
    small_recipe,
    train_steps,
)
from tests.ranks import run_on_ranks

BACKENDS: tuple[BackendName, BackendName] = ("deepspeed", "fsdp")
ELSEWHERE = 1000  # a step whose batch no test trains on


# --- what is done and taken back --------------------------------------------------------------------------


def _clipped(backend: Backend, accumulation: int) -> None:
    backend.forward_backward(*micro_batches(ELSEWHERE, accumulation))
    assert backend.clip(0.5) > 0.5, "clipping must be at work"
    backend.discard()


def _not_clipped(backend: Backend, accumulation: int) -> None:
    backend.forward_backward(*micro_batches(ELSEWHERE, accumulation))
    backend.discard()


def _infinite_gradients(backend: Backend, accumulation: int) -> None:
    batches, _ = micro_batches(ELSEWHERE, accumulation)
    loss = backend.forward_backward(batches, cast(int, 1e-42))  # scaled beyond fp32
    assert math.isfinite(loss.item())
    norm = backend.clip(0.5)
    assert not math.isfinite(norm)
    assert _is_the_same_everywhere(repr(norm))
    backend.discard()


def _refused(backend: Backend, accumulation: int) -> None:
    backend.forward_backward(*micro_batches(ELSEWHERE, accumulation))
    assert backend.clip(0.5) > 0.5, "clipping must be at work"
    backend.step(1e-2, refused=torch.ones(()))


def _refused_for_infinite_gradients(backend: Backend, accumulation: int) -> None:
    backend.forward_backward(micro_batches(ELSEWHERE, accumulation)[0], cast(int, 1e-42))
    assert not math.isfinite(backend.clip(0.5))
    backend.step(1e-2, refused=torch.ones(()))


def _infinite_gradients_not_clipped(backend: Backend, accumulation: int) -> None:
    backend.forward_backward(micro_batches(ELSEWHERE, accumulation)[0], cast(int, 1e-42))
    backend.discard()


def _nan_throughout(backend: Backend, accumulation: int) -> None:
    """A weight that is not a number spoils loss and gradients; with the weight mended nothing of it stays."""
    weight = local_state(backend)["model.model.norm.weight"]
    before = weight.clone()
    weight.fill_(math.nan)
    backend.state_loaded()
    assert math.isnan(backend.forward_backward(*micro_batches(ELSEWHERE, accumulation)).item())
    assert math.isnan(backend.clip(0.5))
    backend.discard()
    weight.copy_(before)
    backend.state_loaded()


def _evaluated(backend: Backend, accumulation: int) -> None:
    batch = micro_batches(ELSEWHERE, accumulation)[0][0]
    before = backend.evaluate(batch)
    _clipped(backend, accumulation)
    assert backend.evaluate(batch) == before


REFUSALS: list[Callable[[Backend, int], None]] = [_refused, _refused_for_infinite_gradients]
DISTURBANCES: list[Callable[[Backend, int], None]] = [
    *REFUSALS,
    _clipped,
    _not_clipped,
    _infinite_gradients,
    _nan_throughout,
    _infinite_gradients_not_clipped,
    _evaluated,
]

# --- the tests -------------------------------------------------------------------------------------------

Checkpointing = Literal["none", "full"]
CASES: list[tuple[int, Checkpointing]] = [(2, "full"), (1, "full"), (2, "none"), (1, "none")]


def _train_disturbed_and_not(cases: Sequence[tuple[int, Checkpointing]]) -> None:
    for backend_name, (accumulation, checkpointing) in product(BACKENDS, cases):
        recipe = small_recipe(backend_name, accumulation)
        recipe.sharding = ShardingConfig(checkpointing)
        expected, history = _run(recipe, accumulation, [None] * len(DISTURBANCES))
        found, disturbed = _run(recipe, accumulation, DISTURBANCES)
        assert disturbed == history, (backend_name, accumulation, checkpointing)
        assert history[-1] != history[0], "the weights must move"
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (name, backend_name, accumulation, checkpointing)


def _run(
    recipe: Recipe, accumulation: int, disturbances: Sequence[Callable[[Backend, int], None] | None]
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """State and history after as many steps as there are disturbances, each coming before its step."""
    backend = seeded_backend(recipe, gathered_config())
    history = []
    for step, disturb in enumerate(disturbances):
        if disturb:
            before = _bookkeeping(backend)
            disturb(backend, accumulation)
            # DeepSpeed counts a refused step, which nothing depends on.
            assert disturb in REFUSALS or _bookkeeping(backend) == before, disturb
        history += train_steps(backend, step, step + 1, accumulation)
    state = {name: tensor.clone() for name, tensor in local_state(backend).items()}
    backend.close()
    return state, history


def _bookkeeping(backend: Any) -> list[object]:
    """What a backend counts, and the gradients that it holds."""
    if isinstance(backend, FsdpBackend):
        return [parameter.grad for parameter in backend.parameters.values()]
    engine, zero = backend.engine, backend.zero
    return [
        (engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps),
        (zero.micro_step_id, zero.overflow, zero.loss_scale),
        [bucket.elements for bucket in zero.ipg_buckets.values()],
        [gradients for gradients in zero.averaged_gradients.values() if gradients is not None],
    ]


def test_a_discarded_step_leaves_no_bit_behind() -> None:
    run_on_ranks(2, _train_disturbed_and_not, CASES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), [(1, CASES), (2, CASES[1:])])
def test_a_discarded_step_leaves_no_bit_behind_in_any_case(
    ranks: int, cases: list[tuple[int, Checkpointing]]
) -> None:
    run_on_ranks(ranks, _train_disturbed_and_not, cases)


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    ("value", "norm"), [(math.inf, math.inf), (-math.inf, math.inf), (math.nan, math.nan)]
)
def test_a_norm_that_is_not_finite_is_told(value: float, norm: float) -> None:
    shards = [torch.tensor([3.0, value]), torch.tensor([4.0])]
    assert float(gradient_norm(shards, CPU)) == pytest.approx(norm, nan_ok=True)


@pytest.mark.usefixtures("world_of_one")
def test_a_norm_whose_square_is_beyond_fp32_is_not_finite() -> None:
    assert math.isfinite(gradient_norm([torch.tensor([1.8e19])], CPU))
    assert not math.isfinite(gradient_norm([torch.tensor([1.9e19])], CPU))


@pytest.mark.parametrize("norm", [0.0, 0.3, 0.5, 0.7, 123.0])
def test_gradients_are_clipped_as_torch_clips_them(norm: float) -> None:
    gradient = torch.tensor([0.6, 0.8]) * norm
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], 0.5)
    divisor = clip_divisor(torch.tensor(norm, dtype=torch.float64), 0.5)
    torch.testing.assert_close(gradient / divisor, parameter.grad)


def _is_the_same_everywhere(value: str) -> bool:
    values = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return len({*values}) == 1
