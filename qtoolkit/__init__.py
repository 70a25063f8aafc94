"""qtoolkit compresses models and serves them: calibrate, transform, pack, serve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtoolkit.bridges.convert import convert as convert
    from qtoolkit.loading import load as load
    from qtoolkit.pipeline import quantize as quantize
    from qtoolkit.vision.pipeline import compress as compress

__version__ = "0.1.0"
__all__ = ["__version__", "compress", "convert", "load", "quantize"]

_LAZY = {  # importing qtoolkit must not import torch
    "compress": "qtoolkit.vision.pipeline",
    "convert": "qtoolkit.bridges.convert",
    "load": "qtoolkit.loading",
    "quantize": "qtoolkit.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qtoolkit' has no attribute {name!r}")
