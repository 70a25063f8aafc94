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


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_somebody_elses_by_the_name_of_the_runs_own_is_left_alone(fresh: bool, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    for name in ("lock", "job.json"):  # one of the two alone says nothing
        with pytest.raises(RequestError, match="was not made by a run"):
            Job.open(tmp_path / "out", {}, fresh=fresh)
        (mine.parent / name).write_text("{}")
        assert mine.read_text() == "mine"
        (mine.parent / name).rename(tmp_path / name)


def test_a_folder_called_replaced_beside_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "notes.txt").write_text("mine")
    finish(Job.open(tmp_path / "out", {}))
    finish(Job.open(tmp_path / "out", {}, fresh=True))
    assert (tmp_path / "out.replaced" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_by_that_name_is_taken_and_an_output_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    finish(Job.open(tmp_path / "out", {}))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(RequestError, match="unfinished run's folder"):
        Job.open(tmp_path / "out.partial", {})


def test_a_checkpoint_moved_away_to_be_replaced_is_put_back_when_the_run_is_killed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(Job.open(tmp_path / "out", {}), "old")

    move = os.replace

    def killed(source: Path, target: Path) -> None:
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        move(source, target)

    job = Job.open(tmp_path / "out", {}, fresh=True)
    job.save("other", {"weight": torch.zeros(2)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(job)
    job.close()
    assert not (tmp_path / "out").exists()
    again = Job.open(tmp_path / "out", {}, fresh=True)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == "old"
    finish(again, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_that_was_to_be_replaced_is_not_taken_for_the_result(tmp_path: Path) -> None:
    finish(Job.open(tmp_path / "out", {"recipe": 1}), "old")
    stopped = Job.open(tmp_path / "out", {"recipe": 2}, fresh=True)
    stopped.save("block", {"weight": torch.ones(2)})
    stopped.close()
    with pytest.raises(RequestError, match="already holds a finished checkpoint"):
        Job.open(tmp_path / "out", {"recipe": 2})


def test_another_recipe_is_told_by_the_keys_that_differ(tmp_path: Path) -> None:
    first = Job.open(tmp_path / "out", {"recipe": {"steps": {"gptq": {"damping": 0.01}}, "seed": 1}})
    first.save("block", {"weight": torch.ones(2)})
    first.close()
    with pytest.raises(RequestError, match=r"another recipe\.steps\.gptq\.damping 0\.01, now not given\.") as caught:
        Job.open(tmp_path / "out", {"recipe": {"steps": {"gptq": {}}, "seed": 1}})
    assert "seed" not in caught.value.message
    with pytest.raises(RequestError, match=r"; 1 more\."):
        Job.open(tmp_path / "out", dict.fromkeys("abc", 1) | {"recipe": {}})


@pytest.mark.parametrize("text", ["{", "[1]", "\ud800 x", ""])
def test_a_damaged_word_of_the_options_is_one_sentence_and_fresh_starts_anew(text: str, tmp_path: Path) -> None:
    first = Job.open(tmp_path / "out", {})
    first.save("block", {"weight": torch.ones(2)})
    first.close()
    (tmp_path / "out.partial" / "job.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(QToolkitError, match=r"job\.json of an interrupted run is damaged") as caught:
        Job.open(tmp_path / "out", {})
    assert "--fresh" in caught.value.hint
    finish(Job.open(tmp_path / "out", {}, fresh=True))


@pytest.mark.parametrize("size", [0, 5, 90])
def test_a_damaged_part_is_named(size: int, tmp_path: Path) -> None:
    job = Job.open(tmp_path / "out", {})
    job.save("block", {"weight": torch.ones(64)}, {"word": 1})
    assert job.facts("block") == {"word": 1}
    part = job.file("block")
    part.write_bytes(part.read_bytes()[:size])
    for read in (job.tensors, job.facts):
        with pytest.raises(QToolkitError, match=r"block\.safetensors of an interrupted run is damaged") as caught:
            read("block")
        assert "--fresh" in caught.value.hint
