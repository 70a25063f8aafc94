"""Small transformers image classifiers with random weights, saved as any model on the hub is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES = {"height": 32, "width": 32}
EDGE = {"shortest_edge": 32}
PLAIN = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "do_rescale": True}
# name -> config class, its options, the processor's class, its options
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "resnet": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
        "ConvNextImageProcessor",
        {"size": EDGE, "crop_pct": 0.875, "resample": 3},
    ),
    "bottleneck": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck"},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3},
    ),
    "mobilenet": (
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "image_size": 32, "finegrained_output": True},
        "MobileNetV2ImageProcessor",
        {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": SIZES, "resample": 2},
    ),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 8,
        },
        "ViTImageProcessor",
        {"size": SIZES, "resample": 2},
    ),
    "convnext": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "image_size": 32, "layer_scale_init_value": 0.5},
        "ConvNextImageProcessor",
        {"size": EDGE, "crop_pct": 0.875, "resample": 3},
    ),
}


def save(kind: str, folder: Path) -> Path:
    """Save a classifier of ten named classes whose batch norms have seen something, with its preprocessor."""
    import transformers

    name, options, processor, preparation = KINDS[kind]
    labels = {index: f"kind {index}" for index in range(10)}
    config = getattr(transformers, name)(**options, id2label=labels, label2id={v: k for k, v in labels.items()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageClassification.from_config(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # a fresh one would hide a forgotten shift
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.3)
            elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, 0, (module.weight[0].numel()) ** -0.5)
                if module.bias is not None:
                    torch.nn.init.normal_(module.bias, 0, 0.3)
    model.save_pretrained(folder)
    values = {"image_processor_type": processor, "do_resize": True, **PLAIN, **preparation}
    (folder / "preprocessor_config.json").write_text(json.dumps(values), "utf-8")
    return folder
