"""What is known of a step. `metrics.py` says where it is told."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Losses are in nats a target."""

    step: int  # from 1
    steps: int  # of the whole run
    samples: int  # sequences consumed so far, this step's included
    tokens: int  # inputs consumed so far, padding included
    epoch: float  # passes over the corpus so far
    loss: float  # of the global batch, before the step
    grad_norm: float  # global, before clipping
    learning_rate: float
    step_seconds: float
    data_seconds: float  # of those, waiting for the batch
    forward_backward_seconds: float  # of those, up to the loss of all ranks
    optimizer_seconds: float  # of those, clipping and the update
    seconds_since_start: float  # of the process
    tokens_per_second: float  # all ranks
    tokens_per_second_per_device: float
    peak_memory_bytes: int  # of this rank, see `peak_memory`
    mfu: float | None = None  # see `flops.model_flops_utilization`
    heldout_loss: float | None = None  # at steps that evaluate, after the step
    skipped: str | None = None  # why the update was not made; None when it was
    updates: int = 0  # made so far, skipped ones not counted
    coverage: dict[str, float] = field(
        default_factory=dict
    )  # by corpus: part of its tokens seen at least once
    checkpoint_seconds: float = 0.0  # for which saving a checkpoint stopped training after the step before


@dataclass(frozen=True)
class StepTimes:
    """A clock, in seconds, at the turns of a step."""

    begin: float
    have_data: float
    have_gradients: float  # and the loss of all ranks
    end: float

    @property
    def step_seconds(self) -> float:
        """All of the step."""
        return self.end - self.begin

    @property
    def data_seconds(self) -> float:
        """Waiting for the batch."""
        return self.have_data - self.begin

    @property
    def forward_backward_seconds(self) -> float:
        """Up to the loss of all ranks."""
        return self.have_gradients - self.have_data

    @property
    def optimizer_seconds(self) -> float:
        """Clipping and the update."""
        return self.end - self.have_gradients
