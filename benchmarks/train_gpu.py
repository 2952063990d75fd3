"""Training speed on one GPU: tokens/s, MFU, memory and where a step goes, under both backends.

One call, of at most ten minutes on a GPU, makes its inputs (a corpus of random tokens, random weights),
measures what matrix products reach at the model's shapes, and trains a LLaMA-7B, or as many of its layers as
the GPU has room for, once for each variant and backend: first as recipes have it, then with a thing changed.
Every row is a process of its own with a time limit, killed once it has made its steps, before it would save;
one that fails is a row that says why. Rows of one sequence length train on the same tokens from the same
weights, so their losses must agree, which is checked. benchmarks/train_gpu.md is written after every row.

    python -m benchmarks.train_gpu

On a machine without DeepSpeed, or other packages, wheels that were brought along are put into a temporary
directory, without what they depend on:

    python -m benchmarks.train_gpu --deepspeed-wheel wheels/deepspeed-*.whl wheels/hjson-*.whl

Without a GPU the same runs with a tiny model, and the table says "not yet measured on GPU".
"""

import argparse
import hashlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file
from transformers import LlamaConfig

from data_tools.files import write_published
from data_tools.manifest import (
    Counts,
    FileInfo,
    Inputs,
    Manifest,
    PartInfo,
    SplitInfo,
    TokenizerInfo,
    write_manifest,
)
from data_tools.recipe import Recipe
from data_tools.splits import array_file, split_file
from data_tools.token_files import TokenFileWriter
from pmc_llama.config import ModelConfig
from pmc_llama.flops import PEAK_FLOPS, model_flops_per_token
from pmc_llama.metrics import read_metrics
from pmc_llama.model import llama_config
from pmc_llama.plan.states import parameter_shapes
from pmc_llama.profile_table import KINDS
from pmc_llama.profiling import Profile, read_profile

TABLE = Path(__file__).with_suffix(".md")
_TOKENIZER = Path(__file__).parents[1] / "sample" / "tokenizer.model"
BACKENDS = ("fsdp", "deepspeed")
STEPS = 16  # the first five warm up, the next three are profiled, and what follows the ninth counts
_COUNTED_FROM = 9
TOLERANCE = 0.01  # of losses, relative: the largest of all steps, from the row that they are compared with
_SECONDS_OF_ROW = 150  # start, weights, compilation, steps
_LEAST_SECONDS = 40  # below which no row is begun
NOT_YET = "not yet measured on GPU"


class Size(NamedTuple):
    """What is trained.

    Attributes:
        layers: of LLaMA-7B; 32 are all.
        micro: sequences of a micro-batch, by sequence length.
        tokens: of a step.
    """

    layers: int
    micro: Mapping[int, int]
    tokens: int


# The most that fits under ZeRO-3 without recomputation, by `pmc-llama plan`; FSDP2 needs less.
SIZES = {
    "NVIDIA H200": Size(32, {2048: 1, 512: 4}, 16384),
    "NVIDIA H100 80GB HBM3": Size(16, {2048: 2, 512: 8}, 16384),
}
TINY = Size(2, {64: 2, 32: 4}, 512)


class Variant(NamedTuple):
    """What a row differs in.

    Attributes:
        name: what is changed.
        settings: of the recipe, beside those of all rows.
        more: times the micro-batch, for variants that save memory.
    """

    name: str
    settings: Mapping[str, str] = {}
    more: int = 1


def _turned(key: str, default: bool, off: str, on: str) -> Variant:
    """A switch of the recipe, turned from what it is by default; `off` and `on` say what it then is."""
    return Variant(off if default else on, {key: str(not default).lower()})


_CHECKPOINTING = "sharding.activation_checkpointing"
_SAVERS = (
    Variant("selective recomputation, twice the micro-batch", {_CHECKPOINTING: "selective"}, more=2),
    Variant("full recomputation, four times the micro-batch", {_CHECKPOINTING: "full"}, more=4),
    Variant("parameters kept gathered", {"sharding.reshard_after_forward": "false"}),
    Variant("gradients summed in bf16", {"precision.reduce": "bf16"}),
)


@dataclass
class Row:
    """A run, and what was measured of it.

    Attributes:
        backend: that it ran under.
        variant: with what changed.
        length: tokens of a sequence.
        micro: sequences of a micro-batch.
        said: why there are no figures; empty when there are.
        losses: of every step.
        tokens_per_second: at steady state.
        peak_bytes: most memory.
        profile: where a step goes.
    """

    backend: str
    variant: Variant
    length: int
    micro: int
    said: str = "not reached"
    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    profile: Profile | None = None


@dataclass
class Bench:
    """The whole of it.

    Attributes:
        device: name of the GPU; None without one.
        size: what is trained.
        config: its model.
        directory: of inputs and runs.
        path: directories before all others in which processes find packages.
        deadline: in seconds of `time.monotonic`.
        rows: in the order in which they run.
        ceiling: FLOP/s of matrix products of the model, by itself.
    """

    device: str | None
    size: Size
    config: LlamaConfig
    directory: Path
    path: list[str]
    deadline: float
    rows: list[Row]
    ceiling: float = 0.0


def main() -> None:
    """Run everything and write the table; or, as a process of its own, make weights or measure products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    minutes = 9.5 if torch.cuda.is_available() else 30.0
    parser.add_argument("--minutes", type=float, default=minutes, help="after which no row runs on")
    parser.add_argument("--deepspeed-wheel", nargs="+", type=Path, default=[], metavar="WHEEL")
    parser.add_argument("--table", type=Path, default=TABLE, help="Markdown file to write")
    parser.add_argument("--make-weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceiling", type=int, metavar="TOKENS", help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_weights:
        _make_weights(LlamaConfig.from_json_file(options.config), options.make_weights)
    elif options.ceiling:
        print(_ceiling(LlamaConfig.from_json_file(options.config), options.ceiling))
    else:
        deadline = time.monotonic() + 60 * options.minutes
        with tempfile.TemporaryDirectory() as name:
            _bench(Path(name), deadline, options.deepspeed_wheel, options.table)


def _bench(directory: Path, deadline: float, wheels: Sequence[Path], table: Path) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if device is not None and device not in SIZES:
        sys.exit(f"{device} is not in SIZES; find what fits it with `pmc-llama plan`, and add a line.")
    size = TINY if device is None else SIZES[device]
    config = _config(size, tiny=device is None)
    path = [str(Path(__file__).parents[1])]
    if wheels:
        target = directory / "packages"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*install, *map(str, wheels)], check=True)
        path.insert(0, str(target))
    bench = Bench(device, size, config, directory, path, deadline, list(_rows(size, device is not None)))
    _write(bench, table)
    _make_inputs(bench)
    told = _child(bench, ["--ceiling", str(size.tokens // 4)])
    bench.ceiling = float(told.splitlines()[-1])
    for row in bench.rows:
        print(f"{row.backend}, {row.length} x {row.micro}, {row.variant.name} ...", flush=True)
        begin = time.monotonic()
        _measure(bench, row)
        speed = f"{row.tokens_per_second:,.0f} tokens/s"
        print(f"  {row.said or speed}; {time.monotonic() - begin:.0f} s", flush=True)
        _write(bench, table)


def _rows(size: Size, gpu: bool) -> Iterator[Row]:
    """As it is, under both backends at all lengths, the longest first; then the other variants."""
    longest = next(iter(size.micro))
    for length, micro in size.micro.items():
        for backend in BACKENDS:
            yield Row(backend, Variant("as it is"), length, micro)
    for backend in BACKENDS:
        compiled = gpu and backend == "fsdp"
        variant = _turned("speed.compile", compiled, "layers not compiled", "layers compiled")
        yield Row(backend, variant, longest, size.micro[longest])
    for backend in BACKENDS:
        variant = _turned("speed.read_late", gpu, "a step read at once", "a step read late")
        yield Row(backend, variant, longest, size.micro[longest])
    for variant in _SAVERS:
        for backend in BACKENDS:
            yield Row(backend, variant, longest, variant.more * size.micro[longest])


# --- inputs ------------------------------------------------------------------------------------------------


def _config(size: Size, tiny: bool) -> LlamaConfig:
    config = llama_config(ModelConfig(size="demo" if tiny else "7b"), 32000)
    config.num_hidden_layers = size.layers
    return config


def _make_inputs(bench: Bench) -> None:
    """A corpus, and weights as transformers draws them, in bf16."""
    _make_corpus(bench.directory / "corpus", bench.config.vocab_size, (STEPS + 4) * bench.size.tokens)
    bench.config.to_json_file(bench.directory / "config.json")
    _child(bench, ["--make-weights", str(bench.directory / "weights")])


def _make_corpus(directory: Path, vocab_size: int, tokens: int) -> None:
    """A corpus of documents of 2,048 tokens in which every id is drawn alike; the last one is held out."""
    dtype, length = np.dtype("<u2"), 2048
    count = tokens // length + 2
    (directory / "parts").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with TokenFileWriter(directory / "parts" / "part-00000", dtype) as writer:
        for _ in range(count):
            writer.add(draw.integers(3, vocab_size, length).astype(dtype))
    lengths, chosen = np.full(count, length, np.int64), np.arange(count) < count - 1
    contents = {"reasons": array_file(np.zeros(count, np.uint8))}
    splits: dict[str, SplitInfo] = {}
    for name, of_split in (("train", chosen), ("heldout", ~chosen)):
        contents[name] = split_file(lengths, of_split, np.zeros(1, np.int64))
        documents = int(of_split.sum())
        splits[name] = SplitInfo(documents, documents * length, _file_info(contents[name]))
    for empty in ("parts/part-00000.documents.parquet", "parts/part-00000.rejected.jsonl", "rejected.jsonl"):
        (directory / empty).touch()
    tokenizer = _TOKENIZER.read_bytes()  # of fewer pieces than there are ids, and never asked for any
    (directory / "tokenizer.model").write_bytes(tokenizer)
    parts = (directory / "parts").iterdir()
    files = {path.name.partition(".")[2]: _file_info(path.read_bytes()) for path in parts}
    sha256 = hashlib.sha256(tokenizer).hexdigest()
    manifest = Manifest(
        tokenizer=TokenizerInfo(sha256, vocab_size, 1, 2, 0, "tokenizer.model"),
        dtype="uint16",
        rules_version=1,
        recipe=Recipe(),
        counts=Counts(read=count, kept=count),
        decisions=[],
        splits=splits,
        files={"reasons.npy": _file_info(contents["reasons"]), "rejected.jsonl": _file_info(b"")},
        parts=[PartInfo("part-00000", count, writer.tokens, Inputs("random", 1, 0, "0" * 32), files)],
    )
    for name, content in contents.items():
        manifest.path(directory, f"{name}.npy").write_bytes(content)
    write_manifest(directory, manifest)


def _file_info(content: bytes) -> FileInfo:
    return FileInfo(len(content), xxhash.xxh3_128_hexdigest(content))


def _make_weights(config: LlamaConfig, directory: Path) -> None:
    directory.mkdir()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        weight = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if "norm" not in name:
            weight.normal_(0.0, config.initializer_range, generator=draw)
        weights[name] = weight.cpu()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config.to_json_file(directory / "config.json")


def _ceiling(config: LlamaConfig, tokens: int) -> float:
    """FLOP/s of the model's own matrix products in bf16, forward, each over and over for a while.

    Weighted as the model has them: the FLOPs of all over the seconds of all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, wide = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layers = config.num_hidden_layers
    counts = {(hidden, heads): 2 * layers, (hidden, keys): 2 * layers, (hidden, wide): 3 * layers}
    counts[hidden, config.vocab_size] = 1
    flops = seconds = 0.0
    for (inner, outer), count in counts.items():
        one = torch.randn(tokens, inner, dtype=torch.bfloat16, device=device)
        other = torch.randn(outer, inner, dtype=torch.bfloat16, device=device).T
        seconds += count * _seconds_of(one, other)
        flops += count * 2.0 * tokens * inner * outer
    return flops / seconds


def _seconds_of(one: torch.Tensor, other: torch.Tensor, repeats: int = 20) -> float:
    """Of a product: the median of five times `repeats`."""
    times = []
    for _ in range(6):  # the first is left out
        _synchronize(one)
        begin = time.perf_counter()
        for _ in range(repeats):
            one @ other
        _synchronize(one)
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times[1:])


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _child(bench: Bench, arguments: Sequence[str]) -> str:
    """Run this module as a process of its own, so that this one never holds memory of the GPU."""
    command = [sys.executable, "-m", "benchmarks.train_gpu", *arguments]
    command += ["--config", str(bench.directory / "config.json")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=_environment(bench), timeout=_SECONDS_OF_ROW
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def _environment(bench: Bench) -> dict[str, str]:
    path = [*bench.path, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


# --- a row -------------------------------------------------------------------------------------------------


def _measure(bench: Bench, row: Row) -> None:
    """Train, and fill in `row`."""
    left = bench.deadline - time.monotonic()
    if left < _LEAST_SECONDS:
        return
    run = bench.directory / "run"
    shutil.rmtree(run, ignore_errors=True)
    row.said = _train(bench, row, run, min(left, _SECONDS_OF_ROW))
    if row.said:
        return
    records = read_metrics(run / "metrics.jsonl")
    ends = [record["seconds_since_start"] for record in records[_COUNTED_FROM - 1 : STEPS]]
    row.losses = [record["loss"] for record in records[:STEPS]]
    row.tokens_per_second = bench.size.tokens / statistics.median(b - a for a, b in pairwise(ends))
    row.peak_bytes = max(record["peak_memory_bytes"] for record in records)
    row.profile = read_profile(run / "profile" / "profile.json")


def _train(bench: Bench, row: Row, run: Path, seconds: float) -> str:
    """Train until all steps are recorded, then kill the run; what went wrong, or nothing."""
    options: dict[str, Any] = {
        "output": run,
        "backend": row.backend,
        "model.size": bench.directory / "config.json",
        "model.initialize_from": bench.directory / "weights",
        "data.corpus": bench.directory / "corpus",
        "data.mode": "packed",
        "data.sequence_length": row.length,
        "batch.global_size": bench.size.tokens // row.length,
        "batch.micro_size": row.micro,
        "schedule.steps": 1000,
        "evaluation.max_sequences": 1,
        "logging.profile_steps": 3,
        "dry_run": "false",
        **row.variant.settings,
    }
    recipe = bench.directory / "recipe.yaml"
    recipe.write_text("seed: 1\n")
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    log, until = bench.directory / "log", time.monotonic() + seconds
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pmc_llama.cli", "train", str(recipe), *words],
            stdout=output,
            stderr=output,
            env=_environment(bench),
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if time.monotonic() > until:
                    return f"ran out of time after {_steps_of(run)} steps"
                if _steps_of(run) >= STEPS:
                    return ""
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _reason(log.read_text())


def _steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _reason(log: str) -> str:
    """Why a run ended, in a sentence of its own."""
    if "out of memory" in log.lower() or "does not suffice" in log:
        return "out of memory"
    lines = [line for line in log.splitlines() if line.strip()] or ["ended and said nothing"]
    told = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
    return told.removeprefix("error: ").replace("|", "/")[:200]


# --- the table ---------------------------------------------------------------------------------------------


def _write(bench: Bench, table: Path) -> None:
    write_published(table, "\n".join([*_lines(bench), ""]).encode())


def _lines(bench: Bench) -> Iterator[str]:
    size, config = bench.size, bench.config
    yield "# Training speed on one GPU"
    yield ""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "deepspeed", "transformers"))
    where = f"one {bench.device}" if bench.device else f"a CPU, where nothing here was timed: {NOT_YET}"
    ran = f"Python {platform.python_version()}, {packages} · {datetime.now(UTC):%Y-%m-%d}"
    yield f"`python -m benchmarks.train_gpu` · {where} · {ran}"
    yield ""
    parameters = sum(shape.numel() for shape in parameter_shapes(config).values())
    name = "the demo's shape" if bench.device is None else "LLaMA-7B's shape"
    yield (
        f"A LLaMA of {name}, {size.layers} layers, {parameters:,} parameters; bf16 compute, fp32 masters, "
        f"moments and gradients; {size.tokens:,} tokens a step of full rows, no document isolation."
    )
    yield ""
    yield (
        "MFU is tokens/s times 6 N + 12 L H Q T FLOPs a token (PaLM, arXiv 2204.02311, appendix B; N without "
        f"the input embedding) over the dense bf16 peak, {_peak(bench)}. The model's own matrix products, "
        f'alone and forward, weighted as it has them, reach {_reached(bench)}; the column "of ceiling" is '
        "over that. Speed is the median from the end of a step to the end of the next, of "
        f"{STEPS - _COUNTED_FROM} that are not profiled; peak memory is torch's `max_memory_allocated`. "
        '"Loss" is the largest relative difference from the first row of the same length, over '
        f"{STEPS} steps on the same tokens: up to {TOLERANCE:.0%} is rounding."
    )
    yield ""
    columns = ("backend", "tokens", "variant", "tokens/s", "gain", "MFU", "of ceiling", "peak, GiB", "loss")
    yield from _table(columns, [_speeds(bench, row) for row in bench.rows])
    yield ""
    yield "## Where a step goes"
    yield ""
    yield (
        "Milliseconds of a profiled step by kind of work, every moment once; communication, where there is "
        "more than one GPU, as far as nothing hides it."
    )
    yield ""
    yield from _table(("backend", "tokens", "variant", *KINDS), [_profiled(bench, row) for row in bench.rows])
    if bench.device is not None:
        yield from _published()


def _published() -> Iterator[str]:
    yield ""
    yield "## Beside what was published"
    yield ""
    yield (
        "Of a GPU among 8 or more, in bf16, tokens/s: MPT-7B at 2,048 on H100 10,643, 46% (llm-foundry, "
        "scripts/train/benchmarking/README.md); Llama-2-7B at 4,096 on H100 9,600, 46%, and on A100 4,550, "
        "68%, compiled (fms-fsdp, README.md); Granite-7B on 4 A100, FSDP 3,159 and ZeRO-3 3,094 (Hugging "
        "Face blog, From DeepSpeed to FSDP and Back Again); LLaMA-7B at 512 on A100 2,370, 31% "
        "(chaoyi-wu/Finetune_LLAMA, README.md)."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(cells)} |"


def _names(row: Row) -> list[str]:
    return [row.backend, f"{row.micro} x {row.length}", row.variant.name]


def _speeds(bench: Bench, row: Row) -> list[str]:
    if not row.losses or bench.device is None:
        return [*_names(row), _without_figures(bench, row), *[""] * 4, _agreement(bench, row)]
    plain = _plain(bench, row)
    flops = row.tokens_per_second * model_flops_per_token(bench.config, row.length)
    gain = f"{row.tokens_per_second / plain.tokens_per_second - 1:+.1%}" if plain.losses else ""
    return [
        *_names(row),
        f"{row.tokens_per_second:,.0f}",
        "" if plain is row else gain,
        f"{flops / PEAK_FLOPS[bench.device]:.1%}",
        f"{flops / bench.ceiling:.1%}",
        f"{row.peak_bytes / 2**30:.1f}",
        _agreement(bench, row),
    ]


def _without_figures(bench: Bench, row: Row) -> str:
    if bench.device is None:
        return f"{NOT_YET}; on CPU: {row.said or 'it runs'}"
    return row.said


def _plain(bench: Bench, row: Row) -> Row:
    """The row without changes, of the same backend and length."""
    return next(other for other in bench.rows if (other.backend, other.length) == (row.backend, row.length))


def _agreement(bench: Bench, row: Row) -> str:
    """How far the losses are from those of the first row of the same length."""
    first = next(other for other in bench.rows if other.length == row.length)
    if first is row or not first.losses or not row.losses:
        return ""
    pairs = zip(first.losses, row.losses, strict=True)
    largest = max(abs(one - other) / one for one, other in pairs)
    return f"{largest:.1e}{'' if largest <= TOLERANCE else ', TOO FAR'}"


def _profiled(bench: Bench, row: Row) -> list[str]:
    if row.profile is None or bench.device is None:
        return [*_names(row), _without_figures(bench, row), *[""] * (len(KINDS) - 1)]
    return [*_names(row), *(f"{1000 * row.profile.seconds[kind]:.1f}" for kind in KINDS)]


def _peak(bench: Bench) -> str:
    return NOT_YET if bench.device is None else f"{PEAK_FLOPS[bench.device] / 1e12:,.1f} TFLOP/s"


def _reached(bench: Bench) -> str:
    return NOT_YET if bench.device is None else f"{bench.ceiling / 1e12:,.1f} TFLOP/s"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of the wheel"


if __name__ == "__main__":
    main()
