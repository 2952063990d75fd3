"""Where the time of the full chain goes: ms of processor time a MB of text, and share, of each stage.

The JATS is `--articles` itself; the S2ORC is the same articles, written as records of the Datasets API's
`s2orc`, gzipped. A build with `--workers 2` runs two of these side by side.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time

from benchmarks.s2orc_records import s2orc_record
from data_tools.documents import DocumentTable, row
from data_tools.inputs import find_inputs
from data_tools.measures import Measured, Measurer
from data_tools.papers import Paper
from data_tools.parts import ENCODED_TOGETHER
from data_tools.recipe import Recipe
from data_tools.recipe_file import read_recipe
from data_tools.render import training_text
from data_tools.rules import chain
from data_tools.rules.base import Rule
from data_tools.shards import ShardReader
from data_tools.token_files import TokenFileWriter
from data_tools.tokenizer import Tokenizer

Document = tuple[Paper, str, Measured]
"""A cleaned paper, its text and what was measured of it."""


class Clock:
    """Adds up the processor time of each stage, in seconds: other programs on the machine disturb it less."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = process_time()

    def lap(self, stage: str) -> None:
        """Everything since the lap before was this stage."""
        now = process_time()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def main() -> None:
    """Run the chain over both inputs and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--articles", type=Path, required=True, help="a tar of JATS articles")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--recipe", type=Path, required=True, help="such as recipes/corpus_pmc.yaml")
    options = parser.parse_args()
    tokenizer, recipe = Tokenizer(options.tokenizer), read_recipe(options.recipe)
    tokenizer.encode("")  # made here, so that its start is in no stage
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        records = directory / "s2orc.jsonl.gz"
        with gzip.open(records, "wb", compresslevel=6) as file:
            for record in ShardReader(find_inputs([options.articles])):
                if isinstance(record, Paper):
                    file.write(json.dumps(s2orc_record(record)).encode() + b"\n")
        for name, path in (("JATS", options.articles), ("S2ORC", records)):
            _print(name, *run(path, tokenizer, recipe, directory))


def run(path: Path, tokenizer: Tokenizer, recipe: Recipe, directory: Path) -> tuple[Clock, int, int]:
    """The chain of a build over one input; returns the clock, the documents and the bytes of text kept."""
    rules, measure, clock = chain(recipe.rules), Measurer(recipe.measures), Clock()
    documents, size = 0, 0
    with (
        TokenFileWriter(directory / "part", tokenizer.dtype) as tokens,
        DocumentTable(directory / "part.documents.parquet") as table,
    ):
        for together in _together(_cleaned(path, rules, measure, clock)):
            for paper, text, measured in together:
                ids = tokenizer.encode_document(text)
                clock.lap("tokenize")
                document = row(paper, text, len(ids), measured)
                clock.lap("describe")
                tokens.add(ids)
                table.add(document)
                clock.lap("write")
                documents, size = documents + 1, size + document.text_bytes
    clock.lap("write")
    return clock, documents, size


def _cleaned(path: Path, rules: Sequence[Rule], measure: Measurer, clock: Clock) -> Iterator[Document]:
    for record in ShardReader(find_inputs([path])):
        clock.lap("read")
        result: object = record
        for rule in rules:
            if isinstance(result, Paper):
                result = rule(result)
                clock.lap(f"rule {type(rule).__name__}")
        if isinstance(result, Paper):
            text = training_text(result)
            clock.lap("render")
            measured = measure(text)
            clock.lap("measure")
            yield result, text, measured


def _together(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents as a build encodes them: as many one after another as have `ENCODED_TOGETHER` characters."""
    together: list[Document] = []
    characters = 0
    for document in documents:
        together.append(document)
        characters += len(document[1])
        if characters >= ENCODED_TOGETHER:
            yield together
            together, characters = [], 0
    yield together


def _print(name: str, clock: Clock, documents: int, size: int) -> None:
    total = sum(clock.seconds.values())
    print(f"{name}: {documents:,} documents, {size:,} bytes of text, {size / total / 1e6:.1f} MB/s")
    for stage, seconds in [("all", total), *sorted(clock.seconds.items(), key=lambda item: -item[1])]:
        print(f"    {stage:24} {seconds * 1e9 / size:7.1f} ms/MB  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
