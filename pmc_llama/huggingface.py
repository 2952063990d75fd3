"""Hugging Face directories in and out: weights are read into shards, and written shard by shard.

Neither direction holds a model in memory. Reading fills whatever part of each tensor a rank owns, straight
from safetensors; writing takes as much memory as one output file.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader, StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from data_tools.errors import UserError
from data_tools.files import sync
from pmc_llama.checkpoint import MANIFEST, Manifest, find_tokenizer, verify
from pmc_llama.huggingface_tokenizer import SpecialTokens, write_tokenizer
from pmc_llama.merged_weights import open_weights
from pmc_llama.model import check_buildable
from pmc_llama.model_card import NOTHING_MORE, About, model_card
from pmc_llama.progress import ByteProgress

ExportDtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # transformers' own habit is 5 GB and more; smaller files travel better

_READABLE = {"F16", "BF16", "F32"}
_ROTARY_FREQUENCIES = "rotary_emb.inv_freq"  # which older versions of transformers stored; they are computed
_PARTIAL = ".partial"


# --- in --------------------------------------------------------------------------------------------------


def check_directory(path: Path) -> LlamaConfig:
    """Check, from headers alone, that a directory holds every weight of a LLaMA model and no other.

    Args:
        path: `config.json` and safetensors weights, in one file or in shards with an index.

    Returns:
        The model's configuration.

    Raises:
        UserError: it is not a directory, has no configuration or one of no model, is another kind of model,
            is quantized, has its weights in another format, lacks a shard or a tensor, has one damaged, twice
            or of a wrong shape, or has one that the model has not.
    """
    config = _read_config(path)
    found = _tensors(path)
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing from the weights that {CONFIG} describes")
        file, dtype, stored = found[name]
        if stored != shape:
            raise UserError(
                f"{file}: tensor {name} has shape {list(stored)}, expected {list(shape)} by {CONFIG}"
            )
        if dtype not in _READABLE:
            raise UserError(f"{file}: tensor {name} is of type {dtype}, expected one of F16, BF16 and F32")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in found.keys() - shapes.keys() - tied:
        if not name.endswith(_ROTARY_FREQUENCIES):
            raise UserError(
                f"{found[name][0]}: tensor {name} is not of the model that {CONFIG} describes, which would "
                "be trained without it; mend the configuration"
            )
    return config


def weights_reader(path: Path) -> StorageReader:
    """A reader of the weights of `path` for `torch.distributed.checkpoint.load`.

    Tensors are asked for under the names that transformers gives them, in any dtype and any rectangles; each
    rank reads the bytes of its own part only. Call `check_directory` first: torch's reader believes whatever
    safetensors files it finds.
    """
    return HuggingFaceStorageReader(str(path))


def parameter_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the model, in its own order; tied weights once."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _llama_config(values: dict[str, Any], where: Path) -> LlamaConfig:
    """The configuration that a file holds, of a model that can be built."""
    try:
        config = LlamaConfig.from_dict(values)
    except Exception as error:  # whatever nonsense in a file leads to, deep in transformers
        raise UserError(
            f"{where} does not describe a LLaMA model: {' '.join(str(error).split())}; copy it again"
        ) from error
    check_buildable(config, where)
    return config


def _read_config(path: Path) -> LlamaConfig:
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; expected one with {CONFIG} and safetensors weights")
    try:
        values = json.loads((path / CONFIG).read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{path} has no {CONFIG}; expected a Hugging Face directory of a LLaMA model"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CONFIG} cannot be read as JSON: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llama":
        raise UserError(
            f"{path / CONFIG} has model_type {kind}, expected llama; only LLaMA models are trained here"
        )
    if "quantization_config" in values:
        raise UserError(f"{path / CONFIG} describes quantized weights; use the original fp16 or bf16 ones")
    return _llama_config(values, path / CONFIG)


def _tensors(path: Path) -> dict[str, tuple[Path, str, torch.Size]]:
    """File, dtype and shape of every stored tensor, from the headers."""
    found: dict[str, tuple[Path, str, torch.Size]] = {}
    _check_files(path)
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file} is damaged or not a safetensors file ({error}); copy it again"
            ) from error
        for name, part in slices.items():
            if name in found:
                # torch's reader does not look at the index and would take either.
                raise UserError(
                    f"{path}: tensor {name} is both in {found[name][0].name} and in {file.name}; "
                    "remove the file that does not belong to this model"
                )
            found[name] = (file, part.get_dtype(), torch.Size(part.get_shape()))
    return found


def _check_files(path: Path) -> None:
    """Every file that the index names is there; without an index there is the single file."""
    if (path / INDEX).is_file():
        try:
            expected = set(json.loads((path / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path / INDEX} is not a safetensors index; copy it again") from error
        for name in sorted(expected):
            if not (path / name).is_file():
                raise UserError(f"{path}: shard {name}, which {INDEX} names, is missing; copy it again")
    elif not (path / SINGLE).is_file():
        if any(path.glob("*.bin")):
            raise UserError(
                f"{path} has its weights as .bin files only, which can run code when loaded; "
                "convert them to safetensors"
            )
        raise UserError(f"{path} has no weights: neither {SINGLE} nor {INDEX} is there")


# --- out -------------------------------------------------------------------------------------------------


Writer = Callable[[Path, Manifest, Path, str], None]
"""Writes what a checkpoint is exported as: takes a sound one, its manifest, an empty directory, and the name
that this will have."""


def export(
    checkpoint: Path,
    directory: Path,
    dtype: ExportDtype = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    about: About = NOTHING_MORE,
) -> None:
    """Write a checkpoint as a directory that transformers opens, without holding the model in memory.

    The result has the weights as safetensors, configuration, generation configuration, tokenizer and a model
    card. It appears under its name only when it is complete. Adapters are merged into the weights that they
    belong to.

    Args:
        checkpoint: a published checkpoint.
        directory: where the model goes; it must not exist, or be empty.
        dtype: of the weights, rounded to nearest from the fp32 masters.
        max_shard_bytes: above which the weights are cut into several files; memory is that of one.
        about: what the model card says beside what the checkpoint tells.

    Raises:
        UserError: the checkpoint is damaged, `directory` is in use, a weight does not fit `dtype`, the
            tokenizer cannot be expressed exactly, the weights that adapters belong to are not there, or the
            disk refuses.
    """

    def write(source: Path, manifest: Manifest, aside: Path, name: str) -> None:
        _write_model(source, manifest, aside, name, dtype, max_shard_bytes, about)

    publish(checkpoint, directory, write)


def publish(checkpoint: Path, directory: Path, write: Writer) -> None:
    """Check a checkpoint, have it written aside, and give that its name once it is on disk.

    Raises:
        UserError: the checkpoint is damaged, `directory` is there and not empty, or the disk refuses.
    """
    try:
        _publish(checkpoint, directory.resolve(), write)
    except (OSError, SafetensorError) as error:
        full = os.strerror(errno.ENOSPC) in str(error)  # safetensors gives no number
        advice = "make room, then export again" if full else "mend that or choose another directory"
        raise UserError(f"{checkpoint} cannot be exported to {directory}: {error}; {advice}") from error


def _publish(checkpoint: Path, directory: Path, write: Writer) -> None:
    empty = directory.is_dir() and all(path.name == _PARTIAL for path in directory.iterdir())
    if directory.exists() and not empty:
        raise UserError(
            f"{directory} is there already and not an empty directory; choose another or remove it"
        )
    # An empty directory is filled, not replaced: it may be a mount, or the one that the user is in.
    aside = directory / _PARTIAL if empty else directory.with_name(f".{directory.name}{_PARTIAL}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        manifest = verify(checkpoint)
        write(checkpoint, manifest, aside, directory.name)
        _synchronize(aside)
        if empty:
            _move_files(aside, directory)
        else:
            aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    """Move every file; the configuration last, without which transformers opens nothing."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == CONFIG):
        path.rename(target / path.name)
    sync(target)


def _write_model(
    checkpoint: Path,
    manifest: Manifest,
    directory: Path,
    name: str,
    dtype: ExportDtype,
    max_shard_bytes: int,
    about: About,
) -> None:
    config = _llama_config(manifest.model_config, checkpoint / MANIFEST)
    special = write_tokenizer(find_tokenizer(checkpoint), directory, config.max_position_embeddings)
    _write_configs(config, special, directory, dtype)
    shapes = parameter_shapes(config)
    parameters = sum(shape.numel() for shape in shapes.values())
    (directory / "README.md").write_text(model_card(name, manifest, parameters, dtype, about))

    empty = {key: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for key, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_bytes)
    planner = _CountingPlanner(ByteProgress("export", split.metadata["total_size"]))
    reader, prefix = open_weights(checkpoint, manifest)
    for file, names in split.filename_to_tensors.items():
        wanted = {f"{prefix}{key}": torch.empty_like(empty[key], device="cpu") for key in names}
        _load(wanted, checkpoint, reader, planner)
        tensors = {key.removeprefix(prefix): tensor for key, tensor in wanted.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG, directory / file)  # safetensors lets nobody else read it
    if split.is_sharded:
        _write_index(split, directory)


def _load(
    tensors: dict[str, Tensor], checkpoint: Path, reader: StorageReader, planner: DefaultLoadPlanner
) -> None:
    """Fill tensors in CPU memory from what a checkpoint stands for, rounded to their dtype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # Copying an fp32 piece into a tensor of another dtype rounds it, so no fp32 copy is ever whole.
        try:
            dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            if not isinstance(cause, Exception):
                raise cause from error  # it catches Ctrl-C, too
            raise UserError(
                f"the tensors of {checkpoint} are not those that its {MANIFEST} describes: "
                f"{' '.join(str(cause).split())}; use an earlier checkpoint"
            ) from error
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and not tensor.isfinite().all():
            raise UserError(f"{name} has values beyond the range of fp16; export with --dtype bf16")


def _write_index(split: StateDictSplit, directory: Path) -> None:
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_configs(config: LlamaConfig, special: SpecialTokens, directory: Path, dtype: ExportDtype) -> None:
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = DTYPES[dtype]
    config.bos_token_id = special.bos and special.bos[0]
    config.eos_token_id = special.eos and special.eos[0]
    config.use_cache = True  # off in training
    config.save_pretrained(directory)
    generation = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    generation.save_pretrained(directory)


class _CountingPlanner(DefaultLoadPlanner):
    """The default planner, telling how far the reading is."""

    def __init__(self, progress: ByteProgress) -> None:
        super().__init__()
        self._progress = progress

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Count a piece that has been read and rounded."""
        self._progress.advance(tensor.nbytes)


def _synchronize(directory: Path) -> None:
    """Have every byte of the directory on disk before its name says that it is complete."""
    for path in (*directory.iterdir(), directory):
        sync(path)
