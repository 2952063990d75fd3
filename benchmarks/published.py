"""Published training throughput, each run with its own model and settings, to fit the plan and to check it.

What a source does not say is assumed here and said in `note`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from pmc_llama.plan.cluster import GPUS, Cluster, Gpu
from pmc_llama.plan.throughput import COMPILED, Kernels, Recomputation, Shape, Workload

MPT = "llm-foundry, scripts/train/benchmarking/README.md"
FMS = "fms-fsdp, README.md"
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "torchtitan, docs/performance.md (2024)"
GRANITE = "Hugging Face blog, From DeepSpeed to FSDP and Back Again"
PMC = "chaoyi-wu/Finetune_LLAMA, README.md"


@dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        source: where it stands.
        name: of the run.
        work: what a rank did.
        cluster: on what.
        tokens_per_second: of a GPU, as published.
        fitted: the constants that were fitted to it: `speed`, `host` or none, so that it only checks them.
        note: what the source does not say.
    """

    source: str
    name: str
    work: Workload
    cluster: Cluster
    tokens_per_second: float
    fitted: Literal["speed", "input", "host", ""] = ""
    note: str = ""


# MPT: layer norms, GELU and attention each one kernel; no rotary embedding, no biases.
MPT_KERNELS = Kernels("fused", forward=(20, 0, 4), backward=(32, 0, 6))
Fitted = Literal["speed", "input", "host", ""]

NONE, FULL = Recomputation(), Recomputation(1, 1, 1)
# torchtitan's per-operator policy keeps attention and every second matrix product; per layer: every second
# layer.
TITAN_OPERATORS, TITAN_LAYERS = Recomputation(0.5, 0, 1), Recomputation(0.5, 0.5, 0.5)


def _mpt(layers: int, hidden: int, heads: int) -> Shape:
    return Shape(layers, hidden, heads, hidden, hidden, 4 * hidden, 50368, feed_forward_matrices=2, tied=True)


MPT_SHAPES = {"7B": _mpt(32, 4096, 32), "13B": _mpt(40, 5120, 40), "30B": _mpt(48, 7168, 56),
              "70B": _mpt(80, 8192, 64)}  # fmt: skip
LLAMA = {
    "7B": Shape(32, 4096, 32, 4096, 4096, 11008, 32000),
    "13B": Shape(40, 5120, 40, 5120, 5120, 13824, 32000),
    "34B": Shape(48, 8192, 64, 8192, 1024, 22016, 32000),  # Code Llama's, as fms-fsdp has it
    "70B": Shape(80, 8192, 64, 8192, 1024, 28672, 32000),
    "8B": Shape(32, 4096, 32, 4096, 1024, 14336, 128256),  # Llama 3
    "3-70B": Shape(80, 8192, 64, 8192, 1024, 28672, 128256),
}

# Seconds that PMC-LLaMA's trainer waits for a paper: its scripts read a small file for each, in the process
# that trains. Fitted to its two runs without offload; plans have 0, since batches are read ahead.
INPUT = 0.067

# The card of torchtitan's tables of 2024: 96 GB of HBM2e at 2.4 TB/s, held to 500 W; the peak of the usual
# one is taken.
H100_500W = replace(GPUS["h100"], memory_bandwidth=2.4e12)
A100, A100_40, H100 = GPUS["a100"], GPUS["a100-40"], GPUS["h100"]


def _on(gpu: Gpu, gpus: int, gigabits: float, per_node: int = 8) -> Cluster:
    return Cluster(gpu, -(-gpus // per_node), min(gpus, per_node), gigabits * 1e9 / 8)


def _foundry() -> list[Published]:
    rows: list[tuple[str, Gpu, int, int, int, int, Recomputation, float, Fitted]] = [
        # model, GPU, GPUs, sequence, micro-batch, accumulation, recomputation, published, fitted
        ("7B", H100, 8, 2048, 6, 1, NONE, 10643, "speed"),
        ("7B", H100, 128, 2048, 6, 1, NONE, 10475, ""),
        ("7B", H100, 512, 2048, 6, 1, NONE, 9670, "speed"),
        ("7B", H100, 8, 4096, 16, 2, FULL, 8611, ""),
        ("7B", H100, 8, 8192, 8, 2, FULL, 6935, ""),
        ("13B", H100, 8, 2048, 2, 1, NONE, 4792, "speed"),
        ("13B", H100, 64, 2048, 2, 1, NONE, 4800, ""),
        ("13B", H100, 128, 2048, 16, 1, FULL, 5080, ""),
        ("13B", H100, 512, 2048, 16, 1, FULL, 4952, ""),
        ("30B", H100, 32, 2048, 14, 3, FULL, 2308, ""),
        ("30B", H100, 8, 2048, 3, 21, FULL, 2002, ""),
        ("30B", H100, 128, 2048, 8, 1, FULL, 2199, ""),
        ("30B", H100, 512, 2048, 8, 1, FULL, 2115, ""),
        ("70B", H100, 64, 2048, 8, 4, FULL, 1039, "speed"),
        ("70B", H100, 128, 2048, 8, 1, FULL, 1058, ""),
        ("70B", H100, 512, 2048, 8, 1, FULL, 1007, ""),
        ("7B", A100, 8, 2048, 6, 2, NONE, 4641, "speed"),
        ("7B", A100, 8, 4096, 16, 2, FULL, 3684, ""),
        ("13B", A100, 8, 2048, 2, 3, NONE, 2262, ""),
        ("13B", A100, 8, 4096, 10, 3, FULL, 2060, ""),
        ("30B", A100, 8, 2048, 3, 21, FULL, 916, ""),
        ("70B", A100, 64, 2048, 8, 4, FULL, 410, "speed"),
        ("7B", A100_40, 128, 2048, 18, 1, FULL, 3623, ""),
        ("13B", A100_40, 128, 2048, 16, 1, FULL, 1972, ""),
        ("30B", A100_40, 128, 2048, 6, 1, FULL, 865, ""),
        ("70B", A100_40, 128, 2048, 4, 1, FULL, 376, ""),
    ]
    published = []
    for model, gpu, gpus, length, micro, count, again, speed, fitted in rows:
        # `PURE`, in which gradients are summed in bf16, is used in the 40 GB table and by the 70B on A100.
        reduced = 2 if gpu is A100_40 or (gpu is A100 and model == "70B") else 4
        work = Workload(MPT_SHAPES[model], "fsdp", length, micro, count, MPT_KERNELS, recomputation=again,
                        reduce_bytes=reduced)  # fmt: skip
        name = f"MPT-{model} {length} x {micro}{' AC' if again == FULL else ''}, {gpus} {_short(gpu)}"
        cluster = _on(gpu, gpus, 3200 if gpu is H100 else 1600)
        note = "network assumed 3,200 Gbit/s a node" if gpu is H100 and gpus > 8 else ""
        published.append(Published(MPT, name, work, cluster, speed, fitted=fitted, note=note))
    return published


def _short(gpu: Gpu) -> str:
    return next(name for name, known in GPUS.items() if known is gpu)


def _fms() -> list[Published]:
    # Recomputed part from its HFU over MFU on A100: 0.69 / 0.61 for 13B, a third more for 34B and 70B.
    part = Recomputation(0.39, 0.39, 0.39)
    rows: list[tuple[str, Recomputation, int | None, float, float]] = [
        ("7B", NONE, 8, 4550, 9600),
        ("13B", part, None, 2150, 4850),
        ("34B", FULL, None, 820, 1830),
        ("70B", FULL, None, 410, 890),
    ]
    published = []
    for model, again, group, a100, h100 in rows:
        work = Workload(LLAMA[model], "fsdp", 4096, 2, 1, COMPILED, recomputation=again, shard_group=group,
                        reduce_bytes=2)  # fmt: skip
        name = f"Llama-2-{model} 4096 x 2 compiled{' HSDP' if group else ''}"
        fitted: dict[str, Fitted] = {"7B": "speed", "70B": "speed"}
        published += [
            Published(FMS, f"{name}, 128 a100", work, _on(A100, 128, 400), a100, fitted.get(model, "")),
            Published(FMS, f"{name}, 96 h100", work, _on(H100, 96, 800), h100, "speed" if group else ""),
        ]
    return published


def _titan() -> list[Published]:
    published = []
    for gpus, eager, compiled in ((8, 5762, 6667), (128, 5605, 6514)):
        work = Workload(LLAMA["8B"], "fsdp", 8192, 2, recomputation=TITAN_OPERATORS)
        cluster = _on(H100_500W, gpus, 3200)
        name, on = "Llama-3.1-8B 8192 x 2 SAC", f", {gpus} h100 of 500 W"
        published += [
            Published(TITAN, name + on, work, cluster, eager),
            Published(TITAN, f"{name} compiled{on}", replace(work, kernels=COMPILED), cluster, compiled),
        ]
    rows = [
        ("Llama-3-8B 8192 x 1 SAC by operator", "8B", 8192, 1, TITAN_OPERATORS, 2973),
        ("Llama-3-8B 8192 x 1 SAC by layer", "8B", 8192, 1, TITAN_LAYERS, 2904),
        ("Llama-3-70B 8192 x 1 AC", "3-70B", 8192, 1, FULL, 331),
        ("Llama-2-13B 4096 x 2", "13B", 4096, 2, NONE, 2162),
        ("Llama-2-13B 4096 x 2 SAC by operator", "13B", 4096, 2, TITAN_OPERATORS, 1904),
        ("Llama-2-70B 4096 x 1 SAC by operator", "70B", 4096, 1, TITAN_OPERATORS, 355),
        ("Llama-2-70B 4096 x 2 AC", "70B", 4096, 2, FULL, 353),
    ]
    note = "network assumed 1,600 Gbit/s a node; eager"
    for name, model, length, micro, again, speed in rows:
        work = Workload(LLAMA[model], "fsdp", length, micro, recomputation=again)
        published.append(
            Published(TITAN_A100, f"{name}, 64 a100", work, _on(A100, 64, 1600), speed, note=note)
        )
    return published


def _granite() -> list[Published]:
    work = Workload(LLAMA["7B"], "fsdp", 4096, 8, recomputation=FULL, reduce_bytes=2)
    zero = replace(work, backend="deepspeed")
    note = "4,096 tokens by its step time; AC assumed, since 32,768 tokens do not fit without"
    cluster = _on(A100, 4, 0)
    return [
        Published(GRANITE, "Granite-7B 4096 x 8 AC FSDP, 4 a100", work, cluster, 3158.7, "speed", note),
        Published(GRANITE, "Granite-7B 4096 x 8 AC ZeRO-3, 4 a100", zero, cluster, 3094.5, note=note),
    ]


def _pmc() -> list[Published]:
    # Its transformers of early 2023 writes attention scores to memory; no flash attention, no fused kernels.
    seven = Workload(
        LLAMA["7B"], "fsdp", 512, 4, 4, attention="materialized", reduce_bytes=2, input_seconds=INPUT
    )
    checkpointed = replace(seven, micro_size=48, accumulation=1, recomputation=FULL)
    zero = replace(seven, backend="deepspeed", offload="optimizer")
    scripts = "micro-batch and AC as in its scripts; reading as fitted"
    assumed = "micro-batch 4 without AC assumed; reading as fitted"
    rows: list[tuple[str, Workload, int, float, Fitted, str]] = [
        # run, work, accumulation, hours an epoch, fitted, what is assumed
        ("LLaMA-7B 512, batch 128, FSDP", seven, 4, 36, "input", scripts),
        ("LLaMA-7B 512, batch 384, FSDP AC", checkpointed, 1, 35, "input", scripts),
        ("LLaMA-7B 512, batch 384, ZeRO-3 offload optimizer", zero, 12, 90, "host", assumed),
        ("LLaMA-7B 512, batch 128, ZeRO-3 offload all", replace(zero, offload="all"), 4, 100, "", assumed),
        ("LLaMA-7B 512, batch 768, ZeRO-3 offload all", replace(zero, offload="all"), 24, 100, "", assumed),
        ("LLaMA-13B 512, batch 384, ZeRO-3 offload all",
         replace(zero, offload="all", shape=LLAMA["13B"]), 12, 122, "", assumed),
    ]  # fmt: skip
    tokens = 4.8e6 * 512 / 8 / 3600  # of a GPU, an epoch, for each hour that it takes
    return [
        Published(PMC, f"{name}, 8 a100", replace(work, accumulation=count), _on(A100, 8, 0), tokens / hours,
                  fitted, note)
        for name, work, count, hours, fitted, note in rows
    ]  # fmt: skip


def published_runs() -> list[Published]:
    """All of them."""
    return [*_foundry(), *_fms(), *_titan(), *_granite(), *_pmc()]
