"""How fast a corpus of PMC-LLaMA's size is opened and read, beside Megatron's reader and a bare memory map.

    python benchmarks/reader.py [--directory DIR] [--gib 4]

Scale: 4.9 million documents of log-normal length, 75 billion tokens, 293 parts; index and split files of true
size and content, the 150 GB of `.bin` sparse, so that they take no disk. A fresh process opens it and reads
one batch; then batches of random windows of 2,049 tokens (2,048 and the last one's target) are read that are
in the page cache.

Cold: parts of random bytes, 4 GiB together, on the disk of DIR (default: the system's directory for temporary
files). Before each measurement every page of them is dropped by `posix_fadvise(DONTNEED)` after an fsync,
which needs no root; how much of the files was in memory afterwards is printed. A cache below the kernel, of a
hypervisor for instance, is beyond its reach, and serves all readers alike. No window is read twice. How much
a memory map reads for a sample is decided by the read-ahead of the device, which is printed, too.

The same windows, each inside a document, are asked of every reader; Megatron's is `IndexedDataset` of the
installed megatron-core, one a part, through `get(document, offset, length)`.
"""

import argparse
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus import Corpus, Split
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
from data_tools.token_files import index_file

DOCUMENTS, MEAN_TOKENS, PARTS = 4_900_000, 15_300, 293
WINDOW = 2_049
BATCHES = (64, 256, 512)
ROUNDS = 3
UINT16 = np.dtype("<u2")
_WARM_WINDOWS = 20_000
_COLD_WINDOWS = 4_096
_COLD_WINDOWS_SLOW = 384
"""Of readers of some hundred windows a second: with more their read-ahead would have read the files whole."""

Windows = NDArray[np.int64]
"""`[n, 2]`: numbers of documents, and where in them the windows begin."""
Read = Callable[[Windows], object]


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--gib", type=int, default=4, help="of real data for the cold readings (default 4)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        measure_opening(options.open)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        scale, real = Path(temporary) / "scale", Path(temporary) / "real"
        lengths = make(scale, DOCUMENTS, PARTS, content=False)
        print(f"{DOCUMENTS:,} documents, {int(lengths.sum()):,} tokens in {PARTS} parts", flush=True)
        for _ in range(ROUNDS):
            subprocess.run([sys.executable, __file__, "--open", str(scale)], check=True)
        measure_warm(Layout(scale, lengths, PARTS))
        (scale / "parts").rename(scale / "gone")
        documents = options.gib * 2**30 // (2 * MEAN_TOKENS)
        lengths = make(real, documents, 8, content=True)
        print(f"{int(lengths.sum()) * 2:,} bytes of real data in 8 parts; read-ahead {_read_ahead(real)}")
        measure_cold(Layout(real, lengths, 8))


def make(directory: Path, documents: int, parts: int, content: bool) -> NDArray[np.int32]:
    """A corpus; its `.bin` with random bytes, or sparse. Returns the tokens of each document."""
    (directory / "parts").mkdir(parents=True)
    random = np.random.default_rng(0)
    sigma = 0.7  # as of PMC's full texts
    drawn = random.lognormal(np.log(MEAN_TOKENS) - sigma**2 / 2, sigma, documents)
    lengths = np.maximum(1, drawn).astype(np.int32)
    bounds = np.linspace(0, documents, parts + 1).astype(int)
    infos = []
    for number in range(parts):
        mine = lengths[bounds[number] : bounds[number + 1]]
        tokens, name = int(mine.sum(dtype=np.int64)), f"part-{number:05}"
        index = index_file(UINT16, mine)
        (directory / "parts" / f"{name}.idx").write_bytes(index)
        sizes = {"bin": 2 * tokens, "idx": len(index), "documents.parquet": 320 * len(mine)}
        for suffix, size in {**sizes, "rejected.jsonl": 4096}.items():
            if suffix != "idx":
                with (directory / "parts" / f"{name}.{suffix}").open("wb") as file:
                    if content and suffix == "bin":
                        file.write(random.bytes(size))
                        os.fsync(file.fileno())
                    file.truncate(size)
        files = {suffix: FileInfo(size, "0" * 32) for suffix, size in sizes.items()}
        files["rejected.jsonl"] = FileInfo(4096, "0" * 32)
        inputs = Inputs(f"shard-{number:03}.jsonl.gz", 1, 0, "0" * 32)
        infos.append(PartInfo(name, len(mine), tokens, inputs, files))
    _finish(directory, infos, lengths)
    return lengths


def _finish(directory: Path, infos: list[PartInfo], lengths: NDArray[np.int32]) -> None:
    """All that a corpus has besides its parts. Every hundredth document counts as held out."""
    heldout = np.arange(len(lengths)) % 100 == 99
    firsts = np.cumsum([0, *(info.documents for info in infos)])[:-1]
    tokens = lengths.astype(np.int64)
    contents = {"reasons": array_file(np.zeros(len(lengths), np.uint8))}
    splits: dict[str, SplitInfo] = {}
    for name, chosen in (("train", ~heldout), ("heldout", heldout)):
        contents[name] = split_file(tokens, chosen, firsts)
        info = FileInfo(len(contents[name]), f"{len(splits):032}")
        splits[name] = SplitInfo(int(chosen.sum()), int(tokens[chosen].sum()), info)
    model = bytes(500_000)  # as large as LLaMA's
    manifest = Manifest(
        tokenizer=TokenizerInfo(hashlib.sha256(model).hexdigest(), 32_000, 1, 2, 0, "tokenizer.model"),
        dtype="uint16",
        rules_version=1,
        recipe=Recipe(),
        counts=Counts(read=len(lengths), kept=len(lengths)),
        decisions=[],
        splits=splits,
        files={
            "reasons.npy": FileInfo(len(contents["reasons"]), "2" * 32),
            "rejected.jsonl": FileInfo(0, ""),
        },
        parts=infos,
    )
    for name, content in contents.items():
        manifest.path(directory, f"{name}.npy").write_bytes(content)
    (directory / "rejected.jsonl").touch()
    (directory / "tokenizer.model").write_bytes(model)
    write_manifest(directory, manifest)


@dataclass(frozen=True)
class Layout:
    """The corpus in `directory`, the tokens of its documents `[documents]`, and its number of parts."""

    directory: Path
    lengths: NDArray[np.int32]
    parts: int

    @property
    def bounds(self) -> NDArray[np.int64]:
        """`[parts + 1]`, the first document of each part."""
        return np.linspace(0, len(self.lengths), self.parts + 1).astype(np.int64)

    @property
    def bins(self) -> list[Path]:
        """The files of ids."""
        return [self.directory / "parts" / f"part-{number:05}.bin" for number in range(self.parts)]

    def windows(self, count: int, seed: int) -> Windows:
        """Windows of documents that are long enough and in the split `train`, no two the same."""
        random = np.random.default_rng(seed)
        fit = np.flatnonzero((self.lengths >= WINDOW) & (np.arange(len(self.lengths)) % 100 != 99))
        chosen = random.choice(fit, count, replace=False)
        places = random.integers(0, self.lengths[chosen] - WINDOW + 1)
        return np.stack([chosen, places], axis=1).astype(np.int64)


# --- the readers --------------------------------------------------------------------------------------------


def ours(layout: Layout) -> Read:
    """`Split.read`, as training calls it."""
    split = Corpus.open(layout.directory).split("train")

    def read(windows: Windows) -> object:
        return split.read(_ranges(split, windows))

    return read


def _ranges(split: Split, windows: Windows) -> list[tuple[int, int]]:
    documents = windows[:, 0] - windows[:, 0] // 100  # each hundredth is held out
    starts = np.asarray(split.starts[documents]) + windows[:, 1]
    return list(zip(starts.tolist(), (starts + WINDOW).tolist(), strict=True))


def megatron(layout: Layout, mapped: bool) -> Read:
    """Megatron's `IndexedDataset`, which maps the `.bin`, or opens and reads it for each sample."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    datasets = [IndexedDataset(str(path.with_suffix("")), mmap=mapped) for path in layout.bins]
    bounds = layout.bounds

    def read(windows: Windows) -> object:
        parts = np.searchsorted(bounds, windows[:, 0], side="right") - 1
        local = windows[:, 0] - bounds[parts]
        asked = zip(parts.tolist(), local.tolist(), windows[:, 1].tolist(), strict=True)
        # A copy, as every use of the tokens makes one: `get` on a map gives a view and has read nothing yet.
        return [np.array(datasets[part].get(document, place, WINDOW)) for part, document, place in asked]

    return read


def memory_map(layout: Layout, advice: int | None = None) -> Read:
    """A bare `np.memmap` of each `.bin`; the window is copied, since a map alone reads nothing."""
    maps = [np.memmap(path, UINT16, mode="r") for path in layout.bins]
    if advice is not None:
        for mapped in maps:
            mapped._mmap.madvise(advice)  # type: ignore[attr-defined]
    starts = np.concatenate([[0], np.cumsum(layout.lengths, dtype=np.int64)])
    bounds = layout.bounds

    def read(windows: Windows) -> object:
        parts = np.searchsorted(bounds, windows[:, 0], side="right") - 1
        places = starts[windows[:, 0]] - starts[bounds[parts]] + windows[:, 1]
        asked = zip(parts.tolist(), places.tolist(), strict=True)
        return [np.array(maps[part][place : place + WINDOW]) for part, place in asked]

    return read


# --- measurements -------------------------------------------------------------------------------------------


def measure_opening(directory: Path) -> None:
    """Print what opening and a first batch take, in time and memory, beyond the imports."""
    random = np.random.default_rng(1)
    for batch in (BATCHES[0], BATCHES[-1]):
        before, begin = _resident(), time.perf_counter()
        split = Corpus.open(directory).split("train")
        opened = time.perf_counter() - begin
        starts = random.integers(0, split.tokens - WINDOW, batch).tolist()
        split.read([(start, start + WINDOW) for start in starts])
        seconds = time.perf_counter() - begin
        more = {kind: (size - before[kind]) / 1e6 for kind, size in _resident().items()}
        print(
            f"  open {opened * 1e3:.0f} ms, with a first batch of {batch} {seconds * 1e3:.0f} ms; "
            f"more memory: {more['RssAnon']:.1f} MB own, {more['RssFile']:.1f} MB mapped files",
            flush=True,
        )
        del split


def measure_warm(layout: Layout) -> None:
    """Print windows a second when all of them are in the page cache and the process has not yet seen them.

    Each measurement starts with a reader just opened, since no training run reads a window many times over.
    """
    readers: dict[str, Callable[[], Read]] = {
        "pmc-llama": lambda: ours(layout),
        "np.memmap": lambda: memory_map(layout),
        "Megatron IndexedDataset": lambda: megatron(layout, mapped=True),
        "Megatron IndexedDataset, mmap=False": lambda: megatron(layout, mapped=False),
    }
    windows = layout.windows(_WARM_WINDOWS, seed=2)
    for batch in BATCHES:
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(ROUNDS):
            for name, opened in readers.items():
                ours(layout)(windows)  # the read-ahead of a memory map may have driven them out
                rates[name].append(_rate(opened(), windows, batch, time.process_time))
        _print(rates, f"warm, batches of {batch}, windows/s of CPU time")


def measure_cold(layout: Layout) -> None:
    """Print windows a second when none of the pages is in memory."""
    readers: dict[str, tuple[Callable[[], Read], int, int]] = {
        "pmc-llama, batches of 64": (lambda: ours(layout), 64, _COLD_WINDOWS),
        "pmc-llama, batches of 512": (lambda: ours(layout), 512, _COLD_WINDOWS),
        "np.memmap": (lambda: memory_map(layout), 64, _COLD_WINDOWS_SLOW),
        "np.memmap, MADV_RANDOM": (lambda: memory_map(layout, mmap.MADV_RANDOM), 64, _COLD_WINDOWS),
        "Megatron IndexedDataset": (lambda: megatron(layout, mapped=True), 64, _COLD_WINDOWS_SLOW),
        "Megatron IndexedDataset, mmap=False": (lambda: megatron(layout, mapped=False), 64, _COLD_WINDOWS),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for seed in range(ROUNDS):
        for name, (opened, batch, count) in readers.items():
            read = opened()
            left = _drop(layout.bins)
            rates[name].append(_rate(read, layout.windows(count, seed), batch, time.perf_counter))
            if left:
                print(f"  {name}: {left:,} bytes were still in memory", flush=True)
    _print(rates, "cold, windows/s of wall time")


def _rate(read: Read, windows: Windows, batch: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for start in range(0, len(windows), batch):
        read(windows[start : start + batch])
    return len(windows) / (clock() - begin)


def _drop(paths: Sequence[Path]) -> int:
    """Drop the files from the page cache; the bytes of them that are in it afterwards."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    fincore = shutil.which("fincore")
    if fincore is None:
        raise SystemExit("fincore (of util-linux) is needed to see what the page cache holds.")
    command = [fincore, "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(map(int, found.split()))


def _print(rates: dict[str, list[float]], title: str) -> None:
    print(f"{title}: median of rounds, times slower than the first, each round")
    first = next(iter(rates))
    for name, found in rates.items():
        factor = median(rates[first]) / median(found)
        each = " ".join(f"{rate:,.0f}" for rate in found)
        print(f"  {name:37}{median(found):10,.0f}  {factor:6.1f}  ({each})", flush=True)


def _resident() -> dict[str, int]:
    """Resident memory of this process by kind, bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0].startswith("Rss")}


def _read_ahead(path: Path) -> str:
    device = os.stat(path).st_dev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    return f"{queue.read_text().strip()} KiB" if queue.exists() else "unknown"


if __name__ == "__main__":
    main()
