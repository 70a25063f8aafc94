"""Batches that wait on the disk: what was put there comes back, and nothing stays."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from qtoolkit.errors import QToolkitError
from qtoolkit.stages import Stream, put
from qtoolkit.waiting import Waiting

BATCHES = [torch.randn(2, 5, 8), torch.randn(1, 3, 8), torch.randn(0, 3, 8), torch.randn(2, 5, 8)]


def test_batches_come_back_as_they_were(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, BATCHES)
    assert len(waiting) == 4
    for found, wanted in zip(waiting, BATCHES, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(waiting[-1], BATCHES[-1])
    assert [each.shape for each in waiting[1:3]] == [each.shape for each in BATCHES[1:3]]
    with pytest.raises(IndexError):
        waiting[4]
    waiting.append(BATCHES[1])
    assert torch.equal(waiting[4], BATCHES[1])
    assert torch.equal(waiting[3], BATCHES[3])


def test_what_is_put_there_replaces_one_batch(tmp_path: Path) -> None:
    waiting, listed = Waiting(tmp_path, BATCHES), [batch.clone() for batch in BATCHES]
    new = torch.randn(8, 3, 1).transpose(0, 2)  # in another order of memory
    waiting[0].zero_()  # a copy
    for batches in (waiting, listed):
        put(batches, 1, new)
    for found, wanted in zip(waiting, listed, strict=True):
        assert torch.equal(found, wanted)


def test_a_stream_reads_both_alike(tmp_path: Path) -> None:
    kwargs = [{"number": number} for number in range(4)]
    waiting, listed = (Stream(batches, kwargs) for batches in (Waiting(tmp_path, BATCHES), BATCHES))
    assert waiting.shapes() == listed.shapes() == [(2, 5), (1, 3), (0, 3), (2, 5)]
    for (found, one), (wanted, other) in zip(waiting.calls(), listed.calls(), strict=True):
        assert torch.equal(found, wanted)
        assert one == other


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, BATCHES)
    assert not list(tmp_path.iterdir())  # the file has no name: even a killed run leaves none
    del waiting


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(tmp_path, BATCHES)

    class Full:
        def seek(self, place: int) -> None: ...
        def write(self, data: memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(waiting, "_file", Full())
    with pytest.raises(QToolkitError, match="the disk is full"):
        waiting[0] = BATCHES[0]
