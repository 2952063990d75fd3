"""`pmc-llama evaluate`: a model's answers to questions, and its perplexity on papers held out."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from data_tools.errors import UserError
from data_tools.files import write_published
from data_tools.prompts import PromptId
from pmc_llama.arguments import Parser
from pmc_llama.evaluate.results import Method, Setting

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import LlamaForCausalLM

    from pmc_llama.evaluate.weights import ModelSource

_TIMEOUT = timedelta(minutes=30)  # the slowest rank's reading of the weights
_BATCH_TOKENS = 8192
_WINDOW = 2048
_PAPERS = 1000


Judge = Callable[["LlamaForCausalLM"], dict[str, Any]]
"""Judges a model by what was read for it; collective. What it finds, as plain data."""


def evaluate(arguments: Sequence[str]) -> int:
    """Judge a model: its answers to questions, and its perplexity on the papers that a corpus holds out."""
    options = _parser().parse_args(arguments)
    _require_possible(options)

    import torch
    import transformers

    from pmc_llama.distributed import connect, disconnect
    from pmc_llama.evaluate.adapter import with_adapter
    from pmc_llama.evaluate.weights import find_model, load_model
    from pmc_llama.huggingface import DTYPES
    from pmc_llama.ranks import discover

    ranks = discover()
    device = connect(ranks, _TIMEOUT)
    source = find_model(options.model)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    facts = {
        "model": str(options.model),
        "weights": str(source.path),
        "adapter": str(options.adapter) if options.adapter else None,
        "dtype": dtype,
        "device": device.type,
        "ranks": ranks.world_size,
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    # What is asked is read before the weights, so that a mistake in it is told at once.
    judges = [
        prepare(options, source, facts)
        for given, prepare in ((options.heldout, _heldout), (options.questions, _questions))
        if given
    ]
    model = load_model(source, DTYPES[dtype], device)
    if options.adapter:
        model = with_adapter(model, options.adapter)
    result = dict(facts)
    for judge in judges:
        result |= judge(model)
    if ranks.rank == 0:
        _show(result)
        if options.output:
            _write(result, options.output)
    disconnect()
    return 0


def _require_possible(options: argparse.Namespace) -> None:
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"--output is {options.output}, but there is no directory for it; make that first.")
    if not options.heldout and not options.questions:
        raise UserError("Nothing to judge by: give --heldout CORPUS, --questions DIR, or both.")


def _questions(options: argparse.Namespace, source: "ModelSource", facts: dict[str, Any]) -> Judge:
    from data_tools.questions.written import QuestionSets
    from pmc_llama.evaluate.results import FORMAT, VERSION, Scores

    try:
        from pmc_llama.evaluate.scoring import answer, open_model, read_sets
    except ImportError as error:
        raise UserError(
            f"Questions are asked by lm-eval ({error}); pip install 'pmc-llama[eval]'."
        ) from error

    found = QuestionSets.open(options.questions)
    asked = read_sets(found, options.sets, options.split, options.limit)
    method: Method = "generated" if options.generate else "likelihood"

    def judge(model: "LlamaForCausalLM") -> dict[str, Any]:
        begin = time.monotonic()
        lm = open_model(model, source, options.batch_size)
        sets = answer(lm, asked, options.prompt, method)
        scores = Scores(
            format=FORMAT,
            version=VERSION,
            name=options.name or (options.adapter or options.model).absolute().name,
            setting=options.setting,
            questions=str(options.questions),
            fingerprint=found.manifest.fingerprint,
            prompt=options.prompt,
            method=method,
            batch_size=next(iter(lm.batch_sizes.values()), lm.batch_size),  # `auto` finds one as it goes
            seconds=round(time.monotonic() - begin, 3),
            sets=tuple(sets),
            **facts | {"versions": facts["versions"] | {"lm_eval": version("lm_eval")}},
        )
        return {"scores": msgspec.to_builtins(scores)}

    return judge


def _heldout(options: argparse.Namespace, source: "ModelSource", facts: dict[str, Any]) -> Judge:
    from data_tools.corpus import Corpus
    from pmc_llama.evaluate.heldout import read_heldout
    from pmc_llama.evaluate.perplexity import log_likelihoods, summarize
    from pmc_llama.evaluate.progress import TokenProgress, ignore

    corpus = Corpus.open(options.heldout)
    papers = read_heldout(corpus, source, options.max_documents, options.prefix)
    window, stride = _window(options, source.config.max_position_embeddings)

    def judge(model: "LlamaForCausalLM") -> dict[str, Any]:
        import torch.distributed as dist

        begin = time.monotonic()
        progress = TokenProgress() if dist.get_rank() == 0 else ignore
        nats = log_likelihoods(model, papers.tokens, window, stride, options.batch_tokens, progress)
        seconds = time.monotonic() - begin
        return {
            "corpus": corpus.location,
            "corpus_fingerprint": corpus.fingerprint,
            "tokenizer": papers.tokenizer,
            "held_out": papers.held_out,
            "prefix": papers.prefix,
            "window": window,
            "stride": stride,
            "seconds": round(seconds, 3),
            "perplexity": asdict(summarize(nats, papers.targets, papers.bytes)),
            "papers": {
                "number": papers.numbers.tolist(),
                "nats": nats.tolist(),
                "tokens": papers.targets.tolist(),
                "bytes": papers.bytes.tolist(),
            },
        }

    return judge


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
    """Tell all of it on standard output."""
    from rich.console import Console

    from pmc_llama.evaluate.results import Scores
    from pmc_llama.report.table import answers_table

    console = Console()
    if "perplexity" in result:
        _show_heldout(console, result)
    if "scores" in result:
        scores = msgspec.convert(result["scores"], Scores)
        console.print(answers_table(scores))
        line = (
            f"{scores.weights} on {scores.questions}, prompt {scores.prompt}; {scores.dtype}, "
            f"{scores.seconds:,.1f} s"
        )
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _show_heldout(console: "Console", result: dict[str, Any]) -> None:
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser("pmc-llama evaluate", description=evaluate.__doc__)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a Hugging Face directory, a checkpoint, or the output of a run, whose newest checkpoint it is",
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="of PEFT's, put on the model without merging it"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of the computation (default bf16, on a CPU fp32)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all of it as JSON, too")
    _add_questions(parser.add_argument_group("questions"))
    _add_heldout(parser.add_argument_group("papers held out"))
    return parser


def _add_questions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--questions", type=Path, metavar="DIR", help="to ask, as `pmc-data questions` made them"
    )
    group.add_argument(
        "--sets",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        metavar="SET,SET",
        help="of the questions (default all with options)",
    )
    group.add_argument(
        "--split",
        choices=("test", "dev"),
        help="of each set (default test, and dev of a set without answered test questions, as MedMCQA)",
    )
    group.add_argument(
        "--prompt",
        choices=[prompt for prompt in get_args(PromptId) if prompt != "alpaca"],
        default="pmc-llama",
        help="id of the template (default pmc-llama)",
    )
    group.add_argument(
        "--generate",
        action="store_true",
        help="let the model write its answer, and count invalid ones (default: compare likelihoods)",
    )
    group.add_argument(
        "--limit", type=_positive, metavar="N", help="questions of each set at most, its first ones"
    )
    group.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="prompts at once on each rank (default 64 or what fits the GPU, and 8 on a CPU)",
    )
    group.add_argument("--name", help="of the model in tables (default its directory's)")
    group.add_argument(
        "--setting",
        choices=get_args(Setting),
        help="how it was fine-tuned: the row of the paper's table that it is put beside",
    )


def _add_heldout(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--heldout", metavar="CORPUS", help="directory or URL of a corpus")
    group.add_argument(
        "--max-documents",
        type=_positive,
        default=_PAPERS,
        metavar="N",
        help=f"evenly spread over those held out, at most (default {_PAPERS:,})",
    )
    group.add_argument(
        "--window",
        type=_positive,
        metavar="TOKENS",
        help=f"that the model sees at once (default {_WINDOW:,}, or what the model can)",
    )
    group.add_argument(
        "--stride",
        type=_positive,
        metavar="TOKENS",
        help="that each window of a long paper adds; the others are its context (default half a window)",
    )
    group.add_argument(
        "--prefix",
        choices=("bos", "eod"),
        default="bos",
        help="the token before a paper: bos as in other tools, eod as in training (default bos)",
    )
    group.add_argument(
        "--batch-tokens",
        type=_positive,
        default=_BATCH_TOKENS,
        metavar="N",
        help=f"tokens computed at once on each rank (default {_BATCH_TOKENS:,})",
    )


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 1")
    return int(value)
