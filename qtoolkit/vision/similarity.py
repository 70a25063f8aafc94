"""How alike two networks see the same images, layer by layer, and how well a layer keeps classes apart.

Everything is computed from Gram matrices, [images, images] whatever a layer's size: centred kernel alignment (Kornblith
et al. 2019), the overlap of nearest-neighbour graphs (graph-based similarity, Chen et al. 2022), and the modularity of
the classes in such a graph (Lu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEIGHBOURS = 3


@torch.inference_mode()
def grams(network: nn.Module, names: Iterable[str], x: Tensor) -> dict[str, Tensor]:
    """Return x_i . x_j of the named layers' flattened outputs for images x: float64 [images, images] each."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
            flat = out.flatten(1).double()
            found[name] = flat @ flat.T

        handles.append(network.get_submodule(name).register_forward_hook(hook))
    try:
        network.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two Gram matrices: 1 for equal up to rotation and scale.

    <HKH, HLH> / (|HKH| |HLH|), with H the centring matrix.
    """
    k, q = _centred(first), _centred(second)
    scale = float(k.norm() * q.norm())
    return float((k * q).sum()) / scale if scale > 0 else 0.0


def neighbours(gram: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Return bool [images, images]: which are the ``count`` images of largest cosine to each image."""
    norms = gram.diagonal().clamp_min(1e-24).sqrt()
    cosine = gram / norms / norms.unsqueeze(1)
    cosine = cosine.fill_diagonal_(-torch.inf)
    return torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, cosine.topk(count, dim=1).indices, True)


def gbs(first: Tensor, second: Tensor, count: int = NEIGHBOURS) -> float:
    """Return the part of all nearest neighbours that two layers have in common, from their Gram matrices."""
    return float((neighbours(first, count) & neighbours(second, count)).sum()) / (count * len(first))


def modularity(gram: Tensor, y: Tensor, count: int = NEIGHBOURS) -> float:
    """Return Q of the classes y [images] in the nearest-neighbour graph of a layer: high where classes are apart.

    Q = sum over classes of inside / m - (degrees / 2m)^2, with the graph's weights (A + A^T) / 2 and m their sum.
    """
    graph = neighbours(gram, count).double()
    graph = (graph + graph.T) / 2
    total = graph.sum()  # 2m
    same = (y.unsqueeze(0) == y.unsqueeze(1)).double()
    degrees = graph.sum(dim=1)
    return float(((graph - torch.outer(degrees, degrees) / total) * same).sum() / total)


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
