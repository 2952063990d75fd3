"""Hugging Face weights enter every kind of shard exactly; checkpoints leave as models transformers opens."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_tools.errors import UserError
from pmc_llama.backends.flat_shard import FlatShard
from pmc_llama.checkpoint import Manifest, save
from pmc_llama.config import Recipe
from pmc_llama.huggingface import check_directory, export, parameter_shapes, weights_reader
from tests.pmc_llama.small import bare_manifest
from tests.pmc_llama.test_huggingface_tokenizer import train
from tests.ranks import run_on_ranks

# Widths that two ranks do not divide, and norms of one row for two ranks: the shapes that go wrong first.
ODD = {
    "hidden_size": 40,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def tiny(vocab_size: int = 131, tied: bool = False, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **ODD, **options))


def written(
    directory: Path, dtype: torch.dtype = torch.float16, shard: str = "50KB", **options: object
) -> Path:
    """A sharded Hugging Face directory as transformers writes it."""
    tiny(**options).to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


# --- in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_enter_fp32_tensors_exactly(tmp_path, dtype, tied):
    path = written(tmp_path, dtype, tied=tied)
    assert (tmp_path / "model.safetensors.index.json").exists()
    shapes = parameter_shapes(check_directory(path))
    assert ("lm_head.weight" in shapes) is not tied
    state = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    dcp.load(state, storage_reader=weights_reader(path), no_dist=True)
    source = stored(path)
    for name, tensor in state.items():
        assert torch.equal(tensor, source[name].float()), name


def test_a_tied_model_reads_from_a_file_that_stores_both_ends(tmp_path):
    path = written(tmp_path, tied=True, shard="1GB")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    assert "lm_head.weight" not in parameter_shapes(check_directory(path))


def test_rotary_frequencies_that_older_versions_stored_are_passed_over(tmp_path):
    path = written(tmp_path)
    add_tensor(path, "model.layers.0.self_attn.rotary_emb.inv_freq")
    check_directory(path)


def load_into_shards(path: Path) -> None:
    """Fill row shards as FSDP2 holds them and flat ranges as ZeRO-3 does; compare with the whole."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    source = stored(path)
    shapes = parameter_shapes(check_directory(path))
    rows = {name: distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]) for name, shape in shapes.items()}
    flat = {}
    for name, shape in shapes.items():
        length = -(-shape.numel() // ranks)
        start, stop = rank * length, min((rank + 1) * length, shape.numel())
        flat[name] = FlatShard(torch.zeros(stop - start), start, shape)
    dcp.load(rows, storage_reader=weights_reader(path))
    dcp.load(flat, storage_reader=weights_reader(path))
    for name in shapes:
        whole = source[name].float()
        shard, part = rows[name], flat[name]
        assert isinstance(shard, DTensor)
        assert torch.equal(shard.to_local(), distribute_tensor(whole, mesh, [Shard(0)]).to_local()), name
        end = part.start + part.local.numel()
        assert torch.equal(part.local, whole.flatten()[part.start : end]), name


def test_weights_enter_the_shards_of_both_backends_exactly(tmp_path):
    run_on_ranks(3, load_into_shards, written(tmp_path))  # the middle rank has three rectangles a matrix


def edit_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def first_shard(path: Path) -> Path:
    return min(path.glob("*.safetensors"))


def keep_only_bin(path: Path) -> None:
    for file in (*path.glob("*.safetensors"), path / "model.safetensors.index.json"):
        file.unlink()
    (path / "pytorch_model.bin").touch()


def duplicate_tensors(path: Path) -> None:
    shutil.copyfile(first_shard(path), path / "model.safetensors")


def truncate_shard(path: Path) -> None:
    first_shard(path).write_bytes(first_shard(path).read_bytes()[:-100])


def integers_in_shard(path: Path) -> None:
    save_file({k: v.to(torch.int8) for k, v in load_file(first_shard(path)).items()}, first_shard(path))


def add_tensor(path: Path, name: str) -> None:
    save_file({**load_file(first_shard(path)), name: torch.ones(40)}, first_shard(path))


BROKEN = {
    "is not a directory": lambda path: shutil.rmtree(path),
    "has no config.json": lambda path: (path / "config.json").unlink(),
    "cannot be read as JSON": lambda path: (path / "config.json").write_text("{"),
    "model_type mistral, expected llama": lambda path: edit_config(path, model_type="mistral"),
    "quantized": lambda path: edit_config(path, quantization_config={"bits": 4}),
    "convert them to safetensors": keep_only_bin,
    "has no weights": lambda path: [file.unlink() for file in path.glob("model*")],
    "shard model-00001-of-.*, which .* names, is missing": lambda path: first_shard(path).unlink(),
    "is not a safetensors index": lambda path: (path / "model.safetensors.index.json").write_text("[]"),
    "damaged or not a safetensors file": truncate_shard,
    "is both in": duplicate_tensors,
    r"has shape \[131, 40\], expected \[132, 40\]": lambda path: edit_config(path, vocab_size=132),
    "layers.2.* is missing": lambda path: edit_config(path, num_hidden_layers=3),
    "is of type I8": integers_in_shard,
    "q_proj.bias is not of the model": lambda path: add_tensor(path, "model.layers.0.self_attn.q_proj.bias"),
    "does not describe .*66": lambda path: edit_config(path, hidden_size=66),
    "does not describe .*hidden_size": lambda path: edit_config(path, hidden_size="40"),
    "does not describe .*zero": lambda path: edit_config(path, num_attention_heads=0),
    "does not describe .*nope": lambda path: edit_config(path, hidden_act="nope"),
    "does not describe .*spiral": lambda path: edit_config(path, rope_parameters={"rope_type": "spiral"}),
    "num_hidden_layers -1; expected 1 or more": lambda path: edit_config(path, num_hidden_layers=-1),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_directory_that_cannot_serve_is_refused_in_one_sentence(tmp_path, sentence):
    path = written(tmp_path / "model")
    BROKEN[sentence](path)
    with pytest.raises(UserError, match=sentence) as raised:
        check_directory(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


# --- out ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """A process group of one, which saving a checkpoint needs."""
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def trained(request, tmp_path, gloo, tokenizer_model):
    """(model, its published checkpoint with moments beside the weights)."""
    model = tiny(vocab_size=420, tied=request.param, use_cache=False)
    state: dict[str, torch.Tensor] = {"optim.step": torch.tensor(7)}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.data
        state[f"optim.exp_avg.{name}"] = torch.randn_like(parameter)
        state[f"optim.exp_avg_sq.{name}"] = torch.rand_like(parameter)
    recipe = json.loads(json.dumps(asdict(Recipe()), default=str))

    def describe(files):
        return bare_manifest(
            7,
            files,
            samples=7 * 128,
            tokens=7 * 128 * 512,
            recipe=recipe,
            model_config=json.loads(model.config.to_json_string(use_diff=False)),
            corpus="c0ffee",
            versions={"torch": "2"},
        )

    return model, save(state, tmp_path / "checkpoints", describe, tokenizer_model, gloo)


def test_an_export_is_the_reference_cast_to_bf16(trained, tmp_path):
    model, checkpoint = trained
    export(checkpoint, tmp_path / "model")
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    reference = model.to(torch.bfloat16)
    assert exported.config.dtype == torch.bfloat16
    assert exported.config.use_cache
    for (name, a), (other, b) in zip(exported.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("the  cells", return_tensors="pt")
    assert torch.equal(exported(**ids).logits, reference(**ids).logits)
    assert exported.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_an_fp32_export_read_again_is_the_checkpoint(trained, tmp_path):
    model, checkpoint = trained
    export(checkpoint, tmp_path / "model", dtype="fp32")
    shapes = parameter_shapes(check_directory(tmp_path / "model"))
    state = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    dcp.load(state, storage_reader=weights_reader(tmp_path / "model"), no_dist=True)
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


def test_shards_keep_to_the_limit_and_hold_every_tensor_once(trained, tmp_path):
    model, checkpoint = trained
    limit = 60_000
    export(checkpoint, tmp_path / "model", max_shard_bytes=limit)
    names: list[str] = []
    for file in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            names += tensors.keys()
        assert sum(t.nbytes for t in load_file(file).values()) <= limit
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert sorted(names) == sorted(index["weight_map"]) == sorted(n for n, _ in model.named_parameters())
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in model.parameters())


def test_the_model_card_says_what_the_model_has_seen(trained, tmp_path):
    _, checkpoint = trained
    export(checkpoint, tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    for fact in ("458,752", "c0ffee", "global_size: 128", "Intended use", "Licence"):
        assert fact in card


def test_an_export_never_writes_into_a_directory_in_use(trained, tmp_path):
    _, checkpoint = trained
    (tmp_path / "model").mkdir()
    (tmp_path / "model/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        export(checkpoint, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]


def test_an_export_fills_the_empty_directory_that_the_user_is_in(trained, tmp_path, monkeypatch):
    _, checkpoint = trained
    directory = tmp_path / "model"
    directory.mkdir()
    before = directory.stat().st_ino
    monkeypatch.chdir(directory)
    export(checkpoint, Path())
    assert directory.stat().st_ino == before
    assert "# model\n" in (directory / "README.md").read_text()
    assert not list(directory.glob(".*"))
    LlamaForCausalLM.from_pretrained(directory)


def test_a_place_that_cannot_be_written_is_told_before_the_checkpoint_is_read(trained, tmp_path):
    _, checkpoint = trained
    next(checkpoint.glob("*.distcp")).unlink()
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match="Not a directory") as raised:
        export(checkpoint, tmp_path / "README.md/x")
    assert "make room" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 80}, {"num_hidden_layers": 0}, {"num_attention_heads": "4"}]
)
def test_a_manifest_that_describes_another_model_leaves_no_half_export(trained, tmp_path, wrong):
    _, checkpoint = trained
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["model_config"] |= wrong
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=str(checkpoint)) as raised:
        export(checkpoint, tmp_path / "model")
    assert "\n" not in str(raised.value)
    assert set(tmp_path.iterdir()) == before


def test_a_damaged_checkpoint_leaves_no_half_export(trained, tmp_path):
    _, checkpoint = trained
    tensors = next(checkpoint.glob("*.distcp"))
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match="damaged"):
        export(checkpoint, tmp_path / "model")
    assert set(tmp_path.iterdir()) == before


def test_weights_beyond_fp16_are_refused_as_fp16(tmp_path, gloo, tokenizer_model, trained):
    model, checkpoint = trained
    model.get_parameter("model.norm.weight").data[3] = 1e6
    state = {f"model.{name}": p.data for name, p in model.named_parameters()}

    def describe(files):
        found = json.loads((checkpoint / "manifest.json").read_text())
        return Manifest(**{**found, "step": 8, "files": files})

    large = save(state, tmp_path / "checkpoints", describe, tokenizer_model, gloo)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"model\.norm\.weight has values beyond the range of fp16"):
        export(large, tmp_path / "model", dtype="fp16")
    assert set(tmp_path.iterdir()) == before
