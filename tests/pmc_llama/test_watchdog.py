"""A rank that hangs ends the run on all ranks, and is named; ranks that are only slow are left alone."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pmc_llama.config import HangConfig
from pmc_llama.distributed import Ranks
from pmc_llama.hang_report import Sign, explain, ranges
from pmc_llama.watchdog import Watchdog, collective_timeout
from tests.pmc_llama.forked import end, start_ranks

HANGS = HangConfig(start_seconds=30, step_seconds=2)
BOUND = 40.0  # seconds, on a busy machine, within which no rank may be left


def loop(rank: int, directory: Path, late_rank: int, fault: str) -> None:
    """Steps of two phases; after the second one rank does what it shall be caught at."""
    ranks = Ranks(rank, dist.get_world_size(), rank, "slurm")
    with Watchdog(ranks, directory / "logs", HANGS) as watchdog:
        for step in range(1, 100):
            watchdog.enter("data")
            if step == 3 and rank == late_rank and fault == "sleep":
                time.sleep(300)
            watchdog.enter("forward and backward")
            time.sleep(0.5)  # some signs of life
            if step == 3 and rank == late_rank and fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if not (step == 3 and rank == late_rank and fault == "skip"):
                dist.all_reduce(torch.ones(1))
            elif step == 3:
                watchdog.enter("evaluation")
                dist.broadcast_object_list([None], src=late_rank, group=GROUPS[0])
            watchdog.step_made(step)


def loop_with_groups(rank: int, directory: Path, late_rank: int, fault: str) -> None:
    GROUPS.append(dist.new_group())
    loop(rank, directory, late_rank, fault)


GROUPS: list[dist.ProcessGroup] = []


def hang(tmp_path: Path, world_size: int, late_rank: int, fault: str) -> tuple[list[int | None], str]:
    """Exit statuses, and all that was said on standard error."""
    processes = start_ranks(world_size, loop_with_groups, tmp_path, late_rank, fault)
    statuses = end(processes, BOUND, stopped=late_rank if fault == "stop" else None)
    return statuses, "".join((tmp_path / f"said-{rank}").read_text() for rank in range(world_size))


def stacks(tmp_path: Path, rank: int) -> str:
    return (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()


def test_a_stopped_rank_ends_the_others_and_is_named_with_where_it_was_last_seen(tmp_path: Path) -> None:
    statuses, said = hang(tmp_path, 3, late_rank=1, fault="stop")
    assert statuses == [1, None, 1]
    assert re.search(
        r"rank 1 on \S+ is late: no sign of life for \d+ s, last seen in step 3, forward and backward\n"
        r"ranks 0, 2 in step 3, forward and backward for \d+ s\n",
        said,
    )
    assert said.count("error: the run hangs") == 1
    for rank in (0, 2):
        assert "in all_reduce" in stacks(tmp_path, rank)


def test_a_stopped_rank_0_which_holds_the_store_ends_the_others_and_is_named_once(tmp_path: Path) -> None:
    statuses, said = hang(tmp_path, 3, late_rank=0, fault="stop")
    assert statuses == [None, 1, 1]
    assert re.search(
        r"rank 0 is late: no sign of life for \d+ s .* last seen in step 3, forward and backward\n", said
    )
    assert said.count("error: the run hangs") == 1
    for rank in (1, 2):
        assert "in all_reduce" in stacks(tmp_path, rank)


def test_a_rank_that_skips_a_collective_is_named_with_the_collective_it_owes(tmp_path: Path) -> None:
    statuses, said = hang(tmp_path, 3, late_rank=2, fault="skip")
    assert statuses == [1, 1, 1]
    assert re.search(
        r"rank 2 on \S+ is out of step: in step 3, evaluation for \d+ s, it has begun "
        r".*2 collectives of group default where the others have begun 3\n"
        r"ranks 0-1 in step 3, forward and backward for \d+ s\n",
        said,
    )
    assert "in all_reduce" in stacks(tmp_path, 0)
    assert "in broadcast" in stacks(tmp_path, 2)


def test_a_rank_that_sleeps_in_python_code_is_named_and_its_stack_shows_where(tmp_path: Path) -> None:
    statuses, said = hang(tmp_path, 2, late_rank=1, fault="sleep")
    assert statuses == [1, 1]
    assert re.search(r"rank 1 on \S+ is late: in step 3, data for \d+ s", said)
    assert re.search(r'test_watchdog\.py", line \d+ in loop\b', stacks(tmp_path, 1))


def hold_the_interpreter_lock(rank: int, directory: Path) -> None:
    with Watchdog(Ranks(rank, 1, rank, "alone"), directory / "logs", HangConfig(1, 1), last_resort_seconds=1):
        sum(range(10**12))


def test_a_rank_whose_main_thread_keeps_the_interpreter_lock_ends_with_its_stack_in_the_log(
    tmp_path: Path,
) -> None:
    assert end(start_ranks(1, hold_the_interpreter_lock, tmp_path), BOUND) == [1]
    assert "in hold_the_interpreter_lock" in stacks(tmp_path, 0)


def slow_but_well(rank: int, directory: Path) -> None:
    ranks = Ranks(rank, dist.get_world_size(), rank, "slurm")
    with Watchdog(ranks, directory / "logs", HangConfig(start_seconds=4, step_seconds=1.5)) as watchdog:
        time.sleep(2)  # within the time of the start
        watchdog.step_made(1)
        watchdog.enter("held-out loss")
        for _ in range(4):
            time.sleep(0.5)
            watchdog.progress()
        watchdog.enter("saving a checkpoint", saving=True)
        time.sleep(2)  # has a bound of its own
        for _ in range(3):
            watchdog.enter("forward and backward")
            time.sleep(0.6)
        dist.all_reduce(torch.ones(1))
        watchdog.step_made(2)


def test_a_slow_start_long_work_that_progresses_and_many_short_phases_are_left_alone(tmp_path: Path) -> None:
    assert end(start_ranks(2, slow_but_well, tmp_path), BOUND) == [0, 0]
    assert [(tmp_path / f"said-{rank}").read_text() for rank in range(2)] == ["", ""]


def waits_past_the_first_step(rank: int, directory: Path) -> None:
    background = dist.new_group()
    hangs = HangConfig(start_seconds=30, step_seconds=0.5)
    with Watchdog(Ranks(rank, 2, rank, "slurm"), directory / "logs", hangs, [background]) as watchdog:
        watchdog.step_made(1)
    for group in (dist.group.WORLD, background):
        gloo = group._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        print(int(gloo.options._timeout.total_seconds()), flush=True)


def test_after_the_first_step_collectives_of_training_have_the_short_timeout_and_others_keep_theirs(
    tmp_path: Path,
) -> None:
    assert end(start_ranks(2, waits_past_the_first_step, tmp_path), BOUND) == [0, 0]
    assert (tmp_path / "said-0").read_text().split() == ["60", "1800"]  # gloo's own default
    assert collective_timeout(600).total_seconds() > 600


def test_a_watchdog_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(Ranks(0, 1, 0, "alone"), tmp_path, HANGS):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# --- the verdict ---


def sign(phase: str, **collectives: int) -> Sign:
    return Sign("node7", step=9, phase=phase, phase_seconds=12.0, collectives=collectives, posted=100.0)


def test_in_hybrid_sharding_the_rank_is_named_that_the_others_wait_for_not_those_that_wait_for_it() -> None:
    # Shards are of ranks 0-1 and 2-3, replicas of ranks 0, 2 and 1, 3. Rank 1 sleeps before its shard's 8th.
    signs = {
        0: sign("forward", a=8, x=3),
        1: sign("data", a=7, y=3),
        2: sign("backward", b=9, x=4),
        3: sign("backward", b=9, y=4),
    }
    verdict, *others = explain(signs, 4, answered=range(4), now=112.0).splitlines()
    assert verdict == (
        "rank 1 on node7 is late: in step 10, data for 12 s, it has begun 7 collectives of group a, and the "
        "others wait for it in number 8"
    )
    assert others == ["rank 0 in step 10, forward for 12 s", "ranks 2-3 in step 10, backward for 12 s"]


def test_one_rank_that_made_a_collective_too_many_is_named_and_not_the_many_that_did_not() -> None:
    signs = {rank: sign("forward", default=8) for rank in range(5)} | {2: sign("evaluation", default=9)}
    verdict, *_ = explain(signs, 5, answered=range(5), now=112.0).splitlines()
    assert verdict == (
        "rank 2 on node7 is out of step: in step 10, evaluation for 12 s, it has begun 9 collectives of "
        "group default where the others have begun 8"
    )


def test_where_no_rank_is_behind_no_rank_is_blamed() -> None:
    signs = {rank: sign("checkpoint", default=8) for rank in range(4)}
    text = explain(signs, 4, answered=range(4), now=112.0)
    assert text.startswith("no rank is behind")
    assert text.endswith("ranks 0-3 in step 10, checkpoint for 12 s")


def test_a_lost_node_of_many_ranks_is_told_briefly() -> None:
    signs = {rank: sign("forward", default=8) for rank in range(512)}
    text = explain(signs, 512, answered=range(0, 256), now=160.0)
    assert len(text.splitlines()) < 12
    assert "and ranks 264-511 likewise" in text
    assert "no sign of life for 60 s" in text


def test_a_rank_that_was_never_seen_is_named() -> None:
    signs = {0: sign("forward", default=8)}
    text = explain(signs, 2, answered=[0], now=112.0)
    assert text.startswith("rank 1 is late: it has given no sign of life since the start")


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 2, 3, 4, 7], "ranks 0, 2-4, 7"), ([1, 0], "ranks 0-1")]
)
def test_ranks_are_written_as_ranges(ranks: list[int], text: str) -> None:
    assert ranges(ranks) == text
