"""Batches of hidden states that wait on the disk between two blocks, so that blocks have the memory for themselves.

The file has no name, so that nothing is left of it, whatever ends the run. What it holds stays in the system's cache
as far as there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import overload

import torch
from torch import Tensor

from qtoolkit.job import disk_errors


class Waiting(Sequence[Tensor]):
    """Batches of one dtype as a list has them, each read anew from the disk when it is asked for."""

    def __init__(self, folder: Path, batches: Iterable[Tensor] = (), dtype: torch.dtype = torch.float32) -> None:
        """Write ``batches`` to a file in ``folder``; more may be appended.

        Raises:
            QToolkitError: the disk is full, or does not take it.
        """
        self.folder, self.dtype = folder, dtype
        self.shapes: list[torch.Size] = []
        self._places = [0]  # where each batch begins, and the next one will
        with disk_errors(folder):
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed with this
        for batch in batches:
            self.append(batch)

    def append(self, batch: Tensor) -> None:
        """Write one more batch."""
        self.shapes.append(batch.shape)
        self._places.append(self._places[-1] + self.dtype.itemsize * batch.numel())
        self[len(self) - 1] = batch

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, number: int) -> Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tensor]: ...
    def __getitem__(self, number: int | slice) -> Tensor | list[Tensor]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        batch = torch.empty(self.shapes[number], dtype=self.dtype, device="cpu")
        with disk_errors(self.folder):
            self._file.seek(self._places[:-1][number])
            self._file.readinto(_bytes(batch))
        return batch

    def __setitem__(self, number: int, batch: Tensor) -> None:
        with disk_errors(self.folder):
            self._file.seek(self._places[:-1][number])
            self._file.write(_bytes(batch.to("cpu", self.dtype).contiguous()))


def _bytes(batch: Tensor) -> memoryview:
    return memoryview(batch.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
