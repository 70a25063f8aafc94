"""Which channels depend on each other in a network nobody described: groups read from torch-pruning's trace.

A group holds every layer that writes a set of channels (residual sums join several) and every layer that reads it. It
is only given where a channel that carries zero can be left out without any other changing; else the reason is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtoolkit.errors import QToolkitError
from qtoolkit.stages import ChannelGroup


@dataclass(frozen=True)
class Traced:
    """Groups in the order of the network, and for every layer outside of them why its channels must stay."""

    groups: tuple[ChannelGroup, ...]
    refused: dict[str, str]


def trace(network: nn.Module, image: tuple[int, int, int]) -> Traced:
    """Return the channel groups of a network that takes images [n, channels, height, width].

    The network is run once on a zero image, on a copy with gradients, because the trace follows them.

    Raises:
        QToolkitError: the package torch-pruning is not installed.
    """
    try:
        import torch_pruning
    except ImportError:
        raise QToolkitError(
            "Finding which channels belong together needs the package torch-pruning.", "`pip install torch-pruning`."
        ) from None
    traced = copy.deepcopy(network).requires_grad_(True)
    names = {module: name for name, module in traced.named_modules()}
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(traced, [torch.zeros(1, *image)], verbose=False)
    order = list(names.values())
    groups: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    for found in graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)):
        group, reason = _translate(found, graph, names, traced)
        if reason:
            refused |= dict.fromkeys(group.producers, reason)
        else:
            groups.append(group)
    return Traced(tuple(sorted(groups, key=lambda group: order.index(group.name))), refused)


def depthwise(module: object) -> bool:
    """Tell whether a module is a convolution whose every channel depends on one channel alone."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def writers(group: ChannelGroup, network: nn.Module) -> list[str]:
    """Return the producers that make the channels from others: not batch norms, not depthwise convolutions."""
    modules = {name: network.get_submodule(name) for name in group.producers}
    return [name for name, m in modules.items() if not isinstance(m, nn.BatchNorm2d) and not depthwise(m)]


def _translate(found: Any, graph: Any, names: dict[nn.Module, str], network: nn.Module) -> tuple[ChannelGroup, str]:
    """Return torch-pruning's group as ours, and why it cannot be pruned, if so."""
    made: set[str] = set()
    followers: set[str] = set()
    readers: set[str] = set()
    mixer = rearranged = constant = grouped = ""
    for dependency, indices in found.items:
        module = dependency.target.module
        known = isinstance(module, nn.Module) and module in names
        if list(indices) != list(range(len(found[0].idxs))):
            rearranged = "its channels are rearranged on their way to a reader"
        elif known and (isinstance(module, nn.BatchNorm2d) or depthwise(module)):
            followers.add(names[module])
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            grouped = f"{names[module]} is a grouped convolution"
        elif isinstance(module, nn.Conv2d | nn.Linear):
            (made if graph.is_out_channel_pruning_fn(dependency.handler) else readers).add(names[module])
        elif isinstance(module, nn.Parameter):
            constant = "a parameter is added to its channels or multiplied with them"
        elif known and next(module.parameters(), None) is not None:
            mixer = mixer or f"a {type(module).__name__} mixes its channels"
    unit, unclear = _unit(made, network) if _attended(found) else (1, "")
    unread = "" if readers else "its channels are the network's output"
    order = list(names.values())  # torch-pruning's own order is that of its search
    inside, behind, ahead = (sorted(found, key=order.index) for found in (made, followers, readers))
    group = ChannelGroup(inside[0], (*inside, *behind), tuple(ahead), unit=unit)
    return group, mixer or grouped or constant or rearranged or unclear or unread


def _attended(found: Any) -> bool:
    """Tell whether the channels of a group go through an attention product, in which a head's belong together."""
    return any("Attention" in str(dependency.target.name) for dependency, _ in found.items)


def _unit(made: set[str], network: nn.Module) -> tuple[int, str]:
    """Return how many channels a head has, by what the attention module says."""
    sizes = {getattr(network.get_submodule(name.rpartition(".")[0]), "head_dim", None) for name in made}
    size = sizes.pop()
    return (size, "") if isinstance(size, int) and not sizes else (1, "attention mixes its channels")
