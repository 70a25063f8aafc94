"""Several safetensors files put together as one, byte by byte: no tensor comes into memory.

The format: eight bytes with the header's length, the header as JSON (dtype, shape and place of every tensor), the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 22  # bytes that are copied at once
ALIGNED = 8  # bytes: where the data begin, and so do the widest numbers
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its row of the header, and where its bytes lie."""

    row: dict[str, Any]
    path: Path
    start: int
    size: int

    @property
    def width(self) -> int:
        """Return the bytes of a number; what is not known may be as wide as any."""
        return WIDTHS.get(self.row["dtype"], ALIGNED)


def join(parts: Sequence[Path], file: Path, renamed: Callable[[str], str]) -> list[str]:
    """Write all tensors of ``parts`` into ``file``, by the names that ``renamed`` gives; return these, in order.

    Wide numbers come first, so that each begins where its width asks.
    """
    found = {renamed(name): tensor for part in parts for name, tensor in tensors(part)}
    names = sorted(found, key=lambda name: (-found[name].width, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = found[name]
        header[name] = {**tensor.row, "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _copy(found[name], out)
    return names


def tensors(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield name and place of every tensor in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, row in header.items():
        if name != "__metadata__":
            first, last = row["data_offsets"]
            yield name, Stored({"dtype": row["dtype"], "shape": row["shape"]}, path, 8 + length + first, last - first)


def _copy(tensor: Stored, out: Any) -> None:
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.size
        while left:
            chunk = file.read(min(left, CHUNK))
            if not chunk:
                raise OSError(f"{os.fspath(tensor.path)} ends early")
            out.write(chunk)
            left -= len(chunk)
