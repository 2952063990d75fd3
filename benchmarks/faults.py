"""How a run takes faults: stories of killed ranks, cut writes, full disks and damaged checkpoints, tallied.

Each story is a run of 24 steps on two ranks that meets some faults at instants drawn from its seed, under
either backend, the same command after each (`tests/pmc_llama/faults.py`). Its losses are compared, bit by
bit, with those of a run that met none, and no complete checkpoint may be lost on the way.

    python -m benchmarks.faults
"""

import argparse
import shutil
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from time import monotonic

from data_tools.build import build
from data_tools.recipe import Decisions, Recipe
from tests.data_tools.sources import simple_record, write_jsonl
from tests.pmc_llama.faults import Story, small_disk, story_command
from tests.pmc_llama.runs import finish, numbers

_TOKENIZER = Path(__file__).parents[1] / "sample" / "tokenizer.model"


def main() -> None:
    """Tell the stories and print the tally; ends with status 1 at the first that goes wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=60, help="in all (default 60)")
    parser.add_argument("--each", type=int, default=4, help="in one story at most (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first story")
    options = parser.parse_args()
    tally: Counter[str] = Counter()
    begin = monotonic()
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "disk") as disk:
        directory = Path(name)
        command = _command(directory)
        finish([*command, "--backend", "fsdp", "--output", str(directory / "uninterrupted")])
        expected = numbers(directory / "uninterrupted")
        for seed in count(options.seed):
            if tally.total() >= options.faults:
                break
            run = (disk or directory) / f"run-{seed}"
            story = Story(run, [*command, "--output", str(run)], seed, small_disk=disk is not None)
            story.suffer(options.each)
            story.end()
            if numbers(run) != expected:
                raise SystemExit(f"story {seed} has other numbers: {story.told}")
            tally.update(told.partition(":")[0] for told in story.told)
            print(f"story {seed} ({monotonic() - begin:.0f} s): {'; '.join(story.told)}", flush=True)
            shutil.rmtree(run)
    print(f"\n{tally.total()} faults in {seed - options.seed} runs, {monotonic() - begin:.0f} s:")
    for fault, times in sorted(tally.items()):
        print(f"  {times:3} {fault}")
    print("no complete checkpoint lost, every loss the same bits as without faults")


def _command(directory: Path) -> list[str]:
    """A small corpus, and the arguments of a run on it."""
    records = [simple_record(number, words=10 + 7 * number) for number in range(60)]
    write_jsonl(directory / "papers.jsonl", records)
    recipe = Recipe(decisions=Decisions(heldout=0.1))
    build([directory / "papers.jsonl"], _TOKENIZER, directory / "corpus", recipe, workers=1)
    return story_command(directory / "corpus", directory)


if __name__ == "__main__":
    main()
