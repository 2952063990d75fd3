"""The step before the first: it shows what a run needs, and nothing of it stays."""

import random
import re
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pmc_llama.backends.fsdp import FsdpBackend
from pmc_llama.config import BackendName
from pmc_llama.dry_run import dry_run
from tests.pmc_llama.small import (
    CPU,
    MICRO,
    SEQUENCE,
    VOCABULARY,
    local_state,
    odd_config,
    seeded_backend,
    small_recipe,
    train_steps,
)
from tests.ranks import run_on_ranks

BACKENDS: tuple[BackendName, BackendName] = ("deepspeed", "fsdp")
FOUND = re.compile(
    r"dry run of 2 micro-batches of 2 x 24 tokens: "
    r"(\d+\.\d\d) GiB of (\d+\.\d\d) GiB on the fullest rank, [01]; \d+\.\d s"
)


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def _train_with_and_without() -> None:
    """Dry runs before the first step and between later ones, as at a resume."""
    for backend_name in BACKENDS:
        recipe = small_recipe(backend_name, accumulation=3)
        expected, plain = seeded_backend(recipe, odd_config()), []
        for step in range(3):
            plain += train_steps(expected, step, step + 1, 3)
        found, tried = seeded_backend(recipe, odd_config()), []
        for step in range(3):
            if step != 1:
                before = _random_states()
                line = dry_run(found, recipe, VOCABULARY, CPU)
                assert _random_states() == before
                figures = FOUND.fullmatch(line)
                assert figures, line
                assert 0 < float(figures[1]) < float(figures[2])
            tried += train_steps(found, step, step + 1, 3)
        assert tried == plain, backend_name
        assert plain[-1] != plain[0], "the weights must move"
        for name, tensor in local_state(expected).items():
            assert torch.equal(local_state(found)[name], tensor), (backend_name, name)


def test_losses_and_weights_after_a_dry_run_are_bit_for_bit_those_without_it() -> None:
    run_on_ranks(2, _train_with_and_without)


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(("accumulation", "isolated"), [(1, False), (2, True), (5, False)])
def test_a_dry_run_has_the_recipes_shapes_and_at_most_two_micro_batches(
    accumulation: int, isolated: bool
) -> None:
    recipe = small_recipe("fsdp", accumulation)
    recipe.data.mode, recipe.data.isolate_documents = "packed", isolated
    backend = seeded_backend(recipe, odd_config())
    assert isinstance(backend, FsdpBackend)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    backend.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    dry_run(backend, recipe, VOCABULARY, CPU)
    assert len(seen) == min(accumulation, 2)
    for inputs, labels, positions, _ in seen:
        assert inputs.shape == labels.shape == (MICRO, SEQUENCE)
        assert 0 <= inputs.min() <= inputs.max() < VOCABULARY
        assert labels.min() >= 0, "every position is a target"
        assert (positions is not None) is isolated
        if positions is not None:
            assert positions.tolist() == [[*range(SEQUENCE // 2)] * 2] * MICRO, "two documents"


@pytest.mark.usefixtures("world_of_one")
def test_too_little_memory_is_told_with_what_was_asked_what_there_is_and_what_to_change() -> None:
    recipe = small_recipe("fsdp")
    backend = seeded_backend(recipe, odd_config())
    recipe.batch.micro_size = recipe.batch.global_size = 2**17  # its first activation alone is 245 MB
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 150 * 10**6, limits[1]))
    try:
        with pytest.raises(UserError) as told:
            dry_run(backend, recipe, VOCABULARY, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    expected = (
        r"The memory of rank 0 does not suffice for a step: with batch\.micro_size 131072, "
        r"data\.sequence_length 24 and sharding\.activation_checkpointing none it ran out at \d+\.\d\d GiB, "
        r"of \d+\.\d\d GiB of its machine; set --batch\.micro_size 65536, the next smaller one, "
        r"set --sharding\.activation_checkpointing selective, then full, set --sharding\.offload all, "
        r"lower data\.sequence_length, or train on more ranks\."
    )
    assert re.fullmatch(expected, str(told.value))
