"""The data of a run: its corpora opened, their order, what was taken of them, and what the run goes on with.

corpora ──open_sources──▶ Sources ──with a checkpoint's history──▶ TrainingData ──batches──▶ a rank's tensors
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_tools.corpus import Corpus, Split
from data_tools.errors import UserError
from pmc_llama.batches import NO_TARGET as NO_TARGET
from pmc_llama.batches import Batch as Batch
from pmc_llama.batches import MicroBatch as MicroBatch
from pmc_llama.batches import TrainingBatches as TrainingBatches
from pmc_llama.batches import heldout_batches as heldout_batches
from pmc_llama.blend import Blend, BlendedOrder, BlendedStream
from pmc_llama.config import BatchConfig, CorpusConfig, DataConfig
from pmc_llama.coverage import Coverage
from pmc_llama.sample_order import IsolatedOrder, SampleOrder
from pmc_llama.sample_order import sample_order as sample_order
from pmc_llama.segments import Segment, Stream, from_plain, stretches, to_plain
from pmc_llama.spans import DocumentReader
from pmc_llama.whole import Deal, WholeBatches, require_short, whole_heldout_batches


@dataclass(frozen=True)
class Source:
    """A corpus that is trained on.

    Attributes:
        asked: what the recipe says of it.
        corpus: opened.
        split: the papers to train on.
        stream: which those are.
    """

    asked: CorpusConfig
    corpus: Corpus
    split: Split
    stream: Stream


def open_sources(data: DataConfig) -> list[Source]:
    """Open the corpus of a recipe, or the corpora of its blend.

    Raises:
        UserError: one cannot be opened, has nothing to train on, or another tokenizer than the first; or the
            recipe says of `grown` what cannot be.
    """
    alone = CorpusConfig(data.corpus, grown=data.grown, grown_from=data.grown_from)
    if data.corpora and (data.grown or data.grown_from):
        raise UserError(
            "data.grown is for data.corpus; of a blend say it for the corpus in data.corpora that grew."
        )
    sources = [_open(asked) for asked in data.corpora or [alone]]
    first = sources[0].corpus
    for corpus in (source.corpus for source in sources[1:]):
        if corpus.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise UserError(
                f"{corpus.location} was made with another tokenizer than {first.location}; the corpora of a "
                "blend need the same one."
            )
    return sources


def _open(asked: CorpusConfig) -> Source:
    if (asked.grown == "new") != (asked.grown_from is not None):
        raise UserError(
            f"grown is {asked.grown or 'null'} and grown_from is {asked.grown_from or 'null'} for "
            f"{asked.path}; grown: new needs grown_from, the corpus trained on before, and nothing else does."
        )
    corpus = Corpus.open(asked.path)
    split = corpus.split("train")
    if asked.grown_from is None:
        return Source(asked, corpus, split, Stream(corpus.fingerprint))
    from data_tools.growth import new_documents  # pyarrow, which other runs do without

    old = Corpus.open(asked.grown_from)
    split = split.only(new_documents(split, old))
    if not split.documents:
        raise UserError(f"{asked.path} has no paper to train on that {asked.grown_from} lacks.")
    return Source(asked, corpus, split, Stream(corpus.fingerprint, old.fingerprint))


class TrainingData:
    """What a run is trained on, from where it stands.

    Args:
        sources: opened corpora.
        data: the regime that the recipe asks for.
        seed: of the run.
        history: of the checkpoint that is gone on from (`history`), or None.
        samples: that the checkpoint has taken.

    Attributes:
        order: the samples, numbered from `first_sample` of the run on.
        first_sample: of the present segment.
        covered: tokens of each source that were targets so far.
        notes: lines that say what is not as it was in the checkpoint.

    Raises:
        UserError: the checkpoint cannot be gone on from with these corpora or this seed, or the regime is
            none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        data: DataConfig,
        seed: int,
        history: dict[str, Any] | None = None,
        samples: int = 0,
    ) -> None:
        self.sources, self._data = sources, data
        _require_fitting(sources, data)
        before = from_plain(history["segments"]) if history else []
        now = Segment(
            samples,
            data.mode,
            data.sequence_length,
            seed,
            tuple(source.stream for source in sources),
            tuple(source.asked.weight for source in sources),
        )
        self.notes = _continue(before[-1], now, sources) if before else []
        as_before = bool(before) and replace(now, first_sample=before[-1].first_sample) == before[-1]
        self._segments = before if as_before else [*before, now]
        self.first_sample = self._segments[-1].first_sample
        self._blend = Blend(now.weights)
        self._coverages = [self._coverage(number) for number in range(len(sources))]
        self.order, self._stream = self._order()
        self.covered = tuple(
            history["covered"][number] if history and before[-1].streams[number] == stream else 0
            for number, stream in enumerate(now.streams)
        )

    def batches(self, batch: BatchConfig, rank: int, world_size: int) -> TrainingBatches | WholeBatches:
        """The batches of one data-parallel rank; their samples are numbered as the run's."""
        if self._data.mode == "whole":
            deal = Deal(self._data.sequence_length, batch.micro_size, rank, world_size)
            return WholeBatches(self._stream, self.order, batch.global_size, deal, self.first_sample)
        return TrainingBatches(
            self._stream,
            self.order,
            batch.global_size,
            batch.micro_size,
            rank,
            world_size,
            first_sample=self.first_sample,
            positions=self._isolated,
        )

    def steps_left(self, epochs: float, samples: int, global_size: int) -> int:
        """Steps from a count of samples until so many epochs are made; the last batch runs on."""
        left = self.order.samples_until(epochs) - (samples - self.first_sample)
        return max(0, math.ceil(round(left, 6) / global_size))  # what fp64 rounds is no sample

    def epoch(self, samples: int) -> float:
        """Epochs made after so many samples of the run: of the first corpus, as it is now."""
        return self.order.epochs_after(samples - self.first_sample)

    def covered_after(self, covered: Sequence[int], first_sample: int, samples: int) -> tuple[int, ...]:
        """Tokens of each source that were targets after another batch.

        Args:
            covered: before the batch.
            first_sample: of the batch, as the run counts.
            samples: of the batch.
        """
        numbers = np.arange(first_sample, first_sample + samples) - self.first_sample
        source, index = self._blend.locate(numbers)
        return tuple(
            before + int(coverage.new_targets(index[source == number]).sum())
            for number, (before, coverage) in enumerate(zip(covered, self._coverages, strict=True))
        )

    def coverage(self, covered: Sequence[int]) -> dict[str, float]:
        """The part of each source's tokens that were targets, by where the corpus is."""
        return {
            source.corpus.location: tokens / source.split.tokens
            for source, tokens in zip(self.sources, covered, strict=True)
        }

    def history(self, covered: Sequence[int]) -> dict[str, Any]:
        """What a checkpoint keeps beside the count of samples, as JSON holds it."""
        return {"segments": to_plain(self._segments), "covered": list(covered)}

    @property
    def _isolated(self) -> bool:
        """A window is of one document in any case."""
        return self._data.isolate_documents and self._data.mode == "packed"

    def _coverage(self, number: int) -> Coverage:
        segment, source = self._segments[-1], self.sources[number]
        taken = stretches(self._segments, segment.first_sample, number)[:-1]  # all but the present one
        return Coverage.of(source.split, segment.mode, segment.sequence_length, segment.seed, taken)

    def _order(self) -> tuple[SampleOrder, DocumentReader]:
        orders: list[SampleOrder] = [coverage.order for coverage in self._coverages]
        splits = [source.split for source in self.sources]
        if self._isolated:
            orders = [IsolatedOrder(order, split.starts) for order, split in zip(orders, splits, strict=True)]
        if len(splits) == 1:
            return orders[0], splits[0]
        sizes = [split.tokens for split in splits]
        return BlendedOrder(orders, sizes, self._blend), BlendedStream(splits, sizes)


def heldout(
    split: Split, data: DataConfig, micro_size: int, rank: int, world_size: int, max_sequences: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank over the held-out split, equally many on every rank.

    Args:
        split: to evaluate.
        data: the regime of the recipe.
        micro_size: sequences of a micro-batch; rows in `whole` mode.
        rank: this rank.
        world_size: data-parallel ranks.
        max_sequences: sequences, or documents in `whole` mode, taken from the front at most.
    """
    length = data.sequence_length
    if data.mode == "whole":
        return whole_heldout_batches(split, Deal(length, micro_size, rank, world_size), max_sequences)
    return heldout_batches(split, length, micro_size, rank, world_size, max_sequences, data.isolate_documents)


def _require_fitting(sources: Sequence[Source], data: DataConfig) -> None:
    """Refuse a corpus that the mode would cut, or whose prompts it would train on.

    Raises:
        UserError: naming the corpus.
    """
    splits = [source.split for source in sources]
    for split in splits:
        if data.mode != "whole" and split.has_prompts:
            raise UserError(
                f"{split.corpus.location} is of prompts with loss on their answers, which data.mode "
                f"{data.mode} does not know; set data.mode to whole, or make it with --loss all."
            )
    if data.mode == "whole":
        for split in [*splits, sources[0].corpus.split("heldout")]:
            require_short(split, data.sequence_length, f"{split.corpus.location} ({split.name})")


def _continue(before: Segment, now: Segment, sources: Sequence[Source]) -> list[str]:
    """What is not as it was, in lines.

    Raises:
        UserError: what may not change, or not without a word in the recipe.
    """
    if before.seed != now.seed:
        raise UserError(
            f"seed is {now.seed}, but the checkpoint was made with {before.seed}, on which its place in the "
            f"data depends; set seed to {before.seed}."
        )
    if len(before.streams) != len(now.streams):
        raise UserError(
            f"The recipe has {len(now.streams)} corpora, but the checkpoint was trained on "
            f"{len(before.streams)}; give those, or export the checkpoint and start a new run from it."
        )
    notes = [
        _grown(stream, source)
        for stream, source in zip(before.streams, sources, strict=True)
        if stream != source.stream
    ]
    if (before.mode, before.sequence_length) != (now.mode, now.sequence_length):
        notes.append(
            f"from {before.mode} sequences of {before.sequence_length} tokens to {now.mode} ones of "
            f"{now.sequence_length}: each mode goes on in its epoch with what that has left"
        )
    if before.weights != now.weights:
        notes.append(
            f"from weights {list(before.weights)} to {list(now.weights)}: each corpus goes on in its epoch"
        )
    return notes


def _grown(before: Stream, source: Source) -> str:
    """A line on a corpus that is not the checkpoint's.

    Raises:
        UserError: the recipe does not say that it grew, or names another one that it grew from.
    """
    asked, now = source.asked, source.stream
    if asked.grown is None:
        raise UserError(
            f"The checkpoint was trained on a corpus with fingerprint {before.corpus[:12]}, but {asked.path} "
            f"has {now.corpus[:12]}; give the corpus that it was trained on, or say how to go on with one "
            "that grew: data.grown all, or new with data.grown_from."
        )
    if asked.grown == "new" and now.without != before.corpus:
        raise UserError(
            f"The checkpoint was trained on a corpus with fingerprint {before.corpus[:12]}, but "
            f"{asked.grown_from} (data.grown_from) has {str(now.without)[:12]}; give the corpus that it was "
            "trained on."
        )
    which = "all" if asked.grown == "all" else "the new"
    return (
        f"{asked.path} has grown: going on over {which} {source.split.documents:,} papers of it; its epochs "
        "and its coverage begin anew"
    )
