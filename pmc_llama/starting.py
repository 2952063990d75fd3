"""How a run begins: from which checkpoint, with which model, with which first weights."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama import checkpoint, huggingface
from pmc_llama.backends.base import Backend
from pmc_llama.checkpoint import Manifest
from pmc_llama.compatibility import check_shape
from pmc_llama.config import Recipe
from pmc_llama.initialize import RandomWeights
from pmc_llama.model import check_buildable, for_training, llama_config


def find_checkpoint(
    root: Path, resume: str | None, group: dist.ProcessGroup, warn: Callable[[str], None]
) -> Path | None:
    """The checkpoint that a run goes on from, or None. Collective over `group`.

    Args:
        root: the run's `checkpoints` directory; what a killed run left half done there is cleared away.
        resume: None starts afresh; `latest` is the newest sound checkpoint of `root`, if there is one;
            anything else is the directory of a checkpoint.
        group: a gloo group over all ranks.
        warn: told of damaged checkpoints passed over.

    Raises:
        UserError: the checkpoint is damaged or none, or the run would go back over later ones of its own.
    """
    if dist.get_rank(group) == 0:
        checkpoint.tidy(root)
    dist.barrier(group)
    if resume == "latest":
        return checkpoint.newest_sound(root, group, warn)
    source, here = (Path(resume) if resume else None), checkpoint.list_checkpoints(root)
    if source and (damage := checkpoint.verify_together(source, group)):
        raise UserError(damage)
    if here and not (source and source.resolve() == here[-1].resolve()):
        raise UserError(
            f"{root} already holds checkpoints; add --resume to go on from the newest, or choose another "
            "--output."
        )
    return source


def model_config(recipe: Recipe, vocab_size: int, source: Path | None) -> LlamaConfig:
    """The configuration of the checkpoint, else of the first weights, else the one that the recipe names.

    Args:
        recipe: the run's.
        vocab_size: of the corpus' tokenizer.
        source: the checkpoint, if there is one.

    Raises:
        UserError: it makes no model, or has another shape than the recipe's `model.size`.
    """
    where = source or recipe.model.initialize_from
    if where is None:
        return for_training(llama_config(recipe.model, vocab_size))
    if source:
        config = LlamaConfig.from_dict(checkpoint.read_manifest(source).model_config)
        check_buildable(config, where)
    else:
        config = huggingface.check_directory(where)
    # The size is what the recipe says; all else that makes the function is what the weights say.
    check_shape(recipe, llama_config(recipe.model, config.vocab_size), config, where)
    return for_training(config)


def load_first_weights(
    recipe: Recipe, config: LlamaConfig, backend: Backend, group: dist.ProcessGroup
) -> None:
    """Fill the masters from `model.initialize_from`, or with random weights drawn from the seed."""
    state, source = backend.state(), recipe.model.initialize_from
    weights = {name[len("model.") :]: t for name, t in state.items() if name.startswith("model.")}
    if source:
        reader = huggingface.weights_reader(source)
    else:
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        reader = RandomWeights(shapes, recipe.seed, config.initializer_range)
    checkpoint.read_weights(weights, reader, group)
    backend.state_loaded()


def load_checkpoint(source: Path, manifest: Manifest, backend: Backend, group: dist.ProcessGroup) -> None:
    """Fill masters and moments from a checkpoint.

    Raises:
        UserError: it cannot be read, or its tensors are not those that its manifest describes.
    """
    state = backend.state()
    checkpoint.load(state, source, group)
    if state["optim.step"] != manifest.updates:
        raise UserError(
            f"{source} is damaged: its manifest says {manifest.updates} updates, its tensors "
            f"{state['optim.step'].item()}; use an earlier checkpoint."
        )
    backend.state_loaded()
