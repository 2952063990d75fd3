"""`pmc-llama plan` needs neither GPU nor corpus, and tells what it found and what it assumed."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.errors import UserError
from pmc_llama.config import ModelConfig, Recipe
from pmc_llama.model import llama_config
from pmc_llama.plan.advice import Batch, Change
from pmc_llama.plan.cluster import GIB, GPUS, Cluster
from pmc_llama.plan.command import plan
from pmc_llama.plan.duration import CorpusSize, plan_duration
from pmc_llama.plan.memory import MemoryPlan
from pmc_llama.plan.picture import draw
from pmc_llama.plan.plan import Plan, as_data, assumptions
from pmc_llama.plan.table import batch_row, describe, in_words
from pmc_llama.plan.throughput import Workload, step_time

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.yaml"


def made(gpu: str = "h100", nodes: int = 1) -> Plan:
    """A plan of a 7B with a given memory, to be told; how memory is found is tested elsewhere."""
    recipe, cluster = Recipe(), Cluster(GPUS[gpu], nodes, 8, node_bandwidth=400e9)
    config = llama_config(ModelConfig(size="7b"), 32000)
    work = Workload.of(recipe, config, cluster.ranks)
    step, corpus = step_time(work, cluster), CorpusSize(4_800_000, 75_000_000_000, "given")
    memory = MemoryPlan(
        parameters=5 * GIB,
        gradients=3 * GIB,
        optimizer=6 * GIB,
        gathered=2 * GIB,
        reduction=1 * GIB,
        activations=24 * GIB,
        logits=1 * GIB,
        temporary=0,
        margin=3 * GIB,
        host_states=0,
        host_snapshot=12 * GIB,
        moment="backward",
    )
    change = Change(("--batch.micro_size 2",), recipe, nodes, replace(memory, activations=12 * GIB), 1.5)
    return Plan(
        recipe=recipe,
        config=config,
        cluster=cluster,
        corpus=corpus,
        memory=memory,
        largest_micro_size=4,
        changes=[] if memory.total <= cluster.gpu.memory_bytes else [change],
        work=work,
        step=step,
        duration=plan_duration(recipe, work, step, cluster, corpus),
    )


def printed(told: Plan) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(describe(told), soft_wrap=True)
    return console.export_text()


def test_what_fits_is_told_with_its_time_and_cost() -> None:
    told, text = made(), printed(made())
    assert "It fits. The largest micro-batch that does is 4." in text
    assert f"{told.tokens_per_second:,.0f}" in text
    assert f"{told.mfu:.1%}" in text
    assert f"{told.duration.gpu_hours:,.0f}" in text
    assert "45.0" in text  # GiB in all
    assert "Nothing here was measured." in text


def test_what_does_not_fit_is_told_with_the_cheapest_change() -> None:
    text = printed(made("a100-40"))
    assert "It does not fit." in text
    assert "The cheapest change: --batch.micro_size 2  (33.0 GiB" in text


def test_every_assumption_that_a_plan_rests_on_is_told() -> None:
    here, far = " ".join(assumptions(made())), " ".join(assumptions(made(nodes=2)))
    assert "between nodes" not in here
    assert "between nodes" in far
    assert "Hopper" not in here
    assert "constants are those of Hopper" in " ".join(assumptions(made("b200")))


def test_json_holds_the_parts_and_their_sum() -> None:
    data = json.loads(json.dumps(as_data(made())))
    assert data["memory"]["total"] == 45 * GIB
    seconds = data["step_seconds"]
    assert sum(value for name, value in seconds.items() if name != "total") == pytest.approx(seconds["total"])
    assert data["parameters"] == 6_738_415_616
    assert data["fits"] is True


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw({"one": made(), "two": made(nodes=2)}, "two plans", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        draw({"one": made()}, "one", tmp_path / "missing" / "plan.png")


def test_durations_are_told_in_words() -> None:
    assert in_words(3723) == "1:02:03"
    assert in_words(86400 * 2 - 60) == "2 days 0 hours"


def test_the_demo_is_planned_without_gpu_or_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(RECIPE), "--backend=fsdp", "--gpus-per-node=2", "--json", "--data.corpus=nowhere"]
    assert plan(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fits"] is True
    assert data["memory"]["total"] < 5 * GIB
    assert data["tokens_per_second_per_gpu"] > 0


@pytest.mark.slow
def test_the_largest_micro_batch_is_found_for_each_kind_of_checkpointing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(RECIPE), "--backend=fsdp", "--gpus-per-node=2", "--data.corpus=nowhere", "--find-batch"]
    assert plan([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [batch["activation_checkpointing"] for batch in found] == ["none", "selective", "full"]
    assert [batch["micro_size"] for batch in found] == [8, 8, 8]  # all of a rank's part of the 16
    speeds = [batch["tokens_per_second_per_gpu"] for batch in found]
    assert speeds == sorted(speeds, reverse=True)
    assert plan(arguments) == 0
    assert "--batch.micro_size 8 --sharding.activation_checkpointing full" in capsys.readouterr().out


def test_a_batch_that_was_found_is_told_with_what_to_set() -> None:
    row = batch_row(Batch("selective", 6, made().memory, 9876.5))
    assert row.split() == [
        *("selective", "6", "45.0", "9,876"),
        *("--batch.micro_size", "6", "--sharding.activation_checkpointing", "selective"),
    ]
    assert batch_row(Batch("none", None, None, 0.0)).split() == ["none", "none", "fits"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu=v100"], "--gpu is v100, expected one of"),
        (["--interconnect=telex"], "--interconnect is telex, expected one of"),
        (["--nodes=0"], "--nodes is 0, expected a number above 0"),
        (["--tokens=-1"], "--tokens is -1"),
        (["--gpus-per-node=3"], "batch.global_size is 16, expected a multiple"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(options: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plan([str(RECIPE), "--data.corpus=nowhere", *options])
