"""How long a step takes: a roofline whose parts can be read, with a few constants fitted to published runs.

A GPU spends a step on matrix products (at a part of its peak), attention (at a smaller part), everything
that waits for memory (norms, rotary embedding, activation, residuals, loss, optimizer: bytes over bandwidth),
and on what of its communication is not hidden behind those. `benchmarks/plan.md` has each published run
beside what is computed here, and says which constants were fitted to which runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from transformers import LlamaConfig

from pmc_llama.config import BackendName, DataConfig, Recipe, ShardingConfig
from pmc_llama.plan.cluster import Cluster, Gpu

ADAMW_BYTES = 28  # read parameter, gradient and both moments, write all but the gradient: fp32, fused
CLIP_BYTES = 12  # read for the norm, read and write for the scaling
LOSS_BYTES = 40  # a logit: cast to fp32, softmax, gradient, cast back, scaled in backward (`model.py`)


@dataclass(frozen=True)
class Shape:
    """What of a decoder's shape decides its time.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        heads: attention heads.
        query: width of all queries together.
        key_value: width of all keys together, and of all values.
        feed_forward: width of the feed-forward.
        vocabulary: rows of embedding and output head.
        feed_forward_matrices: 3 for LLaMA's gated one, 2 for the plain one of GPT and MPT.
        tied: embedding and output head are one matrix.
    """

    layers: int
    hidden: int
    heads: int
    query: int
    key_value: int
    feed_forward: int
    vocabulary: int
    feed_forward_matrices: int = 3
    tied: bool = False

    @classmethod
    def of(cls, config: LlamaConfig) -> "Shape":
        """The shape of a LLaMA."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            query=config.num_attention_heads * config.head_dim,
            key_value=config.num_key_value_heads * config.head_dim,
            feed_forward=config.intermediate_size,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of a decoder layer."""
        attention = 2 * self.hidden * (self.query + self.key_value)
        return attention + self.feed_forward_matrices * self.hidden * self.feed_forward

    @property
    def parameters(self) -> int:
        """Elements of all parameters, norms included."""
        norms = (2 * self.layers + 1) * self.hidden
        outside = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_weights + outside + norms


@dataclass(frozen=True)
class Kernels:
    """Bytes that the memory-bound operations of a decoder layer read and write, for a token, in bf16.

    Counted from the code, kernel by kernel. Each triple is for elements of the residual stream, of queries
    and keys, and of the feed-forward.

    Attributes:
        name: in tables.
        forward: bytes for each such element.
        backward: likewise, with the sums of gradients from several uses.
    """

    name: str
    forward: tuple[float, float, float]
    backward: tuple[float, float, float]

    def bytes_per_token(self, shape: Shape) -> tuple[float, float]:
        """Forward and backward, of one layer."""
        widths = (shape.hidden, shape.query + shape.key_value, shape.feed_forward)
        forward: float = sum(count * width for count, width in zip(self.forward, widths, strict=True))
        backward: float = sum(count * width for count, width in zip(self.backward, widths, strict=True))
        return forward, backward


# transformers' LlamaDecoderLayer, one kernel an operator: each RMSNorm makes seven passes, partly in fp32 (36
# bytes), the rotary embedding five (20), SiLU and product five of 2 bytes, a residual sum three.
EAGER = Kernels("eager", forward=(84, 20, 10), backward=(182, 36, 18))
# The same with what lies between two matrix products fused into one kernel, as torch.compile does.
COMPILED = Kernels("compiled", forward=(20, 4, 6), backward=(32, 4, 10))


@dataclass(frozen=True)
class Recomputation:
    """What part of the layers' forward is computed again in backward.

    Attributes:
        matmul: of matrix products.
        attention: of attention.
        pointwise: of the rest.
    """

    matmul: float = 0.0
    attention: float = 0.0
    pointwise: float = 0.0

    @classmethod
    def of(cls, sharding: ShardingConfig, layers: int) -> "Recomputation":
        """That of a recipe."""
        count = layers if sharding.checkpointed_layers is None else sharding.checkpointed_layers
        share = count / layers
        if sharding.activation_checkpointing == "full":
            return cls(share, share, share)
        return cls(pointwise=share if sharding.activation_checkpointing == "selective" else 0.0)


@dataclass(frozen=True)
class Workload:
    """A step of one rank.

    Attributes:
        shape: of the model.
        backend: what shards it.
        sequence_length: tokens of a sequence.
        micro_size: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        kernels: of the memory-bound operations.
        attention: `causal` skips what lies above the diagonal; `full` computes it and masks it, as documents
            that are isolated from one another need; `materialized` also writes the scores to memory, as code
            before flash attention did.
        recomputation: by activation checkpointing.
        shard_group: ranks that a parameter is cut over; None for all.
        gathered_twice: in forward and again in backward.
        reduce_bytes: of an element of a gradient while it is summed.
        offload: what lives in host memory.
        input_seconds: that a step waits for each of its rank's sequences to be read; 0 when read ahead.
    """

    shape: Shape
    backend: BackendName
    sequence_length: int
    micro_size: int
    accumulation: int = 1
    kernels: Kernels = EAGER
    attention: Literal["causal", "full", "materialized"] = "causal"
    recomputation: Recomputation = Recomputation()
    shard_group: int | None = None
    gathered_twice: bool = True
    reduce_bytes: int = 4
    offload: Literal["none", "optimizer", "all"] = "none"
    input_seconds: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, config: LlamaConfig, ranks: int, rows: int | None = None) -> "Workload":
        """A step of a recipe on so many ranks, which divide its batch.

        Args:
            recipe: the whole of it.
            config: of its model.
            ranks: one a GPU.
            rows: of a step, see `duration.rows_of_step`; None, as many as the global batch has sequences: in
                `whole` mode a row for each document, the most that there can be.
        """
        sharding, micro_size = recipe.sharding, recipe.batch.micro_size
        rows = recipe.batch.global_size if rows is None else rows
        return cls(
            shape=Shape.of(config),
            backend=recipe.backend,
            sequence_length=recipe.data.sequence_length,
            micro_size=micro_size,
            accumulation=-(-rows // (micro_size * ranks)),
            attention="full" if masks_documents(recipe.data) else "causal",
            recomputation=Recomputation.of(sharding, config.num_hidden_layers),
            shard_group=sharding.shard_group,
            gathered_twice=sharding.reshard_after_forward,
            reduce_bytes={"fp32": 4, "bf16": 2}[recipe.precision.reduce],
            offload=sharding.offload,
        )

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_size * self.sequence_length


def masks_documents(data: DataConfig) -> bool:
    """Whether documents that share a row are masked from one another: always in `whole` mode."""
    return data.mode == "whole" or (data.mode == "packed" and data.isolate_documents)


@dataclass(frozen=True)
class Calibration:
    """What part of the data sheets is reached.

    Attributes:
        matmul: of the dense bf16 peak, in matrix products of a model 4,096 wide, by architecture.
        width: the power of (width / 4,096) by which that grows, up to a width of 8,192.
        attention: of that peak, in causal flash attention, forward and backward together.
        memory: of the HBM bandwidth.
        link: of NVLink and of the network.
        overlap_loss: part of a hidden transfer by which the computation above it grows longer, since the two
            share the GPU's processors and memory.
        node_seconds: that each further node adds to a collective, unhidden.
    """

    matmul: Mapping[str, float]
    width: Mapping[str, float]
    attention: Mapping[str, float]
    memory: float
    link: float
    overlap_loss: float
    node_seconds: float

    def fitted(self, gpu: Gpu) -> bool:
        """Whether published runs of this architecture were fitted; else Hopper's constants are taken."""
        return gpu.architecture in self.matmul

    def matmul_part(self, gpu: Gpu, hidden: int) -> float:
        """Of the peak, in matrix products of a model of this width."""
        architecture = gpu.architecture if self.fitted(gpu) else "hopper"
        growth: float = (min(hidden, 8192) / 4096) ** self.width[architecture]
        return self.matmul[architecture] * growth

    def attention_part(self, gpu: Gpu) -> float:
        """Of the peak, in flash attention."""
        return self.attention[gpu.architecture if self.fitted(gpu) else "hopper"]


# matmul, width and node_seconds: fitted by `python -m benchmarks.plan --fit` to the runs that
# benchmarks/plan.md marks. attention: FlashAttention-2 (Dao 2023, arXiv 2307.08691) reaches 50 to 73% of an
# A100's peak and up to 335 TFLOP/s on an H100; forward with backward, causal, is at the lower end. memory:
# what simple kernels reach. link: what NCCL's own tests reach of NVLink and InfiniBand for large messages.
# overlap_loss: those runs do not tell it (0 to 0.2 fit them almost equally well); at 0.1 a slow network is
# never free.
CALIBRATION = Calibration(
    matmul={"ampere": 0.742, "hopper": 0.506},
    width={"ampere": 0.0, "hopper": 0.23},
    attention={"ampere": 0.55, "hopper": 0.30},
    memory=0.85,
    link=0.80,
    overlap_loss=0.1,
    node_seconds=15e-6,
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go to.

    Attributes:
        matmul: matrix products, recomputation included.
        attention: likewise.
        pointwise: norms, rotary embedding, activation, residual sums.
        loss: cross-entropy.
        copies: of parameters out of, and gradients into, the buffers of collectives.
        optimizer: clipping and AdamW.
        communication: exposed: not hidden behind computation, or slowing it.
        offload: exchange with host memory, and the update there.
        input: waiting for data.
    """

    matmul: float
    attention: float
    pointwise: float
    loss: float
    copies: float
    optimizer: float
    communication: float
    offload: float
    input: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return math.fsum(asdict(self).values())


@dataclass(frozen=True)
class Collective:
    """One exchange of all parameters or gradients, a decoder layer at a time.

    Attributes:
        bytes: of the whole tensors.
        ranks: that take part.
        nodes: that those lie on.
        sharers: ranks of a node that exchange something else at the same time, through the same network.
        rounds: 1 for a gather or a reduce-scatter, 2 for an all-reduce, which is both.
    """

    bytes: float
    ranks: int
    nodes: int
    sharers: int = 1
    rounds: int = 1

    @property
    def link_bytes(self) -> float:
        """That a GPU receives from those of its node, in a ring."""
        if self.nodes == self.ranks:
            return 0.0
        return self.rounds * self.bytes * (self.ranks - 1) / self.ranks

    @property
    def network_bytes(self) -> float:
        """That a node receives from the others."""
        return self.rounds * self.bytes * self.sharers * (self.nodes - 1) / self.nodes


def collectives(work: Workload, cluster: Cluster) -> list[Collective]:
    """What a micro-batch exchanges: parameters gathered in bf16, gradients summed."""
    ranks, a_node = cluster.ranks, cluster.gpus_per_node
    group = work.shard_group or ranks
    nodes = -(-group // a_node)
    gathered, summed = 2.0 * work.shape.parameters, float(work.reduce_bytes * work.shape.parameters)
    in_group = Collective(gathered, group, nodes)
    if group == ranks:
        return [in_group] * (2 if work.gathered_twice else 1) + [Collective(summed, ranks, nodes)]
    if work.backend == "deepspeed":  # hpZ: masters over all ranks, the copy for backward within the group
        over_all = Collective(gathered, ranks, cluster.nodes)
        backward = [in_group] if work.gathered_twice else []
        return [over_all, *backward, Collective(summed, ranks, cluster.nodes)]
    replicas = ranks // group
    between = Collective(
        summed / group,
        replicas,
        min(replicas, cluster.nodes),
        sharers=min(group, a_node),
        rounds=2,
    )
    return [in_group] * (2 if work.gathered_twice else 1) + [Collective(summed, group, nodes), between]


def step_time(work: Workload, cluster: Cluster, calibration: Calibration = CALIBRATION) -> StepTime:
    """What a step takes on every rank of a cluster.

    Args:
        work: the step.
        cluster: where.
        calibration: what of the data sheets is reached.
    """
    shape, gpu, count = work.shape, cluster.gpu, work.accumulation
    memory = gpu.memory_bandwidth * calibration.memory
    matmul = _matmul_flops(work) / (gpu.peak_flops * calibration.matmul_part(gpu, shape.hidden))
    attention = _attention_seconds(work, gpu, calibration)
    forward, backward = work.kernels.bytes_per_token(shape)
    pointwise = (forward * (1 + work.recomputation.pointwise) + backward) * shape.layers * work.micro_tokens
    loss = LOSS_BYTES * shape.vocabulary * work.micro_tokens / memory
    copies = _copied_bytes(work, cluster) / memory
    compute = matmul + attention + pointwise / memory + loss + copies

    exchanged = collectives(work, cluster) if cluster.ranks > 1 else []
    transfer = _transfer_seconds(exchanged, _bus_bytes(work, cluster), cluster, calibration)
    hops = sum(collective.nodes - 1 for collective in exchanged) * (shape.layers + 1)
    exposed = max(0.0, transfer - compute) + calibration.overlap_loss * min(transfer, compute)
    exposed += hops * calibration.node_seconds

    owned = shape.parameters / (work.shard_group or cluster.ranks)
    if work.backend == "deepspeed":
        owned = shape.parameters / cluster.ranks
    on_gpu = (CLIP_BYTES + ADAMW_BYTES + (14 if work.backend == "deepspeed" else 0)) * owned / memory
    return StepTime(
        matmul=count * matmul,
        attention=count * attention,
        pointwise=count * pointwise / memory,
        loss=count * loss,
        copies=count * copies,
        optimizer=on_gpu if work.offload == "none" else 0.0,
        communication=count * exposed,
        offload=_offload_seconds(work, cluster, owned) if work.offload != "none" else 0.0,
        input=count * work.micro_size * work.input_seconds,
    )


def _transfer_seconds(
    exchanged: Sequence[Collective], bus_bytes: float, cluster: Cluster, calibration: Calibration
) -> float:
    """NVLink and network work at the same time, the slower decides; before them a shard comes over PCIe."""
    link = sum(collective.link_bytes for collective in exchanged)
    network = sum(collective.network_bytes for collective in exchanged)
    rings = max(
        link / (cluster.gpu.link_bandwidth * calibration.link),
        network / (cluster.node_bandwidth * calibration.link) if network else 0.0,
    )
    return rings + bus_bytes / cluster.gpu.host_link_bandwidth


def _matmul_flops(work: Workload) -> float:
    """Of a micro-batch: 2 a weight and token forward, 4 backward, and what is computed again."""
    shape = work.shape
    layers = shape.layers * shape.layer_weights * (6 + 2 * work.recomputation.matmul)
    return (layers + 6 * shape.vocabulary * shape.hidden) * work.micro_tokens


def _attention_seconds(work: Workload, gpu: Gpu, calibration: Calibration) -> float:
    """Flash attention does 2.5 times the forward's work in backward, where it computes the scores again."""
    shape, length = work.shape, work.sequence_length
    forward = 4.0 * shape.query * length * shape.layers * work.micro_tokens
    if work.attention == "materialized":
        scores = 62.0 * shape.heads * length * shape.layers * work.micro_tokens  # 28 bytes forward, 34 back
        again = 1 + work.recomputation.attention * 28 / 62
        products = forward * (3 + work.recomputation.attention)
        rate = gpu.peak_flops * calibration.matmul_part(gpu, shape.hidden)
        return products / rate + scores * again / (gpu.memory_bandwidth * calibration.memory)
    if work.attention == "causal":
        forward /= 2
    rate = gpu.peak_flops * calibration.attention_part(gpu)
    return forward * (3.5 + work.recomputation.attention) / rate


def _copied_bytes(work: Workload, cluster: Cluster) -> float:
    """Of a micro-batch, around its collectives, on however many ranks.

    For a gather the shard is cast from fp32 to bf16 (6 bytes) and all of the parameters copied (4). Gradients
    are read in bf16 and written in the dtype of the sum, by ZeRO-3 once more in bf16 into its bucket; what a
    rank keeps of the sum is added in fp32 (12).
    """
    own = 1 / (work.shard_group or cluster.ranks)
    gathers = 2 if work.gathered_twice else 1
    bucket = 4 if work.backend == "deepspeed" else 0
    return (gathers * (6 * own + 4) + 2 + work.reduce_bytes + bucket + 12 * own) * work.shape.parameters


def _bus_bytes(work: Workload, cluster: Cluster) -> float:
    """Of a micro-batch, from host memory to a GPU for gathers; FSDP2 casts masters only there."""
    if work.offload != "all":
        return 0.0
    shard = work.shape.parameters / (work.shard_group or cluster.ranks)
    return shard * (4 if work.backend == "fsdp" else 2) * (2 if work.gathered_twice else 1)


def _offload_seconds(work: Workload, cluster: Cluster, owned: float) -> float:
    """Gradients to the host and summed there after every micro-batch, AdamW there, parameters back.

    Summing reads two and writes one fp32 element; the copy before it writes one. All ranks of a node share
    its memory.
    """
    of_node = owned * cluster.gpus_per_node
    host = of_node * (16 * work.accumulation + CLIP_BYTES + ADAMW_BYTES) / cluster.host_bandwidth
    back = 0.0 if work.offload == "all" else 2.0
    bus = owned * (4 * work.accumulation + back) / cluster.gpu.host_link_bandwidth
    return host + bus
