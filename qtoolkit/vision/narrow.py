"""Physical removal: where every reader of a channel group leaves channels out, the writers need not compute them.

A ``Filtered`` layer alone gathers the channels that are left and writes zeros where filters were. Inside a group both
steps cancel: what remains is an ordinary, narrower network, for any runtime.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qtoolkit.stages import ChannelGroup
from qtoolkit.vision.layers import Filtered
from qtoolkit.vision.matrix import Geometry


@torch.no_grad()
def narrow(network: nn.Module, groups: Iterable[ChannelGroup]) -> int:
    """Replace the layers of every group by narrower ordinary ones, in place; return how many channels went.

    A group is left as it is unless its first producer and all its consumers are ``Filtered`` and the consumers read
    the same channels.
    """
    gone = 0
    for group in groups:
        writer = network.get_submodule(group.producers[0])
        readers = [network.get_submodule(name) for name in group.consumers]
        if not isinstance(writer, Filtered) or not all(isinstance(reader, Filtered) for reader in readers):
            continue
        kept: Tensor = readers[0].channels  # type: ignore[assignment]
        if any(not torch.equal(reader.channels, kept) for reader in readers[1:]):  # type: ignore[arg-type]
            continue
        gone += writer.geometry.n - len(kept)
        _keep_rows(writer, kept)
        for name in group.producers[1:]:
            network.set_submodule(name, _narrow_norm(network.get_submodule(name), kept))
        for reader in readers:
            _read_all(reader, len(kept))  # type: ignore[arg-type]
    return gone


def _keep_rows(layer: Filtered, kept: Tensor) -> None:
    """Let ``layer`` compute just the filters ``kept``, of which some may be zero."""
    dense = layer.weight.new_zeros(layer.geometry.n, *layer.weight.shape[1:])
    dense[layer.rows] = layer.weight
    layer.weight = dense[kept].contiguous()
    layer.bias = layer.bias[kept] if layer.bias is not None else None
    layer.rows = torch.arange(len(kept))
    layer.geometry = Geometry((len(kept), *layer.geometry.shape[1:]), *_rest(layer.geometry))


def _read_all(layer: Filtered, inputs: int) -> None:
    """Tell ``layer`` that its input holds only the channels it reads."""
    layer.channels = torch.arange(inputs)
    shape = (layer.geometry.n, inputs, *layer.geometry.shape[2:])
    layer.geometry = Geometry(shape, *_rest(layer.geometry))


def _rest(geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    return geometry.stride, geometry.padding, geometry.dilation


def _narrow_norm(norm: nn.Module, kept: Tensor) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm2d)
    made = nn.BatchNorm2d(len(kept), eps=norm.eps)
    made.load_state_dict({name: t[kept] if t.dim() else t for name, t in norm.state_dict().items()})
    return made.eval().requires_grad_(False)
