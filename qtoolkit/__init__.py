"""qtoolkit compresses models and serves them: calibrate, transform, pack, serve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtoolkit.pipeline import quantize as quantize
    from qtoolkit.runtime import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "quantize"]

_LAZY = {"quantize": "qtoolkit.pipeline", "load": "qtoolkit.runtime"}  # importing qtoolkit must not import torch


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qtoolkit' has no attribute {name!r}")
