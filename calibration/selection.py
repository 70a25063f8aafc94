"""Which training images calibrate: the first, random ones, or a spread over the k-core levels of each class (RK-core).

Source of the last: images of a class that are alike form a graph; peeling it from the outside in gives every image a
core number and an onion layer. The inner ones are typical, the outer ones are not, and a good choice has both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtoolkit.vision.data import Images
from qtoolkit.vision.measure import batch_of
from qtoolkit.vision.models import Architecture

EDGES = 0.99  # quantile of the cosines above which two images of a class are joined


def first(network: nn.Module, images: Images, architecture: Architecture, count: int, seed: int) -> Images:
    """Return the first ``count`` images."""
    return images.first(count)


def random(network: nn.Module, images: Images, architecture: Architecture, count: int, seed: int) -> Images:
    """Return ``count`` images drawn by ``seed``, in the order of the data."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return _part(images, order[:count].sort().values)


def kcore(network: nn.Module, images: Images, architecture: Architecture, count: int, seed: int) -> Images:
    """Return ``count`` images, from every class its share, evenly spaced over the ranks that ``ranks`` gives."""
    features = penultimate(network, images, architecture)
    classes = images.y.unique()
    chosen = []
    for index, label in enumerate(classes):
        members = (images.y == label).nonzero().flatten()
        share = (count * (index + 1)) // len(classes) - (count * index) // len(classes)
        order = members[ranks(alike(features[members])).argsort(stable=True)]
        share = min(share, len(order))
        places = (
            torch.linspace(0, len(order) - 1, share).round().long() if share > 1 else torch.tensor([len(order) - 1])
        )
        chosen.append(order[places[:share]])
    return _part(images, torch.cat(chosen).sort().values)


@torch.inference_mode()
def penultimate(network: nn.Module, images: Images, architecture: Architecture) -> Tensor:
    """Return what the last linear layer receives for every image: [images, features]."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(1)))
    try:
        for x, _ in images.batches(batch_of(architecture), architecture):
            network.eval()(x)
    finally:
        handle.remove()
    return torch.cat(seen)


def alike(features: Tensor, quantile: float = EDGES) -> Tensor:
    """Return the graph of images [n, features] whose cosine is in the top part: bool [n, n], symmetric, no loops."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosine = unit @ unit.T
    n = len(cosine)
    pairs = cosine[~torch.eye(n, dtype=torch.bool)]
    if not len(pairs):
        return torch.zeros(n, n, dtype=torch.bool)
    cut = pairs.sort().values[min(int(quantile * len(pairs)), len(pairs) - 1)]
    return (cosine >= cut) & ~torch.eye(n, dtype=torch.bool)


def peel(graph: Tensor) -> tuple[Tensor, Tensor]:
    """Return core number and onion layer of every node of ``graph`` bool [n, n].

    Source: Hebert-Dufresne et al. 2016: nodes of degree <= k leave together and form a layer; k rises when none is
    left to leave. The first layer is 1.
    """
    degree = graph.sum(dim=1)
    core, layer = torch.zeros_like(degree), torch.zeros_like(degree)
    alive = torch.ones(len(graph), dtype=torch.bool)
    k = number = 0
    while bool(alive.any()):
        k = max(k, int(degree[alive].min()))
        leaving = alive & (degree <= k)
        number += 1
        core[leaving], layer[leaving] = k, number
        alive &= ~leaving
        degree = (graph & alive).sum(dim=1)
    return core, layer


def ranks(graph: Tensor) -> Tensor:
    """Return a rank for each node, larger further inside: core number plus onion layer, its neighbours' added."""
    core, layer = peel(graph)
    own = (core + layer).double()
    return own + graph.double() @ own


def _part(images: Images, index: Tensor) -> Images:
    return Images(images.x[index], images.y[index])
