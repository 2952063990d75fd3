"""The recipe: what a run is, as typed dataclasses that jsonargparse reads from YAML and overrides.

Only what a recipe may say lives here; checks that need the corpus or the number of ranks are made where
those are known (`trainer.py`). Every field is documented because `--help` prints these lines.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

BackendName = Literal["deepspeed", "fsdp"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The matrices of a decoder layer, by the names that transformers gives them."""


@dataclass
class ModelConfig:
    """Which model, and where its first weights come from.

    Args:
        size: a size known to `pmc_llama.model.SIZES` (demo, 7b, ...) or the path of a Hugging Face
            `config.json` of a LLaMA model.
        initialize_from: a Hugging Face LLaMA directory with safetensors weights, whose shape must be that
            of `size`; null starts from random weights drawn from `seed`.
        vocab_size: rows of the embedding; null takes the vocabulary of the weights, or else the corpus'
            tokenizer's.
    """

    size: str = "7b"
    initialize_from: Path | None = None
    vocab_size: int | None = None


@dataclass
class LoraConfig:
    """Train low-rank adapters beside frozen matrices (Hu et al. 2021, arXiv 2106.09685), made by PEFT.

    The frozen weights are those of `model.initialize_from`, in `precision.compute`; checkpoints hold the
    adapters alone.

    Args:
        rank: of the product that is added to a matrix.
        alpha: the product is multiplied by `alpha` / `rank`.
        dropout: part of an adapter's inputs that is zero in training, drawn anew for every micro-batch.
        targets: the matrices that get an adapter, in every decoder layer.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: list[Projection] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class CorpusConfig:
    """One corpus of a blend.

    Args:
        path: see `data.corpus`.
        weight: samples come from the corpora in the ratio of these whole numbers.
        grown: see `data.grown`.
        grown_from: see `data.grown_from`.
    """

    path: str
    weight: int = 1
    grown: Literal["all", "new"] | None = None
    grown_from: str | None = None


@dataclass
class DataConfig:
    """Which tokens, in which regime.

    Args:
        corpus: a corpus made by `pmc-data build`: a directory, or a URL such as `s3://bucket/corpus`.
        corpora: a blend of several corpora in place of `corpus`: a list of `path`, `weight` (a whole number)
            and, where one has grown, `grown` and `grown_from`; the first one's held-out papers are evaluated.
        mode: `window`: each epoch takes one random window from every paper (PMC-LLaMA's regime);
            `packed`: each epoch makes every token of the corpus a target exactly once; `whole`: each epoch
            takes every document once, uncut and seen alone, with loss on what follows its prompt: for
            fine-tuning on a corpus that `pmc-data prompts` made.
        sequence_length: inputs, and as many targets, of one sequence; in `whole` mode of a row into which
            documents are packed, none of which may be longer.
        isolate_documents: in `packed` mode a token attends only within its own paper, as always in `whole`.
        grown: what to train on when the corpus is not the checkpoint's because papers were added: `all` of
            its papers, or the `new` ones; null refuses another corpus.
        grown_from: with `grown: new`, the corpus that the checkpoint was trained on.
    """

    corpus: str = "corpus"
    corpora: list[CorpusConfig] = field(default_factory=list)
    mode: Literal["window", "packed", "whole"] = "window"
    sequence_length: int = 512
    isolate_documents: bool = False
    grown: Literal["all", "new"] | None = None
    grown_from: str | None = None


@dataclass
class BatchConfig:
    """How many sequences a step takes. Their quotient over the ranks is the gradient accumulation.

    Args:
        global_size: sequences in one optimizer step, over all ranks; in `whole` mode documents, of which
            several make a row, so that the accumulation is what their lengths need.
        micro_size: sequences, or rows, that one rank takes through forward and backward at once.
    """

    global_size: int = 128
    micro_size: int = 4


@dataclass
class ScheduleConfig:
    """How long, and with which learning rate: linear warm-up, then cosine decay.

    Args:
        epochs: passes over the corpus (over its documents in `window` and `whole` mode, its tokens in
            `packed` mode).
        steps: optimizer steps; when given, it decides instead of `epochs`.
        warmup_ratio: part of all steps during which the learning rate rises linearly from 0.
        final_learning_rate_ratio: what the cosine falls to by the end, as a part of the peak.
    """

    epochs: float = 1.0
    steps: int | None = None
    warmup_ratio: float = 0.03
    final_learning_rate_ratio: float = 0.0


@dataclass
class OptimizerConfig:
    """AdamW; norm weights are never decayed.

    Args:
        learning_rate: the peak.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled weight decay of matrices.
        max_grad_norm: global gradient norm above which gradients are scaled down to it.
    """

    learning_rate: float = 2e-5
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass
class PrecisionConfig:
    """Dtypes. Master weights and moments are always fp32.

    Args:
        compute: dtype of forward, backward and parameter all-gather.
        reduce: dtype in which gradients are summed over the ranks; micro-batches accumulate in fp32.
    """

    compute: Literal["bf16", "fp32"] = "bf16"
    reduce: Literal["fp32", "bf16"] = "fp32"


@dataclass
class ShardingConfig:
    """Memory against speed. None of it changes a loss beyond the order of sums between ranks.

    Args:
        activation_checkpointing: `none` keeps all activations; `selective` keeps the results of matrix
            products and attention and computes the rest of a decoder layer again in backward; `full` keeps a
            decoder layer's input and computes all of it again, a third more arithmetic.
        checkpointed_layers: how many decoder layers, the first ones, whose activations live longest, are
            computed again; null, all of them.
        shard_group: hybrid sharding: parameters are gathered within groups of this many consecutive ranks, as
            of one node, each group holding all of them. fsdp shards all state in a group and repeats it in
            each; deepspeed (hpZ) repeats only the parameters in `precision.compute`, and shards masters,
            moments and gradients over all ranks. null: no groups.
        offload: what lives in host memory: `optimizer` (deepspeed only) the fp32 masters, moments and summed
            gradients, with the update computed there; `all` the parameters as well, so that a GPU holds
            activations and the layers in use. Set OMP_NUM_THREADS to the cores of a rank for the update.
        prefetch_layers: decoder layers gathered ahead of the one that computes. 1 hides the gathering when a
            layer computes for longer than it takes to gather; each further one costs its whole parameters. 0,
            the least memory, is for deepspeed only.
        reduce_bucket_mb: megabytes of gradients, in `precision.reduce`, that are summed over the ranks at
            once (deepspeed only; a buffer of this size is held); null is one decoder layer, as fsdp has it.
        reshard_after_forward: free a decoder layer's gathered parameters between forward and backward, and
            gather them again, but for the last layer, with which backward begins; false keeps the whole model
            gathered, for a third less communication, and for more where micro-batches are accumulated.
    """

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    checkpointed_layers: int | None = None
    shard_group: int | None = None
    offload: Literal["none", "optimizer", "all"] = "none"
    prefetch_layers: int = 1
    reduce_bucket_mb: int | None = None
    reshard_after_forward: bool = True


@dataclass
class SpeedConfig:
    """What makes a step faster, and changes nothing that is computed beyond rounding.

    Args:
        compile: `torch.compile` every decoder layer, which fuses what lies between matrix products and
            attention, and computes most of it again in backward in place of keeping it: `selective`
            checkpointing is then the compiler's. The first step takes a minute more, and a C++ compiler on a
            CPU. null, on a GPU with backend fsdp.
        read_late: tell of a step when the next one has been sent to the device, so that a GPU never waits for
            the host to read a loss; null, on a GPU.
    """

    compile: bool | None = None
    read_late: bool | None = None


@dataclass
class CheckpointConfig:
    """When to publish a checkpoint, and which to keep.

    Args:
        every_steps: steps between checkpoints; the last step always publishes one.
        keep_last: newest checkpoints kept; older ones are removed after a new one is published.
        keep_every: steps whose multiples are kept for good; 0 keeps none for good.
        asynchronous: train on while a checkpoint is written; training stops only for the copy to host memory,
            which then holds the state a second time.
        max_failed: checkpoints in a row that may fail to be written before the run ends.
    """

    every_steps: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    max_failed: int = 2


@dataclass
class GuardConfig:
    """Updates that are not made, on all ranks alike. A non-finite loss or gradient norm is never taken.

    Args:
        max_skipped: skipped updates in a row, for non-finite numbers or spikes, before the run stops.
        spike_deviations: standard deviations above the mean of the recent losses, or gradient norms, from
            which a step is a spike and its update skipped (OLMo-core's `SkipStepOptimizer` has 6); null
            skips none.
        spike_window: recent steps that mean and deviation are taken of.
        skip_steps: ranges of steps, as [first, last] pairs, whose batches are passed over.
    """

    max_skipped: int = 5
    spike_deviations: float | None = None
    spike_window: int = 128
    skip_steps: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class HangConfig:
    """How long ranks wait for one another before the run ends.

    Args:
        start_seconds: until the first step is made: loading, compiling, the slowest node's start.
        step_seconds: from then on, in any one thing that a step waits for.
        save_seconds: for a checkpoint that is being written, on the slowest disk.
    """

    start_seconds: float = 1800.0
    step_seconds: float = 600.0
    save_seconds: float = 7200.0


@dataclass
class EvaluationConfig:
    """Loss on the papers that the corpus keeps out of training.

    Args:
        every_steps: steps between evaluations; the first and the last step always have one.
        max_sequences: held-out sequences used, in `whole` mode documents, from the front; all of them when
            there are fewer.
    """

    every_steps: int = 500
    max_sequences: int = 512


@dataclass
class LoggingConfig:
    """What a run tells.

    Args:
        every_steps: steps between console lines. `metrics.jsonl` and TensorBoard have every step.
        profile_steps: steady steps to profile, from the sixth step of the process on, into `OUTPUT/profile`.
        wandb_project: a Weights & Biases project that gets the same (needs `pmc-llama[wandb]`); null, none.
    """

    every_steps: int = 1
    profile_steps: int = 0
    wandb_project: str | None = None


@dataclass
class Recipe:
    """A run of `pmc-llama train`.

    Args:
        output: the run's directory: checkpoints, `metrics.jsonl`, TensorBoard.
        backend: what shards the model: DeepSpeed ZeRO-3, or FSDP2 (`torch.distributed.fsdp.fully_shard`).
        seed: decides the random first weights and the sample order.
        model: which model.
        lora: train adapters in place of all weights, see `--lora.help`; null trains all weights.
        data: which tokens.
        batch: how many sequences a step takes.
        schedule: how long and with which learning rate.
        optimizer: AdamW.
        precision: dtypes.
        sharding: memory against speed.
        speed: how a step is computed.
        checkpoint: when to save.
        guards: updates that are not made.
        hangs: how long to wait for other ranks.
        evaluation: held-out loss.
        logging: what is told.
        dry_run: make one full-size step on synthetic data first, which shows whether the memory suffices, and
            undo it.
    """

    output: Path = Path("runs/default")
    backend: BackendName = "deepspeed"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    hangs: HangConfig = field(default_factory=HangConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    dry_run: bool = True


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries of strings and numbers, as YAML and JSON hold it."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simple(entry) for key, entry in value.items()}
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = simple(asdict(recipe))
    return result
