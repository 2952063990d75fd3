"""What is kept of every start of a run, and what is not."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from data_tools.errors import UserError
from pmc_llama.distributed import Ranks
from pmc_llama.provenance import append_start, describe_start, environment_that_matters

ALONE = Ranks(0, 1, 0, "alone")
CPU = torch.device("cpu")


def test_every_start_of_a_run_is_kept_oldest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        append_start(tmp_path / "run.json", describe_start(ALONE, CPU, {"torch": "2.13"}))
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert (first["job_id"], second["job_id"]) == ("7", "8")
    assert first["time"] <= second["time"]
    assert first["versions"]["torch"] == "2.13"
    assert (first["world_size"], len(first["hosts"]), first["launcher"]) == (1, 1, "alone")
    assert "pytest" in first["command"]


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)  # noqa: S607
    start = describe_start(ALONE, CPU, {})
    assert start.git_commit == head.stdout.strip()
    assert start.git_dirty in (True, False)


def test_no_secret_of_the_environment_is_kept() -> None:
    kept = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "MASTER_ADDR": "node1",
        "WANDB_MODE": "offline",
    }
    left_out = {
        "HOME": "/root",
        "WANDB_API_KEY": "abc",
        "HF_TOKEN": "abc",
        "TORCH_HUB_PASSWORD": "abc",
        "HF_ENDPOINT": "https://user:abc@example.org",
        "SLURM_JWT": "abc",
        "SLURM_JOB_TOKEN": "abc",
        "AWS_SECRET_ACCESS_KEY": "abc",
    }
    assert environment_that_matters(kept | left_out) == kept


def test_a_damaged_file_of_starts_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"time": ')
    with pytest.raises(UserError, match=r"run\.json is not the list of a run's starts"):
        append_start(path, describe_start(ALONE, CPU, {}))
    assert path.read_text() == '{"time": '
