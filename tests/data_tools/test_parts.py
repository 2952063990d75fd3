"""A part is made anew when its input changed, found when not, and never made of wrong ids."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_tools import parts
from data_tools.build import build
from data_tools.errors import UserError
from data_tools.fast_bpe import FastBpe
from data_tools.files import checksum
from data_tools.inputs import InputFile, find_inputs
from data_tools.parts import Part, PartTask, make_part
from data_tools.recipe import Recipe
from tests.data_tools.sources import simple_record, write_jsonl


@pytest.fixture
def task(tiny_tokenizer: Path, tmp_path: Path) -> PartTask:
    """A part of five papers and a damaged record."""
    records = [simple_record(number) for number in range(5)]
    path = write_jsonl(tmp_path / "papers.jsonl", [*records, ["no paper"]])
    (tmp_path / "parts").mkdir()
    files = tuple(find_inputs([path]))
    return PartTask("part-00000", files, tmp_path / "parts", tiny_tokenizer, Recipe(max_bad=1.0), fixed=False)


def _made(task: PartTask) -> Part:
    return make_part(task, lambda records, size: None)


def test_the_record_of_a_part_has_the_checksums_of_its_files(task: PartTask) -> None:
    made = _made(task)
    for suffix, file in made.info.files.items():
        path = task.directory / f"part-00000.{suffix}"
        assert (file.bytes, file.checksum) == (path.stat().st_size, checksum(path)), suffix
    assert made.counts.left_out == {"wrong_structure": 1}


def test_a_finished_part_is_found_without_its_input_being_read(
    task: PartTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _made(task)
    _set_clock_of_output(task, seconds=660)

    def fail(files: Sequence[InputFile]) -> None:
        raise AssertionError("the input was read")

    monkeypatch.setattr(parts, "describe", fail)
    monkeypatch.setattr(parts, "ShardReader", fail)
    assert _made(task) == made


def _set_clock_of_output(task: PartTask, seconds: float) -> None:
    """Make the part's record as old as if the server of the output were ahead of that of the input."""
    record = task.directory / "part-00000.json"
    changed = os.stat(task.files[0].path).st_ctime_ns + int(seconds * 1e9)
    os.utime(record, ns=(changed, changed))


def test_a_change_is_noticed_though_the_clock_of_the_inputs_server_is_ten_minutes_behind(
    task: PartTask,
) -> None:
    made = _made(task)
    path = Path(task.files[0].path)
    path.write_text(path.read_text().replace("the", "eht"))
    _set_clock_of_output(task, seconds=590)
    assert _made(task).info.inputs.checksum != made.info.inputs.checksum


def test_an_input_that_is_gone_is_one_sentence(task: PartTask) -> None:
    os.unlink(task.files[0].path)
    with pytest.raises(UserError, match=r"The input .*papers\.jsonl cannot be read: No such file"):
        _made(task)


def test_an_input_with_other_content_of_the_same_size_and_date_makes_the_part_anew(task: PartTask) -> None:
    made = _made(task)
    path = Path(task.files[0].path)
    before = path.stat()
    path.write_text(path.read_text().replace("the", "eht"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    again = _made(task)
    assert again.info.inputs.checksum != made.info.inputs.checksum
    assert again.info.files["bin"] != made.info.files["bin"]


def test_an_input_that_changes_while_it_is_read_makes_no_part(task: PartTask) -> None:
    def touch(records: int, size: int) -> None:
        os.utime(task.files[0].path)

    with pytest.raises(UserError, match="changed while it was read"):
        make_part(task, touch)
    assert not (task.directory / "part-00000.json").exists()


def test_an_input_that_was_only_touched_leaves_its_part_alone(task: PartTask) -> None:
    made = _made(task)
    os.utime(task.files[0].path)
    ids = task.directory / "part-00000.bin"
    before = ids.stat().st_mtime_ns
    assert _made(task) == made
    assert ids.stat().st_mtime_ns == before


def test_a_build_whose_fast_encoder_errs_stops_at_the_document_and_leaves_no_corpus(
    task: PartTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = FastBpe.encode

    def broken(self: FastBpe, text: str) -> np.ndarray:
        ids = sound(self, text).copy()
        ids[7] += 1
        return ids

    monkeypatch.setattr(FastBpe, "encode", broken)
    with pytest.raises(
        UserError, match=r"tokenizer\.model .* papers\.jsonl:1 other ids .* first at token 7:"
    ):
        build([Path(task.files[0].path)], task.tokenizer, tmp_path / "corpus", task.recipe, workers=1)
    assert not (tmp_path / "corpus").exists()
