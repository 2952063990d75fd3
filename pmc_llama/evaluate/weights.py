"""A model to be judged: its weights, whole on every rank, from a Hugging Face directory or a checkpoint."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data_tools.errors import UserError
from data_tools.tokenizer import Tokenizer
from pmc_llama.checkpoint import MANIFEST, TOKENIZERS, list_checkpoints, read_manifest, read_weights
from pmc_llama.huggingface import check_directory, weights_reader
from pmc_llama.merged_weights import open_weights


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Attributes:
        path: of the Hugging Face directory or of the checkpoint.
        config: of the model.
        is_checkpoint: whether it is a checkpoint.
    """

    path: Path
    config: LlamaConfig
    is_checkpoint: bool

    def tokenizers(self) -> dict[str, Path]:
        """The tokenizers beside its weights by their SHA-256 (hex); the first one is its own."""
        paths = [self.path / name for name in TOKENIZERS if (self.path / name).is_file()]
        return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in paths}

    def tokenizer(self) -> Tokenizer:
        """Its own tokenizer.

        Raises:
            UserError: there is none beside its weights, or it is damaged.
        """
        for path in self.tokenizers().values():
            return Tokenizer(path)
        raise UserError(f"{self.path} has no tokenizer, {' or '.join(TOKENIZERS)}; copy the model's there.")


def find_model(path: Path) -> ModelSource:
    """The model that a path stands for: a Hugging Face directory, a checkpoint, or a run's newest checkpoint.

    Raises:
        UserError: it is none of these, or its headers show damage.
    """
    published = list_checkpoints(path / "checkpoints")
    if published or (path / MANIFEST).is_file():
        checkpoint = path if (path / MANIFEST).is_file() else published[-1]
        config = LlamaConfig.from_dict(read_manifest(checkpoint).model_config)
        return ModelSource(checkpoint, config, is_checkpoint=True)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no model: expected a Hugging Face directory with config.json, a checkpoint, or "
            "the output directory of a run that has published one."
        )
    return ModelSource(path, check_directory(path), is_checkpoint=False)


def load_model(source: ModelSource, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Read the weights, rounded to `dtype`. Collective over the default group; every rank holds them all.

    Adapters of a checkpoint are merged.

    Raises:
        UserError: on every rank, when they cannot be read.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(source.config).to(dtype)
    model = model.to_empty(device=device)
    model.tie_weights()
    with torch.device(device):  # no file holds them, and bf16 would turn far positions by a wrong angle
        model.model.rotary_emb = LlamaRotaryEmbedding(source.config)
    group = dist.group.WORLD
    assert group is not None  # noqa: S101
    reader, prefix = weights_reader(source.path), ""
    if source.is_checkpoint:
        reader, prefix = open_weights(source.path, read_manifest(source.path), group)
    weights = {f"{prefix}{name}": parameter.data for name, parameter in model.named_parameters()}
    read_weights(weights, reader, group)
    return model.eval()
