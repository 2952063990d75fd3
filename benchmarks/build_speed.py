"""How fast texts become token files: our plain build beside Megatron's two scripts and datatrove.

The corpus is made from real articles (`--articles`, a tar of JATS): the articles themselves, then, until it
has the size asked for, their paragraphs in another order, cut into documents of the articles' lengths. So no
document comes twice, while words come as often as they do in papers. It lies in two `.jsonl.gz`; Megatron's
scripts get the same documents, spared the decompression, as one plain `.jsonl`.

Each tool runs as its users run it, in a process of its own, from start until its output is on disk: what it
does not sync itself is synced before the clock stops. They take turns for some rounds. Memory is that of the
whole process tree, looked at 20 times a second.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import numpy as np
import psutil

from data_tools.fast_bpe import read_vocabulary, tokenizer_json
from data_tools.inputs import find_inputs
from data_tools.papers import Paper
from data_tools.recipe import Recipe
from data_tools.render import training_text
from data_tools.rules import apply, chain
from data_tools.shards import ShardReader
from data_tools.token_files import TokenFile

_SHARDS = 2
_SEED = 1

_RECIPE = Path(__file__).parents[1] / "recipes" / "corpus_plain.yaml"

_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
if __name__ == "__main__":
    texts, tokenizer, output, workers = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(texts, glob_pattern="*.jsonl.gz"),
            MegatronDocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token="</s>"),
        ],
        tasks=int(workers), workers=int(workers), logging_dir=output + "/logs",
    ).run()
"""


@dataclass(frozen=True)
class Tool:
    """A command that makes token files in the directory OUTPUT."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a run took: seconds, and the most memory of the largest process and of all of them, in bytes."""

    seconds: float
    largest: int
    together: int


def main() -> None:
    """Make the corpus where it is not there yet, run every tool, compare their bytes, print the table."""
    options = _options()
    directory = options.directory / f"{options.megabytes * options.scale}-MB"
    size = make_corpus(options.articles, directory, options.megabytes * options.scale * 1_000_000)
    tools = [tool for tool in _tools(options, directory) if tool.name not in options.without]
    runs: dict[str, list[Run]] = {tool.name: [] for tool in tools}
    for number in range(options.rounds):
        for tool in tools:
            output = directory / "output" / tool.name
            shutil.rmtree(output, ignore_errors=True)
            output.parent.mkdir(exist_ok=True)
            runs[tool.name].append(measured(tool, output))
            print(f"round {number + 1}  {tool.name:16} {runs[tool.name][-1].seconds:7.2f} s", flush=True)
    _print_table(runs, size)
    ours = directory / "output" / "pmc-data" / "parts"
    for tool in tools[1:]:
        print(f"{tool.name}: {_compared(ours, directory / 'output' / tool.name)}")


def make_corpus(articles: Path, directory: Path, size: int) -> int:
    """Write `texts/*.jsonl.gz` and `texts.jsonl` of at least `size` bytes of text; returns the bytes."""
    done = directory / "bytes"
    if done.exists():
        return int(done.read_text())
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "texts").mkdir(parents=True)
    documents = _documents(list(_article_texts(articles)))
    total, names = 0, [directory / "texts" / f"texts-{number:02}.jsonl.gz" for number in range(_SHARDS)]
    for number, name in enumerate(names, start=1):
        with gzip.open(name, "wb", compresslevel=6) as shard:
            while total < size * number // _SHARDS:
                text = next(documents)
                shard.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
                total += len(text.encode())
    with (directory / "texts.jsonl").open("wb") as together:
        for name in names:
            with gzip.open(name) as shard:
                shutil.copyfileobj(shard, together)
    done.write_text(str(total))
    return total


def _article_texts(articles: Path) -> Iterator[str]:
    rules = chain(Recipe().rules)
    for record in ShardReader(find_inputs([articles])):
        paper = apply(rules, record) if isinstance(record, Paper) else None
        if isinstance(paper, Paper):
            yield training_text(paper)


def _documents(texts: list[str]) -> Iterator[str]:
    """The texts, then, for ever, their paragraphs in a new order, cut into documents as long as the texts."""
    yield from texts
    order = np.random.default_rng(_SEED)
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    while True:
        shuffled = [paragraphs[number] for number in order.permutation(len(paragraphs))]
        yield from _cut(shuffled, [len(text) for text in texts])


def _cut(paragraphs: list[str], lengths: list[int]) -> Iterator[str]:
    for length in lengths:
        chosen: list[str] = []
        while paragraphs and sum(map(len, chosen)) < length:
            chosen.append(paragraphs.pop())
        if chosen:
            yield "\n\n".join(chosen)


def measured(tool: Tool, output: Path) -> Run:
    """Run a tool until its output is on disk."""
    log = output.with_name(f"{output.name}.log")
    command = [part.replace("OUTPUT", str(output)) for part in tool.command]
    if tool.name != "pmc-data":
        output.mkdir()
    start = perf_counter()
    with log.open("wb") as written:
        process = psutil.Popen(
            command, env={**os.environ, **tool.environment}, stdout=written, stderr=subprocess.STDOUT
        )
        watch = _Watch(process)
        try:
            status = process.wait()
        finally:  # interrupted, the tool is interrupted, too; its watch has to be told
            watch.stop()
    for path in output.rglob("*"):
        if path.is_file():
            _sync(path)
    seconds = perf_counter() - start
    if status:
        sys.exit(f"{tool.name} failed with status {status}; see {log}")
    return Run(seconds, watch.largest, watch.together)


class _Watch:
    """Looks at the memory of a process tree as long as it runs."""

    def __init__(self, process: psutil.Popen) -> None:
        self.largest = self.together = 0
        self._process = process
        self._running = True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        self._running = False
        self._thread.join()

    def _look(self) -> None:
        while self._running:
            sizes = list(_resident(self._process))
            self.largest = max([self.largest, *sizes])
            self.together = max(self.together, sum(sizes))
            sleep(0.05)


def _resident(process: psutil.Popen) -> Iterator[int]:
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in tree:
        try:
            yield one.memory_info().rss
        except psutil.NoSuchProcess:
            continue


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _tools(options: argparse.Namespace, directory: Path) -> list[Tool]:
    texts, together = str(directory / "texts"), str(directory / "texts.jsonl")
    tokenizer, workers = str(options.tokenizer), str(options.workers)
    hugging_face = str(_hugging_face(options.tokenizer, directory / "tokenizer"))
    build = [sys.executable, "-m", "data_tools.cli", "build", "--recipe", str(_RECIPE), "--input", texts]
    tools = [Tool("pmc-data", [*build, "--tokenizer", tokenizer, "--output", "OUTPUT", "--workers", workers])]
    if options.megatron:
        repository = options.megatron.resolve()
        environment = {"PYTHONPATH": os.pathsep.join([*options.megatron_path, str(repository)])}
        for name, script, more in (
            (
                "Megatron",
                "preprocess_data.py",
                ["SentencePieceTokenizer", "--tokenizer-model", tokenizer, "--workers", workers],
            ),
            (
                "Megatron fast",
                "preprocess_data_fast.py",
                ["HuggingFaceTokenizer", "--tokenizer-model", hugging_face, "--use-gigatoken"],
            ),
        ):
            command = [options.megatron_python, str(repository / "tools" / script), "--input", together]
            command += ["--output-prefix", "OUTPUT/corpus", "--append-eod", "--tokenizer-type", *more]
            tools.append(Tool(name, command, environment))
    if options.datatrove_python:
        command = [options.datatrove_python, "-c", _DATATROVE, texts, f"{hugging_face}/tokenizer.json"]
        tools.append(Tool("datatrove", [*command, "OUTPUT", workers]))
    return tools


def _hugging_face(model: Path, directory: Path) -> Path:
    """The tokenizer as a Hugging Face directory, for the tools that read only that."""
    definition = json.loads(tokenizer_json(read_vocabulary(model.read_bytes())))
    definition["added_tokens"] = [
        {"id": number, "content": text, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for number, text in enumerate(["<unk>", "<s>", "</s>"])
    ]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    return directory


def _print_table(runs: dict[str, list[Run]], size: int) -> None:
    ours = median(run.seconds for run in runs["pmc-data"])
    print(f"\n{size:,} bytes of text")
    print(
        "tool              median s      (each)                 MB/s  largest MB  all MB  ours is faster by"
    )
    for name, found in runs.items():
        seconds = median(run.seconds for run in found)
        each = " ".join(f"{run.seconds:.2f}" for run in found)
        largest, together = (max(getattr(run, what) for run in found) for what in ("largest", "together"))
        print(
            f"{name:16} {seconds:9.2f}      ({each})  {size / seconds / 1e6:8.1f}  {largest / 1e6:8.0f}  "
            f"{together / 1e6:6.0f}  {seconds / ours:6.1f}"
        )


def _compared(ours: Path, theirs: Path) -> str:
    """Whether the ids and document lengths of two sets of token files, in order, are the same bytes."""
    found = [_contents(sorted(directory.rglob("*.idx"))) for directory in (ours, theirs)]
    same = all(np.array_equal(first, second) for first, second in zip(*found, strict=True))
    tokens, documents = (f"{len(what):,}" for what in found[0])
    return f"{'the same' if same else 'OTHER'} bytes ({tokens} tokens, {documents} documents)"


def _contents(indices: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    files = [TokenFile(path.with_suffix("")) for path in indices]
    ids = [file.read(0, file.header.tokens) for file in files]
    return np.concatenate(ids), np.concatenate([file.lengths for file in files])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--articles", type=Path, required=True, help="a tar of JATS articles")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--directory", type=Path, required=True, help="where corpora and outputs go")
    parser.add_argument("--megabytes", type=int, default=130, help="of text (default 130)")
    parser.add_argument("--scale", type=int, default=1, help="times as much (default 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], metavar="TOOL", help="by the names in the table")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-python", default=sys.executable, help="the Python that runs it")
    parser.add_argument(
        "--megatron-path", nargs="*", default=[], help="more of its PYTHONPATH, such as triton"
    )
    parser.add_argument("--datatrove-python", help="a Python with datatrove")
    return parser.parse_args()


if __name__ == "__main__":
    main()
