"""An adapter of PEFT's on a model, unmerged."""

from pathlib import Path

from transformers import LlamaForCausalLM

from data_tools.errors import UserError


def with_adapter(model: LlamaForCausalLM, directory: Path) -> LlamaForCausalLM:
    """The model with a LoRA adapter put on it and not merged into its weights.

    Raises:
        UserError: PEFT is not installed, or there is no adapter that fits.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"Adapters are read by the package peft ({error}); pip install peft.") from error
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no adapter of PEFT's: there is no {name}.")
    try:
        return PeftModel.from_pretrained(model, str(directory)).get_base_model().eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"The adapter {directory} does not fit the model: {error}") from error
