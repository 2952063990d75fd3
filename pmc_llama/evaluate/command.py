"""`pmc-llama evaluate`: the perplexity of a model on the papers that a corpus holds out."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from data_tools.errors import UserError
from data_tools.files import write_published

_TIMEOUT = timedelta(minutes=30)  # the slowest rank's reading of the weights
_BATCH_TOKENS = 8192
_WINDOW = 2048
_PAPERS = 1000


def evaluate(arguments: Sequence[str]) -> int:
    """Judge a model: its perplexity per token and per byte on the papers that a corpus holds out."""
    options = _parser().parse_args(arguments)
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"--output is {options.output}, but there is no directory for it; make that first.")

    from pmc_llama.distributed import connect, disconnect
    from pmc_llama.ranks import discover

    ranks = discover()
    device = connect(ranks, _TIMEOUT)
    result = _heldout(options, ranks.rank, device)
    if ranks.rank == 0:
        _show(result)
        if options.output:
            _write(result, options.output)
    disconnect()
    return 0


def _heldout(options: argparse.Namespace, rank: int, device: Any) -> dict[str, Any]:
    """What is known of the perplexity, as plain data. Collective."""
    import torch
    import torch.distributed as dist
    import transformers

    from data_tools.corpus import Corpus
    from pmc_llama.evaluate.heldout import read_heldout
    from pmc_llama.evaluate.perplexity import log_likelihoods, summarize
    from pmc_llama.evaluate.progress import TokenProgress, ignore
    from pmc_llama.evaluate.weights import find_model, load_model
    from pmc_llama.huggingface import DTYPES

    source = find_model(options.model)
    corpus = Corpus.open(options.heldout)
    papers = read_heldout(corpus, source, options.max_documents, options.prefix)
    window, stride = _window(options, source.config.max_position_embeddings)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    model = load_model(source, DTYPES[dtype], device)
    begin = time.monotonic()
    progress = TokenProgress() if rank == 0 else ignore
    nats = log_likelihoods(model, papers.tokens, window, stride, options.batch_tokens, progress)
    seconds = time.monotonic() - begin
    found = summarize(nats, papers.targets, papers.bytes)
    return {
        "model": str(options.model),
        "weights": str(source.path),
        "corpus": corpus.location,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer": papers.tokenizer,
        "held_out": papers.held_out,
        "prefix": papers.prefix,
        "window": window,
        "stride": stride,
        "dtype": dtype,
        "device": device.type,
        "ranks": dist.get_world_size(),
        "seconds": round(seconds, 3),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "perplexity": asdict(found),
        "papers": {
            "number": papers.numbers.tolist(),
            "nats": nats.tolist(),
            "tokens": papers.targets.tolist(),
            "bytes": papers.bytes.tolist(),
        },
    }


def _window(options: argparse.Namespace, positions: int) -> tuple[int, int]:
    """Inputs of a window, and targets that each after the first adds."""
    window = options.window or min(_WINDOW, positions)
    stride = options.stride or max(1, window // 2)
    if window > positions:
        raise UserError(f"--window is {window}, but the model has {positions} positions; ask for fewer.")
    if stride > window:
        raise UserError(f"--stride is {stride}, more than the window of {window}: targets would be left out.")
    return window, stride


def _write(result: dict[str, Any], path: Path) -> None:
    try:
        write_published(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"The result cannot be written to {path}: {error.strerror}.") from error


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    found = result["perplexity"]
    table = Table("", "value", "95% interval", title="Held-out papers", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, key in (
        ("perplexity a token", "per_token"),
        ("perplexity a byte", "per_byte"),
        ("bits a byte", "bits_per_byte"),
    ):
        one = found[key]
        digits = 2 if key == "per_token" else 4
        interval = f"{one['low']:,.{digits}f} to {one['high']:,.{digits}f}"
        table.add_row(name, f"{one['value']:,.{digits}f}", interval)
    table.add_row("bytes a token", f"{found['bytes_per_token']:.3f}", "")
    console = Console()
    console.print(table)
    tokenizer = "the corpus'" if result["tokenizer"] == "corpus" else "its own"
    for line in (
        f"{result['weights']} on {found['texts']:,} of {result['held_out']:,} papers held out by "
        f"{result['corpus']}",
        f"{found['tokens']:,} tokens of {tokenizer} tokenizer, {found['bytes']:,} bytes; windows of "
        f"{result['window']:,} tokens, stride {result['stride']:,}, prefix {result['prefix']}, "
        f"{result['dtype']}; {result['seconds']:,.1f} s",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("pmc-llama evaluate", description=evaluate.__doc__)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a Hugging Face directory, a checkpoint, or the output of a run, whose newest checkpoint it is",
    )
    parser.add_argument("--heldout", required=True, metavar="CORPUS", help="directory or URL of a corpus")
    parser.add_argument(
        "--max-documents",
        type=_positive,
        default=_PAPERS,
        metavar="N",
        help=f"evenly spread over those held out, at most (default {_PAPERS:,})",
    )
    parser.add_argument(
        "--window",
        type=_positive,
        metavar="TOKENS",
        help=f"that the model sees at once (default {_WINDOW:,}, or what the model can)",
    )
    parser.add_argument(
        "--stride",
        type=_positive,
        metavar="TOKENS",
        help="that each window of a long paper adds; the others are its context (default half a window)",
    )
    parser.add_argument(
        "--prefix",
        choices=("bos", "eod"),
        default="bos",
        help="the token before a paper: bos as in other tools, eod as in training (default bos)",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of the computation (default bf16, on a CPU fp32)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=_positive,
        default=_BATCH_TOKENS,
        metavar="N",
        help=f"tokens computed at once on each rank (default {_BATCH_TOKENS:,})",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all of it as JSON, too")
    return parser


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 1")
    return int(value)
