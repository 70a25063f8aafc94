"""Names to implementations: "module:attr" strings imported on first use, open to third parties through entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qtoolkit.errors import RequestError


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the nearest known names, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known) or 'none'}."


class Registry:
    """A table of one kind of thing; third parties add rows through the entry-point group ``qtoolkit.<kind>s``."""

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(targets)

    def targets(self) -> dict[str, str]:
        """Return every name with its "module:attr" string, third parties' rows included."""
        return {**self._others, **self._targets}

    @cached_property
    def _others(self) -> dict[str, str]:
        # asked once: it reads the metadata of every installed package, some ten milliseconds
        return {entry.name: entry.value for entry in entry_points(group=f"qtoolkit.{self.kind}s")}

    def names(self) -> list[str]:
        """Return the known names in order."""
        return sorted(self.targets())

    def get(self, name: str) -> Any:
        """Import and return what ``name`` stands for.

        Raises:
            RequestError: the name is unknown; the hint has the nearest ones.
        """
        targets = self.targets()
        if name not in targets:
            raise RequestError(f"There is no {self.kind} named {name!r}.", suggest(name, targets))
        module, _, attr = targets[name].partition(":")
        return getattr(import_module(module), attr)


# Which of the package's own steps compress what; one of others' making may do either.
STEPS = {
    "llm": ("rotate", "smooth", "gptq"),
    "vision": ("sparsify", "filters", "shorten", "binarize", "fold", "debut", "recover", "batchnorm"),
}
transforms = Registry(
    "transform",
    {
        "rotate": "qtoolkit.calibration.rotation:Rotate",
        "smooth": "qtoolkit.calibration.smoothing:Smooth",
        "gptq": "qtoolkit.calibration.compensation:Compensate",
        "sparsify": "qtoolkit.calibration.sparsify:Sparsify",
        "filters": "qtoolkit.calibration.filters:Filters",
        "shorten": "qtoolkit.calibration.shorten:Shorten",
        "binarize": "qtoolkit.calibration.binarize:Binarize",
        "fold": "qtoolkit.calibration.fold:Fold",
        "debut": "qtoolkit.calibration.debut:Debut",
        "recover": "qtoolkit.calibration.recover:Recover",
        "batchnorm": "qtoolkit.calibration.batchnorm:BatchNorm",
    },
)
packers = Registry(
    "packer",
    {
        "int4": "qtoolkit.packing.int4:PACKER",
        "int8": "qtoolkit.packing.int8:PACKER",
        "qqq": "qtoolkit.packing.qqq:PACKER",
        "gptq": "qtoolkit.packing.gptq:PACKER",
        "nm": "qtoolkit.packing.nm:PACKER",
        "block": "qtoolkit.packing.block:PACKER",
        "filter": "qtoolkit.packing.filter:PACKER",
        "binary": "qtoolkit.packing.binary:PACKER",
        "debut": "qtoolkit.packing.debut:PACKER",
    },
)
selectors = Registry(  # of calibration images
    "selector",
    {
        "first": "qtoolkit.calibration.selection:first",
        "random": "qtoolkit.calibration.selection:random",
        "kcore": "qtoolkit.calibration.selection:kcore",
    },
)
