"""The whole model that a checkpoint stands for, read tensor by tensor; adapters are merged on the way."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader, StorageReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from data_tools.errors import UserError
from pmc_llama.base_weights import Base, identify, require_same
from pmc_llama.checkpoint import Manifest
from pmc_llama.lora import adapter_names

_PREFIX = "model."


def open_weights(
    checkpoint: Path, manifest: Manifest, group: dist.ProcessGroup | None = None
) -> tuple[StorageReader, str]:
    """A reader of every weight of the model that a checkpoint stands for.

    Args:
        checkpoint: whole.
        manifest: its manifest.
        group: whose ranks share the checking of frozen weights; None: one process alone.

    Returns:
        The reader, and what it has before the model's own names.

    Raises:
        UserError: the frozen weights that its adapters belong to are not there, or are others.
    """
    if manifest.base is None:
        return FileSystemReader(checkpoint), _PREFIX
    _require_base(manifest.base, checkpoint, group)
    lora = manifest.recipe["lora"]
    return MergedWeights(manifest.base.path, read_adapters(checkpoint), lora["alpha"] / lora["rank"]), ""


def read_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """The adapters of a checkpoint by their names in the model, whole, fp32. Not collective."""
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    adapters = {
        name: torch.empty(entry.size)  # type: ignore[union-attr]  # all that is stored are tensors
        for name, entry in stored.items()
        if name.startswith(_PREFIX)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(adapters, storage_reader=reader, no_dist=True)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in adapters.items()}


class MergedWeights(HuggingFaceStorageReader):
    """Weights of a Hugging Face directory with adapters merged: W + scale B A in fp32, rounded once.

    Holds the adapters, and of the weights one rectangle that is asked for at a time.

    Args:
        path: of the directory.
        adapters: see `read_adapters`.
        scale: alpha / rank.
    """

    def __init__(self, path: str, adapters: dict[str, Tensor], scale: float) -> None:
        super().__init__(path)
        self.adapters = adapters
        self.scale = scale

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors that `plan` names."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for file, items in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for item in items:
                    where = tuple(
                        slice(offset, offset + length)
                        for offset, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    name = item.storage_index.fqn
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(self._merged(name, tensors.get_slice(name)[where], where))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _merged(self, name: str, weights: Tensor, where: tuple[slice, ...]) -> Tensor:
        a, b = adapter_names(name)
        if a not in self.adapters:
            return weights
        rows, columns = where
        return torch.addmm(
            weights.float(), self.adapters[b][rows], self.adapters[a][:, columns], alpha=self.scale
        )


def _require_base(base: Base, checkpoint: Path, group: dist.ProcessGroup | None) -> None:
    path = Path(base.path)
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{checkpoint} holds adapters of the weights in {path}, where there are none now; put them back, "
            "or write the adapters alone with `pmc-llama export --adapter`."
        )
    require_same(identify(path, group), base, checkpoint)
