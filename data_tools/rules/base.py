"""What a rule of the cleaning chain is."""

from dataclasses import dataclass
from typing import Protocol

from data_tools.papers import Paper


@dataclass(frozen=True)
class Dropped:
    """A paper that a rule leaves out: the counted reason, and what was found."""

    reason: str
    detail: str = ""


class Rule(Protocol):
    """One step of the chain: a frozen dataclass, its fields the parameters of the recipe."""

    def __call__(self, paper: Paper) -> Paper | Dropped:
        """The paper as the rule leaves it, or why it is left out."""
        ...
