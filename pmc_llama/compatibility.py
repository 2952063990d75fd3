"""Do recipe, corpus, weights and checkpoint fit each other? Asked before anything is trained."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from pmc_llama.checkpoint import Manifest
from pmc_llama.config import Recipe, plain

# A checkpoint's count of samples means something only while these stay what they were.
_ORDER_KEYS = ("seed", "data.mode", "data.sequence_length", "batch.global_size")
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
            f"model.vocab_size is {config.vocab_size}, but the tokenizer of {corpus.directory} makes "
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


def check_resumable(recipe: Recipe, corpus: Corpus, manifest: Manifest) -> None:
    """The run can go on from a checkpoint exactly where it stopped in the data.

    Raises:
        UserError: corpus or sample order are not those of the checkpoint.
    """
    if manifest.corpus != corpus.fingerprint:
        raise UserError(
            f"The checkpoint was trained on a corpus with fingerprint {manifest.corpus[:12]}, but "
            f"{corpus.directory} has {corpus.fingerprint[:12]}; give the corpus that it was trained on, or "
            "export the checkpoint and start a new run from its weights."
        )
    ours = plain(recipe)
    for key in _ORDER_KEYS:
        before, now = _lookup(manifest.recipe, key), _lookup(ours, key)
        if before != now:
            raise UserError(
                f"{key} is {now}, but the checkpoint was made with {before}, on which its place in the data "
                f"depends; set {key} to {before}."
            )


def _lookup(tree: dict[str, Any], dotted: str) -> Any:
    value: Any = tree
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
