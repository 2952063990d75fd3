"""Jobs on a real SLURM of three nodes, by the scripts of `launch/`, with a model of demo size on CPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pmc_llama.checkpoint import list_checkpoints
from tests.cluster.cluster import Cluster, Job
from tests.data_tools.sources import simple_record, write_jsonl
from tests.pmc_llama.runs import numbers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

LAUNCH = Path(__file__).parents[2] / "launch"
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
ONE = ("--nodes=1", "--ntasks-per-node=1")
STEPS = 40
Train = Callable[..., Job]


@pytest.fixture(scope="module")
def recipe(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        f"""
        output: run
        seed: 1
        model: {{size: demo}}
        data: {{corpus: {tiny_corpus}, mode: packed, sequence_length: 32}}
        batch: {{global_size: 8, micro_size: 2}}
        schedule: {{steps: {STEPS}}}
        optimizer: {{learning_rate: 3.0e-3}}
        checkpoint: {{every_steps: 20}}
        evaluation: {{every_steps: 20, max_sequences: 8}}
        """
    )
    return path


@pytest.fixture(scope="module")
def train(cluster: Cluster, recipe: Path) -> Train:
    """Submits `launch/pretrain_7b.slurm` for two nodes of two ranks, with the small recipe in its place."""

    def submit(
        directory: Path, *options: str, sbatch: tuple[str, ...] = TWO_BY_TWO, **environment: str
    ) -> Job:
        return cluster.submit(
            *sbatch,
            LAUNCH / "pretrain_7b.slurm",
            *options,
            directory=directory,
            **{
                "PMC_RECIPE": str(recipe),
                "PMC_VENV": sys.prefix,
                "PMC_PREFLIGHT": "0",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )

    return submit


@pytest.fixture(scope="module")
def uninterrupted(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a job that nothing happened to."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    job = train(directory, "--backend", "fsdp", WANDB_API_KEY="f00d", PMC_PREFLIGHT="1")
    assert job.end() == "0:0", job.output()
    return directory / "run"


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def attempts(run: Path, job: Job) -> list[str]:
    """What each line of the job's record of attempts says, without its time."""
    file = run / "slurm" / str(job.number) / "attempts"
    return [line.partition(" ")[2] for line in file.read_text().splitlines()] if file.exists() else []


def rank(number: int, run: Path) -> psutil.Process:
    """The process of a rank."""
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        is_rank = "--resume" in words and "srun" not in words[0] and process.cwd() == str(run.parent)
        if is_rank and environment.get("SLURM_PROCID") == str(number):
            return process
    raise AssertionError(f"no rank {number} of {run}")


def test_sbatch_accepts_every_script_on_a_cluster_with_enough_gpus(cluster: Cluster) -> None:
    scripts = sorted(LAUNCH.glob("*.slurm"))
    assert len(scripts) == 8
    for script in scripts:
        assert "to start at" in cluster.run("sbatch", "--test-only", "--partition=big", script)


def test_a_job_trains_with_either_backend_by_flag_and_keeps_how(
    train: Train, uninterrupted: Path, tmp_path: Path
) -> None:
    job = train(tmp_path, "--backend", "deepspeed", "--optimizer.learning_rate", "3e-3")
    assert job.end() == "0:0", job.output()
    run = tmp_path / "run"
    assert numbers(run) == numbers(uninterrupted)
    [start] = json.loads((run / "run.json").read_text())
    assert (start["world_size"], start["launcher"], start["job_id"]) == (4, "slurm", str(job.number))
    nodes = job.cluster.nodes[:2]
    assert start["hosts"] == nodes or job.cluster.layout == "one-host"

    [kept] = (uninterrupted / "slurm").iterdir()
    assert (kept / "command").read_text().endswith("--backend fsdp --resume ")
    assert (kept / "job.sh").read_text() == (LAUNCH / "pretrain_7b.slurm").read_text()
    if (LAUNCH.parent / ".git").exists():
        assert len((kept / "git-commit").read_text().strip()) == 40
    environment = (kept / "attempt-0" / "environment.txt").read_text()
    assert "OMP_NUM_THREADS=1" in environment
    assert "f00d" not in environment
    logs = {f"{node}-rank-{2 * n + m:05d}.log" for n, node in enumerate(nodes) for m in (0, 1)}
    assert logs == {path.name for path in (kept / "attempt-0").glob("*-rank-*.log")}


def test_a_job_near_its_time_limit_saves_is_requeued_and_goes_on_with_the_same_losses(
    cluster: Cluster, train: Train, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = train(tmp_path, "--backend", "fsdp")
    job.wait(lambda: steps(run) >= 5)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))  # what --signal=B:USR1@600 sends
    assert job.end() == "0:0", job.output()
    assert job.field("Restarts") == "1"
    first, asked, again, end = attempts(run, job)
    assert first.startswith("start 0")
    stopped_at = int(asked.split()[1])
    assert 5 <= stopped_at < STEPS
    assert asked == f"end {stopped_at} asked -"
    assert again.startswith(f"start {stopped_at} ")
    assert end == f"end {STEPS} 0 -"
    assert numbers(run) == numbers(uninterrupted)

    before = (run / "metrics.jsonl").read_bytes()
    once_more = train(tmp_path, "--backend", "fsdp", sbatch=ONE)
    assert once_more.end() == "0:0", once_more.output()
    assert "nothing is left to train" in once_more.output()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_slurm_itself_asks_in_time_and_a_cancelled_job_does_not_come_back(
    cluster: Cluster, train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # The script asks for 600 s: due at once.
    job = train(tmp_path, "--backend", "fsdp", "--schedule.steps", "9999", sbatch=(*ONE, "--time=10"))
    job.wait(lambda: len(attempts(run, job)) == 3)
    assert "SIGUSR1: asking the run for a checkpoint" in job.output()
    asked = attempts(run, job)[1]
    assert int(asked.split()[1]) >= 1
    cluster.run("scancel", str(job.number))
    job.end()
    assert job.state == "CANCELLED"
    assert job.field("Restarts") == "1"


def test_a_run_outlives_a_killed_rank_and_a_node_that_loses_power(
    cluster: Cluster, train: Train, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    second = cluster.nodes[1]
    job = train(tmp_path, "--backend", "deepspeed")
    job.wait(lambda: steps(run) >= 5)
    rank(3, run).kill()
    job.wait(lambda: len(attempts(run, job)) == 2)
    assert attempts(run, job)[1] == f"end 0 137 {second}"

    if cluster.layout == "namespaces":
        job.wait(lambda: len(attempts(run, job)) == 3 and list_checkpoints(run / "checkpoints"))
        cluster.power(second, "off")
        job.wait(lambda: sum(line.startswith("start") for line in attempts(run, job)) == 3)
        first, _, third = cluster.nodes
        assert cluster.run("scontrol", "show", "hostnames", job.field("NodeList")).split() == [first, third]
        cluster.power(second, "on")
    assert job.end() == "0:0", job.output()
    assert numbers(run) == numbers(uninterrupted)


def test_a_node_that_fails_twice_is_excluded_and_a_run_that_always_fails_is_given_up(
    cluster: Cluster, train: Train, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    job = train(
        tmp_path,
        "--output",
        str(broken),
        PMC_VENV=failing_environment(tmp_path / "always", node="*"),
        PMC_MAX_RESTARTS="1",
    )
    assert job.end() == "1:0", job.output()
    assert job.field("Restarts") == "1"
    assert "2 attempts in a row brought no new checkpoint" in job.output()

    bad = cluster.nodes[1]
    job = train(
        tmp_path,
        "--backend",
        "fsdp",
        PMC_VENV=failing_environment(tmp_path / "bad-node", node=bad),
    )
    assert job.end() == "0:0", job.output()
    assert job.field("ExcNodeList") == bad
    assert [end.split()[2:] for end in attempts(tmp_path / "run", job)[1::2]] == [["1", bad]] * 2 + [
        ["0", "-"]
    ]


def failing_environment(directory: Path, node: str) -> str:
    """A virtual environment whose `pmc-llama train` fails at once on nodes that a pattern matches."""
    programs = directory / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (programs / "pmc-llama").write_text(
        f"""#!/bin/bash
        [[ " $* " != *" --resume "* || $SLURMD_NODENAME != {node} ]] || exit 1
        exec {sys.prefix}/bin/pmc-llama "$@"
        """
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    return str(directory)


def test_what_a_user_can_mend_ends_the_job_at_once_with_its_sentence(train: Train, tmp_path: Path) -> None:
    job = train(tmp_path, "--optimizer.learning_rat", "1e-5")
    assert job.end() == "2:0"
    assert "unknown option --optimizer.learning_rat" in job.output()

    job = train(tmp_path, "--data.corpus", str(tmp_path / "nowhere"), sbatch=ONE, PMC_PREFLIGHT="1")
    assert job.end() == "2:0"
    assert "nowhere" in job.output()
    assert job.field("Restarts") == "0"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_container_gets_the_command_and_the_directories(train: Train, tmp_path: Path) -> None:
    stand_in = tmp_path / "apptainer"
    stand_in.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/called\nexit 2\n')
    stand_in.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = train(tmp_path, "--seed", "7", PMC_CONTAINER="image.sif", PMC_MOUNTS="/data", PATH=path)
    assert job.end() == "2:0"
    options = f"exec --nv --bind {LAUNCH.parent},{tmp_path},/data --pwd {tmp_path} image.sif pmc-llama train"
    assert (tmp_path / "called").read_text().startswith(options)


def test_only_restarts_that_bring_nothing_are_counted(tmp_path: Path) -> None:
    preempted = "t start 7 n1\nt end 7 asked -\n" * 100
    progress = "".join(f"t start {n} n1\nt end {n + 1} 1 n1\n" for n in range(100))
    lost = "t start 5 n1\n"
    for record, expected in (
        ("", "0"),
        (preempted, "0"),
        (progress, "0"),
        (progress + "t start 100 n1\nt end 100 1 n1\n", "1"),
        (lost * 3, "3"),
        (lost + "t start 6 n1\n" + "t end 6 137 n2\n", "1"),
    ):
        (tmp_path / "attempts").write_text(record)
        command = f"source {LAUNCH}/common.sh; records={tmp_path}; fruitless"
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "SLURM_JOB_ID": "1"},
        )
        assert done.stdout.strip() == expected, record[-200:]


def test_three_jobs_pretrain_fine_tune_and_evaluate_in_one_submission(
    cluster: Cluster, recipe: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    def pipeline(directory: str, *options: str) -> list[Job]:
        of_pipeline: tuple[str | Path, ...] = (directory, LAUNCH / "pretrain_7b.slurm", recipe, tiny_corpus)
        said = cluster.run(
            LAUNCH / "pipeline.sh",
            *of_pipeline,
            *options,
            directory=tmp_path,
            PMC_SBATCH_OPTIONS="--nodes=1 --ntasks-per-node=2",
            PMC_RECIPE=str(recipe),
            PMC_VENV=sys.prefix,
            PMC_PREFLIGHT="0",
            OMP_NUM_THREADS="1",
        )
        return [Job(cluster, int(words.split()[-1])) for words in said.strip().split(",")]

    refused = pipeline("refused", "--seed", "none")
    jobs = pipeline("done", "--schedule.steps", "20")
    for job in jobs:
        assert job.end() == "0:0", job.output()
    result = json.loads((tmp_path / "done" / "finetune" / "evaluation.json").read_text())
    assert result["weights"].startswith(str(Path("done") / "finetune"))
    assert [job.state for job in refused] == ["FAILED", "CANCELLED", "CANCELLED"]


def test_a_corpus_built_over_nodes_has_the_bytes_of_a_local_build(
    cluster: Cluster, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    papers = tmp_path / "papers"
    papers.mkdir()
    for shard in range(4):
        write_jsonl(papers / f"{shard}.jsonl", [simple_record(10 * shard + n, words=80) for n in range(10)])
    arguments: list[str | Path] = [
        "--input",
        papers,
        "--tokenizer",
        tiny_tokenizer,
        "--workers",
        "1",
        "--output",
    ]
    job = cluster.submit(
        "--nodes=2", LAUNCH / "build_corpus.slurm", *arguments, tmp_path / "over-nodes",
        directory=tmp_path, PMC_VENV=sys.prefix,
    )  # fmt: skip
    subprocess.run([f"{sys.prefix}/bin/pmc-data", "build", *arguments, tmp_path / "local"], check=True)
    assert job.end() == "0:0", job.output()
    assert contents(tmp_path / "over-nodes") == contents(tmp_path / "local")


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
