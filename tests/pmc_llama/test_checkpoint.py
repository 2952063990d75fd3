"""Checkpoints appear whole or not at all; damage is named; the right ones are kept."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.errors import UserError
from pmc_llama import checkpoint
from pmc_llama.checkpoint import Manifest


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _state(value: float) -> dict[str, Tensor]:
    return {"model.weight": torch.full((5, 3), value), "optim.step": torch.tensor(int(value))}


def _save(root: Path, step: int) -> Path:
    tokenizer = root.parent / "some.model"
    tokenizer.write_bytes(b"pieces")
    return checkpoint.save(
        _state(step),
        root,
        lambda files: Manifest(
            step=step,
            updates=step,
            samples=step * 8,
            tokens=step * 64,
            data={},
            guard={},
            recipe={"seed": 0},
            model_config={},
            corpus="abc",
            versions={},
            files=files,
        ),
        tokenizer,
        dist.group.WORLD,
    )


def test_what_was_saved_is_loaded_and_verified(tmp_path: Path) -> None:
    path = _save(tmp_path / "checkpoints", 7)
    state = _state(0)
    checkpoint.load(state, path, dist.group.WORLD)
    assert torch.equal(state["model.weight"], _state(7)["model.weight"])
    manifest = checkpoint.verify(path)
    assert (manifest.step, manifest.samples, manifest.tokens) == (7, 56, 448)
    assert {file.name for file in path.iterdir()} == {*manifest.files, "manifest.json"}
    assert (path / "tokenizer.model").read_bytes() == b"pieces"


def test_a_checkpoint_of_a_later_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    _save(root, 1)
    manifest = _save(root, 2) / "manifest.json"
    values = json.loads(manifest.read_text())
    later = {**values, "format": checkpoint.FORMAT + 1, "versions": {"pmc-llama": "9.1"}, "more": 1}
    manifest.write_text(json.dumps(later))
    for refuse in (
        lambda: checkpoint.verify(manifest.parent),
        lambda: checkpoint.newest_sound(root, dist.group.WORLD, pytest.fail),
    ):
        with pytest.raises(checkpoint.NewerFormat, match=r"step-00000002 has format 3, .* pmc-llama 9\.1"):
            refuse()
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step-00000001", "step-00000002"]


def test_every_file_is_under_a_checksum_and_damage_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path / "checkpoints", 1)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        if file.name != "manifest.json":
            flipped = bytearray(whole)
            flipped[len(whole) // 2] ^= 1
            for content in (bytes(flipped), whole[:-1]):
                file.write_bytes(content)
                with pytest.raises(UserError, match=file.name.replace(".", r"\.")):
                    checkpoint.verify(path)
        file.unlink()
        with pytest.raises(UserError, match=file.name.replace(".", r"\.")):
            checkpoint.verify(path)
        file.write_bytes(whole)
    checkpoint.verify(path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    older, newer = _save(root, 1), _save(root, 2)
    (newer / "manifest.json").write_text("{")
    said: list[str] = []
    assert checkpoint.newest_sound(root, dist.group.WORLD, said.append) == older
    assert len(said) == 1
    assert "step-00000002" in said[0]
    (older / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match="Every checkpoint"):
        checkpoint.newest_sound(root, dist.group.WORLD, said.append)


def test_unfinished_directories_are_never_taken_for_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert checkpoint.newest_sound(root, dist.group.WORLD, print) is None
    finished = _save(root, 3)
    finished.rename(root / ".writing")
    (root / "step-00000004.tmp").mkdir()
    assert checkpoint.list_checkpoints(root) == []
    assert _save(root, 5) == root / "step-00000005"
    assert checkpoint.list_checkpoints(root) == [root / "step-00000005"]


def test_a_failed_write_leaves_the_older_checkpoint_and_says_where(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    older = _save(root, 1)
    (root / ".writing").write_text("a file where a directory must be")
    with pytest.raises(UserError, match="writing"):
        _save(root, 2)
    assert checkpoint.list_checkpoints(root) == [older]
    checkpoint.verify(older)


def test_a_write_that_the_disk_refuses_leaves_the_older_checkpoint_and_nothing_half_done(
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoints"
    older = _save(root, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk were full after 100 bytes
    try:
        with pytest.raises(UserError, match=r"could not be written.*GB are free"):
            _save(root, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in root.iterdir()] == [older.name]
    checkpoint.verify(older)


def test_what_a_kill_left_half_done_is_cleared_and_what_was_whole_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    whole = _save(root, 1)
    whole.rename(root / f".replaced-{whole.name}")  # killed between the two renames of a replacement
    _save(root, 2).rename(root / ".removing-step-00000002")
    _save(root, 3).rename(root / ".writing")
    checkpoint.tidy(root)
    assert [path.name for path in root.iterdir()] == [whole.name]
    checkpoint.verify(whole)
    checkpoint.tidy(tmp_path / "not there yet")


def test_what_is_published_after_damage_is_the_newest(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    _save(root, 6)
    (_save(root, 12) / "__0_0.distcp").write_bytes(b"damaged")
    assert checkpoint.newest_sound(root, dist.group.WORLD, print) == root / "step-00000006"
    _save(root, 8)
    checkpoint.prune(root, keep_last=1, keep_every=0)
    assert sorted(path.name for path in root.iterdir()) == ["damaged-step-00000012", "step-00000008"]


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"a": 3}},
        {"files": {"__0_0.distcp": {"bytes": 1, "xxh3_128": "0"}}},
        {"files": []},
        {"unknown": 1},
    ],
)
def test_a_manifest_that_makes_no_sense_is_damage(tmp_path: Path, change: dict[str, object]) -> None:
    path = _save(tmp_path / "checkpoints", 1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.verify(path.parent)


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    (_save(root, 1) / "__0_0.distcp").write_bytes(b"damaged")
    checkpoint.verify(_save(root, 1))
    assert [path.name for path in root.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [(1, 0, [5]), (2, 0, [4, 5]), (9, 0, [1, 2, 3, 4, 5]), (1, 2, [2, 4, 5])],
)
def test_retention_by_count_and_by_interval(
    tmp_path: Path, keep_last: int, keep_every: int, expected: list[int]
) -> None:
    root = tmp_path / "checkpoints"
    for step in range(1, 6):
        _save(root, step)
    checkpoint.prune(root, keep_last, keep_every)
    assert [checkpoint.read_manifest(path).step for path in checkpoint.list_checkpoints(root)] == expected
    assert len(list(root.iterdir())) == len(expected)


def test_loading_into_another_shape_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "checkpoints", 1)
    for state in ({"model.weight": torch.zeros(4, 3)}, {"model.other": torch.zeros(5, 3)}):
        with pytest.raises(UserError, match=r"could not be loaded.*model\."):
            checkpoint.load(dict(state), path, dist.group.WORLD)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_manifest(tmp_path)
