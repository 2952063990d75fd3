"""`pmc-llama evaluate --questions`: the scores are lm-eval's own, and every answer is kept."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as evaluate_by_lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_tools.errors import UserError
from data_tools.prompt_documents import PromptDocument, prompt_document
from data_tools.questions.build import build_questions
from data_tools.questions.written import QuestionSets
from data_tools.tokenizer import Tokenizer
from pmc_llama.checkpoint import save
from pmc_llama.cli import export
from pmc_llama.config import Recipe, plain
from pmc_llama.evaluate.command import evaluate
from pmc_llama.evaluate.results import Scores, SetScore, read_scores
from pmc_llama.evaluate.tasks import chosen
from pmc_llama.huggingface_tokenizer import write_tokenizer
from tests.data_tools.sources import prose
from tests.pmc_llama.small import bare_manifest

POSITIONS = 512
MEDQA, PUBMEDQA = 12, 9


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No rank and no network; what a start leaves behind ends with the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked for something")

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Questions as the datasets of lm-eval's tasks have them on the hub."""
    directory = tmp_path_factory.mktemp("published")
    medqa = [
        {
            "id": f"m{number}",
            "sent1": prose(number, 4 + number),
            **{f"ending{place}": prose(1000 + 4 * number + place, 2) for place in range(4)},
            "label": (number * 7) % 4,
        }
        for number in range(MEDQA)
    ]
    pubmedqa = [
        {
            "QUESTION": prose(3000 + number, 7),
            "CONTEXTS": [prose(4000 + number, 5), prose(5000 + number, 6)],
            "LONG_ANSWER": prose(6000 + number, 5),
            "final_decision": ("yes", "no", "maybe")[number % 3],
        }
        for number in range(PUBMEDQA)
    ]
    return {
        "medqa_4options": write_jsonl(directory / "medqa_test.jsonl", medqa),
        "pubmedqa": write_jsonl(directory / "pubmedqa_test.jsonl", pubmedqa),
    }


@pytest.fixture(scope="module")
def questions(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("questions") / "questions"
    build_questions([str(path) for path in files.values()], directory)
    return directory


def write_model(directory: Path, model: LlamaForCausalLM, tokenizer: Path) -> Path:
    model.save_pretrained(directory)
    write_tokenizer(tokenizer, directory, POSITIONS)
    return directory


def tiny(vocabulary: int = 400, positions: int = POSITIONS) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    sizes |= {"vocab_size": vocabulary, "max_position_embeddings": positions}
    config = LlamaConfig(initializer_range=0.2, **sizes)
    model = LlamaForCausalLM(config)
    # So that a prediction depends on the whole prompt, not on its last token.
    model.model.embed_tokens.weight.data *= 0.02
    return model


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: its answers are neither right nor all the same."""
    return write_model(tmp_path_factory.mktemp("models") / "random", tiny(), tiny_tokenizer)


def documents(questions: Path, tokenizer: Path) -> list[PromptDocument]:
    """The MedQA questions as they are trained on."""
    found = []
    for question in QuestionSets.open(questions).read("medqa_4options", "test"):
        document = prompt_document(question, "pmc-llama", Tokenizer(tokenizer), POSITIONS)
        assert isinstance(document, PromptDocument)
        found.append(document)
    return found


@pytest.fixture(scope="module")
def obstinate(questions: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers B to everything, and ends: the last token alone decides on the next."""
    model = tiny()
    document = next(one for one in documents(questions, tiny_tokenizer) if one.text.endswith(" B"))
    chain = document.tokens[document.answer - 1 :].tolist()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in pairwise(chain):
            model.lm_head.weight[following] += 100 * model.model.embed_tokens.weight[token]
    return write_model(tmp_path_factory.mktemp("models") / "obstinate", model, tiny_tokenizer)


def scores_of(model: Path, questions: Path, tmp_path: Path, *options: str) -> Scores:
    path = tmp_path / "scores.json"
    assert evaluate([str(model), "--questions", str(questions), "--output", str(path), *options]) == 0
    return read_scores(path)


def by_set(scores: Scores) -> dict[str, SetScore]:
    return {one.set: one for one in scores.sets}


def stock_samples(name: str, path: Path, lm: HFLM, cache: Path) -> list[dict[str, Any]]:
    """What lm-eval's own task answers, fed the local file."""
    folder = {"medqa_4options": "medqa/medqa.yaml", "pubmedqa": "pubmedqa/pubmedqa.yaml"}[name]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / folder)
    split = config["test_split"]
    for unused in ("training_split", "validation_split", "dataset_name"):
        config.pop(unused, None)
    config["dataset_path"] = "json"
    config["dataset_kwargs"] = {"data_files": {split: str(path)}, "cache_dir": str(cache)}
    config["num_fewshot"] = 0
    tasks = {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}}
    samples: list[dict[str, Any]] = evaluate_by_lm_eval(lm, tasks, bootstrap_iters=0)["samples"][name]
    return samples


def require_equal(
    model: Path, questions: Path, files: dict[str, Path], tmp_path: Path, *options: str
) -> None:
    """Hold our answers against those of lm-eval's own tasks, question by question."""
    found = by_set(scores_of(model, questions, tmp_path, "--prompt", "plain", *options))
    assert set(found) == set(files)
    weights = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    lm = HFLM(pretrained=weights, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=8)
    for name, path in files.items():
        stock = stock_samples(name, path, lm, tmp_path / "cache")
        ours = found[name].answers
        wanted = [tuple(value for value, _ in sample["filtered_resps"]) for sample in stock]
        assert [answer.log_likelihoods for answer in ours] == [pytest.approx(one) for one in wanted]
        assert [answer.predicted for answer in ours] == [int(np.argmax(one)) for one in wanted]
        assert [float(answer.correct) for answer in ours] == [sample["acc"] for sample in stock]
        assert found[name].correct / len(ours) == pytest.approx(np.mean([one["acc"] for one in stock]))
        assert len({answer.log_likelihoods for answer in ours}) == len(ours)


def test_accuracy_and_every_answer_are_those_of_lm_evals_own_tasks(
    model: Path, questions: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    require_equal(model, questions, files, tmp_path)


@pytest.mark.slow
@pytest.mark.shared
def test_real_questions_and_llamas_tokenizer_give_the_answers_of_lm_evals_own_tasks(
    shared: Path, tmp_path: Path
) -> None:
    asked = 12
    medqa = (shared / "qa" / "medqa_usmle_4opt_dev.jsonl").read_text().splitlines(keepends=True)[:asked]
    published = json.loads((shared / "qa" / "pubmedqa_ori_pqal.json").read_text())
    pubmedqa = dict(list(published.items())[:asked])
    files = {
        "medqa_4options": tmp_path / "medqa_test.jsonl",
        "pubmedqa": write_jsonl(tmp_path / "pubmedqa.jsonl", list(pubmedqa.values())),
    }
    files["medqa_4options"].write_text("".join(medqa))
    (tmp_path / "pubmedqa_test.json").write_text(json.dumps(pubmedqa))
    sources = [files["medqa_4options"], tmp_path / "pubmedqa_test.json"]
    build_questions([str(path) for path in sources], tmp_path / "questions")
    big = tiny(vocabulary=32000, positions=2048)
    model = write_model(tmp_path / "model", big, shared / "tokenizers" / "llama_tokenizer.model")
    require_equal(model, tmp_path / "questions", files, tmp_path)


@pytest.mark.parametrize("how", [(), ("--generate",)])
def test_an_answer_is_found_by_likelihood_and_by_generation(
    obstinate: Path, questions: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    (score,) = scores_of(obstinate, questions, tmp_path, "--sets", "medqa_4options", *how).sets
    assert {answer.predicted for answer in score.answers} == {1}
    assert (score.correct, score.invalid) == (sum(number * 7 % 4 == 1 for number in range(MEDQA)), 0)


def test_answers_that_are_no_option_are_invalid_and_wrong(
    model: Path, questions: Path, tmp_path: Path
) -> None:
    scores = scores_of(model, questions, tmp_path, "--generate", "--sets", "pubmedqa")
    (score,) = scores.sets
    assert score.invalid > 0
    for answer in score.answers:
        assert answer.generated is not None
        assert answer.predicted == chosen(answer.generated, (" A", " B", " C"))
        assert not (answer.predicted is None and answer.correct)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (" B", 1),
        ("B\n\nQ: next", 1),
        (" (C) because", 2),
        ("A. aspirin", 0),
        (" A patient", None),
        (" Answer", None),
        ("b", None),
        ("E", None),
        ("", None),
        ("The answer is B", None),
    ],
)
def test_a_generated_letter_has_to_stand_alone(text: str, place: int | None) -> None:
    assert chosen(text, (" A", " B", " C", " D")) == place


@pytest.mark.parametrize(
    ("text", "place"),
    [(" Yes, it does", 0), ("no.", 1), ("maybe", 2), ("nothing", None), ("perhaps", None), ("YES", 0)],
)
def test_a_generated_word_may_begin_a_sentence(text: str, place: int | None) -> None:
    assert chosen(text, (" yes", " no", " maybe")) == place


def test_an_unmerged_adapter_answers_as_the_merged_model(
    model: Path, questions: Path, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(model), settings).save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), tmp_path / "adapter")
    write_model(tmp_path / "merged", merged.merge_and_unload(), tiny_tokenizer)
    limit = ("--sets", "medqa_4options", "--limit", "4")
    base = scores_of(model, questions, tmp_path, *limit).sets[0].answers
    wanted = scores_of(tmp_path / "merged", questions, tmp_path, *limit).sets[0].answers
    adapted = scores_of(model, questions, tmp_path, *limit, "--adapter", str(tmp_path / "adapter"))
    assert (adapted.name, adapted.adapter) == ("adapter", str(tmp_path / "adapter"))
    for answer, same, other in zip(adapted.sets[0].answers, wanted, base, strict=True):
        assert answer.log_likelihoods == pytest.approx(same.log_likelihoods, rel=1e-4)
        assert answer.log_likelihoods != pytest.approx(other.log_likelihoods, rel=1e-3)


def test_a_checkpoint_answers_as_what_it_exports_is_judged_by_papers_and_published_with_its_scores(
    model: Path,
    questions: Path,
    tiny_corpus: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights = LlamaForCausalLM.from_pretrained(model).named_parameters()
    config = json.loads((model / "config.json").read_text())
    save(
        {f"model.{name}": tensor.data for name, tensor in weights},
        tmp_path / "run" / "checkpoints",
        lambda files: bare_manifest(7, files, model_config=config, recipe=plain(Recipe())),
        tiny_tokenizer,
        dist.group.WORLD,
    )
    dist.destroy_process_group()
    wanted = scores_of(model, questions, tmp_path, "--limit", "3")
    papers = ("--heldout", str(tiny_corpus), "--max-documents", "1")
    found = scores_of(tmp_path / "run", questions, tmp_path, "--limit", "3", *papers)
    assert (found.name, found.sets) == ("run", wanted.sets)
    assert json.loads((tmp_path / "scores.json").read_text())["perplexity"]["texts"] == 1
    exported = [str(tmp_path / "run"), str(tmp_path / "exported")]
    publish = ["--push-to-hub", "clinic/model", "--dry-run", "--results", str(tmp_path / "scores.json")]
    with pytest.raises(UserError, match="--license"):
        export([*exported, *publish])
    capsys.readouterr()
    export([*exported, *publish, "--license", "apache-2.0"])
    told = capsys.readouterr().out
    assert all(path.name in told for path in (tmp_path / "exported").iterdir())
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert card.count("\n| accuracy (likelihood") == len(found.sets)
    assert "\n| perplexity a token | papers held out" in card


def test_the_result_says_what_was_asked_and_how(
    model: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--name", "ours", "--setting", "full", "--limit", "5", "--sets", "medqa_4options,pubmedqa")
    scores = scores_of(model, questions, tmp_path, *options)
    assert (scores.name, scores.setting, scores.prompt) == ("ours", "full", "pmc-llama")
    assert scores.fingerprint == QuestionSets.open(questions).manifest.fingerprint
    assert [answer.id for answer in by_set(scores)["medqa_4options"].answers] == [f"m{n}" for n in range(5)]
    right = [number * 7 % 4 for number in range(MEDQA)]
    assert [answer.right for answer in by_set(scores)["medqa_4options"].answers] == right[:5]
    assert by_set(scores)["medqa_4options"].majority == pytest.approx(np.bincount(right).max() / MEDQA)
    said = capsys.readouterr().out
    assert "USMLE" in said
    assert "PubMedQA" in said


def test_prompts_that_a_model_cannot_read_whole_are_counted(
    questions: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    tokens = [len(one.tokens) - 1 for one in documents(questions, tiny_tokenizer)]  # without the EOD
    short = tiny()
    short.config.max_position_embeddings = sorted(tokens)[MEDQA // 2] - 1  # the last token is no input
    path = write_model(tmp_path / "short", short, tiny_tokenizer)
    (score,) = scores_of(path, questions, tmp_path, "--sets", "medqa_4options").sets
    assert [answer.tokens for answer in score.answers] == tokens
    assert score.cut == sum(one > sorted(tokens)[MEDQA // 2] for one in tokens)
    assert 0 < score.cut < MEDQA


def test_a_set_without_answered_test_questions_is_asked_on_dev(
    model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def medmcqa(number: int, cop: int) -> dict[str, Any]:
        options = {name: prose(9000 + 9 * number + place, 2) for place, name in enumerate(("opa", "opb"))}
        options |= {"opc": prose(9100 + number, 2), "opd": prose(9200 + number, 2)}
        return {"id": f"d{number}", "question": prose(8000 + number, 6), "cop": cop, **options}

    write_jsonl(tmp_path / "dev.json", [medmcqa(number, 1 + number % 4) for number in range(6)])
    write_jsonl(
        tmp_path / "test.json",
        [{k: v for k, v in medmcqa(n, 1).items() if k != "cop"} for n in range(50, 53)],
    )
    build_questions([str(tmp_path / "dev.json"), str(tmp_path / "test.json")], tmp_path / "asked")
    (score,) = scores_of(model, tmp_path / "asked", tmp_path).sets
    assert (score.set, score.split, len(score.answers)) == ("medmcqa", "dev", 6)


def test_what_cannot_be_asked_is_one_sentence(model: Path, questions: Path, tmp_path: Path) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(UserError) as caught:
            evaluate([str(model), *options])
        if dist.is_initialized():
            dist.destroy_process_group()
        return str(caught.value)

    asked = ("--questions", str(questions))
    assert "--heldout CORPUS, --questions DIR, or both" in refused()
    assert "holds no questions" in refused("--questions", str(tmp_path))
    assert "have no medqa.test" in refused(*asked, "--sets", "medqa")
    assert "have no pubmedqa.dev" in refused(*asked, "--sets", "pubmedqa", "--split", "dev")
    assert "to ask" in refused(*asked, "--split", "dev")
    assert "holds no adapter" in refused(*asked, "--adapter", str(tmp_path))
    assert "--help" in refused(*asked, "--prompt", "alpaca")


@pytest.mark.slow
def test_two_ranks_give_the_answers_of_one(model: Path, questions: Path, tmp_path: Path) -> None:
    wanted = scores_of(model, questions, tmp_path, "--limit", "5")
    torchrun = Path(sys.executable).parent / "torchrun"
    path = tmp_path / "two.json"
    command = [torchrun, "--standalone", "--nproc-per-node", "2", "--module", "pmc_llama.cli", "evaluate"]
    done = subprocess.run(
        [*command, model, "--questions", questions, "--limit", "5", "--output", path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = read_scores(path)
    assert found.ranks == 2
    for one, other in zip(found.sets, wanted.sets, strict=True):
        assert [answer.id for answer in one.answers] == [answer.id for answer in other.answers]
        assert [answer.predicted for answer in one.answers] == [a.predicted for a in other.answers]
        for answer, same in zip(one.answers, other.answers, strict=True):
            assert answer.log_likelihoods == pytest.approx(same.log_likelihoods, rel=1e-4)
    assert done.stdout.count("Answers of random") == 1
