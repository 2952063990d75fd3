"""What a machine is: its software, its GPUs, its memory, its clock.

A check returns facts that have to be the same on every rank that finds them, and raises `UserError` for what
is wrong here.
"""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from data_tools.errors import UserError
from pmc_llama.config import plain
from pmc_llama.distributed import own_device
from pmc_llama.preflight.job import STATE_BYTES, Job

# Of a GPU's memory, what may be taken before training starts: this process's own CUDA context has up to half
# a gigabyte. More is another process's.
_TAKEN = 0.1
# fp32 masters, moments and summed gradients, and with `all` the parameters in bf16, bytes a parameter.
_OFFLOADED = {"none": 0, "optimizer": 16, "all": 18}
_FROZEN = 2  # bytes a parameter, in bf16
_DRIVER = Path("/proc/driver/nvidia/version")

Facts = dict[str, str]


def versions(job: Job) -> Facts:
    """Python, the packages that decide numbers, NCCL and driver, the code itself, and the recipe."""
    recipe = hashlib.sha256(repr(plain(job.recipe)).encode()).hexdigest()[:12]
    facts = {
        "python": platform.python_version(),
        "pmc-llama's code": f"of digest {_code()}",
        "the recipe": f"of digest {recipe}",
    }
    for name in ("torch", "transformers", "deepspeed"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if torch.cuda.is_available():
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        facts["the GPU driver"] = _driver()
    return facts


def gpu(job: Job) -> Facts:
    """A GPU of this rank's own, of one kind on all nodes, that answers and is free."""
    device = own_device(job.ranks)
    if device.type == "cpu":
        return {"the device": "a CPU (no GPU is visible)"}
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise UserError(
            f"GPU {device.index} does not answer ({str(error).splitlines()[0]}); see nvidia-smi and dmesg, "
            "and leave this node out"
        ) from error
    if free < (1 - _TAKEN) * total:
        raise UserError(
            f"GPU {device.index} has {free / 2**30:.1f} of its {total / 2**30:.1f} GiB free; end the "
            "processes that nvidia-smi names, or leave this node out"
        )
    return {"the device": torch.cuda.get_device_name(device)}


def gpu_identity(job: Job) -> str:
    """Names the GPU of this rank; empty without one."""
    device = own_device(job.ranks)
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def host_memory(job: Job) -> Facts:
    """Room for copies of the state that checkpoints are written from, and for what is offloaded."""
    sharding, shards = job.recipe.sharding, job.ranks.world_size
    if job.recipe.backend == "fsdp":
        shards = sharding.shard_group or shards
    parameter_bytes = _OFFLOADED[sharding.offload]
    if job.recipe.checkpoint.asynchronous:
        parameter_bytes += STATE_BYTES
    state = parameter_bytes * job.trained
    if job.recipe.lora and sharding.offload == "all":
        state += _FROZEN * job.parameters
    need = state // shards * job.ranks_of_node
    have = min(psutil.virtual_memory().available, _cgroup_memory())
    if need > have:
        raise UserError(
            f"{job.ranks_of_node} ranks need {need / 1e9:.2f} GB of host memory for checkpoints written "
            f"behind training and for what is offloaded, {have / 1e9:.2f} GB are available; ask the "
            "scheduler for more, or set checkpoint.asynchronous to false"
        )
    return {}


def _code() -> str:
    """A digest of this program's source files, which may be copies on each node."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in ("pmc_llama", "data_tools"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _driver() -> str:
    """Such as 570.86.15: the first number with dots in what the kernel module says of itself."""
    words = _DRIVER.read_text().split() if _DRIVER.exists() else []
    return next((word for word in words if "." in word and word[0].isdigit()), "unknown")


def _cgroup_memory() -> float:
    """What the limits of the job leave, bytes; page cache counts as left, since it makes room.

    The names of the files are of cgroup v2 and v1 (kernel.org, admin-guide/cgroup-v2, cgroup-v1/memory).
    """
    room = float("inf")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = Path("/sys/fs/cgroup")
            limit, used, cache = "memory.max", "memory.current", "file"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"
        else:
            continue
        directory = root / path.lstrip("/")
        while directory.is_relative_to(root):
            if (directory / limit).exists() and (most := (directory / limit).read_text().strip()) != "max":
                statistics = dict(
                    entry.split() for entry in (directory / "memory.stat").read_text().splitlines()
                )
                taken = int((directory / used).read_text()) - int(statistics.get(cache, 0))
                room = min(room, int(most) - taken)
            directory = directory.parent
    return room
