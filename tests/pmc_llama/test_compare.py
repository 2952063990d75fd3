"""The comparison's report says what the metrics of the runs say."""

import json
import re
import sys

import pytest
import yaml

from data_tools.errors import UserError
from pmc_llama import compare
from pmc_llama.compare import Run, describe, draw, read_run, verdict
from pmc_llama.config import Recipe, plain

STEPS = 12


def record(step: int, loss: float, **others: object) -> dict[str, object]:
    """A line of `metrics.jsonl`; the first two steps are slow, as they are."""
    speed = 1000.0 * step if step > 2 else 1.0
    return {
        "step": step,
        "steps": STEPS,
        "loss": loss,
        "tokens_per_second": speed,
        "tokens_per_second_per_device": speed / 2,
        "peak_memory_bytes": step << 30,
        "mfu": None,
        "heldout_loss": loss + 0.5 if step in (1, STEPS) else None,
        "seconds_since_start": 11.25 + step,
        **others,
    }


def run(backend: str, changed: dict[int, float] | None = None) -> Run:
    losses = {step: 8.0 - step / 4 for step in range(1, STEPS + 1)} | (changed or {})
    return Run(backend, [record(step, loss) for step, loss in losses.items()])


def rows(report: str) -> dict[str, list[str]]:
    """First cell of each table row to the other cells."""
    cells = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return {first: others for first, *others in cells}


def test_equal_losses_are_said_to_be_bitwise_equal():
    runs = [run("deepspeed"), run("fsdp")]
    report = describe(runs, [], [])
    assert "bitwise equal at all 12 steps" in report
    assert rows(report)["7"] == ["6.2500000", "6.2500000", "0"]


def test_the_largest_difference_is_named_with_its_step():
    runs = [run("deepspeed"), run("fsdp", {5: 6.75 + 2**-20, 7: 6.25 - 2**-18})]
    assert verdict(runs[1], runs[0]) == (
        "The losses of fsdp and deepspeed differ by at most 3.81e-06 (step 7 of 12), 6.1e-07 of the loss."
    )
    found = rows(describe(runs, [], []))
    assert found["5"] == ["6.7500000", "6.7500010", "9.54e-07"]
    assert found["6"] == ["6.5000000", "6.5000000", "0"]
    assert found["7"][2] == "-3.81e-06"


def test_quantities_are_those_of_the_metrics():
    report = describe([run("deepspeed"), run("fsdp")], ["2 ranks on a machine"], ["python -m x"])
    found = rows(report)
    assert found["tokens/s"] == ["9,000", "9,000"]  # the median of steps 6 .. 12
    assert found["tokens/s a device"] == ["4,500", "4,500"]
    assert found["peak memory of a rank, GiB"] == ["12.00", "12.00"]
    assert found["time to first step, s"] == ["12.2", "12.2"]
    assert found["training loss"] == ["7.7500 to 5.0000"] * 2
    assert found["held-out loss"] == ["8.2500 to 5.5000"] * 2
    assert found["model FLOPs utilization"] == ["-", "-"]
    assert report.endswith("    python -m x\n")
    assert "- 2 ranks on a machine" in report


def test_a_long_run_is_shown_in_few_rows_with_its_first_and_last():
    long = Run("fsdp", [record(step, 1.0) for step in range(1, 1001)])
    table = describe([long, long], [], []).partition("## Losses")[2].partition("##")[0]
    shown = [int(cell) for cell in rows(table) if cell.isdigit()]
    assert len(shown) == compare.TABLE_STEPS
    assert (shown[0], shown[-1]) == (1, 1000)


def test_metrics_are_read_step_by_step(tmp_path):
    lines = [record(step, 4.0 - step) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run("fsdp", tmp_path).losses == {1: 3.0, 2: 2.0, 3: 1.0}


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[1]"])
def test_metrics_that_cannot_serve_are_named(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "metrics.jsonl"))):
        read_run("fsdp", tmp_path)


def test_the_picture_is_a_png(tmp_path):
    draw([run("deepspeed"), run("fsdp", {5: 6.8})], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]


def test_a_run_that_fails_names_backend_reason_and_log(capsys, tmp_path):
    program = "print('starting\\nerror: no corpus there\\nTraceback of the launcher'); raise SystemExit(1)"
    log = tmp_path / "fsdp.log"
    with pytest.raises(
        UserError, match=f"training under fsdp failed: no corpus there .* {re.escape(str(log))}"
    ):
        compare._train("fsdp", [sys.executable, "-c", program], {}, log)
    assert capsys.readouterr().out == "     fsdp | starting\n"
    assert log.read_text() == "starting\nerror: no corpus there\nTraceback of the launcher\n"


def test_the_output_of_another_recipe_is_not_mixed_with_this_one(tmp_path):
    recipe = Recipe(output=tmp_path / "out")
    compare._keep_recipe(recipe, "2 ranks, torch 2.0")
    kept = compare._keep_recipe(recipe, "2 ranks, torch 2.0")
    assert yaml.safe_load(kept.read_text()) == plain(recipe)
    with pytest.raises(UserError, match=r"under 2 ranks, torch 2\.0, expected 3 ranks.*another --output"):
        compare._keep_recipe(recipe, "3 ranks, torch 2.0")
    recipe.optimizer.learning_rate = 1.0
    with pytest.raises(UserError, match="another recipe"):
        compare._keep_recipe(recipe, "2 ranks, torch 2.0")


def test_a_report_says_that_speeds_count_padding_where_there_is_some():
    runs = [run("deepspeed"), run("fsdp")]
    assert compare.PADDING in describe(runs, [], [], padded=True)
    assert compare.PADDING not in describe(runs, [], [])
