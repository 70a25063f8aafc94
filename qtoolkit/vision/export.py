"""ONNX: what ONNX can express of a compressed classifier, for any runtime. Sparse weights are stored dense there."""

from __future__ import annotations

from pathlib import Path

import torch

from qtoolkit.errors import QToolkitError
from qtoolkit.vision.runtime import Loaded

OPSET = 17


def to_onnx(loaded: Loaded, file: str | Path) -> Path:
    """Write the network as ``file``: input ``images`` float32 [n, c, h, w], normalised; output ``logits``.

    Pruned filters are gone from the graph, N:M weights hold their zeros, binary layers are sign and convolution,
    butterfly layers are written with their dense product.

    Raises:
        QToolkitError: the package onnx is not installed.
    """
    try:
        import onnx  # noqa: F401  # torch's exporter needs it and says so in fifty lines
    except ImportError:
        raise QToolkitError("ONNX export needs the package onnx.", "`pip install onnx`.") from None
    path = Path(file)
    torch.onnx.export(
        loaded.network,
        (torch.zeros(1, *loaded.architecture.input),),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
        opset_version=OPSET,
        dynamo=False,
    )
    return path
