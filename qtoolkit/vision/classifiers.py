"""Image classifiers of the transformers library: the network, what its images look like, and its labels.

Nothing of torchvision is needed: how images are prepared is read from ``preprocessor_config.json``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qtoolkit.errors import ModelError, NumericError
from qtoolkit.source import Source
from qtoolkit.vision.models import Architecture, Augment, Fit, Model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREPROCESSOR = "preprocessor_config.json"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


class Classifier(Architecture):
    """A transformers classifier: its ``config.json`` builds it."""

    config: dict[str, Any]

    def build(self, seed: int = 0) -> nn.Module:
        """Return the network with random weights; called with images, it gives logits."""
        from transformers import AutoModelForImageClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return answering(AutoModelForImageClassification.from_config(_config(self.config), dtype=torch.float32))


def resolve(source: Source) -> Model:
    """Load a transformers image classifier in float32.

    Raises:
        ModelError: another kind of model, pickled or incomplete weights, or no preprocessor_config.json.
        NumericError: a weight is NaN or Inf.
    """
    from transformers import AutoModelForImageClassification

    architecture = read(source)
    _ = source.files  # refuses pickles and truncated files in one sentence
    try:
        network, found = AutoModelForImageClassification.from_pretrained(
            source.path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{source.name} cannot be loaded by transformers: {reason}") from None
    missing = sorted({*found["missing_keys"], *(row[0] for row in found["mismatched_keys"])})
    if missing:
        raise ModelError(f"{source.name} has no fitting tensor {missing[0]}.", "Was it trained as a classifier?")
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise NumericError(f"{source.name}: {name} holds NaN or Inf.", "The weights are damaged.")
    return Model(source.name, answering(network), architecture, lambda: resolve(source).network, source.path)


def read(source: Source) -> Classifier:
    """Return what is known about the classifier in a folder, from its two JSON files.

    Raises:
        ModelError: no image classifier, no preprocessor_config.json, or one that asks for something unknown.
    """
    config = _config(source.config)
    file = source.path / PREPROCESSOR
    if not file.is_file():
        raise ModelError(
            f"{source.name} has no {PREPROCESSOR}, which says how its images are prepared.",
            "Copy it from the model's page beside config.json.",
        )
    try:
        preparation = json.loads(file.read_text("utf-8"))
        height, width, fit = _size(preparation)
        channels = int(getattr(config, "num_channels", 3))
        mean, std = _normalisation(preparation, channels)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{source.name}: {PREPROCESSOR} does not say how an image is prepared: {reason}.") from None
    labels = [str(label) for _, label in sorted((int(k), v) for k, v in (config.id2label or {}).items())]
    named = any(label != f"LABEL_{index}" for index, label in enumerate(labels))
    architecture = Classifier(
        about=f"{config.model_type}, a transformers image classifier",
        builder="",
        input=(channels, height, width),
        mean=mean,
        std=std,
        fit=fit,
        augment=Augment(flip=True),
        labels=tuple(labels) if named else (),
        config=source.config,
    )
    return architecture.model_copy(update={"keep": _kept(architecture)})


def answering(network: nn.Module) -> nn.Module:
    """Return a transformers classifier that gives logits [images, classes] for images, not an output object.

    A hook does it, so that every tensor keeps the name it has in transformers.

    Raises:
        ModelError: the network does not take images as its first argument.
    """
    first = next(iter(inspect.signature(network.forward).parameters))
    if first != "pixel_values":
        raise ModelError(f"{type(network).__name__} takes {first} first, not images.")
    network.register_forward_hook(lambda module, inputs, output: output.logits)
    return network.eval()


def _config(values: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"A model of type {kind!r} is no image classifier that transformers knows.",
            "`qtoolkit quantize` is for language models.",
        )
    return CONFIG_MAPPING[kind].from_dict(dict(values))


def _kept(architecture: Architecture) -> tuple[str, ...]:
    """Return the first layer, which sees pixels, and the classifier: small, and the most sensitive."""
    with torch.device("meta"):
        network = architecture.build()
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return (names[0], *(name for name in names[1:] if name.split(".")[0].endswith("classifier")))


def _size(values: Mapping[str, Any]) -> tuple[int, int, Fit]:
    """Return height and width of what the network sees, and how an image is brought there.

    Raises:
        ValueError: there is no size, or one of another kind.
    """
    size, crop = values.get("size"), values.get("crop_size") if values.get("do_center_crop") else None
    resample = RESAMPLING[values.get("resample") or 2]
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    final = crop or size
    if isinstance(final, dict):
        final = (final.get("height", edge), final.get("width", edge))
    height, width = (final, final) if isinstance(final, int) else final or (None, None)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError(f"size {size!r} and crop_size {crop!r}")
    if edge and values.get("crop_pct"):  # ConvNeXT's rule: from 384 on images are squeezed, not cropped
        edge = int(edge / values["crop_pct"]) if edge < 384 else None
    if crop and not edge:
        first = (size, size) if isinstance(size, int) else (size["height"], size["width"])  # type: ignore[index]
        return height, width, Fit(resample=resample, squeeze=first)
    return height, width, Fit(resample=resample, shortest=edge or 0)


def _normalisation(values: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation such that (x / 255 - mean) / std is what the model wants."""
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    mean, std = values.get("image_mean", 0.0), values.get("image_std", 1.0)
    if not values.get("do_normalize", True):
        mean, std = 0.0, 1.0
    lists = [list(v) if isinstance(v, list | tuple) else [v] * channels for v in (mean, std)]
    return tuple(m / (255 * factor) for m in lists[0]), tuple(s / (255 * factor) for s in lists[1])
