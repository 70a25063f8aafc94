"""Images from files, folders and scikit-learn; what does not fit is refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qtoolkit.errors import DataError, RequestError
from qtoolkit.vision import data
from qtoolkit.vision.models import Augment, table

LENET = table()["lenet"]


def test_npz_images_keep_their_pixels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "i.npz", x=x, y=np.arange(5))
    images = data.load(str(tmp_path / "i.npz"), LENET)
    assert torch.equal(images.x[:, 0], torch.from_numpy(x))
    assert images.y.tolist() == [0, 1, 2, 3, 4]


def test_a_folder_of_images_gives_classes_in_alphabetical_order(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30), (label * 255,) * 3).save(tmp_path / name / "1.png")
    images = data.load(str(tmp_path), LENET)
    assert images.x.shape == (2, 1, 28, 28)
    assert images.y.tolist() == [0, 1]
    assert images.x[1].float().mean() == 255


def test_digits_are_split_once_and_for_all() -> None:
    digits = table()["digits"]
    assert len(data.load("digits-train", digits)) == 1297
    assert len(data.load("digits-test", digits)) == 500


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere"):
        data.load("nowhere", LENET)
    with pytest.raises(DataError, match="8"):
        data.load("digits", LENET)
    np.savez(tmp_path / "f.npz", x=np.zeros((5, 28, 28)), y=np.arange(5))
    with pytest.raises(DataError, match="uint8"):
        data.load(str(tmp_path / "f.npz"), LENET)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        data.load(str(tmp_path / "empty"), LENET)


def test_augmentation_only_shifts_and_mirrors() -> None:
    x = torch.zeros(64, 1, 9, 9, dtype=torch.uint8)
    x[:, 0, 4, 4] = 7
    moved = data.augmented(x, Augment(crop=2, flip=True), torch.Generator().manual_seed(0))
    assert (moved == 7).sum(dim=(1, 2, 3)).eq(1).all()
    places = (moved[:, 0] == 7).nonzero()[:, 1:]
    assert places.min() == 2
    assert places.max() == 6


def test_an_epoch_sees_every_image_of_its_full_batches_once() -> None:
    images = data.Images(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))
    seen = [y for _, y in images.epoch(4, LENET, torch.Generator().manual_seed(0))]
    assert sorted(torch.cat(seen).tolist()) == sorted(set(torch.cat(seen).tolist()))
    assert len(seen) == 2


def test_a_data_set_in_the_hubs_form_gives_pixels_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # a data set of that name on the disk is read as one of the hub is
    pictures = [Image.new("L", (28, 28), level) for level in (0, 100, 255)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1, 1]}, features=features)
    (tmp_path / "owner" / "shades").mkdir(parents=True)
    rows.to_parquet(tmp_path / "owner" / "shades" / "test-00000-of-00001.parquet")
    images = data.load("owner/shades:test", LENET)
    assert images.y.tolist() == [0, 1, 1]
    assert images.x.flatten(1).float().mean(dim=1).tolist() == [0, 100, 255]


def test_mixed_images_hold_at_most_half_of_another_one_and_all_views_get_the_same() -> None:
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 2, 8, 8)  # image i is all i
    views = data.mixed([x, x + 100], 0.75, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views[1], views[0] + 100)
    changed = (views[0] != x).flatten(1)
    assert 0.5 < changed.any(dim=1).float().mean() < 0.95  # 0.75 of 64 images; the smallest parts round to nothing
    pasted = changed.any(dim=1) & ~changed.all(dim=1)
    assert changed[pasted].float().mean(dim=1).max() <= 36 / 64  # a side of sqrt(1/2) * 8 rounds to 6
    assert torch.equal(views[0][pasted], views[0][pasted].round())  # pixels of one image or of the other
    blended = views[0][changed.all(dim=1)][:, 0, 0, 0]
    assert len(blended) > 8
    assert (blended != blended.round()).all()
    assert torch.equal(data.mixed([x], 0.0, torch.Generator().manual_seed(0))[0], x)
