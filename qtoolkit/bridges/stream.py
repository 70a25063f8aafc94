"""Weight files written one tensor after another, so that none need fit in memory; an index when there are several.

The format is safetensors: eight bytes of header length, a JSON header (blanks may fill it up), the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from qtoolkit.assembly import SHARD_BYTES
from qtoolkit.checkpoint import write_json

ENTRY = 200  # bytes of a tensor's header entry beside its name: dtype, shape of a few dimensions, two offsets
ALIGNED = 8  # tensors of whole multiples of it may follow each other in any order and stay aligned
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Stream:
    """The weight files of one folder, written in the order in which tensors come."""

    def __init__(self, folder: Path, names: Iterable[str], limit: int = SHARD_BYTES) -> None:
        """Prepare for tensors of these ``names``; no file gets more than ``limit`` bytes unless one tensor has more."""
        self.folder, self.limit = folder, limit
        room = sum(len(json.dumps(name)) + ENTRY for name in names) + ENTRY
        self._room = room + -room % ALIGNED
        self._files: list[list[str]] = []  # the names in each file
        self._waiting: list[tuple[str, Tensor]] = []  # odd sizes wait for the end of the file
        self._header: dict[str, object] = {}
        self._out: IO[bytes] | None = None
        self._size = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, which may be forgotten after that."""
        if self._out is not None and self._size + tensor.nbytes > self.limit:
            self._close()
        if self._out is None:
            self._open()
        self._size += tensor.nbytes
        self._total += tensor.nbytes
        self._files[-1].append(name)
        if tensor.nbytes % ALIGNED:
            self._waiting.append((name, tensor))
        else:
            self._write(name, tensor)

    def finish(self) -> dict[str, int]:
        """Close the last file, name the files by their number, and return the size of each."""
        if self._out is not None:
            self._close()
        count = len(self._files)
        sizes: dict[str, int] = {}
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / name)
            sizes[name] = (self.folder / name).stat().st_size
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self.folder / "model.safetensors.index.json", index)
        return sizes

    def _part(self, number: int) -> Path:
        return self.folder / f"shard-{number}"

    def _open(self) -> None:
        self._files.append([])
        self._header, self._size = {"__metadata__": {"format": "pt"}}, 0
        self._out = self._part(len(self._files)).open("wb")
        self._out.write(bytes(8 + self._room))

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._out is not None
        begin = self._out.tell() - 8 - self._room
        self._out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        offsets = [begin, begin + tensor.nbytes]
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def _close(self) -> None:
        assert self._out is not None
        for name, tensor in sorted(self._waiting, key=lambda pair: -pair[1].element_size()):
            self._write(name, tensor)
        self._waiting.clear()
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room, "a tensor was added that was not announced"
        self._out.seek(0)
        self._out.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._out.close()
        self._out = None
