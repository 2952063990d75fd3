"""What each knob of the trainer gains on CPU, under both backends.

A small LLaMA in bf16 on two ranks, as recipes have it and with one thing changed. All runs of a backend are
there at once and take turns of a few seconds, in which the others are stopped.

    python -m benchmarks.knobs
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.small_runs import (
    GLOBAL,
    MICRO,
    SEQUENCE,
    WARM_UP,
    prepare,
    records,
    speed,
    start_training,
    step_ends,
    take_turns,
)

_RANKS = 2
_CHECKPOINTING = "sharding.activation_checkpointing"
KNOBS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "speed.compile: true": {"speed.compile": "true"},
    f"batch.micro_size: {2 * MICRO}": {"batch.micro_size": 2 * MICRO},
    f"{_CHECKPOINTING}: selective": {_CHECKPOINTING: "selective"},
    f"{_CHECKPOINTING}: full": {_CHECKPOINTING: "full"},
    "sharding.reshard_after_forward: false": {"sharding.reshard_after_forward": "false"},
    "precision.reduce: bf16": {"precision.reduce": "bf16"},
    "speed.read_late: true": {"speed.read_late": "true"},
}


def main() -> None:
    """Train with each knob under each backend, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    if options.steps < WARM_UP + 3:
        parser.error(f"--steps is {options.steps}, expected {WARM_UP + 3} or more")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        print(f"{options.steps} steps of {GLOBAL} x {SEQUENCE} tokens, bf16, {_RANKS} ranks")
        for backend in ("fsdp", "deepspeed"):
            jobs = []
            for number, settings in enumerate(KNOBS.values()):
                more = {"schedule.steps": options.steps, **settings}
                jobs.append(start_training(directory, f"run-{number}", backend, "bf16", _RANKS, more))
            take_turns(jobs)
            _tell(backend, [records(directory, f"run-{number}") for number in range(len(KNOBS))])


def _tell(backend: str, runs: list[list[dict[str, Any]]]) -> None:
    """Print tokens/s of each run, its gain, and how far its last loss is from that of the first run."""
    print(f"\n{backend:44}{'tokens/s':>10}{'gain':>8}{'loss':>10}")
    plain, last = speed(step_ends(runs[0])), runs[0][-1]["loss"]
    for knob, rows in zip(KNOBS, runs, strict=True):
        tokens = speed(step_ends(rows))
        off = abs(rows[-1]["loss"] - last) / last
        print(f"{knob:44}{tokens:10,.0f}{tokens / plain - 1:+8.1%}{off:10.1e}", flush=True)


if __name__ == "__main__":
    main()
