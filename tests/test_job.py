"""A run's folder on disk: where it may be, who may write in it, and what a fresh start does to what is there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from qtoolkit.checkpoint import MANIFEST
from qtoolkit.errors import QToolkitError, RequestError
from qtoolkit.job import Job


def finish(job: Job, word: str = "new") -> None:
    """Publish a folder that holds a manifest, one weight file and ``word``."""
    job.save("block", {"weight": torch.zeros(2)})
    job.staging.mkdir()
    (job.staging / MANIFEST).write_text(json.dumps(word))
    (job.folder / "block.safetensors").rename(job.staging / "model.safetensors")
    job.publish()


def test_publishing_leaves_the_output_and_nothing_beside_it(tmp_path: Path) -> None:
    finish(Job.open(tmp_path / "a folder" / "größe", {}))
    assert [path.name for path in (tmp_path / "a folder").iterdir()] == ["größe"]


def test_everybody_who_may_read_one_file_of_a_checkpoint_may_read_all(tmp_path: Path) -> None:
    finish(Job.open(tmp_path / "out", {}))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_a_fresh_run_replaces_a_finished_checkpoint_when_it_ends_and_not_before(tmp_path: Path) -> None:
    finish(Job.open(tmp_path / "out", {}), "old")
    job = Job.open(tmp_path / "out", {}, fresh=True)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == "old"
    finish(job, "new")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fresh_run_does_not_take_the_folder_of_one_at_work(tmp_path: Path) -> None:
    at_work = Job.open(tmp_path / "out", {"recipe": 1})
    at_work.save("block", {"weight": torch.ones(2)})
    for fresh in (False, True):
        with pytest.raises(RequestError, match="Another run is writing"):
            Job.open(tmp_path / "out", {"recipe": 2}, fresh=fresh)
    assert at_work.has("block")
    at_work.close()
    assert not Job.open(tmp_path / "out", {"recipe": 2}, fresh=True).has("block")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    finish(Job.open(tmp_path / "out", {}))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model" / MANIFEST).is_file()
    with pytest.raises(RequestError, match="finished checkpoint"):
        Job.open(tmp_path / "out", {})


def test_a_place_that_can_hold_nothing_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QToolkitError, match="Not a directory"):
        Job.open(tmp_path / "file" / "out", {})
    with pytest.raises(QToolkitError, match="name too long"):
        Job.open(tmp_path / ("x" * 300), {})
    with pytest.raises(RequestError, match="mount point"):
        Job.open(Path(os.sep), {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_full_at_the_start_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtoolkit.job.write_json", full)
    with pytest.raises(QToolkitError, match="disk is full"):
        Job.open(tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []
