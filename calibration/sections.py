"""The sections of a block, one behind another: each reads the hidden stream through its norm and adds to it once.

A decoder layer has two, attention and the MLP. A stream that has passed a section carries what it gave, so that the
layers behind it can be looked at without running it again: in its place come zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtoolkit.stages import Block


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
    inside = all(any(each.holds(name) for each in found) for name in block.targets)
    return found if apart and inside else []


def section_of(known: Sequence[Section], name: str) -> int:
    """Return the place of the section that holds the layer ``name``, 0 where none are known."""
    return next((place for place, section in enumerate(known) if section.holds(name)), 0)


def nothing(out: Any) -> Any:
    """Return zeros in the form of a module's output: a tensor, or a tuple that begins with one; they broadcast."""
    if isinstance(out, Tensor):
        return out.new_zeros(out.shape[-1])
    return tuple(nothing(part) if isinstance(part, Tensor) else None for part in out)


@contextmanager
def without(block: Block, passed: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the ``passed`` sections of ``block`` give zeros: the stream has what they gave."""
    with ExitStack() as stack:
        for name, zeros in passed.items():
            module = block.layer(name)
            module.forward = lambda *args, zeros=zeros, **kwargs: zeros
            stack.callback(delattr, module, "forward")
        yield
