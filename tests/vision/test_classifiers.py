"""transformers image classifiers: loaded whole, images prepared as their own processor does, wrong ones refused."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vision_support import KINDS, save

from qtoolkit.errors import ModelError, NumericError, RequestError
from qtoolkit.vision import data, models

PROCESSORS = {
    "ConvNextImageProcessor": "convnext",
    "MobileNetV2ImageProcessor": "mobilenet_v2",
    "ViTImageProcessor": "vit",
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("size", [(50, 40), (33, 64)])
def test_images_are_prepared_as_the_models_own_processor_does(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    architecture = models.resolve(str(save(kind, tmp_path / "model"))).architecture
    name = KINDS[kind][2]
    module = import_module(f"transformers.models.{PROCESSORS[name]}.image_processing_pil_{PROCESSORS[name]}")
    processor = getattr(module, f"{name}Pil").from_pretrained(tmp_path / "model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    found = data.normalise(data.to_pixels(image, architecture).unsqueeze(0), architecture)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # uint8 either way; the order of two products


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_loaded_classifier_gives_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    model = models.resolve(str(save(kind, tmp_path / "model")))
    x = torch.randn(2, *model.architecture.input, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()(pixel_values=x).logits
        torch.testing.assert_close(model.network(x), expected, rtol=0, atol=0)
    assert model.architecture.labels[:2] == ("kind 0", "kind 1")
    assert len(model.architecture.keep) == 2  # the first layer and the classifier


def test_what_is_no_whole_classifier_is_refused_in_one_sentence(tmp_path: Path, random_llama: Path) -> None:
    folder = save("vit", tmp_path / "model")
    with pytest.raises(ModelError, match="no image classifier"):
        models.resolve(str(random_llama))
    with pytest.raises(RequestError, match="its own weights"):
        models.resolve(str(folder), tmp_path / "weights.npz")
    whole = (folder / "preprocessor_config.json").read_text("utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 3}}), "utf-8")
    with pytest.raises(ModelError, match="longest_edge"):
        models.resolve(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="has no preprocessor_config"):
        models.resolve(str(folder))
    (folder / "preprocessor_config.json").write_text(whole, "utf-8")
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "classifier.weight"}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"no fitting tensor classifier\.weight"):
        models.resolve(str(folder))
    state["classifier.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match=r"classifier\.weight"):
        models.resolve(str(folder))
