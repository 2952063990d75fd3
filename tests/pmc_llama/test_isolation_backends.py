"""Under both backends a packed sequence has the loss and the gradient of each of its documents alone."""

import itertools
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from pmc_llama.batches import MicroBatch
from pmc_llama.config import BackendName, PrecisionConfig, ShardingConfig
from tests.pmc_llama.small import SEQUENCE, micro_batches, odd_config, seeded_backend, small_recipe
from tests.ranks import run_on_ranks

BORDERS = [0, 9, 10, SEQUENCE]  # of the documents of every sequence, in places


def _packed_and_alone(directory: Path, backend_name: BackendName, sharding: ShardingConfig) -> None:
    """Rank 0 writes [loss, gradient norm] packed, of the documents alone, and without isolation."""
    documents = list(itertools.pairwise(BORDERS))
    [plain], targets = micro_batches(0, 1)
    positions = torch.cat([torch.arange(end - begin) for begin, end in documents]).expand_as(plain.inputs)
    alone = []
    for begin, end in documents:
        inputs, labels = torch.zeros_like(plain.inputs), torch.full_like(plain.labels, -100)
        inputs[:, : end - begin], labels[:, : end - begin] = (
            plain.inputs[:, begin:end],
            plain.labels[:, begin:end],
        )
        alone.append(MicroBatch(inputs, labels))
    recipe = small_recipe(backend_name)
    recipe.sharding, recipe.precision = sharding, PrecisionConfig(compute="fp32")
    backend = seeded_backend(recipe, odd_config())
    found = []
    for batches in ([MicroBatch(plain.inputs, plain.labels, positions)], alone, [plain]):
        loss = backend.forward_backward(batches, targets)
        dist.all_reduce(loss)
        evaluated = torch.stack([backend.evaluate(batch) for batch in batches]).sum()
        dist.all_reduce(evaluated)
        found.append((float(loss), float(evaluated), float(backend.clip(1e9))))
        backend.step(0.0)
    backend.close()
    if dist.get_rank() == 0:
        (directory / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_packed_documents_are_trained_on_as_if_each_were_alone(
    tmp_path: Path, backend: BackendName, checkpointing: Literal["none", "full"]
) -> None:
    run_on_ranks(2, _packed_and_alone, tmp_path, backend, ShardingConfig(checkpointing))
    packed, alone, crossing = json.loads((tmp_path / "found.json").read_text())
    assert packed == pytest.approx(alone, rel=1e-6)
    assert packed[2] != pytest.approx(crossing[2], rel=1e-3)
