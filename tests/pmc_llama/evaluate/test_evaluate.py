"""`pmc-llama evaluate`: one number for the same weights, wherever they lie and whoever tokenizes."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.finalize import decide_again
from data_tools.recipe import Decisions
from data_tools.tokenizer import Tokenizer
from pmc_llama.checkpoint import save
from pmc_llama.evaluate.command import evaluate
from pmc_llama.evaluate.heldout import read_heldout
from pmc_llama.evaluate.weights import find_model
from pmc_llama.huggingface_tokenizer import write_tokenizer
from tests.pmc_llama.small import bare_manifest

POSITIONS = 4096  # the longest paper has 2,160 tokens
FEW = ("--max-documents", "2")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a start leaves behind ends with the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with the corpus' tokenizer, written by transformers."""
    directory = tmp_path_factory.mktemp("models") / "model"
    torch.manual_seed(0)
    tiny().save_pretrained(directory)
    write_tokenizer(Corpus.open(tiny_corpus).tokenizer_path, directory, POSITIONS)
    return directory


def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, max_position_embeddings=POSITIONS, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config)


def result(model: Path, corpus: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    path = tmp_path / "result.json"
    assert evaluate([str(model), "--heldout", str(corpus), "--output", str(path), *options]) == 0
    return json.loads(path.read_text())


def test_the_numbers_are_those_of_transformers_for_the_same_weights_and_texts(
    model: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(model, tiny_corpus, tmp_path, "--window", str(POSITIONS), *FEW)
    corpus = Corpus.open(tiny_corpus)
    tokenizer, split = Tokenizer(corpus.tokenizer_path), corpus.split("heldout")
    by_transformers = LlamaForCausalLM.from_pretrained(model)
    nats, tokens, size = [], 0, 0
    for document in (0, split.documents - 1):
        begin, end = split.starts[document : document + 2].tolist()
        text = tokenizer.decode(split.read([(begin, end)])[0])
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text).tolist()]])
        with torch.no_grad():
            nats.append(float(by_transformers(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
        tokens, size = tokens + ids.shape[1] - 1, size + len(text.encode())
    perplexity = found["perplexity"]
    assert (perplexity["tokens"], perplexity["bytes"]) == (tokens, size)
    assert (perplexity["texts"], found["held_out"]) == (2, split.documents)
    assert found["papers"]["nats"] == pytest.approx(nats, rel=1e-5)
    assert perplexity["per_token"]["value"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-5)
    assert perplexity["per_byte"]["value"] == pytest.approx(math.exp(sum(nats) / size), rel=1e-5)
    assert perplexity["bits_per_byte"]["value"] == pytest.approx(sum(nats) / size / math.log(2), rel=1e-5)
    for one in ("per_token", "per_byte"):
        assert perplexity[one]["low"] <= perplexity[one]["value"] <= perplexity[one]["high"]
    said = capsys.readouterr().out
    assert f"{perplexity['per_token']['value']:,.2f}" in said
    assert f"2 of {split.documents} papers held out" in said


def test_a_model_with_another_tokenizer_reads_the_same_bytes(
    model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    wanted = result(model, tiny_corpus, tmp_path, *FEW)
    # The same tokenizer in another file is another one, and gives the same ids.
    other = shutil.copytree(model, tmp_path / "other")
    (other / "tokenizer.model").unlink()
    found = result(other, tiny_corpus, tmp_path, *FEW)
    assert (wanted["tokenizer"], found["tokenizer"]) == ("corpus", "own")
    assert found["perplexity"] == wanted["perplexity"]
    assert found["papers"] == wanted["papers"]


def _publish(run: Path, model: Path) -> Path:
    """The weights of a Hugging Face directory as the checkpoint of a run, in a world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights = LlamaForCausalLM.from_pretrained(model)
    state = {f"model.{name}": tensor.data for name, tensor in weights.named_parameters()}
    config = json.loads((model / "config.json").read_text())
    tokenizer = model / "tokenizer.model"
    path = save(
        state,
        run / "checkpoints",
        lambda files: bare_manifest(7, files, model_config=config),
        tokenizer,
        dist.group.WORLD,
    )
    dist.destroy_process_group()
    return path


def test_a_checkpoint_and_its_run_are_judged_as_what_they_export(
    model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    checkpoint = _publish(tmp_path / "run", model)
    wanted = result(model, tiny_corpus, tmp_path, *FEW)
    for path in (checkpoint, tmp_path / "run"):
        found = result(path, tiny_corpus, tmp_path, *FEW)
        assert (found["papers"], found["weights"]) == (wanted["papers"], str(checkpoint))


def test_options_are_kept_and_said(model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    options = (
        "--max-documents",
        "3",
        "--window",
        "64",
        "--stride",
        "16",
        "--prefix",
        "eod",
        "--dtype",
        "bf16",
    )
    found = result(model, tiny_corpus, tmp_path, *options)
    assert (found["window"], found["stride"], found["dtype"]) == (64, 16, "bf16")
    corpus = Corpus.open(tiny_corpus)
    assert found["prefix"] == corpus.eod
    documents = corpus.split("heldout").documents
    assert documents > 3
    assert found["papers"]["number"] == [0, round((documents - 1) / 2), documents - 1]
    exact = result(model, tiny_corpus, tmp_path, *options[:-1], "fp32")["perplexity"]["per_token"]["value"]
    rounded = found["perplexity"]["per_token"]["value"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_the_end_of_a_paper_is_no_target_and_the_text_is_whole(model: Path, tiny_corpus: Path) -> None:
    corpus = Corpus.open(tiny_corpus)
    papers = read_heldout(corpus, find_model(model), most=10**6)
    assert not any((tokens == corpus.eod).any() for tokens in papers.tokens)
    assert int(papers.targets.sum()) == corpus.split("heldout").tokens - len(papers.tokens)
    decoded = [Tokenizer(corpus.tokenizer_path).decode(tokens[1:]) for tokens in papers.tokens]
    assert [len(text.encode()) for text in decoded] == papers.bytes.tolist()


def test_what_does_not_fit_is_one_sentence(model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    def refused(path: Path, corpus: Path, *options: str) -> str:
        with pytest.raises(UserError) as caught:
            evaluate([str(path), "--heldout", str(corpus), *options])
        if dist.is_initialized():
            dist.destroy_process_group()
        return str(caught.value)

    assert "holds no model" in refused(tmp_path, tiny_corpus)
    assert "is not a directory" in refused(tmp_path / "none", tiny_corpus)
    assert "is not a corpus" in refused(model, tmp_path)
    assert "the model has 4096 positions" in refused(model, tiny_corpus, "--window", "4097")
    assert "targets would be left out" in refused(model, tiny_corpus, "--window", "8", "--stride", "9")
    assert "no directory for it" in refused(model, tiny_corpus, "--output", str(tmp_path / "no" / "x.json"))
    assert "--help" in refused(model, tiny_corpus, "--dtype", "int8")
    bare = shutil.copytree(model, tmp_path / "bare")
    for name in ("tokenizer.model", "tokenizer.json"):
        (bare / name).unlink()
    assert "has no tokenizer" in refused(bare, tiny_corpus)
    whole = shutil.copytree(tiny_corpus, tmp_path / "whole")
    decide_again(whole, Decisions(heldout=0))
    assert "holds no papers out" in refused(model, whole)


@pytest.mark.slow
def test_two_ranks_under_torchrun_give_the_numbers_of_one(
    model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    wanted = result(model, tiny_corpus, tmp_path, "--window", "64")
    code = "import sys; from pmc_llama.evaluate.command import evaluate; sys.exit(evaluate(sys.argv[1:]))"
    (tmp_path / "judge.py").write_text(code)
    torchrun = Path(sys.executable).parent / "torchrun"
    path = tmp_path / "two.json"
    command = [torchrun, "--standalone", "--nproc-per-node", "2", tmp_path / "judge.py", model]
    options = ["--heldout", tiny_corpus, "--window", "64", "--output", path]
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["ranks"] == 2
    assert found["papers"]["nats"] == pytest.approx(wanted["papers"]["nats"], rel=1e-6)
    assert done.stdout.count("Held-out papers") == 1
