"""Whole runs by the command line, on real ranks: killed, resumed, switched, and refused in words."""

import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from data_tools.build import build
from data_tools.corpus import Corpus
from data_tools.recipe import Decisions, Recipe
from pmc_llama import cli
from pmc_llama.checkpoint import read_manifest, verify
from pmc_llama.metrics import read_metrics
from pmc_llama.stopping import REQUEUE
from tests.data_tools.sources import simple_record, write_jsonl
from tests.pmc_llama.runs import BIN, command_line, finish, kill, numbers, start
from tests.pmc_llama.small import odd_config

RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = 24


@pytest.fixture(scope="module")
def options(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of odd shapes on the small corpus, a few dozen steps, checkpoints on the way."""
    size = tmp_path_factory.mktemp("model") / "config.json"
    config = odd_config()
    config.vocab_size = Corpus.open(tiny_corpus).vocab_size
    config.to_json_file(size)
    return {
        "--model.size": str(size),
        "--data.corpus": str(tiny_corpus),
        "--data.mode": "packed",
        "--data.sequence_length": "32",
        "--batch.global_size": "8",
        "--batch.micro_size": "2",
        "--schedule.steps": str(STEPS),
        "--schedule.warmup_ratio": "0.2",
        "--optimizer.learning_rate": "0.003",
        "--checkpoint.every_steps": "8",
        "--evaluation.every_steps": "8",
        "--evaluation.max_sequences": "9",
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that says nothing: every value comes from an option."""
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\n")
    return path


def _kill_after(checkpoint: Path, arguments: list[str]) -> None:
    """Start a run and SIGKILL every process of it as soon as `checkpoint` is published."""
    process = start(arguments)
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    kill(process)
    output, _ = process.communicate()
    assert checkpoint.exists(), output


@pytest.fixture(scope="module")
def uninterrupted(options: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    recipe = directory / "recipe.yaml"
    recipe.write_text("seed: 3\n")
    for backend in ("deepspeed", "fsdp"):
        output = str(directory / backend)
        finish(command_line(recipe, options, "--backend", backend, "--output", output))
    return directory


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param("deepspeed", "deepspeed", marks=pytest.mark.slow),
        pytest.param("fsdp", "fsdp", marks=pytest.mark.slow),
        ("deepspeed", "fsdp"),
        pytest.param("fsdp", "deepspeed", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_and_resumed_has_the_numbers_of_one_that_never_was(
    uninterrupted: Path, options: dict[str, str], recipe: Path, tmp_path: Path, first: str, then: str
) -> None:
    run = tmp_path / "run"
    arguments = command_line(recipe, options, "--output", str(run), "--resume")
    _kill_after(run / "checkpoints" / "step-00000008", [*arguments, "--backend", first])
    assert len(numbers(run)) < STEPS, "the kill came too late to mean anything"
    output = finish([*arguments, "--backend", then])
    assert "starting after step 8" in output or "starting after step 16" in output
    assert numbers(run) == numbers(uninterrupted / first)
    assert numbers(run) == numbers(uninterrupted / then)


def test_a_run_lowers_its_losses_and_leaves_its_records(uninterrupted: Path) -> None:
    for backend in ("deepspeed", "fsdp"):
        run = uninterrupted / backend
        records = numbers(run)
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert records[-1]["loss"] < records[0]["loss"]
        heldout = [record["heldout_loss"] for record in records if record["heldout_loss"] is not None]
        assert len(heldout) == 4  # after steps 1, 8, 16 and 24
        assert heldout[-1] < heldout[0]
        assert list(run.rglob("events.out.tfevents.*"))
        assert (run / "recipe.yaml").is_file()
        assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
            "step-00000016",
            "step-00000024",
        ]


def test_a_finished_run_says_so_and_trains_no_more(
    uninterrupted: Path, options: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted / "fsdp", run)
    before = numbers(run)
    output = finish(command_line(recipe, options, "--backend", "fsdp", "--output", str(run), "--resume"))
    assert "nothing is left to train" in output
    assert numbers(run) == before


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    uninterrupted: Path, options: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted / "fsdp", run)
    file = run / "checkpoints" / "step-00000024" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    output = finish(command_line(recipe, options, "--backend", "fsdp", "--output", str(run), "--resume"))
    assert "step-00000024 is damaged: __1_0.distcp" in output
    assert "starting after step 16" in output
    assert numbers(run) == numbers(uninterrupted / "fsdp")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000024", "step-00000016", "step-00000024"]


@pytest.mark.parametrize("backend", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_7b_recipe_runs_with_the_demo_model(tiny_corpus: Path, tmp_path: Path, backend: str) -> None:
    run = tmp_path / "run"
    output = finish(
        [
            *(str(RECIPES / "pretrain_7b.yaml"), "--backend", backend, "--output", str(run)),
            *("--model.size", "demo", "--model.initialize_from", "null", "--data.corpus", str(tiny_corpus)),
            *("--batch.global_size", "8", "--schedule.steps", "2"),
        ]
    )
    assert "step 2/2" in output
    assert (run / "checkpoints" / "step-00000002" / "manifest.json").is_file()


@pytest.mark.parametrize("backend", ["deepspeed", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_hugging_face_weights_go_into_the_masters_and_out_again_unchanged(
    options: dict[str, str], recipe: Path, tmp_path: Path, backend: str
) -> None:
    config = odd_config()
    config.vocab_size = Corpus.open(options["--data.corpus"]).vocab_size
    torch.manual_seed(5)
    source = LlamaForCausalLM(config).half()
    source.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    still = {**options, "--schedule.steps": "1", "--optimizer.learning_rate": "1e-30"}
    first = ("--model.initialize_from", str(tmp_path / "source"), "--output", str(tmp_path / "run"))
    finish(command_line(recipe, still, "--backend", backend, *first))
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(found[name], tensor.float()), name
    assert all(
        t.dtype == torch.float32
        for f in (tmp_path / "out").glob("*.safetensors")
        for t in load_file(f).values()
    )


@pytest.mark.slow
def test_mpirun_starts_ranks_that_find_each_other(
    options: dict[str, str], recipe: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "RANK", "WORLD_"))
    }
    arguments = command_line(recipe, options, "--backend", "deepspeed", "--output", str(run))
    result = subprocess.run(
        [BIN / "mpiexec", "-n", "2", BIN / "pmc-llama", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**clean, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert numbers(run) == numbers(uninterrupted / "deepspeed")


def test_a_run_asked_to_stop_publishes_a_checkpoint_and_goes_on_from_it(
    uninterrupted: Path, options: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command_line(recipe, options, "--backend", "fsdp", "--output", str(run), "--resume")
    process = start(arguments)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.exists() and len(numbers(run)) >= 2):
        time.sleep(0.01)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "pmc_llama.cli" in child.cmdline()
    ]
    ranks[-1].send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    made = len(numbers(run))
    assert f"exitcode  : {REQUEUE}" in output  # torchrun's own status is 1
    assert 2 <= made < STEPS
    assert (run / "checkpoints" / f"step-{made:08d}" / "manifest.json").is_file()
    assert f"starting after step {made}" in finish(arguments)
    assert numbers(run) == numbers(uninterrupted / "fsdp")


# --- one process: guards, and refusals in one sentence with status 2 --------------------------------------


@pytest.mark.usefixtures("alone")
def test_the_batches_of_steps_to_skip_are_passed_over(
    options: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    short = {**options, "--schedule.steps": "6", "--guards.skip_steps": "[[3, 4]]"}
    assert cli.main(["train", *command_line(recipe, short, "--backend", "fsdp", "--output", str(run))]) == 0
    assert [record["step"] for record in numbers(run)] == [1, 2, 5, 6]
    manifest = read_manifest(run / "checkpoints" / "step-00000006")
    assert (manifest.updates, manifest.samples) == (4, 6 * 8)


@pytest.fixture(scope="module")
def grown_corpus(tiny_tokenizer: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The papers of the small corpus' record files, and ten more."""
    directory = tmp_path_factory.mktemp("grown")
    records = [simple_record(number, words=10 + 7 * number) for number in range(50)]
    write_jsonl(directory / "papers.jsonl", records)
    recipe = Recipe(decisions=Decisions(heldout=0.1))
    build([directory / "papers.jsonl"], tiny_tokenizer, directory / "corpus", recipe, workers=1)
    return directory / "corpus"


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_with_the_new_papers_of_a_grown_corpus_when_told_to(
    options: dict[str, str],
    recipe: Path,
    tiny_corpus: Path,
    grown_corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    before, after = {**options, "--schedule.steps": "2"}, {**options, "--schedule.steps": "4"}

    def train(settings: dict[str, str], *more: str) -> int:
        arguments = command_line(recipe, settings, "--backend", "fsdp", "--output", str(run), *more)
        status = cli.main(["train", *arguments])
        if dist.is_initialized():
            dist.destroy_process_group()
        return status

    assert train(before) == 0
    grown = {**after, "--data.corpus": str(grown_corpus)}
    assert train(grown, "--resume") == 2
    assert "data.grown all, or new" in capfd.readouterr().err
    new = {**grown, "--data.grown": "new", "--data.grown_from": str(tiny_corpus)}
    assert train(new, "--resume") == 0
    first, then = read_manifest(run / "checkpoints" / "step-00000004").data["segments"]
    assert (first["first_sample"], then["first_sample"]) == (0, 2 * 8)
    assert then["streams"] == [
        {"corpus": Corpus.open(grown_corpus).fingerprint, "without": Corpus.open(tiny_corpus).fingerprint}
    ]
    assert [record["step"] for record in numbers(run)] == [1, 2, 3, 4]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("backend", "late"), [("deepspeed", "false"), ("fsdp", "false"), ("fsdp", "true")])
def test_a_run_that_diverges_stops_with_a_checkpoint_from_before(
    options: dict[str, str],
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    backend: str,
    late: str,
) -> None:
    run = tmp_path / "run"
    wild = {**options, "--optimizer.learning_rate": "1e37", "--guards.max_skipped": "2"}
    wild["--speed.read_late"] = late
    arguments = command_line(recipe, wild, "--backend", backend, "--output", str(run))
    assert cli.main(["train", *arguments]) == 2
    said = capfd.readouterr().err
    records = read_metrics(run / "metrics.jsonl")
    assert [bool(record["skipped"]) for record in records[-4:]] == [False, True, True, True]
    good = records[-4]["step"]
    assert f"checkpoint of step {good}" in said
    assert verify(run / "checkpoints" / f"step-{good:08d}").updates == good


REFUSED = {
    "a corpus that is not there": ({"--data.corpus": "nowhere"}, "nowhere"),
    "a batch that does not divide": ({"--batch.global_size": "7"}, "batch.global_size is 7"),
    "sequences longer than the model": ({"--data.sequence_length": "4096"}, "data.sequence_length is 4096"),
    "a vocabulary below the tokenizer's": ({"--model.vocab_size": "5"}, "model.vocab_size is 5"),
    "weights that are not there": ({"--model.initialize_from": "no-model"}, "no-model"),
    "a size that is not known": ({"--model.size": "8b"}, "model.size: 8b"),
    "a checkpoint that is none": ({"--resume": "no-checkpoint"}, "no-checkpoint is not a checkpoint"),
    "an unknown option": ({"--optimizer.learning_rat": "1"}, "optimizer.learning_rate"),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_in_one_sentence(
    options: dict[str, str], recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    change, expected = REFUSED[case]
    arguments = command_line(
        recipe, {**options, **change}, "--backend", "fsdp", "--output", str(tmp_path / "run")
    )
    assert cli.main(["train", *arguments]) == 2
    sentence = capfd.readouterr().err.strip().splitlines()
    assert [line for line in sentence if line.startswith("error: ")] == sentence[-1:]
    assert expected in sentence[-1]
    assert "Traceback" not in "\n".join(sentence)


@pytest.mark.usefixtures("alone")
def test_a_run_does_not_go_back_over_its_own_later_checkpoints(
    uninterrupted: Path, options: dict[str, str], recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = uninterrupted / "fsdp"
    before = sorted((run / "checkpoints").iterdir())
    older = {**options, "--resume": str(before[0])}
    assert cli.main(["train", *command_line(recipe, older, "--backend", "fsdp", "--output", str(run))]) == 2
    assert "already holds checkpoints" in capfd.readouterr().err
    assert sorted((run / "checkpoints").iterdir()) == before


@pytest.mark.usefixtures("alone")
def test_two_runs_do_not_share_a_directory(
    options: dict[str, str], recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert (
            cli.main(["train", *command_line(recipe, options, "--backend", "fsdp", "--output", str(run))])
            == 2
        )
    assert "another run is writing" in capfd.readouterr().err
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("change", [{}, {"rms_norm_eps": 0.5}, {"attention_bias": True}])
def test_the_held_out_loss_is_that_of_transformers_on_the_same_weights(
    options: dict[str, str], recipe: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    corpus = Corpus.open(options["--data.corpus"])
    config = odd_config()
    config.vocab_size = corpus.vocab_size
    config.update(change)
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    run = tmp_path / "run"
    still = {**options, "--schedule.steps": "1", "--optimizer.learning_rate": "1e-30"}
    more = ("--backend", "fsdp", "--precision.compute", "fp32", "--output", str(run))
    source = ("--model.initialize_from", str(tmp_path / "source"))
    assert cli.main(["train", *command_line(recipe, still, *more, *source)]) == 0
    stream = corpus.split("heldout").read([(0, 9 * 32)])[0].astype("int64")
    previous = corpus.split("heldout").read(
        [(corpus.split("heldout").tokens - 1, corpus.split("heldout").tokens)]
    )
    inputs = torch.from_numpy(np.concatenate([previous[0].astype("int64"), stream[:-1]])).view(9, 32)
    with torch.no_grad():
        logits = model.eval()(inputs).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(stream))
    assert numbers(run)[-1]["heldout_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "already holds checkpoints"),
        ({"--resume": "latest", "--seed": "4"}, "seed is 4, but the checkpoint was made with 3"),
        ({"--resume": "latest", "--model.size": "demo"}, "hidden_size"),
    ],
)
def test_a_run_is_not_resumed_as_another(
    uninterrupted: Path,
    options: dict[str, str],
    recipe: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, str],
    expected: str,
) -> None:
    run = uninterrupted / "fsdp"
    before = numbers(run)
    arguments = command_line(recipe, {**options, **change}, "--backend", "fsdp", "--output", str(run))
    assert cli.main(["train", *arguments]) == 2
    assert expected in capfd.readouterr().err
    assert numbers(run) == before


@pytest.mark.usefixtures("alone")
def test_a_run_is_not_resumed_on_another_corpus(
    uninterrupted: Path,
    options: dict[str, str],
    recipe: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "papers.jsonl", [simple_record(number, words=60) for number in range(12)])
    other = tmp_path / "corpus"
    build(
        [tmp_path / "papers.jsonl"],
        tiny_tokenizer,
        other,
        Recipe(decisions=Decisions(heldout=0.1)),
        workers=1,
    )
    changed = {**options, "--data.corpus": str(other), "--resume": "latest"}
    run = str(uninterrupted / "fsdp")
    assert cli.main(["train", *command_line(recipe, changed, "--backend", "fsdp", "--output", run)]) == 2
    assert "fingerprint" in capfd.readouterr().err


@pytest.mark.usefixtures("alone")
def test_a_truncated_token_file_is_refused_before_training(
    options: dict[str, str], recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(options["--data.corpus"], corpus)
    file = next((corpus / "parts").glob("*.bin"))
    file.write_bytes(file.read_bytes()[:-2])
    changed = {**options, "--data.corpus": str(corpus)}
    run = tmp_path / "run"
    assert cli.main(["train", *command_line(recipe, changed, "--backend", "fsdp", "--output", str(run))]) == 2
    assert file.name in capfd.readouterr().err
    assert not run.exists()
