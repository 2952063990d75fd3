"""What is typed wrong is told in one sentence with exit status 2; what is typed right is what runs."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import LlamaConfig, LlamaForCausalLM

from data_tools.errors import UserError
from pmc_llama import cli
from pmc_llama.checkpoint import save
from pmc_llama.config import LoraConfig, Recipe, plain
from pmc_llama.recipe_file import CHECKS, RECIPE_KEYS, check
from tests.pmc_llama.small import bare_manifest
from tests.pmc_llama.test_huggingface_tokenizer import train as train_tokenizer
from tests.ranks import run_on_ranks

RECIPES = Path(__file__).parents[2] / "recipes"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def recipe(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


# --- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "pretrain_7b"])
def test_a_printed_recipe_read_again_prints_the_same(capsys, tmp_path, name):
    status, printed, _ = run(capsys, "train", RECIPES / f"{name}.yaml", "--print_config")
    assert status == 0
    again = recipe(tmp_path, printed)
    assert run(capsys, "train", again, "--print_config") == (0, printed, "")
    assert set(yaml.safe_load(printed)) == {field.name for field in fields(Recipe)}


def test_the_7b_recipe_is_the_regime_of_the_paper(capsys):
    _, printed, _ = run(capsys, "train", RECIPES / "pretrain_7b.yaml", "--print_config")
    values = yaml.safe_load(printed)
    assert values["data"]["mode"] == "window"
    assert values["data"]["sequence_length"] == 512
    assert values["batch"]["global_size"] == 128 == 8 * values["batch"]["micro_size"] * 4
    assert values["schedule"]["epochs"] == 5
    assert values["schedule"]["warmup_ratio"] == 0.03
    optimizer = {"learning_rate": 2e-5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0}
    assert optimizer.items() <= values["optimizer"].items()
    assert values["precision"]["compute"] == "bf16"


def test_options_override_the_file_and_the_file_the_defaults(capsys, tmp_path):
    path = recipe(tmp_path, "batch: {global_size: 8, micro_size: 2}\noptimizer: {learning_rate: 2e-5}\n")
    options = ["--batch.micro_size", "4", "--backend=fsdp", "--schedule.steps", "null"]
    _, printed, _ = run(capsys, "train", path, *options, "--print_config")
    expected = plain(Recipe())
    expected["batch"] = {"global_size": 8, "micro_size": 4}
    expected["optimizer"]["learning_rate"] = 2e-5
    expected["backend"] = "fsdp"
    assert yaml.safe_load(printed) == expected


WRONG_FILES = {
    "batch: {micro_siz: 3}": "unknown key batch.micro_siz; the nearest valid one is batch.micro_size",
    "bath: {micro_size: 3}": "unknown key bath; the nearest valid one is batch",
    "learning_rate: 1": "unknown key learning_rate; the nearest valid one is optimizer.learning_rate",
    "batch: {micro_size: three}": 'batch.micro_size is "three", expected a whole number',
    "batch: {micro_size: 1.5}": "batch.micro_size is 1.5, expected a whole number",
    "batch: {micro_size: null}": "batch.micro_size is null, expected a whole number",
    "batch: {micro_size: {a: null}}": 'batch.micro_size is {"a": null}, expected a whole number',
    "optimizer: {learning_rate: [1]}": "optimizer.learning_rate is [1], expected a number",
    "schedule: {steps: x}": 'schedule.steps is "x", expected a whole number or null',
    "backend: fdsp": 'backend is "fdsp", expected one of deepspeed, fsdp',
    "batch: 3": "batch is 3, expected a section with global_size, micro_size",
    "batch:": "batch is null, expected a section with global_size, micro_size",
    "- batch": 'holds ["batch"], expected sections such as model and data',
    "": "holds null, expected sections such as model and data",
    'output: ""': 'output is "", expected a path',
    "batch: [": "is not valid YAML",
    "3: 4": "unknown key 3",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_recipe_names_file_key_and_what_was_expected(capsys, tmp_path, text):
    path = recipe(tmp_path, text)
    status, out, err = run(capsys, "train", path, "--print_config")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(path) in err
    assert WRONG_FILES[text] in err


WRONG_ARGUMENTS = {
    (
        "train",
        "RECIPE",
        "--batch.micro_siz",
        "3",
    ): "unknown option --batch.micro_siz; the nearest valid one is --batch.micro_size",
    ("train", "RECIPE", "--learning_rate=3"): "the nearest valid one is --optimizer.learning_rate",
    (
        "train",
        "RECIPE",
        "--batch.micro_size",
        "x",
    ): "option --batch.micro_size is 'x', expected a whole number",
    (
        "train",
        "RECIPE",
        "--backend=megatron",
    ): "option --backend is 'megatron', expected one of deepspeed, fsdp",
    ("train", "RECIPE", "--batch", "{micro_size: 3}"): "unknown option --batch",
    ("train", "RECIPE", "--data.mode"): "--data.mode: expected one argument",
    ("train", "RECIPE", "more"): "unrecognized arguments: more",
    ("train",): "there is no RECIPE; name a recipe file",
    ("train", "--seed", "3", "RECIPE"): "the first argument is --seed, expected the RECIPE file",
    ("compare", "--ranks=3", "RECIPE"): "the first argument is --ranks=3, expected the RECIPE file",
    ("train", "RECIPE", "--output="): "option --output is '', expected a path",
    ("train", "RECIPE", "--data.corpus", ""): "option --data.corpus is '', expected text that is not empty",
    ("train", "RECIPE", "--model.size="): "option --model.size is '', expected text that is not empty",
    (
        "train",
        "RECIPE",
        "--optimizer.learning_rate",
        "1e400",
    ): "optimizer.learning_rate is inf, expected a finite number above 0",
    ("train", "nowhere.yaml"): "recipe nowhere.yaml cannot be read: No such file",
    ("compare", "RECIPE", "--backends", "fsdp"): "name two --backends, or vary something",
    ("compare", "RECIPE", "--backends", "fsdp,ddp"): "expected different ones of deepspeed, fsdp",
    ("compare", "RECIPE", "--vary", "seed=1,one"): "option --seed is 'one', expected a whole number",
    ("compare", "RECIPE", "--vary", "sedd=1,2"): "unknown option --sedd",
    ("compare", "RECIPE", "--repeat", "0"): "--repeat is 0, expected 1 or more",
    ("compare", "RECIPE", "--ranks", "0"): "--ranks is 0, expected 1 or more",
    ("compare", "RECIPE", "--ranks", "two"): "two",
    ("export", "somewhere"): "DIR; see pmc-llama export --help",
    ("export", "nowhere", "model"): "nowhere is not a directory",
    ("export", ".", "model", "--dtype", "int8"): "choose from 'bf16', 'fp16', 'fp32'",
    ("checkpoint", "verify", "."): "has no checkpoints",
    ("checkpoint", "mend", "."): "choose from 'list', 'verify'",
    ("trian", "RECIPE"): "unknown command trian; expected one of plan, preflight, train, compare",
}


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS, ids=" ".join)
def test_a_wrong_argument_is_told_in_one_sentence(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, "seed: 1")
    status, out, err = run(capsys, *["recipe.yaml" if a == "RECIPE" else a for a in arguments])
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert WRONG_ARGUMENTS[arguments] in err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.sequence_length", 0),
        ("batch.micro_size", -1),
        ("schedule.epochs", 0.0),
        ("schedule.epochs", float("inf")),
        ("schedule.warmup_ratio", 1.01),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.beta2", 1.0),
        ("checkpoint.keep_last", 0),
        ("evaluation.max_sequences", 0),
        ("optimizer.weight_decay", float("inf")),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(key, value):
    wrong = Recipe()
    section, _, name = key.rpartition(".")
    setattr(getattr(wrong, section) if section else wrong, name, value)
    with pytest.raises(UserError, match=f"{key} is {value}, expected"):
        check(wrong)


def test_a_batch_that_cannot_be_cut_is_refused(capsys, tmp_path):
    path = recipe(tmp_path, "batch: {global_size: 10, micro_size: 4}")
    assert run(capsys, "train", path) == (
        2,
        "",
        "error: batch.global_size is 10, expected a multiple of batch.micro_size, 4\n",
    )


def test_every_number_of_a_recipe_has_a_range():
    def numbers(section: object, prefix: str = ""):
        for field in fields(section):
            value = getattr(section, field.name)
            if is_dataclass(value):
                yield from numbers(value, f"{prefix}{field.name}.")
            elif {int, float} & {
                RECIPE_KEYS[prefix + field.name],
                *get_args(RECIPE_KEYS[prefix + field.name]),
            }:
                yield prefix + field.name

    check(Recipe())
    assert set(CHECKS) == set(numbers(Recipe(lora=LoraConfig())))


# --- the program -------------------------------------------------------------------------------------------


def test_help_names_every_command_without_loading_torch():
    program = (
        "import sys; from pmc_llama import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True
    )
    assert all(f"  {command} " in shown.stdout for command in cli.COMMANDS)
    recipe = [sys.executable, "-c", program, "train", str(RECIPES / "demo.yaml"), "--print_config"]
    assert "size: demo" in subprocess.run(recipe, capture_output=True, text=True, check=True).stdout


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "pmc_llama.cli", "frob"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command frob")


def test_only_the_first_failing_rank_speaks_of_a_checkpoint_that_torch_cannot_read(monkeypatch):
    def fail(arguments):
        raise CheckpointException("load", {})

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    monkeypatch.setattr(cli, "_first_to_fail", lambda error: False)
    assert cli.main(["train"]) == 1
    monkeypatch.setattr(cli, "_first_to_fail", lambda error: True)
    with pytest.raises(CheckpointException):
        cli.main(["train"])


@pytest.mark.parametrize(("rank", "said"), [(None, "interrupted\n"), ("0", "interrupted\n"), ("1", "")])
def test_an_interruption_is_told_once(capsys, monkeypatch, rank, said):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupt)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    assert run(capsys, "train") == (130, "", said)


@pytest.mark.parametrize(("gpus", "given", "ranks"), [(0, [], 2), (4, [], 4), (4, ["--ranks", "3"], 3)])
def test_a_comparison_takes_every_gpu_unless_told_otherwise(
    capsys, tmp_path, monkeypatch, gpus, given, ranks
):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("pmc_llama.compare.compare", lambda *arguments: asked.extend(arguments[1]))
    assert run(capsys, "compare", recipe(tmp_path, "seed: 1"), *given)[0] == 0
    assert [variant.ranks for variant, _ in asked] == [ranks, ranks]


# --- checkpoints -------------------------------------------------------------------------------------------


def publish(root: Path, tokenizer: Path) -> None:
    """Two checkpoints of a run: all weights 1 at step 1, 2 at step 2."""
    config = LlamaConfig(
        vocab_size=420, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    for step in (1, 2):
        named = LlamaForCausalLM(config).named_parameters()
        state = {f"model.{name}": torch.full_like(p, step) for name, p in named}
        values = json.loads(json.dumps(asdict(Recipe()), default=str))

        def describe(files, step=step, values=values):
            said = {"tokens": step * 65_536, "recipe": values, "model_config": config.to_dict()}
            return bare_manifest(step, files, **said)

        save(state, root / "checkpoints", describe, tokenizer, dist.group.WORLD)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    run_on_ranks(1, publish, directory / "run", train_tokenizer(directory))
    return directory / "run"


@pytest.fixture
def finished(tmp_path, published):
    return Path(shutil.copytree(published, tmp_path / "run"))


def test_a_run_is_listed_verified_and_exported_from_its_newest_checkpoint(capsys, finished):
    status, out, _ = run(capsys, "checkpoint", "list", finished)
    assert status == 0
    assert [line.split("step ")[1].split(",")[0] for line in out.splitlines()] == ["1", "2"]
    status, out, _ = run(capsys, "checkpoint", "verify", finished)
    assert (status, out.count("every file is sound")) == (0, 2)

    status, out, _ = run(capsys, "export", finished, finished / "model", "--dtype", "fp16")
    assert status == 0
    weights = load_file(finished / "model/model.safetensors")["model.norm.weight"]
    assert weights.dtype == torch.float16
    assert weights.eq(2).all()

    first = finished / "checkpoints/step-00000001"
    assert run(capsys, "export", first, finished / "first")[0] == 0
    assert load_file(finished / "first/model.safetensors")["model.norm.weight"].eq(1).all()


def test_a_checkpoint_is_inspected_without_its_tensors(capsys, finished):
    first = finished / "checkpoints/step-00000001"
    for tensors in first.glob("*.distcp"):
        tensors.unlink()
    status, out, _ = run(capsys, "checkpoint", "inspect", first)
    assert status == 0
    said = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in out.splitlines()[1:]}
    assert said["step"] == "1"
    assert said["samples"].endswith("65,536 tokens")
    assert said["model"].startswith("7,192 parameters; num_hidden_layers 1, hidden_size 8")
    assert said["backend"] == "deepspeed"
    assert said["learning rate"] == "2e-05"


def test_verify_names_the_damaged_checkpoint_and_goes_on_to_the_next(capsys, finished):
    damaged = next((finished / "checkpoints/step-00000001").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    status, out, err = run(capsys, "checkpoint", "verify", finished)
    assert status == 2
    first, second = out.splitlines()
    assert damaged.name in first
    assert "every file is sound" in second
    expected = f"error: 1 of 2 checkpoints of {finished} are damaged; --resume passes over them"
    assert err.splitlines()[-1] == expected
