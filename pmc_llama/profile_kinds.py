"""What each event of a trace is: attention, a matrix product, the loss, ...; told by names and by nesting.

The rules use what PyTorch records without being asked: operators nested in time on a thread, FSDP2's own
ranges, and the sequence number that an operator shares with its node of the backward pass.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from pmc_llama.intervals import Interval, union

DATA_PHASE, MODEL_PHASE, OPTIMIZER_PHASE = "reading a batch", "forward and backward", "the optimizer's step"
"""The phases of a step, by the trainer's names for them."""

ATTENTION, PRODUCTS, ELEMENTWISE, LOSS, OPTIMIZER, SHARDING, COMMUNICATION, DATA, OTHER = (
    "attention",
    "matrix products",
    "norm and elementwise",
    "loss",
    "optimizer",
    "sharding copies",
    "communication",
    "data",
    "other",
)

# Of the dispatcher (`a::b::c` and `a::b: C` are parts of autograd), or a graph that torch.compile made: what
# is neither an operator of its own nor a product in it is fused elementwise work.
_OPERATOR = re.compile(r"\w+::[\w.]+|## Call CompiledFxGraph .*")
_COMMUNICATION = re.compile(r"(c10d|_c10d_functional|_dtensor)::|(gloo|nccl):|record_param_comms")
_ATTENTION = re.compile(r"scaled_dot_product|flash_attn|flex_attention")
_PRODUCTS = re.compile(
    r"(aten|mkldnn)::(_?linear\w*|mkldnn_linear\w*|matmul|b?mm|(b?add|_scaled_|_grouped_)b?mm)(\.\w+)?"
)
_LOSS = re.compile(r"cross_?entropy|log_softmax", re.IGNORECASE)
# Where FSDP2 and ZeRO-3 run their hooks: FSDP2 names its ranges, ZeRO-3's are autograd functions, and its
# reduction hangs on the accumulation of a gradient.
_HOOKS = re.compile(r"FSDP::|(Pre|Post)BackwardFunction(ForModule|Module)|torch::autograd::AccumulateGrad")
_COPIES = re.compile(r"aten::(cat|copy_|_foreach_copy_)")

_BY_PHASE: dict[str | None, str] = {DATA_PHASE: DATA, OPTIMIZER_PHASE: OPTIMIZER}

# Kernels say by their own names what they are where no operator does, as in a compiled graph.
_KERNELS = [
    (re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE), ATTENTION),
    (re.compile(r"nll_loss|log_softmax|cross_?entropy", re.IGNORECASE), LOSS),
    (re.compile(r"gemm|cutlass|cublas|xmma|nvjet|triton_tem_\w*mm", re.IGNORECASE), PRODUCTS),
]
_HOST_COPY = re.compile(r"Memcpy (HtoD|DtoH)")


class Event(NamedTuple):
    """One event of a Chrome trace of PyTorch's profiler.

    Attributes:
        name: of the operator, range or kernel.
        category: `cpu_op`, `user_annotation`, `cuda_runtime`, `kernel`, `gpu_memcpy`, ...
        thread: that it ran on; of a kernel, its stream.
        begin: seconds since the trace's first event.
        end: as `begin`.
        sequence: autograd's sequence number, which an operator shares with its node of the backward pass.
        forward_thread: of a node of a backward pass, autograd's number of the thread of its forward; else 0.
        correlation: what a call of the CUDA runtime shares with the kernel that it launches.
    """

    name: str
    category: str
    thread: object
    begin: float
    end: float
    sequence: int | None
    forward_thread: int
    correlation: int | None


class Piece(NamedTuple):
    """Part of an event's own time, less the events inside it.

    Attributes:
        interval: when.
        kind: of work; None where no operator runs: Python, or autograd itself.
    """

    interval: Interval
    kind: str | None


class Launch(NamedTuple):
    """Where a kernel comes from.

    Attributes:
        kind: of the operator that launched it; None where no operator did.
        moment: of the launch, on the host.
    """

    kind: str | None
    moment: float


class _Open(NamedTuple):
    """An event that those after it may be inside of.

    Attributes:
        event: the event.
        kind: of its work; those inside have the same one, but for `ELEMENTWISE`, which holds for itself.
        is_operator: whether an operator runs in it, or only Python and autograd.
        is_autograd: whether it is inside a function or node of autograd, where operators have no sequence.
    """

    event: Event
    kind: str | None
    is_operator: bool
    is_autograd: bool


class HostEvents:
    """Kinds of what ran on the threads of a process.

    Args:
        events: of all threads, in any order.
        main: the thread that trains.
        phase: the name of the phase at a time; None between phases.

    Attributes:
        pieces: of the thread that trains, in order; together they are all of its events.
    """

    def __init__(self, events: Sequence[Event], main: object, phase: Callable[[float], str | None]) -> None:
        threads: dict[object, list[Event]] = {main: []}
        for event in sorted(events, key=lambda event: (event.begin, -event.end)):
            threads.setdefault(event.thread, []).append(event)
        self._phase = phase
        self._losses = _loss_regions(threads[main])
        # Each thread numbers its sequences for itself; the first node to run backward is of the model's loss.
        nodes = [event for event in events if event.forward_thread]
        self._model_thread = min(nodes, key=lambda node: node.begin).forward_thread if nodes else 0
        self._forward: dict[int, str | None] = {}
        self._launches: dict[int, Launch] = {}
        self.pieces = self._sweep(threads.pop(main), self._forward)
        for others in threads.values():
            self._sweep(others, {})

    def launch(self, kernel: Event) -> Launch:
        """Where a kernel comes from; from itself where the trace does not say."""
        return self._launches.get(kernel.correlation or -1, Launch(None, kernel.begin))

    def _sweep(self, events: Sequence[Event], forward: dict[int, str | None]) -> list[Piece]:
        """Give every moment of a thread to the innermost event at that moment.

        Args:
            events: of the thread; an event stands before those inside it.
            forward: gets the kind of the last operator with each sequence number, which made the node.
        """
        pieces: list[Piece] = []
        stack: list[_Open] = []
        now = 0.0

        def own_time(until: float) -> None:
            nonlocal now
            if stack and until > now:
                pieces.append(Piece((now, until), stack[-1].kind if stack[-1].is_operator else None))
            now = max(now, until)

        for event in events:
            while stack and stack[-1].event.end <= event.begin:
                own_time(stack[-1].event.end)
                stack.pop()
            own_time(event.begin)
            opened = self._open(event, stack[-1] if stack else None, is_main=forward is self._forward)
            stack.append(opened)
            if event.sequence is not None and not event.forward_thread:
                forward[event.sequence] = opened.kind
            if event.correlation is not None:
                self._launches[event.correlation] = Launch(opened.kind, event.begin)
        while stack:
            own_time(stack[-1].event.end)
            stack.pop()
        return pieces

    def _open(self, event: Event, parent: _Open | None, is_main: bool) -> _Open:
        says = _says(event.name)
        is_operator = says.operator and event.category == "cpu_op"
        in_operator = parent is not None and parent.is_operator
        in_autograd = parent is not None and parent.is_autograd
        is_autograd = in_autograd or (event.category == "cpu_op" and not is_operator and not in_operator)
        inherited = parent.kind if parent else None
        if says.communication:
            kind: str | None = COMMUNICATION
        elif inherited == LOSS and says.kind == PRODUCTS and not in_operator:
            kind = PRODUCTS  # the output head, computed again chunk by chunk
        elif inherited not in (None, ELEMENTWISE):
            kind = inherited
        elif (phase := self._phase(event.begin)) != MODEL_PHASE:
            kind = _BY_PHASE.get(phase, OTHER) if is_operator else None
        elif says.hook:
            kind = SHARDING
        elif event.forward_thread and event.forward_thread == self._model_thread:
            forward = self._forward.get(event.sequence or -1)
            kind = forward if forward in (ATTENTION, LOSS) else None
        elif is_main and _covers(self._losses, event.begin):
            kind = LOSS
        elif not is_operator:
            kind = inherited
        elif says.copies and not (in_operator or in_autograd or event.sequence is not None):
            kind = SHARDING  # copied straight from Python and without a gradient: ZeRO-3's hooks in forward
        else:
            kind = says.kind
        return _Open(event, kind, is_operator or in_operator, is_autograd)


class _Says(NamedTuple):
    """What the name of an event says: the kind of its operator, and what else decides."""

    kind: str
    operator: bool
    communication: bool
    hook: bool
    copies: bool


@cache
def _says(name: str) -> _Says:
    kind = ELEMENTWISE
    if _ATTENTION.search(name):
        kind = ATTENTION
    elif _PRODUCTS.fullmatch(name):
        kind = PRODUCTS
    return _Says(
        kind,
        operator=_OPERATOR.fullmatch(name) is not None,
        communication=_COMMUNICATION.match(name) is not None,
        hook=_HOOKS.match(name) is not None,
        copies=_COPIES.fullmatch(name) is not None,
    )


def kernel_kind(kernel: Event, launch: Launch, phase: str | None) -> str:
    """What a kernel, or a copy by the GPU, is.

    Args:
        kernel: an event of category `kernel`, `gpu_memcpy` or `gpu_memset`.
        launch: where it comes from.
        phase: in which it was launched.
    """
    if kernel.name.startswith("nccl"):
        return COMMUNICATION
    if launch.kind == COMMUNICATION:
        kind = SHARDING  # what a collective copies before and after it communicates
    elif launch.kind is not None and launch.kind != ELEMENTWISE:
        kind = launch.kind
    elif phase != MODEL_PHASE:
        kind = _BY_PHASE.get(phase, OTHER)
    else:
        kind = next((named for name, named in _KERNELS if name.search(kernel.name)), ELEMENTWISE)
    return OTHER if _HOST_COPY.match(kernel.name) and kind not in (DATA, OPTIMIZER) else kind


def _loss_regions(events: Sequence[Event]) -> list[Interval]:
    """From the end of the last matrix product before a cross-entropy to the cross-entropy's end.

    So the conversion to fp32 and the cutting into chunks are part of the loss. The output head is not, unless
    one operator computes both.
    """
    regions: list[Interval] = []
    after_product = 0.0
    for event in events:
        if _LOSS.search(event.name):
            is_fused = "linear" in event.name.lower()
            regions.append((event.begin if is_fused else after_product, event.end))
        elif _PRODUCTS.fullmatch(event.name):
            after_product = event.end
    return union(regions)


def _covers(regions: Sequence[Interval], moment: float) -> bool:
    """Whether a moment is in one of the regions, which stand in order."""
    at = bisect_right(regions, moment, key=lambda region: region[0]) - 1
    return at >= 0 and moment < regions[at][1]
