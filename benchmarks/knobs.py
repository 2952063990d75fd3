"""What each knob of the trainer gains and costs on CPU, under both backends.

A small LLaMA in bf16 on two ranks, as recipes have it and with one thing changed. All runs of a round follow
one another, and a knob's figures are medians of the ratios to the plain run of the same round and backend.

    python -m benchmarks.knobs
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.small_runs import GLOBAL, MICRO, SEQUENCE, WARM_UP, prepare, speed, step_ends, train

_RANKS = 2
_CHECKPOINTING = "sharding.activation_checkpointing"
KNOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "speed.compile: true": {"speed.compile": "true"},
    f"batch.micro_size: {2 * MICRO}": {"batch.micro_size": 2 * MICRO},
    f"{_CHECKPOINTING}: selective": {_CHECKPOINTING: "selective"},
    f"{_CHECKPOINTING}: full": {_CHECKPOINTING: "full"},
    "sharding.reshard_after_forward: false": {"sharding.reshard_after_forward": "false"},
    "precision.reduce: bf16": {"precision.reduce": "bf16"},
    "speed.read_late: true": {"speed.read_late": "true"},
}


class Run(NamedTuple):
    """What a run reached.

    Attributes:
        speed: tokens/s.
        loss: of its last step.
    """

    speed: float
    loss: float


def main() -> None:
    """Run the rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.steps < WARM_UP + 3:
        parser.error(f"--steps is {options.steps}, expected {WARM_UP + 3} or more")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        print(f"{options.rounds} rounds of {options.steps} steps of {GLOBAL} x {SEQUENCE} tokens, bf16")
        for backend in ("fsdp", "deepspeed"):
            rounds = [_round(directory, backend, options.steps) for _ in range(options.rounds)]
            print(f"\n{backend:44}{'tokens/s':>10}{'gain':>8}  {'from':>7}{'to':>8}{'loss':>10}")
            for knob in KNOBS:
                print(_line(knob, rounds), flush=True)


def _round(directory: Path, backend: str, steps: int) -> dict[str, Run]:
    """A run with each knob."""
    runs = {}
    for knob, settings in KNOBS.items():
        records = train(directory, backend, "bf16", _RANKS, {"schedule.steps": steps, **settings})
        runs[knob] = Run(speed(step_ends(records)), records[-1]["loss"])
    return runs


def _line(knob: str, rounds: list[dict[str, Run]]) -> str:
    """The medians of a knob, its gains' range, and how far its loss is from the plain one's."""
    gains = [runs[knob].speed / runs["plain"].speed - 1 for runs in rounds]
    tokens = statistics.median(runs[knob].speed for runs in rounds)
    loss, plain = rounds[0][knob].loss, rounds[0]["plain"].loss
    figures = f"{tokens:10,.0f}{statistics.median(gains):+8.1%}  {min(gains):+7.1%}{max(gains):+8.1%}"
    return f"{knob:44}{figures}{abs(loss - plain) / plain:10.1e}"


if __name__ == "__main__":
    main()
