"""Do recipe, corpus, weights and checkpoint fit each other? Asked before anything is trained."""

from pathlib import Path

from transformers import LlamaConfig

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from pmc_llama.checkpoint import Manifest
from pmc_llama.config import Recipe

_SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def check_model(recipe: Recipe, config: LlamaConfig, corpus: Corpus) -> None:
    """The model has a row for every token id and a position for every input.

    Raises:
        UserError: it has not.
    """
    if config.vocab_size < corpus.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.vocab_size}, but the tokenizer of {corpus.location} makes "
            f"{corpus.vocab_size} different ids; the model needs at least as many."
        )
    length, positions = recipe.data.sequence_length, config.max_position_embeddings
    if length > positions:
        raise UserError(
            f"data.sequence_length is {length}, but the model has {positions} positions; "
            "shorten the sequences or choose a model with more."
        )


def check_shape(recipe: Recipe, config: LlamaConfig, other: LlamaConfig, where: Path) -> None:
    """Weights that are to be loaded have the shape of the recipe's model.

    Args:
        recipe: names the model.
        config: of the model that the recipe names.
        other: that belongs to the weights.
        where: they are; told to the user.

    Raises:
        UserError: names the first value that differs.
    """
    for key in _SHAPE_KEYS:
        ours, theirs = getattr(config, key), getattr(other, key)
        if ours != theirs:
            raise UserError(
                f"The weights in {where} have {key} {theirs}, but the recipe's model (model.size "
                f"{recipe.model.size}) has {ours}; name the size that those weights have."
            )


def check_adapters(recipe: Recipe, manifest: Manifest, where: Path) -> None:
    """A checkpoint that is resumed trained what the recipe trains: all weights, or the same adapters.

    Args:
        recipe: the run's.
        manifest: of the checkpoint.
        where: it is; told to the user.

    Raises:
        UserError: it did not.
    """
    if manifest.base is None:
        if recipe.lora:
            raise UserError(
                f"{where} holds all weights and no adapters, but the recipe has lora; export it and name the "
                "export in model.initialize_from of a new run, or set lora to null."
            )
        return
    theirs = manifest.recipe["lora"]
    if recipe.lora is None:
        raise UserError(
            f"{where} holds adapters alone (lora.rank {theirs['rank']}), but the recipe has no lora; give it "
            "the checkpoint's, or export and name the export in model.initialize_from of a new run."
        )
    # Dropout may change: it is no part of the function.
    for key, ours in (
        ("rank", recipe.lora.rank),
        ("alpha", recipe.lora.alpha),
        ("targets", sorted(recipe.lora.targets)),
    ):
        found = sorted(theirs[key]) if key == "targets" else theirs[key]
        if found != ours:
            raise UserError(
                f"lora.{key} is {_words(ours)}, but the adapters in {where} have {_words(found)}; set it to "
                "that."
            )


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
