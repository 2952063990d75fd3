"""What the trainer itself costs: `pmc-llama train` beside a bare loop with the same model and sharding.

The bare loop is what a careful user would write in an afternoon: the same LLaMA, the library's own sharding,
AdamW and clipping, batches that lie in memory, the mean loss over the ranks at every step, and nothing else.
The trainer reads its corpus, logs every step to the console, metrics.jsonl and TensorBoard, and watches for
trouble. Both run as fresh processes on the same number of ranks and take turns; what counts is the median
time from the end of a step to the end of the next, after the first few. The trainer's own account of its
start, up to the first step, stands below each line: that of the last pair.

    python -m benchmarks.train_cost
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig

from pmc_llama.config import BatchConfig, Recipe

BACKENDS = ("deepspeed", "fsdp")
_WARM_UP = 5  # steps left out
_SEQUENCE, _GLOBAL, _MICRO = 256, 8, 2
_SIZE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
_BIN = Path(sys.executable).parent
_SAMPLE = Path(__file__).parents[1] / "sample"


def main() -> None:
    """Run the pairs and print a table; or, under torchrun, be the bare loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--bare", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        _bare_loop(options.bare, LlamaConfig.from_json_file(options.config), options.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        config = _prepare(Path(name))
        pairs, steps = options.pairs, options.steps
        print(f"{pairs} pairs of {steps} steps of {_GLOBAL} x {_SEQUENCE} tokens; tokens/s, median (each)")
        for backend in options.backends:
            for ranks in options.ranks:
                _compare(Path(name), config, backend, ranks, pairs, steps)


def _compare(directory: Path, config: Path, backend: str, ranks: int, pairs: int, steps: int) -> None:
    ours, bare, starts = [], [], []
    for pair in range(pairs):
        run = directory / f"{backend}-{ranks}-{pair}"
        rows, account = _train(run, directory / "corpus", config, backend, ranks, steps)
        ours.append(_speed([row["seconds_since_start"] for row in rows]))
        starts.append(rows[0]["seconds_since_start"])
        bare.append(_speed(_bare(config, backend, ranks, steps)))
    ratio = statistics.median(one / other for one, other in zip(ours, bare, strict=True))
    speeds = f"pmc-llama {_told(ours)}  bare {_told(bare)}  median of the ratios {ratio:.3f}"
    start = f"first step after {statistics.median(starts):.1f} s"
    print(f"{backend:9} {ranks} rank{'s' * (ranks > 1):1}  {speeds}; {start}", flush=True)
    print(f"          {account}", flush=True)


def _prepare(directory: Path) -> Path:
    """A corpus of the sample papers, and the model's configuration."""
    build = [_BIN / "pmc-data", "build", "--input", _SAMPLE / "s2orc", _SAMPLE / "jats", "--max_bad", "0.1"]
    build += ["--tokenizer", _SAMPLE / "tokenizer.model", "--output", directory / "corpus"]
    subprocess.run(build, check=True, capture_output=True)
    vocab_size = json.loads((directory / "corpus" / "corpus.json").read_text())["tokenizer"]["vocab_size"]
    path = directory / "config.json"
    LlamaConfig(vocab_size=vocab_size, **_SIZE).to_json_file(path)
    return path


def _launch(ranks: int, arguments: list[Any]) -> str:
    command = [_BIN / "torchrun", "--standalone", "--nproc-per-node", str(ranks), *map(str, arguments)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def _train(
    run: Path, corpus: Path, config: Path, backend: str, ranks: int, steps: int
) -> tuple[list[dict[str, Any]], str]:
    """The records of a run, and what it says of its start."""
    recipe = run.with_suffix(".yaml")
    recipe.write_text("seed: 1\n")
    options = {
        "output": run,
        "backend": backend,
        "model.size": config,
        "data.corpus": corpus,
        "data.mode": "packed",
        "data.sequence_length": _SEQUENCE,
        "batch.global_size": _GLOBAL,
        "batch.micro_size": _MICRO,
        "schedule.steps": steps,
        "evaluation.max_sequences": 2,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    output = _launch(ranks, ["--module", "pmc_llama.cli", "train", recipe, *words])
    account = next(line for line in output.splitlines() if line.startswith("first step"))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()], account


def _bare(config: Path, backend: str, ranks: int, steps: int) -> list[float]:
    module = ["--module", "benchmarks.train_cost", "--bare", backend]
    output = _launch(ranks, [*module, "--config", config, "--steps", steps])
    ends: list[float] = json.loads(output.splitlines()[-1])
    return ends


def _speed(ends: list[float]) -> float:
    """Tokens/s, from when each step ended; the last one is followed by a checkpoint and left out."""
    seconds = [end - begin for begin, end in pairwise(ends)]
    return _GLOBAL * _SEQUENCE / statistics.median(seconds[_WARM_UP:-1])


def _told(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):,.0f} ({' '.join(f'{speed:,.0f}' for speed in speeds)})"


# --- the bare loop -----------------------------------------------------------------------------------------


def _bare_loop(backend: str, config: LlamaConfig, steps: int) -> None:
    """Print when each step ended, in seconds, as JSON, on rank 0."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    per_rank = _GLOBAL // dist.get_world_size()
    tokens = torch.randint(0, config.vocab_size, (steps, per_rank // _MICRO, _MICRO, _SEQUENCE + 1))
    step_on = (_deepspeed if backend == "deepspeed" else _fsdp)(config)
    ends = []
    for step in range(steps):
        loss = step_on(tokens[step])
        dist.all_reduce(loss)
        float(loss)
        ends.append(time.perf_counter())
    if dist.get_rank() == 0:
        print(json.dumps(ends))
    dist.destroy_process_group()


def _fsdp(config: LlamaConfig) -> Callable[[Tensor], Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from pmc_llama.model import LlamaForPretraining

    model = LlamaForPretraining(config)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )

    def step_on(batches: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = model(batch[:, :-1], batch[:, 1:])
            (loss / (_GLOBAL * _SEQUENCE) * dist.get_world_size()).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step_on


def _deepspeed(config: LlamaConfig) -> Callable[[Tensor], Tensor]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    from pmc_llama.backends.deepspeed import engine_settings
    from pmc_llama.model import LlamaForPretraining

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for inference
    accumulation = _GLOBAL // _MICRO // dist.get_world_size()
    recipe = Recipe(batch=BatchConfig(_GLOBAL, _MICRO))
    settings = {
        "train_micro_batch_size_per_gpu": _MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        # What is gathered when, and kept for how long, is the sharding: DeepSpeed's defaults keep all of a
        # model of this size gathered after its first use, which is another amount of communication.
        "zero_optimization": engine_settings(recipe, config, torch.device("cpu"))["zero_optimization"],
    }
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = LlamaForPretraining(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step_on(batches: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = engine(batch[:, :-1], batch[:, 1:])
            engine.backward(loss / (_MICRO * _SEQUENCE))
            engine.step()
            total += loss.detach()
        return total

    return step_on


if __name__ == "__main__":
    main()
