"""The records of a run: what a reader finds afterwards, whatever happened in between."""

import json
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.errors import UserError
from pmc_llama.console import console_line
from pmc_llama.metrics import Metrics, peak_memory, read_metrics
from pmc_llama.provenance import Start
from pmc_llama.records import StepRecord

RECORD = StepRecord(
    step=12,
    steps=48,
    samples=96,
    tokens=6144,
    epoch=0.25,
    loss=5.1234,
    grad_norm=0.91,
    learning_rate=1.9e-5,
    step_seconds=2.0,
    data_seconds=0.006,
    forward_backward_seconds=0.08,
    optimizer_seconds=0.014,
    seconds_since_start=60.0,
    tokens_per_second=2468.0,
    tokens_per_second_per_device=1234.0,
    peak_memory_bytes=int(1.2 * 2**30),
)


START = Start(
    time="2026-01-02T03:04:05+00:00",
    command="pmc-llama train recipe.yaml",
    git_commit="0123abcd",
    git_dirty=False,
    versions={"torch": "2.13.0"},
    hosts=["node[1]", "node2"],
    world_size=16,
    launcher="slurm",
    job_id="4711",
    device="NVIDIA H200",
    environment={"NCCL_DEBUG": "INFO"},
)


def at(step: int, attempt: int = 0) -> StepRecord:
    """A step whose loss, exact in fp32 too, tells which attempt made it."""
    return replace(RECORD, step=step, steps=8, loss=step + attempt / 8)


def write(directory: Path, records: Iterable[StepRecord], resume_step: int = 0, rank: int = 0) -> None:
    metrics = Metrics(directory, rank, resume_step, "seed: 7\n", every_steps=1)
    for record in records:
        metrics.record(record)
    metrics.close()


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(directory / "metrics.jsonl")]


def tensorboard(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return events


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


# --- metrics.jsonl ---


def test_every_field_of_a_step_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, [RECORD])
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {field.name: getattr(RECORD, field.name) for field in fields(RECORD)}
    ]


@settings(deadline=None, max_examples=20)
@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_losses_are_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    directory = tmp_path_factory.mktemp("run")
    write(directory, [replace(RECORD, step=step, loss=value) for step, value in enumerate(values, start=1)])
    write(directory, [], resume_step=len(values))  # and kept so by a resumed run
    read = [loss for _, loss in losses(directory)]
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_a_step_is_in_the_file_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, 0, "", every_steps=1)
    metrics.record(at(1))
    assert losses(tmp_path) == [(1, 1.0)]
    metrics.close()


def test_steps_after_the_checkpoint_are_those_of_the_resumed_run(tmp_path: Path) -> None:
    write(tmp_path, [at(step) for step in (1, 2, 3, 4)])
    write(tmp_path, [at(step, attempt=1) for step in (3, 4, 5)], resume_step=2)
    write(tmp_path, [at(step, attempt=2) for step in (5, 6)], resume_step=4)
    expected = [(1, 1.0), (2, 2.0), (3, 3.125), (4, 4.125), (5, 5.25), (6, 6.25)]
    assert losses(tmp_path) == expected
    assert scalars(tensorboard(tmp_path), "loss/train") == expected


def test_a_run_started_afresh_has_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, [at(step) for step in (1, 2, 3)])
    write(tmp_path, [at(1, attempt=1)])
    assert losses(tmp_path) == [(1, 1.125)]


def test_a_last_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [at(1), at(2)])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for cut in range(first_line, len(whole)):
        path.write_bytes(whole[:cut])
        assert losses(tmp_path) == [(1, 1.0)]
    write(tmp_path, [at(2, attempt=1)], resume_step=1)
    assert losses(tmp_path) == [(1, 1.0), (2, 2.125)]


@pytest.mark.parametrize("damage", ["not JSON", "[1]", '{"loss": 1.0}', "5"])
def test_a_damaged_line_is_refused_by_its_number_and_the_file_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        Metrics(tmp_path, 0, 3, "", every_steps=1)
    assert path.read_bytes() == before


def test_missing_metrics_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_an_output_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output: cannot write"):
        Metrics(tmp_path / "file" / "run", 0, 0, "", every_steps=1)


def test_ranks_other_than_0_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, 1, 0, "", every_steps=1)
    metrics.say("hello")
    metrics.record(RECORD)
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# --- TensorBoard ---


def test_tensorboard_has_the_scalars_and_the_recipe(tmp_path: Path) -> None:
    record = replace(RECORD, loss=5.5, learning_rate=2**-15, grad_norm=0.5)  # exact in fp32
    write(tmp_path, [replace(record, step=1), replace(record, step=2, heldout_loss=4.5, mfu=0.25)])
    events = tensorboard(tmp_path)
    assert scalars(events, "loss/train") == [(1, 5.5), (2, 5.5)]
    assert scalars(events, "loss/held-out") == [(2, 4.5)]
    assert scalars(events, "optimizer/learning-rate")[0] == (1, 2**-15)
    assert scalars(events, "optimizer/grad-norm")[0] == (1, 0.5)
    assert scalars(events, "speed/tokens-per-second-per-device")[0] == (1, 1234.0)
    assert scalars(events, "speed/mfu") == [(2, 0.25)]
    [text] = events.Tensors("recipe/text_summary")
    assert b"seed: 7" in text.tensor_proto.string_val[0]


def test_tensorboard_says_what_was_run_where_and_from_which_code(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, 0, "seed: 7\n", every_steps=1, start=START)
    metrics.close()
    [text] = tensorboard(tmp_path).Tensors("start/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    for said in (
        "train recipe.yaml",
        "0123abcd",
        "torch 2.13.0",
        "node[1], node2",
        "4711",
        "NCCL_DEBUG INFO",
    ):
        assert said in shown
    [kept] = json.loads((tmp_path / "run.json").read_text())
    assert kept["job_id"] == "4711"


def test_tensorboard_has_skipped_updates_coverage_and_the_stall_of_checkpoints(tmp_path: Path) -> None:
    record = replace(RECORD, step=1, updates=3, coverage={"books": 0.5}, checkpoint_seconds=1.5)
    write(tmp_path, [record, replace(record, step=2, skipped="spike")])
    events = tensorboard(tmp_path)
    assert scalars(events, "optimizer/skipped") == [(1, 0.0), (2, 1.0)]
    assert scalars(events, "optimizer/updates")[0] == (1, 3.0)
    assert scalars(events, "coverage/books")[0] == (1, 0.5)
    assert scalars(events, "speed/checkpoint-seconds")[0] == (1, 1.5)


# --- Weights & Biases ---

# Keeps the calls that are made of it, and the options it knows, as the real package has them.
STAND_IN = """
import json, types
from pathlib import Path
class errors:
    class Error(Exception): pass
def Settings(console, quiet): return {}
class Run:
    def __init__(self, dir): self.file = (Path(dir) / "calls.jsonl").open("a")
    def call(self, *what): self.file.write(json.dumps(what) + "\\n"); self.file.flush()
    def define_metric(self, name, step_metric): self.call("define_metric", name, step_metric)
    def log(self, values): self.call("log", values)
    def finish(self): self.call("finish")
def init(project, dir, id, resume, config, settings):
    if project == "refused": raise errors.Error("no API key")
    run = Run(dir); run.call("init", project, id, resume, config); return run
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "wandb.py").write_text(STAND_IN.replace("\\\\", "\\"))
    monkeypatch.syspath_prepend(tmp_path / "stand-in")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


@pytest.mark.usefixtures("stand_in")
def test_weights_and_biases_gets_every_step_and_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    for resume_step in (0, 2):
        metrics = Metrics(tmp_path, 0, resume_step, "seed: 7\n", 1, start=START, wandb_project="papers")
        metrics.record(at(resume_step + 1))
        metrics.close()
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    begins = [call for call in calls if call[0] == "init"]
    assert begins[0][1] == "papers"
    assert begins[0][4]["recipe"] == {"seed": 7}
    assert begins[0][4]["start"]["git_commit"] == "0123abcd"
    assert begins[0][2] == begins[1][2]
    logged = [(call[1]["step"], call[1]["loss/train"]) for call in calls if call[0] == "log"]
    assert logged == [(1, 1.0), (3, 3.0)]
    assert [call[0] for call in calls].count("finish") == 2


@pytest.mark.usefixtures("stand_in")
def test_weights_and_biases_that_does_not_start_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no API key.*WANDB_MODE=offline"):
        Metrics(tmp_path, 0, 0, "", 1, wandb_project="refused")


def test_weights_and_biases_that_is_not_installed_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb_project is papers.*install pmc-llama\[wandb\]"):
        Metrics(tmp_path, 0, 0, "", 1, wandb_project="papers")


def test_the_real_package_keeps_an_offline_run_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = Metrics(tmp_path, 0, 0, "seed: 7\n", 1, start=START, wandb_project="papers")
    metrics.record(at(1))
    metrics.close()
    [kept] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss/train" in kept.read_bytes()


# --- the console ---


def test_the_console_line_says_how_the_run_goes() -> None:
    assert console_line(RECORD, seconds_per_step=80 / 36) == (
        "step 12/48  25%  loss 5.1234  grad-norm 0.91  lr 1.9e-05  1,234 tok/s/dev  mem 1.2 GiB  data 0.3%  "
        "ETA 0:01:20"
    )


def test_the_console_line_marks_an_update_that_was_not_made_and_why() -> None:
    line = console_line(replace(RECORD, skipped="loss is not finite"), seconds_per_step=1.0)
    assert "grad-norm 0.91  skipped: loss is not finite  lr" in line


def test_the_console_line_has_held_out_loss_and_mfu_when_there_are_any() -> None:
    line = console_line(replace(RECORD, heldout_loss=4.5, mfu=0.456), seconds_per_step=1.0)
    assert "loss 5.1234  held-out 4.5000  grad-norm" in line
    assert "1,234 tok/s/dev  MFU 45.6%  mem" in line


def test_a_log_has_whole_plain_lines_at_the_interval_and_at_first_last_held_out_and_skipped_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, 0, 0, "", every_steps=3)
    metrics.say("[not markup] " + "long " * 60)
    for step in range(1, 9):
        record = replace(at(step), heldout_loss=4.0 if step == 5 else None)
        metrics.record(replace(record, skipped="spike" if step == 7 else None))
    metrics.close()
    said, *lines = capsys.readouterr().out.splitlines()
    assert said == "[not markup] " + "long " * 60
    assert [line.split()[1] for line in lines] == ["1/8", "3/8", "5/8", "6/8", "7/8", "8/8"]
    assert all(re.fullmatch(r"[ -~]*ETA [0-9:]+", line) for line in lines)


def test_a_terminal_has_colour_and_the_same_words() -> None:
    program = (
        "from pmc_llama.console import ConsoleLines; from test_metrics import RECORD;"
        "ConsoleLines(0, 1).record(RECORD)"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-c", program], stdout=child, env=environment, check=True)
    os.close(child)
    shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert "\x1b[" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).strip() == console_line(RECORD, RECORD.step_seconds)


def test_peak_memory_of_a_cpu_process_is_in_bytes_and_stays_at_its_peak() -> None:
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(300 * 2**20, dtype=torch.uint8)
    peak = peak_memory(torch.device("cpu"))
    assert peak >= block.numel()
    del block
    assert peak_memory(torch.device("cpu")) >= max(before, peak)


def test_a_loss_that_is_not_a_number_is_recorded(tmp_path: Path) -> None:
    write(tmp_path, [replace(RECORD, loss=math.nan)])
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert math.isnan(json.loads(line)["loss"])
