"""What a build measures of a document's text, so that decisions need no text later."""

from dataclasses import dataclass

from data_tools.recipe import Measures


@dataclass(frozen=True)
class Measured:
    """The measures of one document.

    Attributes:
        signature: its MinHash signature, or None when not asked for.
        overlaps: the numbers of the test questions that it overlaps.
    """

    signature: bytes | None = None
    overlaps: tuple[int, ...] = ()


class Measurer:
    """Measures documents as a recipe asks."""

    def __init__(self, measures: Measures) -> None:
        self._measures = measures

    def __call__(self, text: str) -> Measured:
        """The measures of a training text."""
        return Measured()
