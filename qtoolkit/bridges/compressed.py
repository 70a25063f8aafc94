"""compressed-tensors' ``quantization_config``: groups of layers, each with a scheme, as llm-compressor writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qtoolkit.bridges.described import SYMMETRIC, Described, Shapes, named
from qtoolkit.checkpoint import is_token_int8
from qtoolkit.errors import CheckpointError, RequestError
from qtoolkit.packed import PackedLayer
from qtoolkit.scheme import CHANNEL, Scheme

PACKERS = {"pack-quantized": "int4", "int-quantized": "int8"}
BESIDE = ("kv_cache_scheme", "transform_config")  # whole-model parts of a config that our checkpoints do not have
EXTRAS = {"weight_zero_point": "zero points", "weight_g_idx": "inputs in the order of their activations"}


def read(config: Mapping[str, Any], shapes: Shapes) -> Described:
    """Return what a compressed-tensors config and its tensors' shapes say.

    Raises:
        RequestError: what they say is no symmetric integer.
        CheckpointError: tensors are missing, or no group of the config is for a layer.
    """
    for key in BESIDE:
        if config.get(key):
            raise RequestError(f"Its quantization_config has a {key}, which would be lost.", "Leave it out.")
    groups = list((config.get("config_groups") or {}).values())
    layers = [_layer(name, config, groups, shapes) for name in named(shapes, "weight_scale")]
    declared = {is_token_int8(group.get("input_activations")) for group in groups}
    kinds = dict.fromkeys(_format(config, group) for group in groups)
    return Described(" and ".join(kinds), tuple(layers), declared=True in declared)


def _layer(name: str, config: Mapping[str, Any], groups: list[Any], shapes: Shapes) -> PackedLayer:
    group = next(_matching(name, groups), None)
    if group is None:
        raise CheckpointError(f"No group of the quantization_config is for {name}.", "The folder is damaged.")
    layout, weights = _format(config, group), group.get("weights") or {}
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if layout not in PACKERS:
        raise RequestError(f"{name} is stored as {layout}.", f"These can be read: {', '.join(PACKERS)}.")
    if (layout, bits) not in {("pack-quantized", 4), ("int-quantized", 4), ("int-quantized", 8)}:
        raise RequestError(f"{name} has {bits}-bit weights, {layout}.", SYMMETRIC)
    if weights.get("type", "int") != "int" or weights.get("symmetric") is False or weights.get("dynamic"):
        raise RequestError(f"{name} has {weights.get('type')} weights that are not symmetric integers.", SYMMETRIC)
    if strategy not in ("channel", "group") or (bits == 8 and strategy == "group"):
        raise RequestError(f"{name} has {bits}-bit weights with a scale for each {strategy}.", SYMMETRIC)
    activations = group.get("input_activations")
    if activations and not is_token_int8(activations):
        kind = f"{activations.get('num_bits')}-bit {activations.get('type', 'int')}"
        raise RequestError(f"The inputs of {name} become {kind}, not int8 token by token.", SYMMETRIC)
    for part, words in EXTRAS.items():
        if f"{name}.{part}" in shapes:
            raise RequestError(f"{name} has {words} ({part}).", SYMMETRIC)
    size = CHANNEL if strategy == "channel" else weights.get("group_size")
    try:
        return PackedLayer(name, Scheme(weight_bits=bits, group_size=size), PACKERS[layout])
    except ValueError:
        raise RequestError(f"{name} has groups of {size}.", "Groups of a multiple of 8 can be converted.") from None


def _format(config: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    return str(group.get("format") or config.get("format"))


def _matching(name: str, groups: list[Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the groups that are for a layer: those that say its name or a pattern of it, then those for all."""
    said = [(group, str(target)) for group in groups for target in group.get("targets") or []]
    yield from (group for group, target in said if target == name)
    yield from (group for group, target in said if target[:3] == "re:" and re.match(target[3:], name))
    yield from (group for group, target in said if target == "Linear")
