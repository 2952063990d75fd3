"""The comparison's report says what the metrics of the runs say, and holds them to what is promised."""

import json
import re
import sys
from dataclasses import replace

import pytest
import yaml

from data_tools.errors import UserError
from pmc_llama import compare
from pmc_llama.compare.picture import draw
from pmc_llama.compare.report import PADDING, TABLE_STEPS, as_data, describe, judge, sentence
from pmc_llama.compare.runs import Result, Run, read_run, train
from pmc_llama.config import PrecisionConfig, Recipe, plain
from pmc_llama.variants import Variant, allowed_difference, cross, read_varied

STEPS = 24


def record(step: int, loss: float, **others: object) -> dict[str, object]:
    """A line of `metrics.jsonl`; the first two steps are slow, as they are."""
    speed = 1000.0 * step if step > 2 else 1.0
    return {
        "step": step,
        "steps": STEPS,
        "loss": loss,
        "tokens_per_second": speed,
        "tokens_per_second_per_device": speed / 2,
        "step_seconds": 1 / speed,
        "peak_memory_bytes": step << 30,
        "mfu": None,
        "heldout_loss": loss + 0.5 if step in (1, STEPS) else None,
        "seconds_since_start": 11.25 + step,
        **others,
    }


def run(changed: dict[int, float] | None = None, **others: object) -> Run:
    losses = {step: 8.0 - step / 8 for step in range(1, STEPS + 1)} | (changed or {})
    return Run([record(step, loss, **others) for step, loss in losses.items()], {"communication": 0.25})


def result(name: str, *runs: Run) -> Result:
    return Result(Variant(name, name, 2, {"backend": name}), list(runs) or [run()])


def report(*results: Result, **more: object) -> str:
    verdicts = [judge(other, results[0], 0.0) for other in results[1:]]
    return describe(results, verdicts, ["2 ranks on a machine"], ["python -m x"] * len(results), **more)


def rows(report: str) -> dict[str, list[str]]:
    """First cell of each table row to the other cells."""
    cells = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return {first: others for first, *others in cells}


# --- variants ----------------------------------------------------------------------------------------------


def test_every_combination_is_a_variant_named_by_what_varies():
    varied = read_varied(["precision.reduce=fp32,bf16", "ranks=1,2"])
    variants = cross(["deepspeed", "fsdp"], varied, ranks=4)
    assert [variant.name for variant in variants][:3] == [
        "deepspeed reduce=fp32 ranks=1",
        "deepspeed reduce=fp32 ranks=2",
        "deepspeed reduce=bf16 ranks=1",
    ]
    assert len({variant.directory for variant in variants}) == 8
    assert [variant.ranks for variant in variants] == [1, 2] * 4
    assert variants[-1].options == ["--backend", "fsdp", "--precision.reduce", "bf16"]


def test_keys_with_the_same_last_part_are_told_apart():
    varied = read_varied(["checkpoint.every_steps=1,2", "evaluation.every_steps=3,4"])
    assert cross(["fsdp"], varied, 2)[0].name == "fsdp checkpoint.every_steps=1 evaluation.every_steps=3"


@pytest.mark.parametrize(
    "text", ["precision.reduce", "ranks=2", "ranks=2,2", "=1,2", "ranks=1,,2", "backend=a,b"]
)
def test_what_does_not_vary_is_refused(text):
    with pytest.raises(UserError, match=re.escape(text.partition("=")[0])):
        read_varied([text])


@pytest.mark.parametrize("ranks", ["0", "two", "-1"])
def test_ranks_are_whole_numbers(ranks):
    with pytest.raises(UserError, match=f"ranks is {ranks}"):
        cross(["fsdp"], {"ranks": ["1", ranks]}, 2)


def test_one_variant_is_no_comparison():
    with pytest.raises(UserError, match="one variant only"):
        cross(["fsdp"], {}, 2)


def test_equal_bits_are_promised_only_where_nothing_rounds_differently():
    one = Recipe(backend="deepspeed")
    same = replace(one, backend="fsdp")
    assert allowed_difference(one, same, (2, 2), on_gpu=False) == 0
    assert allowed_difference(one, same, (2, 2), on_gpu=True) > 0
    assert allowed_difference(one, same, (3, 3), on_gpu=False) > 0
    assert allowed_difference(one, same, (1, 2), on_gpu=False) > 0
    other = replace(same, precision=PrecisionConfig(reduce="bf16"))
    assert allowed_difference(one, other, (2, 2), on_gpu=False) > 0
    assert allowed_difference(other, other, (2, 2), on_gpu=False) > 0


# --- the report --------------------------------------------------------------------------------------------


def test_equal_losses_are_said_to_be_bitwise_equal():
    text = report(result("deepspeed"), result("fsdp"))
    assert "bitwise equal at all 24 steps" in text
    assert rows(text)["7"] == ["7.1250000", "7.1250000", "0"]


def test_the_largest_difference_is_named_with_its_step_and_held_to_what_is_allowed():
    one, other = result("deepspeed"), result("fsdp", run({5: 7.375 + 2**-20, 16: 6.0 - 2**-18}))
    strict, lenient = judge(other, one, 0.0), judge(other, one, 1e-6)
    assert sentence(other, one, lenient) == (
        "The losses of fsdp and deepspeed differ by at most 3.81e-06 (step 16 of 24), 6.4e-07 of the loss; "
        "1e-06 of it is allowed."
    )
    assert lenient.kept
    assert not strict.kept
    assert "no difference is allowed, so they DISAGREE" in sentence(other, one, strict)
    found = rows(report(one, other))
    assert found["5"] == ["7.3750000", "7.3750010", "9.54e-07"]
    assert found["6"] == ["7.2500000", "7.2500000", "0"]
    assert found["16"][2] == "-3.81e-06"


def test_runs_without_a_common_step_keep_no_promise():
    other = result("fsdp", Run([record(100, 1.0)], {}))
    assert not judge(other, result("deepspeed"), 1.0).kept


def test_quantities_are_those_of_the_metrics():
    times = {"data_seconds": 0.5, "forward_backward_seconds": 2.0, "optimizer_seconds": 1.0}
    text = report(result("deepspeed", run(**times, checkpoint_seconds=3.0)), result("fsdp"))
    found = rows(text)
    assert found["tokens/s"] == ["16,500", "16,500"]  # the median of steps 9 .. 24
    assert found["tokens/s a device"] == ["8,250", "8,250"]
    assert found["peak memory of a rank, GiB"] == ["24.00", "24.00"]
    assert found["time to first step, s"] == ["12.2", "12.2"]
    assert found["training loss"] == ["7.8750 to 5.0000"] * 2
    assert found["held-out loss"] == ["8.3750 to 5.5000"] * 2
    assert found["model FLOPs utilization"] == ["-", "-"]
    assert found["data"] == ["0.5000", "-"]
    assert found["forward and backward"] == ["2.0000", "-"]
    assert found["optimizer, with clipping"] == ["1.0000", "-"]
    assert found["checkpoint, mean over all steps"] == ["3.0000", "-"]
    assert found["communication (profiled)"] == ["0.2500", "0.2500"]
    assert text.endswith("    python -m x\n")
    assert "- 2 ranks on a machine" in text


def test_repetitions_give_median_and_spread_and_are_held_against_the_first():
    slower, slowest = run(tokens_per_second=9.0), run({3: 7.625 + 2**-10}, tokens_per_second=8.0)
    repeated = result("deepspeed", run(tokens_per_second=10.0), slower, slowest)
    text = report(repeated, result("fsdp", run(), run(), run()))
    assert rows(text)["tokens/s"][0] == "9 (8 to 10)"
    assert "Repetitions differ: those of deepspeed by up to 0.00013 of the loss." in text
    same = report(result("deepspeed", run(), run()), result("fsdp", run(), run()))
    assert "Every repetition has the losses of the first, bit for bit." in same


def test_the_data_of_a_report_have_what_its_tables_have():
    results = [result("deepspeed", run(), run()), result("fsdp", run({5: 7.0}), run())]
    verdicts = [judge(results[1], results[0], 0.0)]
    data = json.loads(json.dumps(as_data(results, verdicts, ["a machine"], ["a", "b"])))
    one, other = data["variants"]
    assert one["quantities"]["tokens_per_second"] == {"median": 16500.0, "least": 16500.0, "most": 16500.0}
    assert one["verdict"] is None
    assert other["verdict"]["kept"] is False
    assert other["verdict"]["worst_step"] == 5
    assert other["losses"]["5"] == 7.0
    assert other["repeat_difference"] == pytest.approx(0.375 / 7)


def test_a_long_run_is_shown_in_few_rows_with_its_first_and_last():
    long = result("fsdp", Run([record(step, 1.0) for step in range(1, 1001)], {}))
    table = report(long, long).partition("## Losses")[2].partition("##")[0]
    shown = [int(cell) for cell in rows(table) if cell.isdigit()]
    assert len(shown) == TABLE_STEPS
    assert (shown[0], shown[-1]) == (1, 1000)


def test_metrics_are_read_step_by_step(tmp_path):
    lines = [record(step, 4.0 - step) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).losses == {1: 3.0, 2: 2.0, 3: 1.0}


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[1]"])
def test_metrics_that_cannot_serve_are_named(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "metrics.jsonl"))):
        read_run(tmp_path)


def test_the_picture_is_a_png(tmp_path):
    results = [
        result("deepspeed", run(), run()),
        result("fsdp", run({5: 6.8}), run()),
        result("third", run(), run()),
    ]
    verdicts = [judge(other, results[0], 0.0) for other in results[1:]]
    draw(results, verdicts, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]


def test_a_run_that_fails_names_backend_reason_and_log(capsys, tmp_path):
    program = "print('starting\\nerror: no corpus there\\nTraceback of the launcher'); raise SystemExit(1)"
    log = tmp_path / "fsdp.log"
    with pytest.raises(
        UserError, match=f"training under fsdp failed: no corpus there .* {re.escape(str(log))}"
    ):
        train("fsdp", [sys.executable, "-c", program], {}, log)
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
    results = [result("deepspeed"), result("fsdp")]
    assert PADDING in report(*results, padded=True)
    assert PADDING not in report(*results)


def test_a_broken_promise_ends_with_a_sentence_after_the_report_is_written(tmp_path):
    recipe = Recipe(output=tmp_path)
    results = [result("deepspeed"), result("fsdp", run({5: 7.0}))]
    file = tmp_path / "recipe.yaml"
    with pytest.raises(UserError, match=r"fsdp and deepspeed differ by at most 0\.375 .*DISAGREE"):
        compare._report(recipe, file, results, [recipe, replace(recipe, backend="fsdp")], "2")
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "comparison.png"}
