"""The sections of a block, one behind another: each reads the hidden stream through its norm and adds to it once.

A decoder layer has two, attention and the MLP. A stream that has passed a section carries what it gave, so that the
layers behind it can be looked at without running it again: in its place come zeros. Where only the last layer of one
was still to be quantized, what that layer was given waits as it will be served, int8, and the layer alone runs again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtoolkit.stages import Block, Way
from qtoolkit.waiting import Waiting


@dataclass(frozen=True)
class Section:
    """A module of a block, the norm through which it reads the hidden stream, and its last layer, which adds to it."""

    module: str
    norm: str
    writer: str

    def holds(self, name: str) -> bool:
        """Tell whether the layer ``name`` is in this section."""
        return name.startswith(f"{self.module}.")


def sections(block: Block) -> list[Section]:
    """Return the sections of ``block`` in order; none where a target is outside, or two read through one norm."""
    found = [Section(writer.partition(".")[0], norm, writer) for writer, norm in block.residual.items()]
    apart = len({each.module for each in found}) == len({each.norm for each in found}) == len(found)
    inside = all(each.norm for each in found) and all(any(each.holds(name) for each in found) for name in block.targets)
    return found if apart and inside else []


def section_of(known: Sequence[Section], name: str) -> int:
    """Return the place of the section that holds the layer ``name``, 0 where none are known."""
    return next((place for place, section in enumerate(known) if section.holds(name)), 0)


def nothing(out: Any) -> Any:
    """Return zeros in the form of a module's output: a tensor, or a tuple that begins with one; they broadcast."""
    if isinstance(out, Tensor):
        return out.new_zeros(out.shape[-1])
    return tuple(nothing(part) if isinstance(part, Tensor) else None for part in out)


class Kept:
    """What the last layer of a section is given, batch by batch, rounded per token; it waits on the disk."""

    def __init__(self, writer: str, form: Any, folder: Path) -> None:
        """Take the layer's name, the form of the section's output (``nothing``), and where to wait."""
        self.writer, self.form = writer, form
        self._codes, self._scales = Waiting(folder, dtype=torch.int8), Waiting(folder)

    def append(self, codes: Tensor, scales: Tensor) -> None:
        """Add a batch: codes int8 [sequences, tokens, k] and scales float32 [sequences, tokens, 1]."""
        self._codes.append(codes)
        self._scales.append(scales)

    def output(self, block: Block, number: int) -> Any:
        """Return what the section gives for a batch, with the layer's weight of now."""
        layer = block.linear(self.writer)
        codes, scales = (waiting[number].to(layer.weight.device) for waiting in (self._codes, self._scales))
        out = layer(codes.to(torch.float32).mul_(scales))
        return out if isinstance(self.form, Tensor) else (out, *self.form[1:])


def outputs(block: Block, way: Way, number: int) -> dict[str, Any]:
    """Return what sections of ``block`` give for a batch without running, by name: nothing any more, or what is kept.

    It is to be asked where nobody rounds the inputs of layers.
    """
    return way.passed | {name: kept.output(block, number) for name, kept in way.kept.items()}


@contextmanager
def without(block: Block, given: Mapping[str, Any]) -> Iterator[None]:
    """Inside, sections of ``block`` do not run, nor do their norms: they give what is ``given``."""
    norms = {writer.partition(".")[0]: norm for writer, norm in block.residual.items()}
    with ExitStack() as stack:
        for name, out in given.items():
            module, norm = block.layer(name), block.layer(norms[name])
            module.forward = lambda *args, out=out, **kwargs: out
            norm.forward = lambda hidden, *args, **kwargs: hidden
            stack.callback(delattr, module, "forward")
            stack.callback(delattr, norm, "forward")
        yield
