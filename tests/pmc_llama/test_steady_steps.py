"""Steps in the long run: the host never waits for the device, reads late alike, and memory does not grow."""

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_tools.corpus import Corpus
from pmc_llama import cli
from pmc_llama.metrics import read_metrics
from pmc_llama.stopping import REQUEUE
from pmc_llama.trainer import Trainer
from tests.pmc_llama.runs import NUMBERS, command_line
from tests.pmc_llama.small import odd_config


@pytest.fixture
def options(tiny_corpus: Path, tmp_path: Path) -> dict[str, str]:
    """One rank, a model of odd shapes, steps of a few milliseconds."""
    size, recipe = tmp_path / "config.json", tmp_path / "recipe.yaml"
    config = odd_config()
    config.vocab_size = Corpus.open(tiny_corpus).vocab_size
    config.to_json_file(size)
    recipe.write_text("seed: 3\n")
    return {
        "--model.size": str(size),
        "--data.corpus": str(tiny_corpus),
        "--data.mode": "packed",
        "--data.sequence_length": "32",
        "--batch.global_size": "4",
        "--batch.micro_size": "2",
        "--schedule.steps": "24",
        "--optimizer.learning_rate": "0.003",
        "--checkpoint.every_steps": "10",
        "--evaluation.every_steps": "9",
        "--evaluation.max_sequences": "3",
        "--logging.every_steps": "1000",
    }


def _train(options: dict[str, str], run: Path, *more: str) -> int:
    recipe = Path(options["--model.size"]).with_name("recipe.yaml")
    return cli.main(["train", *command_line(recipe, options, "--output", str(run), *more)])


def _numbers(run: Path) -> list[dict[str, Any]]:
    keys = (*NUMBERS, "grad_norm", "skipped", "updates", "coverage")
    return [{key: record[key] for key in keys} for record in read_metrics(run / "metrics.jsonl")]


def _in_a_process(function: Callable[..., object], *args: Any) -> None:
    """DeepSpeed can be started once a process."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


# --- the host does not wait --------------------------------------------------------------------------------

_READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
_CONVERSIONS = {f"__{kind}__" for kind in ("bool", "float", "int", "index", "contains", "array")}


def _reader() -> str:
    """The file and function, other than torch's and this one's, that ask for a number."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
        assert frame.f_back
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}"


class _Calls(TorchFunctionMode):
    """Notes who calls a function of tensors that waits for the device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or getattr(func, "__name__", "") in _CONVERSIONS:
            self._found.append(_reader())
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Notes who runs an operator that waits for the device."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self._found.append(_reader())
        return func(*args, **(kwargs or {}))


def _train_watched(options: dict[str, str], run: Path, *more: str) -> None:
    """Train, and write to `run / "reads"` where steps but the first read a number of the device."""
    found: list[str] = []
    send = Trainer.send_step

    def watched(trainer: Trainer) -> None:
        if trainer.taken.step == 0:
            send(trainer)
            return
        with _Calls(found), _Operators(found):
            send(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "send_step", watched)
        assert _train(options, run, *more) == 0
    (run / "reads").write_text("".join(f"{place}\n" for place in found))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("guarded", [(), ("--guards.spike_deviations", "6")], ids=["", "spikes"])
def test_a_step_of_fsdp_asks_the_device_for_no_number(
    options: dict[str, str], tmp_path: Path, guarded: tuple[str, ...]
) -> None:
    _train_watched(options, tmp_path / "run", "--backend", "fsdp", *guarded)
    assert (tmp_path / "run" / "reads").read_text() == ""


def test_a_step_of_zero_3_asks_the_device_for_no_number(options: dict[str, str], tmp_path: Path) -> None:
    _in_a_process(_train_watched, options, tmp_path / "run", "--backend", "deepspeed")
    places = (tmp_path / "run" / "reads").read_text().splitlines()
    # DeepSpeed looks whether its norm is finite, which the backend gives it as a number of the host.
    assert {place.rpartition("/")[2] for place in places} == {"utils.py:is_invalid_grad_norm"}


# --- reading late ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_run_that_reads_late_tells_and_does_the_same(options: dict[str, str], tmp_path: Path) -> None:
    spiky = ("--guards.spike_deviations", "0.5", "--guards.spike_window", "6", "--guards.max_skipped", "20")
    skips = ("--guards.skip_steps", "[[5, 6]]")
    for late in ("true", "false"):
        more = ("--backend", "fsdp", "--speed.read_late", late, *spiky, *skips)
        assert _train(options, tmp_path / late, *more) == 0
    told = _numbers(tmp_path / "false")
    assert _numbers(tmp_path / "true") == told
    assert 2 < sum(bool(record["skipped"]) for record in told) < 20, "some updates must be refused"


@pytest.mark.usefixtures("alone")
def test_a_run_that_reads_late_and_is_asked_to_stop_goes_on_as_one_that_was_not(
    options: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    late = ("--backend", "fsdp", "--speed.read_late", "true")
    assert _train(options, tmp_path / "whole", *late) == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    assert _train(options, run, *late, "--resume") == REQUEUE
    assert len(read_metrics(run / "metrics.jsonl")) < 5
    assert _train(options, run, *late, "--resume") == 0
    assert _numbers(run) == _numbers(tmp_path / "whole")


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "late"), [("deepspeed", "false"), ("fsdp", "true")])
def test_a_run_holds_no_more_memory_after_2000_steps_than_after_50(
    options: dict[str, str], tmp_path: Path, backend: str, late: str
) -> None:
    long = {**options, "--schedule.steps": "2000", "--checkpoint.every_steps": "2000"}
    long |= {"--evaluation.every_steps": "2000", "--batch.micro_size": "4"}
    _in_a_process(_train, long, tmp_path / "run", "--backend", backend, "--speed.read_late", late)
    peaks = [record["peak_memory_bytes"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    # The allocator of the C library settles for some hundred steps of ZeRO-3. A leak of a kilobyte a step
    # would be a megabyte in the second half.
    assert peaks[1998] < 1.01 * peaks[49]
    assert peaks[1998] - peaks[998] < 1 << 20
