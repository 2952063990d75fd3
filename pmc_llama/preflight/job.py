"""What the checks are about."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama import checkpoint
from pmc_llama.checkpoint import Manifest
from pmc_llama.config import Recipe
from pmc_llama.data import Source, open_sources
from pmc_llama.huggingface import parameter_shapes
from pmc_llama.lora import adapter_parameters
from pmc_llama.ranks import Ranks
from pmc_llama.starting import model_config

STATE_BYTES = 12
"""Of a parameter in a checkpoint: its fp32 master and two fp32 moments."""


@dataclass(frozen=True)
class Job:
    """A training that is about to start.

    Attributes:
        recipe: of it.
        resume: the checkpoint that it goes on from, or `latest`.
        ranks: this process among all.
        nodes: names of the machines, by rank.
        draw: a number drawn for this start, the same on every rank.
    """

    recipe: Recipe
    resume: str
    ranks: Ranks
    nodes: list[str]
    draw: int

    @property
    def node(self) -> str:
        """This machine."""
        return self.nodes[self.ranks.rank]

    @property
    def ranks_of_node(self) -> int:
        """Ranks on this machine."""
        return self.nodes.count(self.node)

    @property
    def first_of_node(self) -> bool:
        """Whether no smaller rank is on this machine."""
        return self.nodes.index(self.node) == self.ranks.rank

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.recipe.output / "checkpoints"

    @property
    def source(self) -> Path | None:
        """The checkpoint that training goes on from, if there is one."""
        if self.resume != "latest":
            return Path(self.resume)
        found = checkpoint.list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    @cached_property
    def manifest(self) -> Manifest | None:
        """Of `source`; None as well when it is damaged, since training then starts from an earlier one."""
        try:
            return checkpoint.read_manifest(self.source) if self.source else None
        except UserError:
            return None

    @cached_property
    def sources(self) -> list[Source]:
        """The corpora, opened.

        Raises:
            UserError: one cannot be.
        """
        return open_sources(self.recipe.data)

    @cached_property
    def config(self) -> LlamaConfig:
        """Of the model.

        Raises:
            UserError: the recipe names none, or the corpus cannot be opened.
        """
        source = self.source if self.manifest else None
        return model_config(self.recipe, self.sources[0].corpus.vocab_size, source)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model, tied ones once, adapters not counted."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.config).values())

    @property
    def trained(self) -> int:
        """Parameters that have masters and moments: those of adapters, or else all."""
        lora = self.recipe.lora
        return adapter_parameters(self.config, lora) if lora else self.parameters
