"""A small real model fine-tuned on real questions for a bounded number of steps, and the table of answers.

Of each file of questions four fifths are trained on and the rest is the test, by a hash of the question: so
the files need not be the sets' own training splits. One is PubMedQA's JSON by PubMed ids; the others are JSON
Lines with `medmcqa` or `medqa` in their names. Every step is a command that a user would type; what DIRECTORY
has already is not made again. Prints the table of `pmc-llama report`.

    python -m benchmarks.finetuning --model BASE --questions FILE FILE FILE --directory DIR
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import xxhash

RANKS = 2
SETTINGS = {"full": "pubmedqa,medmcqa", "data-efficient": "medqa_4options"}
"""What each setting is trained on, as in PMC-LLaMA."""
_BIN = Path(sys.executable).parent


def main() -> None:
    """Split the questions, train each setting, evaluate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--backend", default="fsdp")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16, help="questions a step")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a question; longer contexts are cut")
    parser.add_argument("--limit", type=int, default=100, help="questions asked of each set")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    questions = _questions(options.questions, options.directory)
    answers = [_ask(options.model, "zero-shot", questions, options)]
    for setting, sets in SETTINGS.items():
        model = options.directory / setting / "model"
        if not model.exists():
            _train(setting, _prompts(setting, sets, questions, options), options)
            _run("pmc-llama", "export", options.directory / setting, model, "--dtype", "fp32")
        answers.append(_ask(model, setting, questions, options))
    report = [
        str(_BIN / "pmc-llama"),
        "report",
        *map(str, answers),
        "--output",
        str(options.directory / "report"),
    ]
    shutil.rmtree(options.directory / "report", ignore_errors=True)
    subprocess.run(report, check=True, stdout=sys.stderr)
    print((options.directory / "report" / "report.md").read_text())


def _run(program: str, *arguments: object, ranks: int = 1) -> None:
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    command = [str(_BIN / program), *map(str, arguments)]
    # Standard output is for the table.
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": threads})


def _torchrun(*arguments: object) -> None:
    launcher = ["--standalone", "--nproc-per-node", RANKS, "--module", "pmc_llama.cli"]
    _run("torchrun", *launcher, *arguments, ranks=RANKS)


def _is_test(name: str) -> bool:
    return xxhash.xxh3_64_intdigest(name.encode()) % 5 == 0


def _questions(files: list[Path], directory: Path) -> Path:
    """The files, each divided into training and test questions, in the format of `pmc-data questions`."""
    found = directory / "questions"
    if not found.exists():
        inputs = [argument for file in files for argument in _divided(file, directory)]
        test_ids = directory / "pubmedqa_test_ids.json"
        _run("pmc-data", "questions", "--input", *inputs, "--test-ids", test_ids, "--output", found)
    return found


def _divided(file: Path, directory: Path) -> Iterator[str]:
    text = file.read_text()
    if "pubmedqa" in file.name:
        tested = {key: "" for key in json.loads(text) if _is_test(key)}
        (directory / "pubmedqa_test_ids.json").write_text(json.dumps(tested))
        yield str(file)
        return
    name = "medmcqa" if "medmcqa" in file.name else "medqa"
    lines = text.splitlines()
    for split, wanted in (("train", False), ("test", True)):
        part = directory / f"{name}_{split}.jsonl"
        part.write_text("".join(f"{line}\n" for line in lines if _is_test(line) is wanted))
        yield f"{split}={part}"


def _prompts(setting: str, sets: str, questions: Path, options: argparse.Namespace) -> Path:
    """The training questions of a setting as a corpus of prompts."""
    corpus: Path = options.directory / f"corpus-{setting}"
    if not corpus.exists():
        _run(
            *("pmc-data", "prompts", "--questions", questions, "--sets", sets, "--prompt", "pmc-llama"),
            *("--tokenizer", options.model / "tokenizer.json", "--max-tokens", options.max_tokens),
            *("--overlong", "cut_context", "--output", corpus),
        )
    return corpus


def _train(setting: str, corpus: Path, options: argparse.Namespace) -> None:
    recipe = Path("recipes") / f"finetune_{setting.replace('-', '_')}.yaml"
    keys = {
        "output": options.directory / setting,
        "backend": options.backend,
        "model.size": options.model / "config.json",
        "model.initialize_from": options.model,
        "data.corpus": corpus,
        "data.sequence_length": options.max_tokens,
        "batch.global_size": options.batch,
        "schedule.steps": options.steps,
        "logging.every_steps": 5,
        "dry_run": False,
    }
    # A run that was cut off goes on.
    _torchrun(
        "train", recipe, "--resume", *(word for key, value in keys.items() for word in (f"--{key}", value))
    )


def _ask(model: Path, setting: str, questions: Path, options: argparse.Namespace) -> Path:
    output: Path = options.directory / f"{setting}-{options.limit}.json"
    if not output.exists():
        sets = ["--sets", ",".join(SETTINGS.values()), "--limit", options.limit, "--split", "test"]
        name = ["--name", setting, "--setting", setting, "--output", output]
        _torchrun("evaluate", model, "--questions", questions, *sets, *name)
    return output


if __name__ == "__main__":
    main()
