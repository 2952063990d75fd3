"""How fast S2ORC records become a corpus under a whole recipe, `pmc-data build` from start to finish.

The records are made from real articles (`--articles`, a tar of JATS), `--copies` times under other ids, in
two gzipped files a copy, so that workers have something to share out. The rate is of the text of all copies:
each is read, cleaned, measured and encoded, whatever finalizing then counts as a duplicate.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import pyarrow.parquet as pq

from benchmarks.s2orc_records import s2orc_record
from data_tools.inputs import find_inputs
from data_tools.papers import Paper
from data_tools.shards import ShardReader

_FILES_A_COPY = 2


def main() -> None:
    """Make the records, build some times, print MB/s of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--articles", type=Path, required=True, help="a tar of JATS articles")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--recipe", type=Path, required=True, help="such as recipes/corpus_pmc.yaml")
    parser.add_argument("--copies", type=int, default=16, help="of the articles")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        records = directory / "records"
        _write(records, options.articles, options.copies)
        seconds = []
        for number in range(options.rounds):
            output = directory / f"corpus-{number}"
            seconds.append(_build(records, output, options))
        size = sum(
            pq.read_table(path, columns=["text_bytes"])["text_bytes"].to_numpy().sum()
            for path in output.rglob("*.documents.parquet")
        )
    each = " ".join(f"{one:.2f}" for one in seconds)
    print(f"{size / 1e6:.0f} MB of text in {each} s: {size / 1e6 / median(seconds):.1f} MB/s by the median")


def _write(directory: Path, articles: Path, copies: int) -> None:
    directory.mkdir()
    papers = [record for record in ShardReader(find_inputs([articles])) if isinstance(record, Paper)]
    for copy in range(copies):
        for part in range(_FILES_A_COPY):
            with gzip.open(directory / f"s2orc-{copy}-{part}.jsonl.gz", "wb", compresslevel=6) as file:
                for line in _lines(papers[part::_FILES_A_COPY], copy):
                    file.write(line)


def _lines(papers: list[Paper], copy: int) -> Iterator[bytes]:
    for paper in papers:
        yield json.dumps(s2orc_record(paper, copy)).encode() + b"\n"


def _build(records: Path, output: Path, options: argparse.Namespace) -> float:
    command = [sys.executable, "-c", "from data_tools.cli import main; main()", "build"]
    command += ["--recipe", str(options.recipe), "--input", str(records)]
    command += [
        "--tokenizer",
        str(options.tokenizer),
        "--output",
        str(output),
        "--workers",
        str(options.workers),
    ]
    begin = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - begin


if __name__ == "__main__":
    main()
