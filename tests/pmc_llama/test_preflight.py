"""What a preflight finds before a run is started, told by node; on real ranks, and as pure functions."""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from data_tools.corpus import Corpus
from pmc_llama.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    Recipe,
    ScheduleConfig,
)
from pmc_llama.preflight.files import checkpoints_to_come
from pmc_llama.preflight.judgement import Findings, judge, lines, slow_nodes
from pmc_llama.preflight.network import bus_bandwidth
from tests.pmc_llama.forked import PRELOADED, end
from tests.pmc_llama.small import odd_config

NODES = ["fz0", "fz0", "fz1", "fz1", "fz2", "fz2"]


def everywhere(**facts: str) -> dict[int, Findings]:
    return {rank: Findings(facts=dict(facts)) for rank in range(len(NODES))}


def test_a_rank_that_differs_from_most_is_named_with_both_values() -> None:
    found = everywhere(torch="2.13.0")
    found[3].facts["torch"] = "2.11.0"
    assert lines(judge(found, NODES, 60), NODES) == [
        "fz1 (rank 3): torch is 2.11.0, on 5 other ranks 2.13.0; make all nodes alike"
    ]


def test_of_two_halves_the_first_is_right() -> None:
    found = everywhere(torch="2.13.0")
    for rank in (3, 4, 5):
        found[rank].facts["torch"] = "2.11.0"
    assert [*judge(found, NODES, 60)] == [3, 4, 5]


def test_what_only_some_ranks_look_at_is_compared_among_those() -> None:
    found = everywhere()
    for rank in (0, 2, 4):
        found[rank].facts["the corpus"] = "of fingerprint 1"
    assert judge(found, NODES, 60) == {}
    found[4].facts["the corpus"] = "of fingerprint 2"
    assert [*judge(found, NODES, 60)] == [4]


def test_a_node_has_one_line_with_what_each_of_its_ranks_found_said_once() -> None:
    found = everywhere()
    for rank in (2, 3):
        found[rank].problems = ["no GPU"]
    found[3].problems.append("no disk")
    del found[5]
    assert lines(judge(found, NODES, 60), NODES) == [
        "fz1 (ranks 2-3): no GPU; no disk",
        "fz2 (rank 5): no answer within 60 s: the node or its network hangs",
    ]


def test_a_clock_that_is_far_off_and_a_gpu_with_two_ranks_are_problems() -> None:
    found = everywhere()
    found[2].seconds_off = -42.0
    found[3].seconds_off = 1.0
    found[4].gpu = found[5].gpu = found[0].gpu = "GPU-1"  # another GPU-1 on another node
    assert lines(judge(found, NODES, 60), NODES) == [
        "fz1 (rank 2): its clock is 42 s behind the first node's; mend its time service",
        "fz2 (rank 5): it has the same GPU as rank 4; start one rank a GPU",
    ]


def test_a_node_far_from_the_median_is_hinted_at() -> None:
    assert slow_nodes({"a product": {"fz0": 1.0, "fz1": 1.1, "fz2": 3.3}}) == [
        "fz2: a product takes 3.0 times the median of all nodes"
    ]


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert bus_bandwidth(1_000, 0.5, 2) == 2_000  # two ranks: size over time
    assert bus_bandwidth(1_000, 0.5, 8) == 3_500


@pytest.mark.parametrize(
    ("done", "existing", "keep_last", "keep_every", "expected"),
    [
        pytest.param(0, [], 2, 0, 3, id="the newest, and one that is being written"),
        pytest.param(50, [40, 50], 2, 0, 1, id="room is taken already"),
        pytest.param(0, [], 2, 20, 8, id="one of five is kept for good"),
        pytest.param(50, [20, 40, 45, 50], 2, 20, 4, id="in the middle of the schedule"),
        pytest.param(0, [], 2, 15, 6, id="only steps that have a checkpoint are kept for good"),
        pytest.param(0, [], 99, 0, 10, id="no more than are made"),
        pytest.param(100, [90, 100], 2, 0, 0, id="a finished run"),
    ],
)
def test_the_checkpoints_to_come_are_counted_at_their_peak(
    done: int, existing: list[int], keep_last: int, keep_every: int, expected: int
) -> None:
    assert checkpoints_to_come(done, 100, existing, 10, keep_last, keep_every) == expected


# --- two nodes of one rank each, as processes of their own --------------------------------------------------


@dataclass(frozen=True)
class Situation:
    """One preflight: what the second rank finds otherwise than the first."""

    recipe: Recipe
    second: Recipe
    port: int
    second_comes: bool = True
    packages: Path | None = None  # before the others on the second rank's path
    seconds: float = 30.0


@dataclass
class Outcome:
    statuses: list[int | str] = field(default_factory=list)
    said: str = ""


def rank_of_all(rank: int, directory: Path, situations: dict[str, Situation]) -> None:
    """Go through the situations one after another, since a process takes seconds to start."""
    import torch

    from data_tools.errors import UserError
    from pmc_llama.preflight.run import run
    from pmc_llama.ranks import Ranks

    torch.set_num_threads(1)
    for name, situation in situations.items():
        if rank and not situation.second_comes:
            continue
        os.environ.update(
            MASTER_ADDR="localhost", MASTER_PORT=str(situation.port), SLURMD_NODENAME=f"fz{rank}"
        )
        path = [str(situation.packages)] if rank and situation.packages else []
        recipe = situation.second if rank else situation.recipe
        with (
            (directory / f"{name}-{rank}").open("w") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            sys.path[:0] = path
            try:
                meet_seconds = situation.seconds if situation.second_comes else 2.0
                status: int | str = run(
                    recipe, Ranks(rank, 2, 0, "torchrun"), "latest", meet_seconds, situation.seconds
                )
            except UserError as error:
                print(error)
                status = type(error).__name__
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                del sys.path[: len(path)]
        (directory / f"{name}-{rank}.status").write_text(str(status))
    os._exit(0)  # one thread hangs on purpose


@pytest.fixture(scope="module")
def outcomes(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Each situation's outcome, by name."""
    directory = tmp_path_factory.mktemp("preflight")
    config = odd_config()
    config.vocab_size = Corpus.open(tiny_corpus).vocab_size
    config.to_json_file(directory / "config.json")

    def recipe(output: str) -> Recipe:
        return Recipe(
            output=directory / output,
            model=ModelConfig(size=str(directory / "config.json")),
            data=DataConfig(corpus=str(tiny_corpus), mode="packed", sequence_length=32),
            batch=BatchConfig(global_size=8, micro_size=2),
            schedule=ScheduleConfig(steps=100),
            checkpoint=CheckpointConfig(every_steps=10),
        )

    def with_corpus(recipe: Recipe, corpus: Path) -> Recipe:
        return replace(recipe, data=replace(recipe.data, corpus=str(corpus)))

    packages = directory / "packages"
    (packages / "transformers-4.0.1.dist-info").mkdir(parents=True)
    (packages / "transformers-4.0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.1\n"
    )
    hanging = directory / "hanging"
    hanging.mkdir()
    os.mkfifo(hanging / "corpus.json")  # nobody ever writes to it

    one = recipe("run")
    for_ever = CheckpointConfig(every_steps=1, keep_last=10**12)
    large = replace(one, schedule=ScheduleConfig(steps=10**12), checkpoint=for_ever)
    uneven = replace(one, batch=BatchConfig(global_size=6, micro_size=2))
    ports = iter(free_ports(8))
    situations = {
        "well": Situation(one, one, next(ports)),
        "no corpus": Situation(one, with_corpus(one, directory / "absent"), next(ports)),
        "versions": Situation(one, one, next(ports), packages=packages),
        "not shared": Situation(one, recipe("elsewhere"), next(ports), seconds=15.0),
        "small disk": Situation(large, large, next(ports)),
        "batch": Situation(uneven, uneven, next(ports)),
        "absent": Situation(one, one, next(ports), second_comes=False),
        "hanging": Situation(one, with_corpus(one, hanging), next(ports), seconds=4.0),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "pmc_llama.preflight.run"])
    processes = [
        context.Process(target=rank_of_all, args=(rank, directory, situations), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert end(processes, 240) == [0, 0], [path.read_text() for path in directory.glob("*-[01]")]
    result = {}
    for name, situation in situations.items():
        ranks = range(1 + situation.second_comes)
        statuses = [(directory / f"{name}-{rank}.status").read_text() for rank in ranks]
        result[name] = Outcome(
            [int(status) if status.isdecimal() else status for status in statuses],
            "".join((directory / f"{name}-{rank}").read_text() for rank in ranks),
        )
    yield result
    assert not [*directory.rglob(".preflight-*")]  # nothing stays behind


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("localhost", 0))
        return [probe.getsockname()[1] for probe in probes]


slow = pytest.mark.slow


@slow
def test_all_is_well_is_a_line_with_nodes_disk_and_bandwidth(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["well"]
    assert outcome.statuses == [0, 0], outcome.said
    *hints, line = outcome.said.splitlines()  # hints are of speed, and processes share cores here
    assert all(hint.startswith("preflight: hint: ") for hint in hints)
    assert line.startswith("preflight: all is well in ")
    for part in (
        "2 nodes, 2 ranks, a CPU",
        "go on from none",
        "for 3 more checkpoints",
        "GB/s of bus bandwidth",
    ):
        assert part in line


@slow
@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        pytest.param("no corpus", "absent is not a corpus", id="corpus"),
        pytest.param("versions", "transformers is 4.0.1, on 1 other rank ", id="versions"),
        pytest.param("not shared", "does not show what the first node wrote", id="not shared"),
        pytest.param("hanging", "the corpus: not done within 4 s", id="hanging"),
    ],
)
def test_the_node_that_fails_has_the_one_line_and_every_rank_the_status(
    outcomes: dict[str, Outcome], situation: str, sentence: str
) -> None:
    outcome = outcomes[situation]
    assert outcome.statuses == [2, 2], outcome.said
    line, count, last = outcome.said.splitlines()
    assert line.startswith("preflight: fz1 (rank 1): ")
    assert sentence in line
    assert (count, last) == ("preflight: 1 of 2 nodes fail", "preflight: nothing was started")


@slow
@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        pytest.param("small disk", "1000000000000 more checkpoints of 0.00 GB are to come", id="disk"),
        pytest.param("batch", "batch.global_size is 6, but 2 ranks", id="batch"),
    ],
)
def test_what_is_wrong_on_any_node_is_blamed_on_none(
    outcomes: dict[str, Outcome], situation: str, sentence: str
) -> None:
    outcome = outcomes[situation]
    assert outcome.statuses == [2, 2], outcome.said
    line, last = outcome.said.splitlines()
    assert line.startswith("preflight: the job, on any node: ")
    assert sentence in line
    assert last == "preflight: nothing was started"


@slow
def test_a_rank_that_never_comes_is_named_when_patience_ends(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["absent"]
    assert outcome.statuses == ["NoMeeting"], outcome.said
    assert "rank 1 of 2 did not come" in outcome.said
