"""What a network is worth and what it costs: accuracy, parameters, multiply-adds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtoolkit.vision.data import Images
from qtoolkit.vision.models import LAYERS, Architecture

BATCH = 250
PIXELS = 2_000_000  # of the images that go through a network at once: bounds the memory of activations


def batch_of(architecture: Architecture, most: int = BATCH) -> int:
    """Return how many images of an architecture go through it at once."""
    return max(1, min(most, PIXELS // (architecture.input[1] * architecture.input[2])))


@torch.inference_mode()
def logits(network: nn.Module, images: Images, architecture: Architecture) -> Tensor:
    """Return float32 [images, classes]; the network is put in evaluation mode."""
    network.eval()
    return torch.cat([network(x) for x, _ in images.batches(batch_of(architecture), architecture)])


def accuracy(network: nn.Module, images: Images, architecture: Architecture) -> float:
    """Return the part of the images whose class has the largest logit."""
    return float((logits(network, images, architecture).argmax(dim=1) == images.y).double().mean())


@torch.inference_mode()
def positions(network: nn.Module, architecture: Architecture) -> dict[str, int]:
    """Return at how many places of one image each convolution or linear layer is computed."""
    found: dict[str, int] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, LAYERS):

            def hook(module: nn.Module, _: object, out: Tensor, name: str = name) -> None:
                found[name] = out[0].numel() // out.shape[-1 if isinstance(module, nn.Linear) else 1]

            handles.append(module.register_forward_hook(hook))
    network.eval()(torch.zeros(1, *architecture.input))
    for handle in handles:
        handle.remove()
    return found


def classes(network: nn.Module, architecture: Architecture) -> int:
    """Return how many classes a network tells apart."""
    with torch.inference_mode():
        return network.eval()(torch.zeros(1, *architecture.input)).shape[1]
