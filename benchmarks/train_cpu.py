"""Training speed on CPU: `pmc-llama train` beside Hugging Face's Trainer, and where a step of ours goes.

Both train the same LLaMA with the same optimizer (torch's fused AdamW), clipping, schedule, batch,
micro-batch and sequence length, attention by SDPA, and tell loss, gradient norm and learning rate of every
step; ours reads its corpus, the Trainer rows of random tokens that lie in memory. Both are fresh processes on
the same number of ranks and take turns of a few seconds, in which the other one is stopped. What counts is
the median time from the end of a step to the end of the next, after the first few. The comparisons, as far as
the Trainer goes on CPU:

    ZeRO-3 beside zero3   in fp32, with the same sharding settings. In bf16 the Trainer asks for `use_cpu`,
                          with which accelerate leaves DeepSpeed off.
    FSDP2 beside fsdp2    in fp32 and bf16, with the same sharding. The Trainer itself has no FSDP2 on CPU:
                          without `use_cpu` it sees no distributed training and refuses, with it accelerate
                          makes DDP of it. So it gets a model to which `fully_shard` was applied before.
    FSDP2 beside ddp      in bf16: what the Trainer does on CPU by itself. Every rank keeps all parameters and
                          gathers none, gradients are summed once a step, and bf16 is autocast's; on one rank
                          the plain model.

At the end, of both backends, steps by kind of work (`logging.profile_steps`), and the share of a step that is
spent outside of the backends: reading batches, records, logs, watching.

    python -m benchmarks.train_cpu
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from benchmarks.small_runs import (
    GLOBAL,
    MICRO,
    SEQUENCE,
    WARM_UP,
    Job,
    prepare,
    records,
    speed,
    start,
    start_training,
    step_ends,
    take_turns,
)
from pmc_llama.config import BatchConfig, PrecisionConfig, Recipe
from pmc_llama.profile_table import KINDS
from pmc_llama.profiling import Profile, read_profile

_PROFILED = 5  # steps


class Case(NamedTuple):
    """Which sharding of ours beside which of the Trainer's, in which dtype."""

    backend: str
    trainer: str  # `zero3`, `fsdp2` or `ddp`
    precision: str

    def __str__(self) -> str:
        return f"{self.backend} beside {self.trainer}, {self.precision}"


CASES = (
    Case("deepspeed", "zero3", "fp32"),
    Case("fsdp", "fsdp2", "fp32"),
    Case("fsdp", "fsdp2", "bf16"),
    Case("fsdp", "ddp", "bf16"),
)


class Run(NamedTuple):
    """A run of ours.

    Attributes:
        speed: tokens/s.
        outside: share of the steps that is not the backend's.
    """

    speed: float
    outside: float


def main() -> None:
    """Run the pairs and print tables; or, as a process of its own, be the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)), help="numbers, from 0")
    parser.add_argument("--trainer", choices=("zero3", "fsdp2", "ddp"), help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        _trainer(options)
        return
    if options.steps < WARM_UP + 3:
        parser.error(f"--steps is {options.steps}, expected {WARM_UP + 3} or more")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        print(f"{options.pairs} pairs of {options.steps} steps of {GLOBAL} x {SEQUENCE} tokens")
        for case in (CASES[number] for number in options.cases):
            for ranks in options.ranks:
                _compare(directory, case, ranks, options.pairs, options.steps)
        for precision in sorted({CASES[number].precision for number in options.cases}):
            for ranks in options.ranks:
                print(_side_by_side(directory, precision, ranks), flush=True)


def _compare(directory: Path, case: Case, ranks: int, pairs: int, steps: int) -> None:
    ours: list[Run] = []
    theirs: list[float] = []
    for pair in range(pairs):
        settings = {"schedule.steps": steps}
        one = start_training(directory, "run", case.backend, case.precision, ranks, settings)
        other = _start_theirs(directory, case, ranks, steps)
        take_turns([one, other] if pair % 2 == 0 else [other, one])
        ours.append(_ours(records(directory, "run")))
        theirs.append(_theirs(other))
    speeds = [run.speed for run in ours]
    ratios = [one / other for one, other in zip(speeds, theirs, strict=True)]
    outside = statistics.median(run.outside for run in ours)
    print(f"\n{case}, {ranks} rank{'s' * (ranks > 1)}")
    print(f"  pmc-llama  {_told(speeds)} tokens/s; outside of the backend {outside:.2%} of a step")
    print(f"  Trainer    {_told(theirs)} tokens/s")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"  ratio      {statistics.median(ratios):.3f} (median of the pairs; {spread})", flush=True)


def _told(speeds: Sequence[float]) -> str:
    return f"{statistics.median(speeds):,.0f} ({' '.join(f'{speed:,.0f}' for speed in speeds)})"


# --- ours --------------------------------------------------------------------------------------------------


def _ours(rows: Sequence[dict[str, Any]]) -> Run:
    shares = []
    for before, row in pairwise(rows[WARM_UP - 1 : -1]):  # the last one is followed by a checkpoint
        seconds = row["seconds_since_start"] - before["seconds_since_start"]
        shares.append(1 - (row["forward_backward_seconds"] + row["optimizer_seconds"]) / seconds)
    return Run(speed(step_ends(rows)), statistics.median(shares))


def _side_by_side(directory: Path, precision: str, ranks: int) -> str:
    """A table of milliseconds a step by kind of work, of both backends."""
    profiles: dict[str, Profile] = {}
    steps = {"schedule.steps": 5 + _PROFILED + 1, "logging.profile_steps": _PROFILED}
    for backend in ("deepspeed", "fsdp"):
        take_turns([start_training(directory, "run", backend, precision, ranks, steps)])
        profiles[backend] = read_profile(directory / "run" / "profile" / "profile.json")
    zero, fsdp = profiles["deepspeed"], profiles["fsdp"]
    lines = [
        f"\nmilliseconds a step, profiled, {precision}, {ranks} rank{'s' * (ranks > 1)}",
        f"{'':24}{'ZeRO-3':>10}{'FSDP2':>10}{'difference':>12}",
    ]
    totals = (zero.step_seconds, fsdp.step_seconds)
    for kind, one, other in [*((k, zero.seconds[k], fsdp.seconds[k]) for k in KINDS), ("all", *totals)]:
        lines.append(f"{kind:24}{1000 * one:10.1f}{1000 * other:10.1f}{1000 * (one - other):+12.1f}")
    lines.append(f"ZeRO-3 has {totals[1] / totals[0]:.3f} of the speed of FSDP2 while both are recorded")
    return "\n".join(lines)


# --- the Trainer -------------------------------------------------------------------------------------------


def _start_theirs(directory: Path, case: Case, ranks: int, steps: int) -> Job:
    options = ["--trainer", case.trainer, "--precision", case.precision, "--steps", steps]
    options += ["--config", directory / "config.json", "--output", directory / "trainer"]
    # Alone and without a launcher the Trainer wraps the model in nothing; DeepSpeed always asks for one.
    launched = ranks > 1 or case.trainer != "ddp"
    return start(directory / "theirs.log", ranks, ["-m", "benchmarks.train_cpu", *options], launched)


def _theirs(job: Job) -> float:
    ends = next(line for line in job.log.read_text().splitlines() if line.startswith("["))
    return speed(json.loads(ends))


def _trainer(options: argparse.Namespace) -> None:
    """Train with Hugging Face's Trainer; rank 0 prints when each step ended, in seconds, as JSON."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    config = LlamaConfig.from_json_file(options.config)
    arguments = TrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=GLOBAL // MICRO // ranks,
        max_steps=options.steps,
        optim="adamw_torch_fused",
        learning_rate=2e-5,
        weight_decay=0.0,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=options.precision == "bf16" and options.trainer == "ddp",
        use_cpu=options.trainer == "ddp",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False if options.trainer == "ddp" else None,
        deepspeed=_zero3(config, ranks) if options.trainer == "zero3" else None,
    )
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (options.steps * GLOBAL, SEQUENCE), generator=draw)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if options.trainer == "fsdp2":
        _shard(model, options.precision)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(ends), flush=True)


def _shard(model: torch.nn.Module, precision: str) -> None:
    """Apply FSDP2 as ours does, on the process group that `TrainingArguments` made."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def _zero3(config: LlamaConfig, ranks: int) -> dict[str, Any]:
    """A configuration for the Trainer, with the sharding settings of ours."""
    import deepspeed

    from pmc_llama.backends.deepspeed import engine_settings

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for inference
    deepspeed.init_distributed(dist_backend="gloo")
    recipe = Recipe(batch=BatchConfig(GLOBAL, MICRO), precision=PrecisionConfig(compute="fp32"))
    return {
        # Not the batch of all ranks: on CPU the Trainer takes itself for one process.
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": GLOBAL // MICRO // ranks,
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's defaults keep all of a model of this size gathered after its first use.
        "zero_optimization": engine_settings(recipe, config, torch.device("cpu"))["zero_optimization"],
    }


if __name__ == "__main__":
    main()
