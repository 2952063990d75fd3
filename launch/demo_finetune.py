"""`make demo-finetune`: the three settings of fine-tuning under both backends, and one table of all.

Every stage is a command that a user would type; this file types them in order, kills each run once on its
way, and checks what came out. The questions are made up (`demo_questions.py`).
"""

import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.demo_questions import write_questions
from launch.typed import RANKS, console, environment, on_ranks, options, run, shown, stage
from pmc_llama.checkpoint import list_checkpoints
from pmc_llama.metrics import read_metrics

OUTPUT = Path("demo-finetune-output")
QUESTIONS, BASE = OUTPUT / "questions", OUTPUT / "base"
STEPS, EVERY_STEPS = 40, 8
BACKENDS = ("deepspeed", "fsdp")


@dataclass(frozen=True)
class Setting:
    """One of the paper's settings.

    Attributes:
        name: as `pmc-llama evaluate --setting` has it.
        recipe: of the training.
        sets: that it is trained on.
        rate: the peak learning rate, higher than the recipe's: so small a model bears it.
    """

    name: str
    recipe: str
    sets: str
    rate: float

    @property
    def corpus(self) -> Path:
        """Its training questions as a corpus of prompts."""
        return OUTPUT / f"prompts-{self.sets.replace(',', '-')}"


SETTINGS = (
    Setting("full", "recipes/finetune_full.yaml", "pubmedqa,medmcqa", 3e-3),
    Setting("peft", "recipes/finetune_lora.yaml", "pubmedqa,medmcqa", 1e-2),
    Setting("data-efficient", "recipes/finetune_data_efficient.yaml", "medqa_4options", 3e-3),
)


def main() -> None:
    """Run every stage and say what was made."""
    begin = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    stage("1/5  a model to fine-tune, pre-trained for a minute on the sample papers")
    pretrain()
    stage("2/5  questions, and prompts made of them")
    make_prompts()
    stage(f"3/5  three settings, two backends, {RANKS} ranks; every run is killed once and resumed")
    for setting in SETTINGS:
        for backend in BACKENDS:
            train(setting, backend, random.Random(f"{setting.name} {backend}"))  # noqa: S311
        check_losses(setting)
    stage("4/5  every model asked")
    scores = [ask("zero-shot", "zero-shot", BASE)]
    scores += [score for setting in SETTINGS for backend in BACKENDS for score in judge(setting, backend)]
    stage("5/5  the table")
    run("pmc-llama", "report", *map(str, scores), "--output", f"{OUTPUT}/report")
    console.rule(f"[bold]made in {time.monotonic() - begin:.0f} s")
    console.print(
        f"{OUTPUT}/report has the table as Markdown, CSV, JSON and a picture; {OUTPUT} the runs and models."
    )


def pretrain() -> None:
    """A model of demo size with the sample's tokenizer, as a Hugging Face directory."""
    corpus, tokenizer = f"{OUTPUT}/corpus", "sample/tokenizer.model"
    build = ("--input", "sample/s2orc", "sample/jats", "--tokenizer", tokenizer, "--max_bad", "0.1")
    run("pmc-data", "build", *build, "--output", corpus)
    keys = {"output": OUTPUT / "pretrained", "backend": "fsdp", "data.corpus": corpus, "schedule.steps": 40}
    run(*on_ranks("train", "recipes/demo.yaml", *options(keys)))
    run("pmc-llama", "export", f"{OUTPUT}/pretrained", str(BASE))


def make_prompts() -> None:
    """Published layouts brought into one format, and a corpus of prompts for each choice of sets."""
    files = write_questions(OUTPUT / "published")
    tests = str(OUTPUT / "published" / "test_ids.json")
    run("pmc-data", "questions", "--input", *files, "--test-ids", tests, "--output", str(QUESTIONS))
    for setting in SETTINGS:
        if not setting.corpus.exists():
            made = ("--questions", str(QUESTIONS), "--sets", setting.sets, "--output", str(setting.corpus))
            template = ("--tokenizer", "sample/tokenizer.model", "--prompt", "pmc-llama")
            run("pmc-data", "prompts", *made, *template, "--max-tokens", "256")


def run_of(setting: Setting, backend: str) -> Path:
    """The directory of a run."""
    return OUTPUT / f"{setting.name}-{backend}"


def train(setting: Setting, backend: str, draw: random.Random) -> None:
    """One run: killed at an instant drawn from a seed, and resumed by the same command."""
    keys = {
        "output": run_of(setting, backend),
        "backend": backend,
        "model.size": BASE / "config.json",
        "model.initialize_from": BASE,
        "data.corpus": setting.corpus,
        "data.sequence_length": 255,
        "batch.global_size": 32,
        "batch.micro_size": 4,
        "schedule.steps": STEPS,
        "optimizer.learning_rate": setting.rate,
        "checkpoint.every_steps": EVERY_STEPS,
        "evaluation.every_steps": STEPS,
        "evaluation.max_sequences": 32,
        "logging.every_steps": 20,
    }
    command = shown(*on_ranks("train", setting.recipe, *options(keys), "--resume"))
    kill_on_the_way(command, run_of(setting, backend), draw)
    run(*on_ranks("train", setting.recipe, *options(keys), "--resume"))


def kill_on_the_way(command: list[str], directory: Path, draw: random.Random) -> None:
    """Start a run and kill all of its processes, at some step after its first checkpoint."""
    step, beyond = draw.randrange(EVERY_STEPS + 2, STEPS - EVERY_STEPS), draw.uniform(0, 0.2)
    process = subprocess.Popen(command, env=environment())
    while process.poll() is None and (_steps_made(directory) < step or not _checkpoints(directory)):
        time.sleep(0.01)
    time.sleep(beyond)  # seconds, into whatever follows the end of the step
    if process.poll() is not None:
        console.print(f"[red]the run ended by itself, with status {process.returncode}, before it was killed")
        sys.exit(1)
    # The ranks first: torchrun starts each in a session of its own.
    for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    kept = _checkpoints(directory)
    console.print(
        f"[yellow]killed after step {_steps_made(directory)}; the newest checkpoint is {kept[-1].name}"
    )


def _checkpoints(directory: Path) -> list[Path]:
    return list_checkpoints(directory / "checkpoints")


def _steps_made(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def check_losses(setting: Setting) -> None:
    """Both backends, killed at different steps, made the same losses bit for bit; else the demo fails.

    A resume that were not exact would show in one of the two.
    """
    curves = [_losses(run_of(setting, backend)) for backend in BACKENDS]
    if curves[0] != curves[1]:
        apart = max(abs(one - other) for one, other in zip(*curves, strict=True))
        console.print(f"[red]{setting.name}: the losses of the backends differ, by up to {apart:.2e}")
        sys.exit(1)
    first, last = curves[0][0], curves[0][-1]
    console.print(
        f"[green]{setting.name}: {len(curves[0])} losses, from {first:.3f} to {last:.3f}, equal bit for bit "
        "under both backends, each killed and resumed"
    )


def _losses(directory: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]


def judge(setting: Setting, backend: str) -> list[Path]:
    """Export a run and ask the model; adapters merged and, under one backend, unmerged, too."""
    directory = run_of(setting, backend)
    model = OUTPUT / "models" / directory.name
    run("pmc-llama", "export", str(directory), str(model))
    scores = [ask(directory.name, setting.name, model)]
    if setting.name == "peft" and backend == "fsdp":
        adapter = OUTPUT / "models" / f"{directory.name}-adapter"
        run("pmc-llama", "export", str(directory), str(adapter), "--adapter")
        scores.append(ask(f"{directory.name} (unmerged)", setting.name, BASE, "--adapter", str(adapter)))
    return scores


def ask(name: str, setting: str, model: Path, *adapter: str) -> Path:
    """Every question of the three sets; the file of the answers."""
    path = OUTPUT / "scores" / f"{name.replace(' ', '-')}.json"
    path.parent.mkdir(exist_ok=True)
    asked = ("--questions", str(QUESTIONS), "--name", name, "--setting", setting, "--output", str(path))
    run("pmc-llama", "evaluate", str(model), *adapter, *asked)
    return path


if __name__ == "__main__":
    main()
