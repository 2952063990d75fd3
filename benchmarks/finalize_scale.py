"""How long deciding about a whole PMC corpus takes, and in how much memory.

Makes the tables of 4.9 million documents in 293 parts, as a build of PMC with every measure on leaves them:
ids of the usual form, 1% of the documents a second time under their PMC id or DOI, 2% near-duplicates of an
earlier document, one in a thousand retracted or overlapping a test question; there are no token files, which
deciding does not read. Then times `decide_again`, with every decision on, in a process of its own.

    python benchmarks/finalize_scale.py [--documents 4900000] [--parts 293] [--directory DIR]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_tools.contamination import TestQuestion
from data_tools.documents import SCHEMA, table_path, table_writer
from data_tools.facts import facts_of
from data_tools.files import write_published
from data_tools.finalize import decide_again
from data_tools.manifest import (
    PART_FILES,
    Counts,
    FileInfo,
    Inputs,
    Manifest,
    PartInfo,
    SplitInfo,
    TokenizerInfo,
    to_json,
    write_manifest,
)
from data_tools.minhash import SIGNATURE_BYTES, VALUES
from data_tools.question_table import question_table
from data_tools.recipe import Decisions, Measures, Recipe

DECISIONS = Decisions(
    near_duplicates=0.8, contamination=1, licenses=["commercial", "noncommercial", "other"], heldout=0.01
)
_QUESTIONS = 12_000
_ROWS_A_GROUP = 16_384
_LICENSES = pa.array(["CC BY", "CC BY-NC-ND", "CC0", "publisher-specific", "NO-CC CODE", None])
_EMPTY = FileInfo(0, "0" * 32)


def main() -> None:
    """Make the tables and time the decisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=4_900_000)
    parser.add_argument("--parts", type=int, default=293)
    parser.add_argument("--directory", type=Path, help="where the tables go; kept when given")
    parser.add_argument("--decide", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decide:
        decide(options.decide)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        if not (directory / "corpus.json").exists():
            make(directory, options.documents, options.parts)
        tables = sum(path.stat().st_size for path in (directory / "parts").glob("*.parquet"))
        print(
            f"{options.documents:,} documents in {options.parts} tables of {tables / 1e9:.2f} GB", flush=True
        )
        subprocess.run([sys.executable, __file__, "--decide", str(directory)], check=True)


def decide(directory: Path) -> None:
    """Decide with everything on, then change one decision; print time, peak memory and what was left out."""
    for name, decisions in (("everything on", DECISIONS), ("no near-duplicates", Decisions(heldout=0.02))):
        begin = time.perf_counter()
        manifest = decide_again(directory, decisions)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name}: {seconds:.1f} s, peak {peak:.2f} GB, kept {manifest.counts.kept:,}", flush=True)
        for decision in manifest.decisions:
            print(f"    {decision.reason:20} {decision.documents:>10,} {decision.tokens:>16,} tokens")


def make(directory: Path, documents: int, parts: int) -> None:
    """The tables of a corpus and the rest of it as far as deciding needs it."""
    (directory / "parts").mkdir(parents=True)
    random = np.random.default_rng(0)
    infos, before = [], {"signatures": random.integers(0, 2**16, (1000, VALUES), np.uint16)}
    bounds = np.linspace(0, documents, parts + 1).astype(int)
    for number in range(parts):
        first, end = int(bounds[number]), int(bounds[number + 1])
        table = rows(random, first, end, before)
        name = f"part-{number:05}"
        with table_writer(table_path(directory, name)) as writer:
            for start in range(0, len(table), _ROWS_A_GROUP):
                writer.write_table(table.slice(start, _ROWS_A_GROUP))
        counts = Counts(read=end - first, kept=end - first)
        files = dict.fromkeys(PART_FILES, _EMPTY)
        inputs = Inputs(f"shard-{number:03}.jsonl.gz", 1, 0, "0" * 32)
        tokens = int(np.sum(table["tokens"].to_numpy(), dtype=np.int64))
        retracts = [f"PMC{1_000_000 + value}" for value in range(first, end, 5000)]
        info = PartInfo(name, end - first, tokens, inputs, files, retracts)
        record = {"made_with": {}, "part": asdict(info), "counts": asdict(counts)}
        write_published(directory / "parts" / f"{name}.json", to_json(record))
        infos.append(info)
    _write_corpus(directory, documents, infos)


def rows(random: np.random.Generator, first: int, end: int, before: dict[str, Any]) -> Any:
    """The table of documents `first` to `end`; `before` carries signatures from part to part."""
    count = end - first
    numbers = np.arange(first, end)
    repeated = random.random(count) < 0.01
    numbers = np.where(repeated & (numbers > 0), random.integers(0, np.maximum(numbers, 1)), numbers)
    numbers = pa.array(numbers)
    pmc_ids = pc.binary_join_element_wise("PMC", pc.add(numbers, 1_000_000).cast(pa.string()), "")
    dois = pc.binary_join_element_wise("10.1371/Journal.pone.", numbers.cast(pa.string()), "")
    tokens = np.clip(random.lognormal(9.2, 0.7, count), 100, 4e5).astype(np.int32)
    licenses = _LICENSES.take(pa.array(random.integers(0, len(_LICENSES), count)))
    sources = pa.array([f"shard-{first}.jsonl.gz"]).take(pa.array(np.zeros(count, np.int64)))
    overlapping = random.random(count) < 0.001
    offsets = np.concatenate([[0], np.cumsum(overlapping)])
    overlaps = random.integers(0, _QUESTIONS, int(overlapping.sum()), np.int32)
    columns = {
        "pmc_id": _with_nulls(random, pmc_ids, 0.02),
        "corpus_id": pa.array(np.asarray(numbers) * 7),
        "doi": _with_nulls(random, dois, 0.05),
        "pubmed_id": numbers.cast(pa.string()),
        "license": licenses,
        "retracted": pa.array(random.random(count) < 0.001),
        "year": pa.array(random.integers(1990, 2025, count).astype(np.int16)),
        "journal": pa.array([f"Journal {value}" for value in random.integers(0, 5000, count)]),
        "source_file": sources,
        "source_position": pa.array(np.arange(1, count + 1)),
        "tokens": pa.array(tokens),
        "text_bytes": pa.array(tokens.astype(np.int64) * 4),
        "text_hash": _fixed(random.bytes(16 * count), 16),
        "signature": _fixed(_signatures(random, count, before).tobytes(), SIGNATURE_BYTES),
        "overlaps": pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(overlaps)),
    }
    return pa.table(columns).select(SCHEMA.names).cast(SCHEMA)


def _signatures(random: np.random.Generator, count: int, before: dict[str, Any]) -> NDArray[np.uint16]:
    """Random ones, but 2% those of an earlier document with a tenth of the values changed."""
    signatures = random.integers(0, 2**16, (count, VALUES), np.uint16)
    near = np.flatnonzero(random.random(count) < 0.02)
    copies = random.choice(before["signatures"], len(near))
    changed = np.less(random.random(copies.shape), 0.1)
    copies[changed] = random.integers(0, 2**16, np.count_nonzero(changed), np.uint16)
    signatures[near] = copies
    before["signatures"] = random.choice(np.delete(signatures, near, axis=0), 1000)
    return signatures


def _with_nulls(random: np.random.Generator, column: Any, share: float) -> Any:
    return pc.if_else(pa.array(random.random(len(column)) < share), None, column)


def _fixed(content: bytes, width: int) -> Any:
    count = len(content) // width
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, pa.py_buffer(content)])


def _write_corpus(directory: Path, documents: int, infos: list[PartInfo]) -> None:
    questions = [TestQuestion("medqa", str(number), True) for number in range(_QUESTIONS)]
    none = facts_of(SCHEMA.empty_table())
    nothing = np.zeros(0, np.bool_)
    content = question_table(questions, none, {"train": nothing, "heldout": nothing})
    tokens = sum(info.tokens for info in infos)
    manifest = Manifest(
        tokenizer=TokenizerInfo("0" * 64, 32_000, 1, 2, 0),
        dtype="uint16",
        rules_version=0,
        recipe=Recipe(measures=Measures(near_duplicates=True, test_sets={"medqa": "medqa.jsonl"})),
        counts=Counts(read=documents, kept=documents),
        decisions=[],
        splits={"train": SplitInfo(documents, tokens, _EMPTY), "heldout": SplitInfo(0, 0, _EMPTY)},
        files={"reasons.npy": _EMPTY, "rejected.jsonl": _EMPTY, "questions.parquet": FileInfo(0, "1" * 32)},
        parts=infos,
    )
    manifest.path(directory, "questions.parquet").write_bytes(content)
    write_manifest(directory, manifest)


if __name__ == "__main__":
    main()
