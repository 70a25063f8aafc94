"""Labelled images: `.npz` files, folders with one subfolder a class, hub data sets, and scikit-learn's digits."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtoolkit.errors import DataError, RequestError
from qtoolkit.vision.models import Architecture, Augment, Fit

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
DIGITS_TRAIN = 1297  # of scikit-learn's 1797 digits; the other 500 are the test set


@dataclass(frozen=True)
class Images:
    """Images uint8 [n, channels, height, width] and their classes int64 [n]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, count: int) -> Images:
        """Return the first ``count`` images, or all when there are fewer."""
        return Images(self.x[:count], self.y[:count])

    def batches(self, size: int, architecture: Architecture) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised float32 images and classes in order."""
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            yield normalise(x, architecture), y

    def epoch(
        self, size: int, architecture: Architecture, generator: torch.Generator, views: int = 1
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield shuffled batches: ``views`` differently augmented normalised versions, and classes.

        The last, smaller batch is left out, unless it is the only one.
        """
        order = torch.randperm(len(self), generator=generator)
        for part in order.split(size):
            if len(part) == size or len(order) < size:
                raw = [augmented(self.x[part], architecture.augment, generator) for _ in range(views)]
                yield [normalise(x, architecture) for x in raw], self.y[part]


def normalise(x: Tensor, architecture: Architecture) -> Tensor:
    """Return images uint8 [n, c, h, w] as the network wants them: float32, (x / 255 - mean) / std."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (architecture.mean, architecture.std))
    return (x.float() / 255 - mean) / std


def augmented(x: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Return images shifted at random by up to ``crop`` pixels (borders black) and mirrored every second time."""
    n, _, height, width = x.shape
    if augment.crop:
        padded = F.pad(x, (augment.crop,) * 4)
        top, left = torch.randint(0, 2 * augment.crop + 1, (2, n), generator=generator)
        rows = top.view(n, 1) + torch.arange(height)  # [n, height]
        columns = left.view(n, 1) + torch.arange(width)
        x = padded[torch.arange(n).view(n, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
    if augment.flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        x = torch.where(mirrored.view(n, 1, 1, 1), x.flip(-1), x)
    return x


def mixed(views: list[Tensor], share: float, generator: torch.Generator) -> list[Tensor]:
    """Return views [n, c, h, w] of which the part ``share`` has up to a half of another image of the batch in it.

    Every second one is blended (mixup, Zhang et al. 2018), the others get a rectangle of it (CutMix, Yun et al. 2019);
    all views get the same. What such images show only a teacher can say: labels stay those of the larger half.
    """
    n, _, height, width = views[0].shape
    partner, chosen = torch.randperm(n, generator=generator), torch.rand(n, generator=generator) < share
    part = torch.rand(n, generator=generator) / 2 * chosen
    blended = torch.rand(n, generator=generator) < 0.5
    top, left = torch.rand(2, n, generator=generator)  # of the rectangle, as a part of the room there is for it
    side = part.sqrt()
    rows = _within(height, side, top).unsqueeze(2)  # [n, height, 1]
    columns = _within(width, side, left).unsqueeze(1)  # [n, 1, width]
    amount = torch.where(blended.view(n, 1, 1), part.view(n, 1, 1), (rows & columns).float()).unsqueeze(1)
    return [x.lerp(x[partner], amount) for x in views]


def _within(length: int, part: Tensor, start: Tensor) -> Tensor:
    """Return bool [n, length]: the pixels of a line that a run of ``part`` of it covers."""
    size = (part * length).round()
    first = (start * (length - size)).round().unsqueeze(1)
    place = torch.arange(length)
    return (place >= first) & (place < first + size.unsqueeze(1))


def load(name: str, architecture: Architecture) -> Images:
    """Return the images of ``name`` in the size and with the channels the network takes.

    Args:
        name: ``.npz`` file with ``x`` uint8 [n, h, w] or [n, h, w, c] and ``y``; a folder with one subfolder a
            class, in alphabetical order; ``digits-train`` or ``digits-test``; or a hub data set ``org/name[:split]``.
        architecture: gives channels and size; folders and hub images are scaled to it.

    Raises:
        RequestError: no such file, folder or data set.
        DataError: the data is empty, damaged, or does not fit the network.
    """
    path = Path(name).expanduser()
    if name in ("digits", "digits-train", "digits-test"):
        images = _digits(test=name.endswith("test"))
    elif path.is_file() and path.suffix == ".npz":
        images = _npz(path)
    elif path.is_dir():
        images = _folder(path, architecture)
    elif name.split(":")[0].count("/") == 1 and not name.startswith((".", "/", "~")):
        images = _hub(name, architecture)
    else:
        raise RequestError(
            f"There is no image data {name!r}.", "Give an .npz file, a folder with one subfolder a class, or digits."
        )
    if not len(images):
        raise DataError(f"The image data {name} is empty.")
    if tuple(images.x.shape[1:]) != architecture.input:
        raise DataError(
            f"The images of {name} are {list(images.x.shape[1:])}, the network takes {list(architecture.input)}."
        )
    return images


def _npz(path: Path) -> Images:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as images: {reason}.", "It needs the arrays x and y.") from None
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) != len(y):
        raise DataError(f"{path}: x is {x.dtype} {list(x.shape)}, y {list(y.shape)}; x must be uint8 [n, h, w(, c)].")
    pixels = torch.from_numpy(x if x.ndim == 4 else x[..., None]).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.from_numpy(y.astype("int64")))


def _digits(*, test: bool) -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)  # 8x8, 17 grey levels
    y = torch.from_numpy(found.target).long()
    part = slice(DIGITS_TRAIN, None) if test else slice(None, DIGITS_TRAIN)
    return Images(x[part], y[part])


def _folder(path: Path, architecture: Architecture) -> Images:
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    found = [
        (to_pixels(file, architecture), label)
        for label, folder in enumerate(classes)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in EXTENSIONS
    ]
    if not found:
        raise DataError(f"{path} holds no images.", "It needs one subfolder a class with images inside.")
    return Images(torch.stack([x for x, _ in found]), torch.tensor([label for _, label in found]))


def _hub(name: str, architecture: Architecture) -> Images:
    from datasets import load_dataset

    repo, _, split = name.partition(":")
    try:
        rows = load_dataset(repo, split=split or "train")
        image = next(key for key in ("image", "img") if key in rows.column_names)
        found = [(to_pixels(row[image], architecture), int(row["label"])) for row in rows]
    except (OSError, ValueError, KeyError, RuntimeError, StopIteration) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"The data set {repo} could not be read: {reason}", "Without network, give a file.") from None
    return Images(torch.stack([x for x, _ in found]), torch.tensor([label for _, label in found]))


def to_pixels(image: Any, architecture: Architecture) -> Tensor:
    """Return a file's or PIL image as uint8 [channels, height, width] in the network's size.

    Raises:
        DataError: it is not an image.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    channels, height, width = architecture.input
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        fitted = _fitted(opened.convert("L" if channels == 1 else "RGB"), (height, width), architecture.fit)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"This is not an image that can be read: {' '.join(str(error).split())}.") from None
    pixels = torch.from_numpy(np.asarray(fitted).copy())
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


def _fitted(image: Any, size: tuple[int, int], fit: Fit) -> Any:
    """Return a PIL image scaled as ``fit`` says, then its middle of ``size`` (height, width)."""
    from PIL import Image

    width, height = image.size
    if fit.shortest:
        short, long = sorted((width, height))
        longer = int(fit.shortest * long / short)
        scaled = (fit.shortest, longer) if height >= width else (longer, fit.shortest)  # width, height
    else:
        scaled = (fit.squeeze or size)[::-1]
    image = image.resize(scaled, Image.Resampling[fit.resample.upper()])
    left, top = (scaled[0] - size[1]) // 2, (scaled[1] - size[0]) // 2
    return image if scaled == size[::-1] else image.crop((left, top, left + size[1], top + size[0]))
