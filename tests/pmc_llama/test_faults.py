"""Runs that meet faults at instants drawn from a seed end with the numbers of one that met none.

`benchmarks/faults.py` tells more of the same stories.
"""

from pathlib import Path

import pytest

from tests.pmc_llama.faults import Story, small_disk, story_command
from tests.pmc_llama.runs import finish, numbers


@pytest.fixture(scope="module")
def command(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 24 steps with a checkpoint every 4, of which two are kept."""
    directory = tmp_path_factory.mktemp("faults")
    return story_command(tiny_corpus, directory)


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish([*command, "--backend", "fsdp", "--output", str(run)])
    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3])
def test_a_run_that_meets_faults_has_the_numbers_of_one_that_never_did(
    command: list[str], uninterrupted: Path, tmp_path: Path, seed: int
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = (disk or tmp_path) / "run"
        story = Story(run, [*command, "--output", str(run)], seed, small_disk=disk is not None)
        story.suffer(faults=3)
        story.end()
        assert numbers(run) == numbers(uninterrupted), story.told
