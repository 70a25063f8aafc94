"""Physical removal: where no reader of a channel group reads a channel, nobody need compute it.

A ``Filtered`` layer alone gathers the channels that are left and writes zeros where filters were. Inside a group both
steps cancel: what remains is an ordinary, narrower network, for any runtime. Batch norms and depthwise convolutions
between the writers and the readers of a group become narrower with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.stages import ChannelGroup
from qtoolkit.vision.dependencies import depthwise
from qtoolkit.vision.layers import Filtered
from qtoolkit.vision.matrix import Geometry


@torch.no_grad()
def narrow(network: nn.Module, groups: Iterable[ChannelGroup]) -> int:
    """Replace the layers of every group by narrower ones, in place; return how many channels went."""
    gone = 0
    for group in groups:
        read = torch.stack([_read(network.get_submodule(name)) for name in group.consumers]).any(dim=0)
        if group.unit > 1:
            read = read.view(-1, group.unit).any(dim=1).repeat_interleave(group.unit)
        read[: group.unit] |= not bool(read.any())  # something must be left to compute
        if bool(read.all()):
            continue
        kept = read.nonzero().flatten()
        gone += len(read) - len(kept)
        for name in group.producers:
            network.set_submodule(name, _keep_rows(network.get_submodule(name), kept))
        for name in group.consumers:
            network.set_submodule(name, _keep_channels(network.get_submodule(name), kept))
    return gone


def _read(layer: nn.Module) -> Tensor:
    """Return which of its input channels a layer reads: bool [channels]."""
    if isinstance(layer, Filtered):
        used = torch.zeros(layer.geometry.inputs, dtype=torch.bool)
        used[layer.channels] = True
        return used
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (weight != 0).transpose(0, 1).flatten(1).any(dim=1)


def _keep_rows(layer: nn.Module, kept: Tensor) -> nn.Module:
    """Return ``layer`` with only the output channels ``kept``, of which some may be zero."""
    if isinstance(layer, Filtered):
        dense = layer.weight.new_zeros(layer.geometry.n, *layer.weight.shape[1:])
        dense[layer.rows] = layer.weight
        layer.weight = dense[kept].contiguous()
        layer.bias = layer.bias[kept] if layer.bias is not None else None
        layer.rows = torch.arange(len(kept))
        layer.geometry = Geometry((len(kept), *layer.geometry.shape[1:]), *_rest(layer.geometry))
        return layer
    made: Any = copy.deepcopy(layer)
    for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if tensor.dim():  # all but a batch norm's count of batches
            _set(made, name, tensor[kept])
    if isinstance(layer, nn.BatchNorm2d):
        made.num_features = len(kept)
    elif isinstance(layer, nn.Linear):
        made.out_features = len(kept)
    else:
        made.out_channels = len(kept)
        if depthwise(layer):
            made.in_channels = made.groups = len(kept)
    return made


def _keep_channels(layer: nn.Module, kept: Tensor) -> nn.Module:
    """Return ``layer`` for an input that holds only the channels ``kept``; it may read fewer of them."""
    if isinstance(layer, Filtered):
        layer.channels = torch.searchsorted(kept, layer.channels)
        layer.geometry = Geometry((layer.geometry.n, len(kept), *layer.geometry.shape[2:]), *_rest(layer.geometry))
        return layer
    made: Any = copy.deepcopy(layer)
    _set(made, "weight", made.weight[:, kept])
    setattr(made, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(kept))
    return made


def _set(layer: nn.Module, name: str, tensor: Tensor) -> None:
    if name in layer._parameters:
        tensor = nn.Parameter(tensor.contiguous(), requires_grad=False)
    setattr(layer, name, tensor)


def _rest(geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    return geometry.stride, geometry.padding, geometry.dilation
