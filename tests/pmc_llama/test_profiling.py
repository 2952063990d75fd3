"""A profile says where a step goes: the kinds add up to it, and what a step is made of is found."""

import gzip
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama.config import BackendName
from pmc_llama.model import LlamaForPretraining
from pmc_llama.profile_kinds import COMMUNICATION, DATA_PHASE, MODEL_PHASE, OPTIMIZER_PHASE
from pmc_llama.profile_table import EXPOSED, GAPS, KINDS, Profile, profile_of
from pmc_llama.profiling import StepProfiler, markdown, read_profile
from tests.pmc_llama.small import CPU, gathered_config, micro_batches, seeded_backend, small_recipe
from tests.ranks import run_on_ranks

SLEEP = 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another on a busy machine would drown what is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Bare:
    """A model without a backend, and its steps."""

    def __init__(self, sequence: int = 16, **sizes: int) -> None:
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        torch.manual_seed(0)
        self.model = LlamaForPretraining(LlamaConfig(num_hidden_layers=1, **{**shape, **sizes}))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.sequence = sequence

    def step(self, profiler: StepProfiler, step: int, reading: float = 0.0, python: float = 0.0) -> float:
        """Make a step that sleeps some seconds in two phases; the seconds between begin and end."""
        profiler.step_begins(step)
        begin = time.perf_counter()
        profiler.phase(DATA_PHASE)
        time.sleep(reading)
        tokens = torch.randint(0, 64, (2, self.sequence))
        profiler.phase(MODEL_PHASE)
        time.sleep(python)
        self.model(tokens, tokens).backward()
        profiler.phase(OPTIMIZER_PHASE)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        profiler.step_ends(step)
        return seconds


def _profiled(directory: Path, bare: Bare, **sleeps: float) -> tuple[Profile, list[float]]:
    """The profile of the third and fourth step, and their seconds by another clock."""
    profiler = StepProfiler(directory, range(3, 5), 0, CPU)
    seconds = [bare.step(profiler, step, **sleeps) for step in range(1, 6)]
    assert profiler.ended()
    return read_profile(directory / "profile" / "profile.json"), seconds[2:4]


def _largest(profile: Profile) -> str:
    return max(KINDS, key=lambda kind: profile.seconds[kind])


def test_the_kinds_add_up_to_the_time_of_a_step_and_the_phases_to_the_kinds(tmp_path: Path) -> None:
    profile, seconds = _profiled(tmp_path, Bare(sequence=64, hidden_size=128), reading=SLEEP)
    assert (profile.device, profile.ranks, profile.steps) == ("cpu", 1, [3, 4])
    assert sum(profile.seconds[kind] for kind in KINDS) == pytest.approx(profile.step_seconds)
    assert profile.step_seconds == pytest.approx(sum(seconds) / 2, rel=0.01, abs=0.005)
    assert list(profile.phases) == [DATA_PHASE, MODEL_PHASE, OPTIMIZER_PHASE]
    for kind in KINDS:
        parts = sum(phase[kind] for phase in profile.phases.values())
        if kind == GAPS:  # the host may be kept from going on between two phases, for any time
            assert parts <= profile.seconds[kind] + 1e-9
        else:
            assert parts == pytest.approx(profile.seconds[kind], abs=1e-4)
    for kind in ("attention", "matrix products", "norm and elementwise", "loss"):
        assert 0 < profile.seconds[kind] == profile.phases[MODEL_PHASE][kind]
    assert 0 < profile.seconds["optimizer"] == profile.phases[OPTIMIZER_PHASE]["optimizer"]


@pytest.mark.parametrize(
    ("kind", "sequence", "sizes"),
    [
        ("attention", 512, {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 8}),
        ("matrix products", 64, {"hidden_size": 256, "intermediate_size": 2048}),
    ],
)
def test_what_a_model_is_made_to_spend_its_time_on_is_found(
    tmp_path: Path, kind: str, sequence: int, sizes: dict[str, int]
) -> None:
    profile, _ = _profiled(tmp_path, Bare(sequence, **sizes))
    assert _largest(profile) == kind


def test_a_large_vocabulary_is_spent_on_the_loss_and_the_products_of_the_output_layer(tmp_path: Path) -> None:
    profile, _ = _profiled(tmp_path, Bare(128, vocab_size=8_000, hidden_size=8, intermediate_size=8))
    assert sorted(KINDS, key=lambda kind: profile.seconds[kind])[-2:] in (
        ["loss", "matrix products"],
        ["matrix products", "loss"],
    )


@pytest.mark.parametrize(("kind", "where"), [("data", "reading"), (GAPS, "python")])
def test_time_without_operators_belongs_to_the_data_or_to_the_host(
    tmp_path: Path, kind: str, where: str
) -> None:
    profile, _ = _profiled(tmp_path, Bare(), **{where: SLEEP})
    assert profile.seconds[kind] >= SLEEP
    assert profile.seconds[kind] < profile.step_seconds


def test_only_the_asked_steps_are_recorded_and_a_trace_is_left(tmp_path: Path) -> None:
    _profiled(tmp_path, Bare())
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "profile.json",
        "profile.md",
        "rank-00000.trace.json.gz",
    ]
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "rank-00000.trace.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    assert [name for name in names if name.startswith("pmc_llama step")] == [
        "pmc_llama step 3",
        "pmc_llama step 4",
    ]
    assert names.count("aten::_fused_adamw_") == 2


def test_the_table_has_a_row_a_kind_and_the_whole(tmp_path: Path) -> None:
    profile, _ = _profiled(tmp_path, Bare())
    table = (tmp_path / "profile" / "profile.md").read_text()
    assert table == markdown(profile)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [*KINDS, "**all**"]
    shares = [float(row[2].rstrip("%")) for row in rows[2:-1]]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_a_run_that_ends_early_has_the_profile_of_what_it_made(tmp_path: Path) -> None:
    bare, profiler = Bare(), StepProfiler(tmp_path, range(1, 9), 0, CPU)
    for step in (1, 2):
        bare.step(profiler, step)
    assert not profiler.ended()
    profiler.close()
    assert profiler.ended()
    assert read_profile(tmp_path / "profile" / "profile.json").steps == [1, 2]


def test_steps_that_are_passed_over_end_the_profile(tmp_path: Path) -> None:
    bare, profiler = Bare(), StepProfiler(tmp_path, range(2, 4), 0, CPU)
    for step in (1, 2, 7):
        bare.step(profiler, step)
    assert profiler.ended()
    assert read_profile(tmp_path / "profile" / "profile.json").steps == [2]


@pytest.mark.parametrize("steps", [range(6, 6), range(6, 9)])
def test_nothing_is_written_when_no_step_is_profiled(tmp_path: Path, steps: range) -> None:
    bare, profiler = Bare(), StepProfiler(tmp_path, steps, 0, CPU)
    for step in range(1, 6):
        bare.step(profiler, step)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    bare, profiler = Bare(), StepProfiler(tmp_path, range(1, 2), 0, CPU)
    with pytest.raises(UserError, match=f"profile cannot be written to {tmp_path / 'profile'}"):
        bare.step(profiler, 1)


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"device": "cpu"}'])
def test_what_is_not_a_profile_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"profile\.json"):
        read_profile(path)


# --- traces made by hand: microseconds after the step's begin -----------------------------------------------


class HandMadeTrace:
    """Events of a main thread (1), autograd's thread (2), a compute stream (7) and NCCL's (20)."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.launches = 0

    def add(self, category: str, name: str, begin: int, end: int, thread: int = 1, **arguments: int) -> None:
        event = {"ph": "X", "cat": category, "name": name, "ts": 5000.0 + begin, "dur": float(end - begin)}
        self.events.append({**event, "pid": 1, "tid": thread, "args": arguments})

    def operator(
        self,
        name: str,
        begin: int,
        end: int,
        kernel: tuple[str, int, int] | None = None,
        thread: int = 1,
        stream: int = 7,
        sequence: int | None = None,
        node: str = "",
    ) -> None:
        """An operator that launches a kernel, in a node of the backward pass where one is named."""
        numbers = {} if sequence is None else {"Sequence number": sequence}
        if node:
            self.add("cpu_op", node, begin, end, thread, **numbers, **{"Fwd thread id": 1})
            numbers = {}
        self.add("cpu_op", name, begin, end, thread, **numbers)
        if kernel:
            self.launches += 1
            category = "gpu_memcpy" if kernel[0].startswith("Memcpy") else "kernel"
            self.add(
                "cuda_runtime", "cudaLaunchKernel", begin + 1, end - 1, thread, correlation=self.launches
            )
            self.add(category, *kernel, stream, correlation=self.launches)


@pytest.fixture
def gpu_trace() -> dict[str, Any]:
    trace = HandMadeTrace()
    add, operator = trace.add, trace.operator
    add("user_annotation", "pmc_llama step 6", 0, 1000)
    add("gpu_user_annotation", "pmc_llama step 6", 105, 980, 7)
    add("user_annotation", f"pmc_llama phase {DATA_PHASE}", 0, 100)
    add("user_annotation", f"pmc_llama phase {MODEL_PHASE}", 100, 580)
    add("user_annotation", f"pmc_llama phase {OPTIMIZER_PHASE}", 580, 1000)
    operator("aten::stack", 10, 20)
    operator("aten::to", 101, 104, ("Memcpy HtoD (Pinned -> Device)", 105, 112))
    add("user_annotation", "FSDP::pre_forward (model.layers.0)", 110, 130)
    operator("c10d::_allgather_base_", 112, 120, ("ncclDevKernel_AllGather_RING_LL", 130, 200), stream=20)
    operator("fsdp::split_with_sizes_copy", 122, 126, ("split_with_sizes_copy_out_kernel", 200, 220))
    operator("aten::cat", 131, 135, ("CatArrayBatchedCopy", 112, 120))
    operator("aten::linear", 140, 150, ("sm90_xmma_gemm_bf16bf16", 220, 300), sequence=1)
    flash = "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>"
    operator("aten::scaled_dot_product_attention", 150, 160, (flash, 300, 350), sequence=2)
    add("cpu_op", "aten::clone", 160, 165, **{"Sequence number": 3})
    operator("aten::copy_", 161, 164, ("vectorized_elementwise_kernel", 350, 370))
    operator("## Call CompiledFxGraph fabcd ##", 165, 170, ("triton_poi_fused_add_0", 370, 380))
    operator("aten::linear", 170, 180, ("nvjet_tst_128x256", 380, 400), sequence=4)
    operator("aten::to", 180, 185, ("vectorized_elementwise_kernel", 400, 410), sequence=5)
    operator("aten::cross_entropy_loss", 185, 195, ("cunn_SoftMaxForward", 410, 430), sequence=6)
    backward = partial(operator, thread=2)
    add("cpu_op", "NllLossBackward0", 196, 210, 2, **{"Sequence number": 6, "Fwd thread id": 1})
    backward("aten::linear", 197, 200, ("nvjet_tst_128x256", 120, 130))
    backward("aten::nll_loss_backward", 200, 210, ("cunn_SoftMaxBackward", 430, 440))
    copied = ("vectorized_elementwise_kernel", 440, 450)
    backward("aten::to", 210, 220, copied, sequence=5, node="ToCopyBackward0")
    backward("aten::mm", 220, 230, ("nvjet_tst_64x8", 450, 500), sequence=4, node="MmBackward0")
    flash = "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel"
    backward("aten::_flash_attention_backward", 230, 240, (flash, 500, 560), sequence=2, node="SdpaBackward0")
    add("user_annotation", "FSDP::post_backward_reduce (model.layers.0)", 240, 260, 2)
    reduced = ("ncclDevKernel_ReduceScatter_Sum_f32", 480, 600)
    backward("c10d::_reduce_scatter_base_", 242, 258, reduced, stream=20)
    operator("aten::linalg_vector_norm", 590, 600, ("reduce_kernel", 750, 760))
    operator("aten::_fused_adamw_", 770, 775, ("multi_tensor_apply_kernel", 780, 980))
    return {"traceEvents": trace.events, "distributedInfo": {"world_size": 8}}


def test_on_a_gpu_kernels_are_told_apart_and_exposed_communication_is_what_nothing_hides(
    gpu_trace: dict[str, Any],
) -> None:
    profile = profile_of(gpu_trace)
    assert (profile.device, profile.ranks, profile.steps) == ("cuda", 8, [6])
    assert profile.step_seconds == pytest.approx(1000e-6)
    microseconds = {kind: round(seconds * 1e6, 3) for kind, seconds in profile.seconds.items()}
    assert microseconds == {
        "attention": 50 + 60,
        "matrix products": 80 + 20 + 10 + 50,
        "norm and elementwise": 20 + 10,
        "loss": 10 + 20 + 10 + 10,
        "optimizer": 10 + 200,
        "sharding copies": 8 + 20,
        "exposed communication": 70 + 40,
        "data": 100,
        "host gaps": 195,
        "other": 7,
        "communication": 70 + 120,
    }


def test_on_a_gpu_a_phase_lasts_until_its_kernels_are_done(gpu_trace: dict[str, Any]) -> None:
    phases = profile_of(gpu_trace).phases
    lasted = {name: round(sum(phase[kind] for kind in KINDS) * 1e6, 3) for name, phase in phases.items()}
    assert lasted == {DATA_PHASE: 100, MODEL_PHASE: 500, OPTIMIZER_PHASE: 400}
    assert phases[OPTIMIZER_PHASE][GAPS] == pytest.approx(190e-6)


def test_on_a_cpu_a_compiled_graph_is_elementwise_but_for_the_operators_in_it() -> None:
    trace = HandMadeTrace()
    trace.add("user_annotation", "pmc_llama step 6", 0, 100)
    trace.add("user_annotation", f"pmc_llama phase {MODEL_PHASE}", 0, 100)
    trace.add("cpu_op", "Torch-Compiled Region: 0/0", 10, 60)
    trace.add("cpu_op", "CompiledFunction", 15, 55)
    trace.add("cpu_op", "## Call CompiledFxGraph fabcd ##", 20, 50)
    trace.add("cpu_op", "aten::mm", 30, 40)
    trace.add("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", 42, 45)
    seconds = profile_of({"traceEvents": trace.events}).seconds
    microseconds = {kind: round(seconds[kind] * 1e6, 3) for kind in KINDS if seconds[kind]}
    assert microseconds == {
        "attention": 3,
        "matrix products": 10,
        "norm and elementwise": 17,
        "host gaps": 70,
    }


# --- ranks --------------------------------------------------------------------------------------------------


def _two_ranks(directory: Path, backend_name: BackendName) -> None:
    """Rank 1 is late in every step."""
    backend = seeded_backend(small_recipe(backend_name, accumulation=2), gathered_config())
    profiler = StepProfiler(directory, range(3, 5), dist.get_rank(), CPU)
    for step in range(1, 5):
        profiler.step_begins(step)
        profiler.phase(DATA_PHASE)
        batches, targets = micro_batches(step, 2)
        profiler.phase(MODEL_PHASE)
        time.sleep(4 * SLEEP * dist.get_rank())
        backend.forward_backward(batches, targets)
        profiler.phase(OPTIMIZER_PHASE)
        backend.clip(0.5)
        backend.step(1e-2)
        profiler.step_ends(step)
    backend.close()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_under_both_backends_every_rank_leaves_a_trace_and_waiting_is_communication(
    tmp_path: Path, backend: BackendName
) -> None:
    run_on_ranks(2, _two_ranks, tmp_path, backend)
    profiles = [
        profile_of(
            json.loads(
                gzip.decompress((tmp_path / "profile" / f"rank-0000{rank}.trace.json.gz").read_bytes())
            )
        )
        for rank in (0, 1)
    ]
    for profile in profiles:
        assert (profile.ranks, profile.steps) == (2, [3, 4])
        assert sum(profile.seconds[kind] for kind in KINDS) == pytest.approx(profile.step_seconds)
        for kind in ("attention", "matrix products", "norm and elementwise", "loss", "sharding copies"):
            assert 0 < profile.seconds[kind] == pytest.approx(profile.phases[MODEL_PHASE][kind])
        assert 0 < profile.seconds["optimizer"] == profile.phases[OPTIMIZER_PHASE]["optimizer"]
        assert 0 < profile.seconds[EXPOSED] <= profile.seconds[COMMUNICATION]
    waits, sleeps = profiles
    assert waits.seconds[EXPOSED] > 3 * SLEEP
    assert sleeps.seconds[GAPS] > 3 * SLEEP
    assert read_profile(tmp_path / "profile" / "profile.json") == waits
