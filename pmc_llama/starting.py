"""How a run begins: from which checkpoint, with which model, with which first weights."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import StorageReader
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama import base_weights, checkpoint, huggingface
from pmc_llama.backends.base import Backend
from pmc_llama.base_weights import Base
from pmc_llama.checkpoint import Manifest
from pmc_llama.compatibility import check_adapters, check_shape
from pmc_llama.config import Recipe
from pmc_llama.initialize import RandomWeights
from pmc_llama.lora import AdapterWeights, base_name
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


def find_base(
    recipe: Recipe, config: LlamaConfig, source: Path | None, group: dist.ProcessGroup
) -> Base | None:
    """The frozen weights of a run with `lora`, None of any other. Collective over `group`.

    Args:
        recipe: the run's.
        config: of the model.
        source: the checkpoint that the run goes on from, if there is one.
        group: a gloo group over all ranks, which share the reading.

    Raises:
        UserError: `model.initialize_from` holds no such weights, or the checkpoint goes with others, or it
            trained something else than the recipe does.
    """
    manifest = checkpoint.read_manifest(source) if source else None
    if source and manifest:
        check_adapters(recipe, manifest, source)
    path = recipe.model.initialize_from
    if recipe.lora is None or path is None:
        return None
    check_shape(recipe, config, huggingface.check_directory(path), path)
    base = base_weights.identify(path, group)
    if source and manifest and manifest.base:
        base_weights.require_same(base, manifest.base, source)
    return base


def load_first_weights(
    recipe: Recipe, config: LlamaConfig, backend: Backend, group: dist.ProcessGroup
) -> None:
    """Fill the masters from `model.initialize_from`, or with random weights drawn from the seed.

    With `lora` the frozen weights are read, and the masters of the adapters drawn.
    """
    state, source = backend.state(), recipe.model.initialize_from
    weights = {name[len("model.") :]: t for name, t in state.items() if name.startswith("model.")}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    reader: StorageReader
    if recipe.lora:
        _load_frozen(recipe, backend, group)
        reader = AdapterWeights(shapes, recipe.seed, config.initializer_range)
    elif source:
        reader = huggingface.weights_reader(source)
    else:
        reader = RandomWeights(shapes, recipe.seed, config.initializer_range)
    checkpoint.read_weights(weights, reader, group)
    backend.state_loaded()


def load_checkpoint(
    recipe: Recipe, source: Path, manifest: Manifest, backend: Backend, group: dist.ProcessGroup
) -> None:
    """Fill masters and moments from a checkpoint, and frozen weights from `model.initialize_from`.

    Raises:
        UserError: it cannot be read, or its tensors are not those that its manifest describes.
    """
    _load_frozen(recipe, backend, group)
    state = backend.state()
    checkpoint.load(state, source, group)
    if state["optim.step"] != manifest.updates:
        raise UserError(
            f"{source} is damaged: its manifest says {manifest.updates} updates, its tensors "
            f"{state['optim.step'].item()}; use an earlier checkpoint."
        )
    backend.state_loaded()


def _load_frozen(recipe: Recipe, backend: Backend, group: dist.ProcessGroup) -> None:
    frozen = {base_name(name): tensor for name, tensor in backend.frozen().items()}
    if frozen and recipe.model.initialize_from:
        reader = huggingface.weights_reader(recipe.model.initialize_from)
        checkpoint.read_weights(frozen, reader, group)
