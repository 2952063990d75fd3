"""What a plan says of memory is what the backends hold."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama.backends import fsdp
from pmc_llama.config import BackendName, BatchConfig, DataConfig, ModelConfig, Recipe, ShardingConfig
from pmc_llama.data import MicroBatch
from pmc_llama.model import LlamaForPretraining, llama_config
from pmc_llama.plan.advice import changes_that_fit, largest_micro_size
from pmc_llama.plan.cluster import GPUS, Cluster
from pmc_llama.plan.memory import plan_memory
from pmc_llama.plan.states import plan_states
from pmc_llama.plan.tracking import COPIES, END, GRADIENTS, MASTERS, MOMENTS, track
from tests.pmc_llama.small import local_state, seeded_backend, small_recipe, train_steps
from tests.ranks import run_on_ranks

GIB = 2**30


def _odd(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1001,
        hidden_size=320,
        intermediate_size=331,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=80,
    )


def _recipe(backend: BackendName, ranks: int, **sharding: object) -> Recipe:
    return Recipe(
        backend=backend,
        data=DataConfig(sequence_length=32),
        batch=BatchConfig(global_size=2 * ranks, micro_size=2),
        sharding=ShardingConfig(**sharding),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("backend", "ranks", "sharding"),
    [
        ("fsdp", 7, {}),
        ("fsdp", 8, {"shard_group": 4}),
        ("fsdp", 4, {"offload": "all"}),
        ("deepspeed", 3, {}),
        ("deepspeed", 4, {"shard_group": 2}),
        ("deepspeed", 2, {"offload": "optimizer"}),
        ("deepspeed", 2, {"offload": "all"}),
    ],
)
def test_closed_form_states_are_what_the_sharding_code_holds(
    backend: BackendName, ranks: int, sharding: dict[str, object]
) -> None:
    recipe = _recipe(backend, ranks, **sharding)
    states, held = plan_states(recipe, _odd(), ranks), track(recipe, _odd(), ranks)[END]
    for part in (MASTERS, COPIES, GRADIENTS, MOMENTS):
        assert held[part] == pytest.approx(getattr(states, part), rel=0.001), part


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_a_plan_for_many_layers_is_what_tracking_all_of_them_gives(backend: BackendName) -> None:
    recipe = _recipe(backend, 2, activation_checkpointing="full", checkpointed_layers=6)
    recipe.data.sequence_length = 64
    config = _odd(layers=15)
    plan = plan_memory(recipe, config, 2)
    phases = track(recipe, config, 2)
    workspace = 128 * (4 * 320 + 4 * 4 + 4 * 320)  # attention's in backward, which is in no tensor
    direct = max(parts.total() + workspace * (phase[0] == "backward") for phase, parts in phases.items())
    update = phases[END].total() + plan_states(recipe, config, 2).update
    assert plan.allocated == pytest.approx(max(direct, update), rel=0.002)


def test_the_peak_is_that_of_torchs_own_tracker() -> None:
    recipe, config = _recipe("fsdp", 8), _odd(layers=4)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    cpu = torch.device("cpu")
    with torch.device("meta"):
        model = LlamaForPretraining(config)
    fsdp.shard(model, recipe, fsdp.build_mesh(recipe.sharding, cpu), cpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        backend = fsdp.FsdpBackend(model.to_empty(device=cpu), recipe, cpu)
        tokens = torch.zeros(2, 32, dtype=torch.int64)
        tracker = FSDPMemTracker(model, backend.optimizer)
        with tracker:
            backend.forward_backward([MicroBatch(tokens, tokens, None)], 1)
        [peak] = tracker.get_tracker_snapshot("peak").values()
    dist.destroy_process_group()
    ours = max(parts.total() for parts in track(recipe, config, 8).values())
    assert ours == pytest.approx(peak["Total"], rel=0.01)


def test_published_sizes_of_states_are_met() -> None:
    config = llama_config(ModelConfig(size="7b"), 32000)
    alone = BatchConfig(global_size=1, micro_size=1)
    fsdp_states = plan_states(Recipe(backend="fsdp", batch=alone), config, 1)
    zero_states = plan_states(Recipe(backend="deepspeed", batch=alone), config, 1)
    assert fsdp_states.total / GIB == pytest.approx(100.4, rel=0.001)  # 16 bytes a parameter
    # deepspeed's estimate_zero3_model_states_mem_needs: 18 bytes a parameter and 4 of the largest layer.
    assert (zero_states.total + 4 * 32000 * 4096) / GIB == pytest.approx(113.45, rel=0.001)


def test_offload_moves_states_to_the_host() -> None:
    plain, config = _recipe("fsdp", 2), _odd()
    offloaded = copy.deepcopy(plain)
    offloaded.sharding.offload = "all"
    before, after = plan_memory(plain, config, 2), plan_memory(offloaded, config, 2)
    states = plan_states(plain, config, 2)
    assert before.host_states == 0
    assert after.host_states == states.total
    assert after.parameters == after.optimizer == after.gradients == 0


@pytest.mark.slow
def test_recomputation_costs_less_memory_the_more_is_recomputed() -> None:
    recipe, config = _recipe("fsdp", 2), _odd(layers=6)
    recipe.data.sequence_length = 256
    sizes = []
    for mode in ("none", "selective", "full"):
        recipe.sharding.activation_checkpointing = mode
        sizes.append(plan_memory(recipe, config, 2).activations)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < sizes[0] / 2


@pytest.mark.slow
def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    config = llama_config(ModelConfig(size="7b"), 32000)
    recipe = Recipe(backend="fsdp", batch=BatchConfig(global_size=512, micro_size=4))
    cluster = Cluster(GPUS["h100"], nodes=1, gpus_per_node=8, node_bandwidth=50e9)
    largest = largest_micro_size(recipe, config, cluster)
    assert largest is not None
    for size, fits in ((largest, True), (2 * largest, False)):
        recipe.batch.micro_size = size
        assert (plan_memory(recipe, config, 8).total <= cluster.gpu.memory_bytes) == fits


@pytest.mark.slow
def test_changes_that_are_told_fit_and_the_cheapest_comes_first() -> None:
    config = llama_config(ModelConfig(size="7b"), 32000)
    recipe = Recipe(backend="fsdp", batch=BatchConfig(global_size=512, micro_size=32))
    cluster = Cluster(GPUS["h100"], nodes=1, gpus_per_node=8, node_bandwidth=50e9)
    assert plan_memory(recipe, config, 8).total > cluster.gpu.memory_bytes
    changes = changes_that_fit(recipe, config, cluster)
    assert changes
    costs = [change.step_seconds * change.nodes for change in changes]
    assert costs == sorted(costs)
    for change in changes:
        assert plan_memory(change.recipe, config, 8 * change.nodes).total <= cluster.gpu.memory_bytes


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    recipe = _recipe("fsdp", 2)
    with pytest.raises(UserError, match=r"batch\.global_size is 4"):
        plan_memory(recipe, _odd(), 3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_ranks_of_a_real_run_hold_what_the_plan_says(backend: BackendName) -> None:
    run_on_ranks(2, _hold_what_is_planned, backend)


def _hold_what_is_planned(backend: BackendName) -> None:
    recipe, config = small_recipe(backend), _odd()
    config.vocab_size = 131  # of `small.micro_batches`
    states = plan_states(recipe, config, 2)
    real = seeded_backend(recipe, config)
    train_steps(real, 0, 1, accumulation=1)
    held = sum(tensor.nbytes for name, tensor in local_state(real).items() if name != "optim.step")
    assert held <= states.masters + states.moments
    assert held == pytest.approx(states.masters + states.moments, rel=0.02)
    assert real.step_bytes() == pytest.approx(states.update, rel=0.02)
