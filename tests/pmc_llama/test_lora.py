"""LoRA: what is trained, what stays as it is, and where the adapters go.

One training on two ranks under each backend; each test reads one promise from what it left.
"""

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from pmc_llama import checkpoint, cli, starting
from pmc_llama.backends import build_backend
from pmc_llama.backends.base import Backend
from pmc_llama.base_weights import Base, identify, require_same
from pmc_llama.checkpoint import Manifest, read_manifest
from pmc_llama.compatibility import check_adapters
from pmc_llama.config import BackendName, LoraConfig, ModelConfig, Recipe, ShardingConfig, plain
from pmc_llama.evaluate.adapter import with_adapter
from pmc_llama.flops import model_flops_per_token
from pmc_llama.huggingface import DTYPES, export
from pmc_llama.lora import adapter_parameters, add_adapters, base_name
from pmc_llama.recipe_file import RecipeParser
from tests.pmc_llama.runs import command_line, finish, kill, numbers, start
from tests.pmc_llama.small import (
    CPU,
    VOCABULARY,
    bare_manifest,
    gathered_config,
    local_state,
    micro_batches,
    odd_config,
    small_recipe,
    train_steps,
)
from tests.ranks import run_on_ranks

BACKENDS: tuple[BackendName, BackendName] = ("deepspeed", "fsdp")
LORA = LoraConfig(rank=3, alpha=12, dropout=0.2, targets=["q_proj", "v_proj", "down_proj"])
STEPS = 3


def _write_base(directory: Path, config: LlamaConfig, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _recipe(name: BackendName, base: Path, accumulation: int = 1) -> Recipe:
    recipe = small_recipe(name, accumulation)
    recipe.model = ModelConfig(size=str(base / "config.json"), initialize_from=base)
    recipe.lora = LORA
    return recipe


def _backend(recipe: Recipe) -> Backend:
    """With the base's weights, and adapters drawn from the recipe's seed."""
    config = starting.model_config(recipe, VOCABULARY, None)
    backend = build_backend(recipe, config, CPU)
    starting.load_first_weights(recipe, config, backend, dist.group.WORLD)
    return backend


def _save(backend: Backend, recipe: Recipe, root: Path, tokenizer: Path) -> None:
    assert recipe.model.initialize_from
    base = identify(recipe.model.initialize_from, dist.group.WORLD)
    config = starting.model_config(recipe, VOCABULARY, None)

    def describe(files: Any) -> Manifest:
        return bare_manifest(
            STEPS, files, recipe=plain(recipe), model_config=config.to_dict(), base=base, format=2
        )

    checkpoint.save(backend.state(), root, describe, tokenizer, dist.group.WORLD)


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as every rank's."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (tensor.start, tensor.local.clone()))
    return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])]).view(tensor.shape)


def _differing(backend: Backend, base: Path) -> list[str]:
    """Frozen weights that are not bit for bit the base's, rounded to bf16."""
    stored = load_file(base / "model.safetensors")
    return [
        name
        for name, tensor in backend.frozen().items()
        if not torch.equal(_whole(tensor), stored[base_name(name)].bfloat16())
    ]


def _optimizer(backend: Any) -> dict[str, int]:
    """Bytes on all ranks of what exists for training alone: masters, moments, gradients."""
    if hasattr(backend, "zero"):
        masters = backend.zero.fp32_partitioned_groups_flat
        moments = backend.zero.optimizer.state
        gradients = [g for group in backend.zero.averaged_gradients.values() for g in group]
    else:
        masters = [parameter.to_local() for parameter in backend.parameters.values()]
        moments = backend.optimizer.state
        gradients = [parameter.grad for parameter in backend.model.parameters()]
        gradients = [gradient.to_local() for gradient in gradients if gradient is not None]
    own = {
        "masters": sum(master.nbytes for master in masters),
        "moments": sum(
            (entry[key].to_local() if isinstance(entry[key], DTensor) else entry[key]).nbytes
            for entry in moments.values()
            for key in ("exp_avg", "exp_avg_sq")
        ),
        "gradients": sum(gradient.nbytes for gradient in gradients),
    }
    everyone: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {key: sum(rank[key] for rank in everyone) for key in own}


def _losses_of_one_batch(backend: Backend) -> dict[str, list[float]]:
    """The summed loss of one micro-batch without training on it, twice each way."""
    batches, targets = micro_batches(9, 1)
    found: dict[str, list[float]] = {"evaluated": [], "once": [], "as two micro-batches": []}
    for _ in range(2):
        found["evaluated"].append(backend.evaluate(batches[0]).item())
        for times, key in ((1, "once"), (2, "as two micro-batches")):
            found[key].append(backend.forward_backward(batches * times, targets).item())
            backend.discard()
    return found


def _train(directory: Path, base: Path, tokenizer: Path) -> None:
    """Under each backend: three steps, held-out losses, a checkpoint; what was found on the way."""
    for name in BACKENDS:
        recipe = _recipe(name, base)
        backend = _backend(recipe)
        first = {key: _whole(tensor) for key, tensor in backend.state().items() if key.startswith("model.")}
        history = train_steps(backend, 0, STEPS, 1)
        losses = _losses_of_one_batch(backend)
        state = {key: _whole(tensor) for key, tensor in backend.state().items() if tensor.dim()}
        differing = _differing(backend, base)
        backend.forward_backward(*micro_batches(STEPS, 1))
        held = _optimizer(backend)
        backend.discard()
        _save(backend, recipe, directory / name, tokenizer)
        if dist.get_rank() == 0:
            torch.save({"first": first, "state": state}, directory / name / "whole.pt")
            facts = {"history": history, "differing": differing, "held": held, "losses": losses}
            (directory / name / "facts.json").write_text(json.dumps(facts))
        backend.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_base(tmp_path_factory.mktemp("base"), gathered_config())


@pytest.fixture(scope="module")
def trained(base: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    run_on_ranks(2, _train, directory, base, tiny_tokenizer)
    return directory


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _facts(trained: Path, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((trained / name / "facts.json").read_text())
    return facts


def _tensors(trained: Path, name: str) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = torch.load(trained / name / "whole.pt", weights_only=True)
    return tensors


def _checkpoint(trained: Path, name: str = "fsdp") -> Path:
    return trained / name / f"step-{STEPS:08d}"


def _assert_same_history(found: list[list[float]], expected: list[list[float]]) -> None:
    """Losses have the same bits, norms but for the order in which fp64 squares are summed."""
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-12)


# --- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_the_base_is_bit_for_bit_the_same_after_training(trained: Path, name: str) -> None:
    facts = _facts(trained, name)
    assert facts["differing"] == []
    assert facts["history"][0] != facts["history"][-1], "the adapters must move"


@pytest.mark.parametrize("name", BACKENDS)
def test_masters_moments_and_gradients_exist_for_adapters_alone(trained: Path, name: str) -> None:
    adapters = adapter_parameters(gathered_config(), LORA)
    names = {key for key in _tensors(trained, name)["state"] if key.startswith("model.")}
    assert all(".lora_" in key for key in names)
    assert len(names) == 2 * len(LORA.targets) * gathered_config().num_hidden_layers
    held = _facts(trained, name)["held"]
    # Two ranks may each pad a tensor by one element, and DeepSpeed the whole by a few.
    room = 4 * (len(names) + 8)
    assert 4 * adapters <= held["masters"] <= 4 * adapters + room
    assert 8 * adapters <= held["moments"] <= 8 * adapters + 2 * room
    assert 4 * adapters <= held["gradients"] <= 4 * adapters + room


def test_both_backends_train_the_same_adapters(trained: Path) -> None:
    zero3, fsdp2 = (_facts(trained, name) for name in BACKENDS)
    _assert_same_history(zero3["history"], fsdp2["history"])
    assert zero3["losses"] == fsdp2["losses"]
    of_zero3, of_fsdp2 = (_tensors(trained, name) for name in BACKENDS)
    for key, tensor in of_fsdp2["first"].items():
        assert torch.equal(tensor, of_zero3["first"][key]), key
    for key, tensor in of_fsdp2["state"].items():
        torch.testing.assert_close(of_zero3["state"][key], tensor, rtol=1e-6, atol=1e-8, msg=key)


def test_adapters_begin_by_pefts_rule_and_add_nothing(trained: Path, base: Path) -> None:
    first = _tensors(trained, "fsdp")["first"]
    for key, tensor in first.items():
        if ".lora_B." in key:
            assert not tensor.any()
        else:  # uniform within 1 / sqrt(in)
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.95 * bound < tensor.abs().max() <= bound
            assert tensor.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    drawn = [tensor for key, tensor in first.items() if ".lora_A." in key]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2) if a.shape == b.shape)


def test_dropout_is_at_work_in_training_and_not_in_evaluation(trained: Path) -> None:
    losses = _facts(trained, "fsdp")["losses"]
    for first, second in losses.values():
        assert first == second, "the draws are a function of the updates made"
    (evaluated, _), (once, _), (twice, _) = losses.values()
    assert len({evaluated, once, twice - once}) == 3, "each micro-batch has draws of its own"


# --- checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_adapters_and_says_what_they_belong_to(trained: Path, base: Path) -> None:
    path = _checkpoint(trained)
    manifest = read_manifest(path)
    assert manifest.base == identify(base, None)
    assert manifest.base is not None
    assert manifest.base.path == str(base.resolve())
    payload = 12 * adapter_parameters(gathered_config(), LORA)
    written = sum(file.stat().st_size for file in path.glob("*.distcp"))
    assert payload <= written < 2 * payload  # and the headers of 54 small tensors on two ranks
    assert json.loads((path / "manifest.json").read_text())["format"] == 2


@pytest.mark.usefixtures("world_of_one")
def test_a_checkpoint_of_all_weights_stays_readable_to_versions_before_adapters(tmp_path: Path) -> None:
    state = {"optim.step": torch.tensor(1)}
    path = checkpoint.save(
        state, tmp_path, lambda files: bare_manifest(1, files), Path(__file__), dist.group.WORLD
    )
    values = json.loads((path / "manifest.json").read_text())
    assert values["format"] == 1
    assert "base" not in values


def test_the_fingerprint_is_that_of_one_reader_and_changes_with_any_byte(tmp_path: Path, base: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    assert identify(copy, None).fingerprint == identify(base, None).fingerprint
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = identify(copy, None)
    with pytest.raises(
        UserError, match=r"The adapters of here were trained on other weights than those in .*copy"
    ):
        require_same(other, identify(base, None), Path("here"))


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        (LORA, None, r"step-1 holds all weights and no adapters, but the recipe has lora"),
        (None, LORA, r"step-1 holds adapters alone \(lora\.rank 3\), but the recipe has no lora"),
        (replace(LORA, rank=4), LORA, r"lora\.rank is 4, but the adapters in step-1 have 3; set it to that"),
        (replace(LORA, alpha=1), LORA, r"lora\.alpha is 1, but the adapters in step-1 have 12"),
        (
            replace(LORA, targets=["q_proj"]),
            LORA,
            r"lora\.targets is q_proj, but the adapters in step-1 have down_proj, q_proj, v_proj",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    ours: LoraConfig | None, theirs: LoraConfig | None, sentence: str
) -> None:
    manifest = bare_manifest(1, {}, recipe=plain(Recipe(lora=theirs)), base=theirs and Base("base", "0"))
    with pytest.raises(UserError, match=sentence):
        check_adapters(Recipe(lora=ours), manifest, Path("step-1"))
    check_adapters(Recipe(lora=theirs and replace(theirs, dropout=0.5)), manifest, Path("step-1"))


# --- the ways out ------------------------------------------------------------------------------------------


def _logits(model: LlamaForCausalLM) -> Tensor:
    tokens = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens).logits
    return logits


def test_merged_and_unmerged_have_equal_logits(trained: Path, base: Path, tmp_path: Path) -> None:
    source = str(_checkpoint(trained))
    cli.export([source, str(tmp_path / "merged"), "--dtype", "fp32"])
    cli.export([source, str(tmp_path / "adapter"), "--adapter"])
    merged = _logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    plain_base = LlamaForCausalLM.from_pretrained(base)
    before = _logits(plain_base)
    unmerged = _logits(PeftModel.from_pretrained(plain_base, str(tmp_path / "adapter")))
    ours = _logits(with_adapter(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter"))
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, unmerged)
    assert (merged - before).abs().max() > 1e-3, "the adapters must do something"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_merged_weights_are_summed_in_fp32_and_rounded_once_in_any_cut_into_files(
    trained: Path, base: Path, tmp_path: Path, dtype: Any
) -> None:
    export(_checkpoint(trained), tmp_path / "out", dtype, max_shard_bytes=300_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    expected = load_file(base / "model.safetensors")
    adapters = _tensors(trained, "fsdp")["state"]
    for key in [name for name in expected if name.split(".")[-2] in LORA.targets]:
        a, b = (adapters[f"model.{key[: -len('.weight')]}.lora_{half}.default.weight"] for half in "AB")
        expected[key] = torch.addmm(expected[key], b, a, alpha=LORA.alpha / LORA.rank)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.to(DTYPES[dtype])), key


def test_another_base_is_not_merged_and_full_weights_have_no_adapters_to_write(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    source = tmp_path / "step-00000003"
    shutil.copytree(_checkpoint(trained), source)
    values = json.loads((source / "manifest.json").read_text())
    other = _write_base(tmp_path / "other", gathered_config(), seed=1)
    for path, sentence in (
        (
            tmp_path / "gone",
            r"holds adapters of the weights in .*gone, where there are none now; put them back",
        ),
        (other, r"were trained on other weights than those in .*other now"),
    ):
        values["base"]["path"] = str(path)
        (source / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=sentence):
            cli.export([str(source), str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    values = {**values, "format": 1}
    del values["base"]
    (source / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"holds all weights and no adapters, .* without --adapter"):
        cli.export([str(source), str(tmp_path / "out"), "--adapter"])


def test_checkpoint_inspect_tells_adapters_and_their_base(
    trained: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.checkpoint(["inspect", str(_checkpoint(trained))])
    told = capsys.readouterr().out
    assert "rank 3, alpha 12, of q_proj, v_proj, down_proj" in told
    assert str(base) in told


# --- the recipe --------------------------------------------------------------------------------------------


def _read(tmp_path: Path, text: str, *options: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {initialize_from: somewhere}\n" + text)
    return RecipeParser("pmc-llama train", path, "").read([str(path), *options])[0]


def test_a_recipe_switches_lora_on_changes_a_key_and_switches_it_off(tmp_path: Path) -> None:
    assert _read(tmp_path, "").lora is None
    assert _read(tmp_path, "lora: {}\n").lora == LoraConfig(8, 32, 0.1, ["q_proj", "v_proj"])
    assert _read(tmp_path, "lora: {rank: 2, alpha: 3}\n", "--lora.rank", "4").lora == LoraConfig(4, 3)
    assert _read(tmp_path, "", "--lora.targets", "[o_proj]", "--lora.rank=4").lora == LoraConfig(
        4, targets=["o_proj"]
    )
    assert _read(tmp_path, "lora: {rank: 2}\n", "--lora", "null").lora is None


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("lora: {rank: x}", [], r'recipe\.yaml: lora\.rank is "x", expected a whole number'),
        ("lora: {rank: 0}", [], r"lora\.rank is 0, expected 1 or more"),
        ("lora: {rnk: 2}", [], r"unknown key lora\.rnk; the nearest valid one is lora\.rank"),
        ("lora: 3", [], r"lora is 3, expected a section with rank, alpha, dropout, targets"),
        ("", ["--lora", "8"], r"option --lora is '8', expected null; its keys are lora\.rank, "),
        (
            "",
            ["--lora.targets", "[q]"],
            r"option --lora\.targets is '\[q\]', expected a list of q_proj, k_proj",
        ),
        ("lora: {targets: []}", [], r"lora\.targets is \[\], expected one or more different ones of q_proj"),
        ("lora: {dropout: 1}", [], r"lora\.dropout is 1\.0, expected 0 or more and below 1"),
        (
            "lora: {}",
            ["--model.initialize_from", "null"],
            r"model\.initialize_from is null, expected .*adapters",
        ),
    ],
)
def test_what_lora_cannot_be_is_told_by_key(
    tmp_path: Path, text: str, options: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        _read(tmp_path, text + "\n", *options)


def test_plan_says_that_it_does_not_know_lora(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {initialize_from: somewhere}\nlora: {}\n")
    with pytest.raises(UserError, match="plan knows only runs that train all weights; with --lora null"):
        cli.plan([str(path)])


def test_flops_of_frozen_weights_are_those_without_their_gradients() -> None:
    config, full = gathered_config(), Recipe()
    attention = 12 * 2 * 3 * 104 * 64
    of_all = model_flops_per_token(config, 64, full.lora) - attention
    adapters = sum(
        tensor.shape.numel() for name, tensor in _adapted(config).named_parameters() if ".lora_" in name
    )
    assert adapters == adapter_parameters(config, LORA)
    assert model_flops_per_token(config, 64, LORA) == of_all // 6 * 4 + 6 * adapters + attention


def _adapted(config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        add_adapters(model, LORA)
    return model


# --- the same numbers in any way of sharding ---------------------------------------------------------------

VARIANTS = {
    "plain": ShardingConfig(),
    "full": ShardingConfig("full"),
    "selective": ShardingConfig("selective"),
    "offload": ShardingConfig(offload="all"),
}


def _train_in_each_variant(directory: Path, base: Path) -> None:
    """Every rank compares its own state with the plain one's."""
    for name in BACKENDS:
        histories, plain_state = {}, dict[str, Tensor]()
        for variant, sharding in VARIANTS.items():
            recipe = _recipe(name, base, accumulation=2)
            recipe.sharding = sharding
            backend = _backend(recipe)
            history = train_steps(backend, 0, 2, 2)
            if variant != "plain":  # nothing of it may stay
                backend.forward_backward(micro_batches(1000, 2)[0], 1e-42)  # type: ignore[arg-type]
                assert not math.isfinite(backend.clip(0.5))
                backend.discard()
                _losses_of_one_batch(backend)
            histories[variant] = history + train_steps(backend, 2, 4, 2)
            state = {key: tensor.clone() for key, tensor in local_state(backend).items()}
            plain_state = plain_state or state
            for key, tensor in state.items():
                assert torch.equal(tensor, plain_state[key]), (key, variant, name)
            assert _differing(backend, base) == []
            backend.close()
        if dist.get_rank() == 0:
            (directory / f"{name}.json").write_text(json.dumps(histories))


@pytest.mark.slow
def test_recomputation_offload_and_steps_taken_back_change_no_bit_with_dropout(
    tmp_path: Path, base: Path
) -> None:
    run_on_ranks(2, _train_in_each_variant, tmp_path, base)
    zero3, fsdp2 = (json.loads((tmp_path / f"{name}.json").read_text()) for name in BACKENDS)
    for found in (zero3, fsdp2):
        assert found["plain"][0] != found["plain"][-1], "the adapters must move"
        assert all(history == found["plain"] for history in found.values())
    _assert_same_history(zero3["plain"], fsdp2["plain"])


def _load_and_compare(trained: Path, base: Path, shard_group: int | None) -> None:
    """Under each backend: what the other wrote has all bits, frozen weights are there, training goes on."""
    for name, writer in zip(BACKENDS, BACKENDS[::-1], strict=True):
        recipe = _recipe(name, base)
        recipe.sharding.shard_group = shard_group
        backend = _backend(replace(recipe, seed=7))
        train_steps(backend, 0, 1, 1)  # so that loading has something to undo
        source = _checkpoint(trained, writer)
        manifest = replace(read_manifest(source), updates=STEPS)
        starting.load_checkpoint(recipe, source, manifest, backend, dist.group.WORLD)
        written = _tensors(trained, writer)["state"]
        for key, tensor in written.items():
            assert torch.equal(_whole(backend.state()[key]), tensor), (key, name)
        assert _differing(backend, base) == []
        before = backend.evaluate(micro_batches(9, 1)[0][0])
        train_steps(backend, STEPS, STEPS + 2, 1)
        assert backend.evaluate(micro_batches(9, 1)[0][0]) != before
        assert backend.state()["optim.step"] == STEPS + 2
        backend.close()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shard_group"), [(1, None), (4, 2)])
def test_adapters_of_either_backend_load_in_the_other_on_other_ranks_and_in_hybrid_sharding(
    trained: Path, base: Path, ranks: int, shard_group: int | None
) -> None:
    run_on_ranks(ranks, _load_and_compare, trained, base, shard_group)


# --- whole runs --------------------------------------------------------------------------------------------

RUN_STEPS = 16


@pytest.fixture(scope="module")
def options(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    config, corpus = odd_config(), Corpus.open(tiny_corpus)
    config.vocab_size = corpus.vocab_size
    base = _write_base(tmp_path_factory.mktemp("run-base"), config)
    shutil.copy(corpus.tokenizer_path, base)
    return {
        "--model.size": str(base / "config.json"),
        "--model.initialize_from": str(base),
        "--lora.rank": "4",
        "--lora.dropout": "0.3",
        "--data.corpus": str(tiny_corpus),
        "--data.mode": "packed",
        "--data.isolate_documents": "true",
        "--data.sequence_length": "32",
        "--batch.global_size": "8",
        "--batch.micro_size": "2",
        "--schedule.steps": str(RUN_STEPS),
        "--optimizer.learning_rate": "0.01",
        "--checkpoint.every_steps": "4",
        "--evaluation.every_steps": "8",
        "--evaluation.max_sequences": "9",
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text("seed: 3\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(options: dict[str, str], recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "fsdp"
    output = finish(command_line(recipe, options, "--backend", "fsdp", "--output", str(run)))
    assert "parameters trained, of " in output
    return run


def _kill_after(published: Path, arguments: list[str]) -> None:
    """Start a run and SIGKILL every process of it as soon as a checkpoint is published."""
    process = start(arguments)
    deadline = time.monotonic() + 240
    while not published.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    kill(process)
    output, _ = process.communicate()
    assert published.exists(), output


@pytest.mark.slow
def test_a_run_killed_and_resumed_with_dropout_and_recomputation_has_the_numbers_of_one_that_never_was(
    uninterrupted: Path, options: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = command_line(recipe, options, "--output", str(run), "--resume")
    _kill_after(run / "checkpoints" / "step-00000004", [*arguments, "--backend", "fsdp"])
    assert len(numbers(run)) < RUN_STEPS, "the kill came too late to mean anything"
    again = ["--backend", "deepspeed", "--sharding.activation_checkpointing", "full"]
    assert "starting after step" in finish([*arguments, *again])
    found = numbers(run)
    assert found == numbers(uninterrupted)
    assert found[-1]["heldout_loss"] < found[0]["heldout_loss"]


@pytest.mark.slow
def test_a_run_is_not_resumed_on_another_base_and_is_judged_with_its_own(
    uninterrupted: Path,
    options: dict[str, str],
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(options["--model.initialize_from"])
    other = _write_base(tmp_path / "other", LlamaConfig.from_pretrained(base), seed=9)
    arguments = {**options, "--model.initialize_from": str(other), "--schedule.steps": str(RUN_STEPS + 1)}
    process = start(command_line(recipe, arguments, "--output", str(uninterrupted), "--resume"))
    output, _ = process.communicate(timeout=240)
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, output
    assert "were trained on other weights than those in" in told[0]

    newest = uninterrupted / "checkpoints" / f"step-{RUN_STEPS:08d}"
    cli.export([str(uninterrupted), str(tmp_path / "merged"), "--dtype", "fp32"])
    cli.export([str(uninterrupted), str(tmp_path / "adapter"), "--adapter"])
    heldout = ["--heldout", options["--data.corpus"], "--dtype", "fp32", "--output"]
    judged = []
    for number, model in enumerate(
        ([str(newest)], [str(tmp_path / "merged")], [str(base), "--adapter", str(tmp_path / "adapter")])
    ):
        result = tmp_path / f"{number}.json"
        assert cli.evaluate([*model, *heldout, str(result)]) == 0
        judged.append(json.loads(result.read_text())["perplexity"]["per_token"]["value"])
    assert judged[0] == judged[1]
    assert judged[2] == pytest.approx(judged[0], rel=1e-6)
