"""The history of a run's data: segments, in each of which every sample came in one way.

A segment begins where a resumed run changed the mode, the sequence length, the weights of a blend, or a
corpus that grew. The list of segments and the count of samples are all that a checkpoint keeps of the order.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pmc_llama.blend import Blend
from pmc_llama.sample_order import Mode, Stretch


@dataclass(frozen=True)
class Stream:
    """Which stream of tokens.

    Args:
        corpus: fingerprint.
        without: fingerprint of the corpus whose papers are left out, if any are.
    """

    corpus: str
    without: str | None = None


@dataclass(frozen=True)
class Segment:
    """Samples that came in one way.

    Args:
        first_sample: of the run's samples, the first of the segment.
        mode: `window`, `packed` or `whole`.
        sequence_length: targets of a sequence.
        seed: of the order.
        streams: one, or those of a blend.
        weights: of the blend; one number for one stream.
    """

    first_sample: int
    mode: Mode
    sequence_length: int
    seed: int
    streams: tuple[Stream, ...]
    weights: tuple[int, ...]


def stretches(segments: Sequence[Segment], samples: int, number: int) -> list[Stretch]:
    """What a run took of the stream at place `number` since that is what it is, segment by segment.

    Args:
        segments: of the run; the last one is not over.
        samples: taken by the run so far.
        number: place of the stream among those of its segment.
    """
    found: list[Stretch] = []
    end = samples
    for segment in reversed(segments):
        if segment.streams[number] != segments[-1].streams[number]:
            break
        taken = Blend(segment.weights).counts(end - segment.first_sample)[number]
        found.append(Stretch(segment.mode, segment.sequence_length, taken))
        end = segment.first_sample
    return found[::-1]


def to_plain(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Segments as JSON holds them."""
    return [asdict(segment) for segment in segments]


def from_plain(segments: Sequence[dict[str, Any]]) -> list[Segment]:
    """Segments from JSON."""
    return [
        Segment(
            **{
                **segment,
                "streams": tuple(Stream(**stream) for stream in segment["streams"]),
                "weights": tuple(segment["weights"]),
            }
        )
        for segment in segments
    ]
