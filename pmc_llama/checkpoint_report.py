"""What a checkpoint is, for a person: read from its manifest alone, without opening its tensors."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from pmc_llama.checkpoint import Manifest
from pmc_llama.model import LlamaForPretraining

_SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def line(path: Path, manifest: Manifest) -> str:
    """One line: how far it is and how large."""
    size = sum(file["bytes"] for file in manifest.files.values()) / 1e9
    return f"{path}  step {manifest.step:,}, {manifest.tokens:,} tokens, {size:.2f} GB"


def describe(path: Path, manifest: Manifest) -> str:
    """Lines on the progress, the model, the data, the recipe's main keys and the files of a checkpoint."""
    size = sum(file["bytes"] for file in manifest.files.values())
    skipped = manifest.step - manifest.updates
    lines = {
        "step": f"{manifest.step:,}" + (f", {skipped:,} of them without an update" if skipped else ""),
        "samples": f"{manifest.samples:,} sequences, {manifest.tokens:,} tokens",
        "model": _model(manifest.model_config),
        **_adapters(manifest),
        "corpus": manifest.corpus,
        **_data(manifest.data),
        **_recipe(manifest.recipe),
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "files": f"{len(manifest.files)}, {size / 1e9:.2f} GB, format {manifest.format}",
    }
    width = max(map(len, lines))
    return "\n".join([str(path), *[f"  {name:<{width}}  {value}" for name, value in lines.items() if value]])


def _model(values: dict[str, Any]) -> str:
    with torch.device("meta"):
        model = LlamaForPretraining(LlamaConfig.from_dict(values))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{parameters:,} parameters; " + ", ".join(
        f"{key} {values[key]}" for key in _SHAPE if key in values
    )


def _adapters(manifest: Manifest) -> dict[str, str]:
    if manifest.base is None:
        return {}
    lora = manifest.recipe["lora"]
    return {
        "adapters": f"rank {lora['rank']}, alpha {lora['alpha']:g}, of {', '.join(lora['targets'])}",
        "belong to": f"{manifest.base.path}, fingerprint {manifest.base.fingerprint}",
    }


def _data(data: dict[str, Any]) -> dict[str, str]:
    lines = {}
    for number, segment in enumerate(data.get("segments", []), start=1):
        streams = ", ".join(stream["corpus"] for stream in segment["streams"])
        ratio = ":".join(str(weight) for weight in segment["weights"])
        lines[f"data {number}"] = (
            f"from sample {segment['first_sample']:,}: {segment['mode']} of {segment['sequence_length']} "
            f"tokens, seed {segment['seed']}, corpora {streams} in the ratio {ratio}"
        )
    if "covered" in data:
        lines["covered"] = (
            f"{', '.join(f'{tokens:,}' for tokens in data['covered'])} tokens seen at least once"
        )
    return lines


def _recipe(recipe: dict[str, Any]) -> dict[str, str]:
    wanted = {
        "backend": ("backend",),
        "batch": ("batch", "global_size"),
        "learning rate": ("optimizer", "learning_rate"),
        "precision": ("precision", "compute"),
    }
    lines = {}
    for name, keys in wanted.items():
        value: Any = recipe
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            lines[name] = str(value)
    return lines
