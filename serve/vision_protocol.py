"""The Open Inference Protocol (KServe V2, REST) for image classifiers: requests to pixels, logits to answers.

An image tensor comes as ``UINT8`` pixels or ``FP32`` (normalised as the network takes it) of shape [n, c, h, w], flat
or nested; or as ``BYTES``, n encoded image files in base64, which are scaled to the network's size.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtoolkit.errors import DataError
from qtoolkit.vision.data import normalise, to_pixels
from qtoolkit.vision.models import Architecture

INPUT, LOGITS, CLASSES, LABELS = "images", "logits", "classes", "labels"
DATATYPES = ("UINT8", "FP32", "BYTES")
MOST_IMAGES = 256  # of one request


class Malformed(DataError):
    """The request cannot be understood; the client is told why with a 400."""


@dataclass(frozen=True)
class Question:
    """A request: normalised images float32 [n, c, h, w], and the id to give back."""

    x: Tensor
    id: str | None


def read(body: bytes, architecture: Architecture) -> Question:
    """Return what a request's body asks.

    Raises:
        Malformed: no JSON, another input, a wrong shape, type or number of values, or no image.
    """
    try:
        request = json.loads(body)
        (tensor,) = request["inputs"]
        name, datatype, shape, values = (tensor[key] for key in ("name", "datatype", "shape", "data"))
        identity = request.get("id")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(f"The body is no inference request with one input: {_words(error)}.") from None
    if name != INPUT or datatype not in DATATYPES:
        raise Malformed(f"The input must be {INPUT!r} of {', '.join(DATATYPES)}, not {name!r} of {datatype!r}.")
    expected = [len(values) if isinstance(values, list) else 0]
    if datatype == "BYTES":
        x = _files(values, architecture)
    else:
        x = _numbers(values, shape, datatype, architecture)
        expected = [len(x), *architecture.input]
    if shape != expected or not 1 <= len(x) <= MOST_IMAGES:
        raise Malformed(f"The shape {shape} does not fit: up to {MOST_IMAGES} images of {list(architecture.input)}.")
    return Question(x, identity if isinstance(identity, str) else None)


def answer(
    question: Question, logits: Tensor, seconds: float, model: str, labels: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the response for ``logits`` float32 [n, classes]; where classes have names, they are told, too.

    ``seconds`` is what the network needed for the batch that these images were part of: the parameter ``compute_ms``.
    """
    classes = logits.argmax(dim=1)
    outputs = [
        {"name": LOGITS, "datatype": "FP32", "shape": list(logits.shape), "data": logits.flatten().tolist()},
        {"name": CLASSES, "datatype": "INT64", "shape": list(classes.shape), "data": classes.tolist()},
    ]
    if labels:
        names = [labels[index] for index in classes.tolist()]
        outputs.append({"name": LABELS, "datatype": "BYTES", "shape": list(classes.shape), "data": names})
    found: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": outputs}
    found["parameters"] = {"compute_ms": round(seconds * 1e3, 3)}
    return found if question.id is None else {**found, "id": question.id}


def metadata(model: str, architecture: Architecture, classes: int) -> dict[str, Any]:
    """Return the model's description: what goes in and what comes out."""
    outputs = [
        {"name": LOGITS, "datatype": "FP32", "shape": [-1, classes]},
        {"name": CLASSES, "datatype": "INT64", "shape": [-1]},
    ]
    if architecture.labels:
        outputs.append({"name": LABELS, "datatype": "BYTES", "shape": [-1]})
    return {
        "name": model,
        "versions": ["1"],
        "platform": "qtoolkit",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *architecture.input]}],
        "outputs": outputs,
    }


def _numbers(values: Any, shape: Any, datatype: str, architecture: Architecture) -> Tensor:
    sizes = isinstance(shape, list) and all(isinstance(size, int) and 0 < size < 1 << 16 for size in shape)
    if not sizes or len(shape) != 4:
        raise Malformed(f"The shape {shape!r} is not of the form [images, channels, height, width].")
    try:
        found = torch.tensor(values, dtype=torch.float64).reshape(shape)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise Malformed(f"The data does not make a tensor of shape {shape}: {_words(error)}.") from None
    if not found.isfinite().all():
        raise Malformed("The data holds NaN or Inf.")
    if datatype == "FP32":
        return found.float()
    if found.min() < 0 or found.max() > 255 or (found != found.round()).any():
        raise Malformed("UINT8 data must be whole numbers from 0 to 255.")
    if found.shape[1] != architecture.input[0]:
        raise Malformed(f"The images have {found.shape[1]} channels, the network takes {architecture.input[0]}.")
    return normalise(found.to(torch.uint8), architecture)


def _files(values: Any, architecture: Architecture) -> Tensor:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_IMAGES:
        raise Malformed(f"BYTES data must be a list of 1 to {MOST_IMAGES} base64 strings.")
    pixels = []
    for value in values:
        try:
            file = io.BytesIO(base64.b64decode(value, validate=True))
            pixels.append(to_pixels(file, architecture))
        except (binascii.Error, TypeError, ValueError) as error:
            raise Malformed(f"An image is not base64: {_words(error)}.") from None
        except DataError as error:
            raise Malformed(error.message) from None
    return normalise(torch.stack(pixels), architecture)


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:160]
