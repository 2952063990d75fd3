"""Memory of a step, tracked through the real sharding code, with a fake process group and fake tensors.

A backend is built for rank 0 of a world that has no other ranks, under `FakeTensorMode`, and takes its steps
there. Every tensor is known by shape and dtype, so what is allocated, when, and when it is freed is what it
would be; nothing is computed or sent. A model of a few layers suffices, as `memory.py` explains.
"""

import functools
import gc
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from pmc_llama.config import Recipe
from pmc_llama.data import MicroBatch
from pmc_llama.model import LlamaForPretraining, rebuild_rotary
from pmc_llama.rectangles import Rectangles

# What a byte is for. Copies are the shards in the compute dtype that ZeRO-3 has beside its fp32 masters.
MASTERS, COPIES, GRADIENTS, MOMENTS = "masters", "copies", "gradients", "moments"
GATHERED, REDUCTION, ACTIVATIONS, LOGITS = "gathered", "reduction", "activations", "logits"

# ("start", 0), ("forward", layer), ("head", 0), ("backward", layer), ("end", 0).
Phase = tuple[str, int]
START, HEAD, END = ("start", 0), ("head", 0), ("end", 0)

_CPU = torch.device("cpu")


def track(
    recipe: Recipe, config: LlamaConfig, world_size: int, elsewhere: Iterable[str] = ()
) -> dict[Phase, Counter[str]]:
    """Take a micro-batch through forward and backward on rank 0 of `world_size`, and see what is held.

    Args:
        recipe: the ranks divide its batch.
        config: of a model of few layers; each takes a quarter of a second.
        world_size: ranks.
        elsewhere: parts that are not in the memory of the GPU, and are left out.

    Returns:
        For each phase of the last micro-batch the bytes held for each part at the moment when most was held;
        at the end, when the gradients are complete.
    """
    with _fake_world(recipe, world_size), FakeTensorMode(allow_non_fake_inputs=True):
        ledger = _Ledger()
        with ledger:
            backend, model = _build(recipe, config)
        _mark_phases(model, ledger)
        micro_batch = [_micro_batch(recipe)]
        accumulates = recipe.batch.global_size > recipe.batch.micro_size * world_size
        with ledger:
            if accumulates or recipe.backend == "deepspeed":
                # The second micro-batch adds to the gradients of the first, and no later one differs from it.
                # ZeRO-3 learns in the first what to gather ahead in the second.
                backend.forward_backward(micro_batch, targets=1)
                if not accumulates:
                    backend.discard()
            gc.collect()
            ledger.begin()
            backend.forward_backward(micro_batch, targets=1)
        ledger.phase = END
        for part, tensors in _states(recipe, backend).items():
            ledger.label(part, tensors)
        peaks = ledger.peaks(frozenset(elsewhere))
        backend.close()
    return peaks


# --- the backend -------------------------------------------------------------------------------------------


@contextmanager
def _fake_world(recipe: Recipe, world_size: int) -> Iterator[None]:
    """Rank 0 of a world whose collectives do nothing."""
    launched = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with _forgotten_by_deepspeed() if recipe.backend == "deepspeed" else _nothing():
            yield
    finally:
        dist.destroy_process_group()
        for name, value in launched.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _forgotten_by_deepspeed() -> Iterator[None]:
    """DeepSpeed keeps its process groups in variables of two modules; what they were is put back.

    In between it does not compare with rank 0 in which order parameters are used, since rank 0 sends nothing.
    """
    import_module("pmc_llama.backends.deepspeed")  # chooses DeepSpeed's accelerator before it is imported
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import groups

    before = [(vars(module), dict(vars(module))) for module in (comm, groups, coordinator)]
    coordinator.assert_ints_same_as_other_ranks = lambda numbers: None
    try:
        yield
    finally:
        for variables, values in before:
            variables.update(values)


def _build(recipe: Recipe, config: LlamaConfig) -> tuple[Any, LlamaForPretraining]:
    if recipe.backend == "deepspeed":
        from pmc_llama.backends import deepspeed

        engine = deepspeed.build(recipe, config, _CPU)
        return engine, engine.engine.module
    from pmc_llama.backends import fsdp
    from pmc_llama.backends.recomputation import checkpoint_activations

    # As `fsdp.build` does; but a mesh is made of numbers that are read, which fake tensors do not have.
    with unset_fake_temporarily():
        mesh = fsdp.build_mesh(recipe.sharding, _CPU)
        with torch.device("meta"):
            model = LlamaForPretraining(config)
        checkpoint_activations(model, recipe.sharding, reentrant=False, compiled=False)
        fsdp.shard(model, recipe, mesh, _CPU)
    model.to_empty(device=_CPU)
    rebuild_rotary(model, config, _CPU)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return fsdp.FsdpBackend(model, recipe, _CPU), model


def _micro_batch(recipe: Recipe) -> MicroBatch:
    tokens = torch.zeros(recipe.batch.micro_size, recipe.data.sequence_length, dtype=torch.int64)
    return MicroBatch(tokens, tokens, None)


def _states(recipe: Recipe, backend: Any) -> Mapping[str, list[Tensor]]:
    """The tensors in which a backend keeps its states, and ZeRO-3's bucket of gradients."""
    state = {name: _local(tensor) for name, tensor in backend.state().items()}
    masters = [tensor for name, tensor in state.items() if name.startswith("model.")]
    moments = [tensor for name, tensor in state.items() if name.startswith("optim.")]
    if recipe.backend == "fsdp":
        gradients = [_local(parameter.grad) for parameter in backend.parameters.values()]
        return {MASTERS: masters, MOMENTS: moments, GRADIENTS: gradients}
    zero = backend.zero
    flat = [zero.grad_partitions_flat_buffer, *(flat.grad for flat in zero.fp32_partitioned_groups_flat)]
    parameters = list(backend.engine.module.parameters())
    copies = [parameter.ds_tensor for parameter in parameters]
    copies += [parameter.ds_secondary_tensor for parameter in parameters]  # of hpZ's group
    return {
        COPIES: [copy for copy in copies if copy is not None],
        MASTERS: masters,  # after the copies, which they are themselves when all is fp32
        MOMENTS: moments,
        GRADIENTS: [gradient for gradient in flat if gradient is not None],
        REDUCTION: [bucket.buffer for bucket in zero.ipg_buckets.values()],
    }


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Rectangles):
        return tensor.pieces[0][1] if tensor.pieces else torch.empty(0)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- what is held, when ------------------------------------------------------------------------------------


def _mark_phases(model: LlamaForPretraining, ledger: "_Ledger") -> None:
    """Keep the ledger's phase: which layer is at work; a layer's recomputation is part of its backward."""
    layers = list(model.model.layers)

    def forward_begins(number: int) -> None:
        # After the last layer's forward a layer runs only to be computed again.
        backward = ledger.phase == HEAD or ledger.phase[0] == "backward"
        ledger.phase = ("backward" if backward else "forward", number)

    def forward_ends(number: int, output: Tensor) -> None:
        def backward_begins(_: Tensor) -> None:
            ledger.phase = ("backward", number)

        if ledger.phase[0] == "forward":
            if output.requires_grad:
                output.register_hook(backward_begins)  # type: ignore[no-untyped-call]
            if number == len(layers) - 1:
                ledger.phase = HEAD

    def step_begins(*_: Any) -> None:
        ledger.phase = START

    model.register_forward_pre_hook(step_begins)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: forward_begins(number))
        layer.register_forward_hook(lambda *seen, number=number: forward_ends(number, seen[-1]))


# Functions of the libraries by which parameters are gathered and gradients summed, by file.
_SITES = {
    "_fsdp_collectives.py": {
        "foreach_reduce": REDUCTION,
        "foreach_all_gather": GATHERED,
        "foreach_all_gather_copy_out": GATHERED,
    },
    "_fsdp_param.py": {"*": GATHERED},
    "_fsdp_param_group.py": {"post_backward": REDUCTION},
    "partition_parameters.py": {"*": GATHERED},
    "stage3.py": {"*": REDUCTION},
}


class _Allocation:
    """A storage that was alive: its bytes now, its part, and when it was made."""

    __slots__ = ("part", "size")

    def __init__(self, size: int, part: str | None) -> None:
        self.size, self.part = size, part


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every storage that is made and freed while the mode is on.

    Attributes:
        phase: of the step; kept by hooks of the model.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = START
        self._live: dict[int, _Allocation] = {}
        self._events: list[tuple[Phase, _Allocation, int]] = []  # bytes that an allocation grew by

    def __enter__(self) -> "_Ledger":
        """Watch; `fully_shard` frees storages by resizing them, which is no operator."""
        resize = torch.UntypedStorage.resize_

        def noted_resize(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self._live:
                self._resize(self._live[storage._cdata], size)

        self._unwatched_resize = resize
        torch.UntypedStorage.resize_ = noted_resize  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Watch no longer."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._unwatched_resize  # type: ignore[method-assign]

    def begin(self) -> None:
        """Forget what happened before; what is alive stays."""
        self._events = [(START, allocation, allocation.size) for allocation in self._live.values()]

    def label(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what some tensors are for."""
        for tensor in tensors:
            for storage in get_untyped_storages(tensor):
                if storage._cdata in self._live:
                    self._live[storage._cdata].part = part

    def peaks(self, elsewhere: frozenset[str]) -> dict[Phase, Counter[str]]:
        """The fullest moment of each phase by part, without the parts `elsewhere`; at the end, the last."""
        held: Counter[str] = Counter()
        peaks: dict[Phase, Counter[str]] = {}
        for phase, allocation, change in self._events:
            part = allocation.part or ACTIVATIONS
            if part in elsewhere:
                continue
            held[part] += change
            if phase not in peaks or held.total() > peaks[phase].total():
                peaks[phase] = held.copy()
        peaks[END] = held
        return peaks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note the storages that it made."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again, with its local tensors
        site = _site()
        if site is REDUCTION:  # what it reads are gradients on their way
            self._relabel(args)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                for storage in get_untyped_storages(tensor):
                    self._note(storage, site)
        return result

    def _relabel(self, arguments: Any) -> None:
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor):
                for storage in get_untyped_storages(tensor):
                    allocation = self._live.get(storage._cdata)
                    if allocation and allocation.part in (None, LOGITS):
                        allocation.part = REDUCTION

    def _note(self, storage: torch.UntypedStorage, site: str | None) -> None:
        allocation = self._live.get(storage._cdata)
        if allocation is None:
            part = LOGITS if site is None and self.phase == HEAD else site
            allocation = self._live[storage._cdata] = _Allocation(0, part)
            weakref.finalize(storage, self._freed, storage._cdata)
        self._resize(allocation, storage.nbytes())

    def _freed(self, key: int) -> None:
        self._resize(self._live.pop(key), 0)

    def _resize(self, allocation: _Allocation, size: int) -> None:
        if size != allocation.size:
            self._events.append((self.phase, allocation, size - allocation.size))
            allocation.size = size


def _site() -> str | None:
    """What the innermost function of a sharding library that is running is for; None outside of those."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        functions = _functions_of(frame.f_code.co_filename)
        if functions:
            part = functions.get(frame.f_code.co_name) or functions.get("*")
            if part:
                return part
        frame = frame.f_back
    return None


@functools.cache
def _functions_of(path: str) -> Mapping[str, str]:
    return _SITES.get(os.path.basename(path), {})
