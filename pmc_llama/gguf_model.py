"""A LLaMA model in a GGUF file as a Hugging Face directory: safetensors, configuration, `tokenizer.json`.

    python -m pmc_llama.gguf_model MODEL.gguf DIRECTORY

transformers reads the file, undoes its quantization and its order of rotary dimensions; what comes out can be
given as `model.initialize_from`, and its `tokenizer.json` to `pmc-data build`.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from data_tools.errors import UserError


def convert(source: Path, directory: Path) -> None:
    """Write the model of a GGUF file to a directory, its weights in fp32.

    Args:
        source: a GGUF file of the LLaMA architecture, quantized or not.
        directory: must not exist, or be empty.

    Raises:
        UserError: the file is none, or is of another architecture, or the directory has files.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty; give a new directory.")
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
    except Exception as error:  # whatever a file that is no GGUF leads to, deep in transformers
        raise UserError(
            f"{source} cannot be read as a GGUF model: {' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(f"{source} holds a {type(model).__name__}, expected a LLaMA model.")
    del model.config.quantization_config  # the weights are plain numbers now
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Convert the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    options = parser.parse_args()
    try:
        convert(options.source, options.directory)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{options.directory} holds the model and its tokenizer.json")


if __name__ == "__main__":
    main()
