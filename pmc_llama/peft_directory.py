"""The adapters of a checkpoint as PEFT writes them, beside weights that stay as they are."""

from pathlib import Path

from safetensors.torch import save_file

from data_tools.errors import UserError
from pmc_llama.checkpoint import Manifest, read_manifest
from pmc_llama.config import LoraConfig
from pmc_llama.huggingface import DTYPES, ExportDtype, publish
from pmc_llama.lora import peft_config, peft_name
from pmc_llama.merged_weights import read_adapters
from pmc_llama.model_card import NOTHING_MORE, About, model_card

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def export_adapters(
    checkpoint: Path, directory: Path, dtype: ExportDtype = "fp32", about: About = NOTHING_MORE
) -> None:
    """Write the adapters of a checkpoint as `peft.PeftModel.from_pretrained` reads them.

    The directory has `adapter_config.json`, which names the weights that they belong to,
    `adapter_model.safetensors` and a model card. It appears under its name only when it is complete.

    Args:
        checkpoint: a published checkpoint of a run with `lora`.
        directory: where they go; it must not exist, or be empty.
        dtype: of the adapters, rounded to nearest from the fp32 masters.
        about: what the model card says beside what the checkpoint tells.

    Raises:
        UserError: the checkpoint has no adapters or is damaged, `directory` is in use, or the disk refuses.
    """
    if read_manifest(checkpoint).base is None:
        raise UserError(
            f"{checkpoint} holds all weights and no adapters, since its recipe has no lora; "
            "export it without --adapter."
        )

    def write(source: Path, manifest: Manifest, aside: Path, name: str) -> None:
        assert manifest.base is not None  # noqa: S101
        config = peft_config(LoraConfig(**manifest.recipe["lora"]), manifest.base.path)
        config.inference_mode = config.init_lora_weights = True  # of those who load it
        config.save_pretrained(str(aside))
        tensors = {
            peft_name(name): tensor.to(DTYPES[dtype]) for name, tensor in read_adapters(source).items()
        }
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        parameters = sum(tensor.numel() for tensor in tensors.values())
        card = model_card(name, manifest, parameters, dtype, about, adapters=True)
        (aside / "README.md").write_text(card)

    publish(checkpoint, directory, write)
