"""ONNX: what ONNX can express of a compressed classifier, for any runtime. Sparse weights are stored dense there."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from qtoolkit.errors import NumericError, QToolkitError, RequestError
from qtoolkit.vision.accelerated import plain
from qtoolkit.vision.runtime import Loaded

OPSET = 17
INPUT, OUTPUT = "images", "logits"
COMPARED = 3  # images
SAME = 1e-3  # of the largest logit


def to_onnx(loaded: Loaded, file: str | Path) -> Path:
    """Write the network as ``file``: input ``images`` float32 [n, c, h, w], normalised; output ``logits``.

    Pruned filters are gone from the graph, N:M weights hold their zeros, binary layers are sign and convolution,
    butterfly layers are written with their dense product.

    Raises:
        QToolkitError: the package onnx is not installed.
        RequestError: the file's folder does not exist.
    """
    try:
        import onnx  # noqa: F401  # torch's exporter needs it and says so in fifty lines
    except ImportError:
        raise QToolkitError("ONNX export needs the package onnx.", "`pip install onnx`.") from None
    path = Path(file).expanduser()
    if not path.parent.is_dir():
        raise RequestError(f"There is no folder {path.parent} for the ONNX file.", "Make it first.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes of layers are constants of this network
        warnings.filterwarnings("ignore", "Constant folding")  # of strided slices: done at run time instead
        torch.onnx.export(
            plain(loaded.network),
            (torch.zeros(1, *loaded.architecture.input),),
            str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "n"}, OUTPUT: {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    return path


def difference(loaded: Loaded, file: Path) -> float | None:
    """Return how far onnxruntime's logits are from ours on random images, as a part of the largest; None without it.

    Raises:
        NumericError: by more than sums in another order explain.
    """
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x = torch.randn(COMPARED, *loaded.architecture.input, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = loaded.network(x)
    found = torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not apart <= SAME:
        raise NumericError(
            f"{file}: onnxruntime's logits differ by {apart:.2%} of the largest.", "Do not use the file."
        )
    return apart
