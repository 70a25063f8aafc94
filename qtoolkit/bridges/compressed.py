"""compressed-tensors' ``quantization_config``: groups of layers, each with a scheme, as llm-compressor writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from qtoolkit.bridges.described import SYMMETRIC, Described, Shapes, named
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


def config(
    scheme: Scheme,
    ignore: list[str],
    others: Mapping[str, Scheme] = MappingProxyType({}),
    experts: str = "",
    packer: str = "int4",
) -> dict[str, Any]:
    """Return the standard compressed-tensors entry for config.json: nothing in it is our own.

    Args:
        scheme: of every linear layer that is named nowhere else.
        ignore: layers that stay in float.
        others: layers with another scheme than ``scheme``. A name is matched before the class ``Linear``.
        experts: what stands in the name of every expert's layer, such as ``.mlp.experts.``, if there are any. Theirs
            is a group that declares no integer inputs: with them vLLM looks for another layout of an expert's weights.
        packer: of the int4 layers: "int4", or "int8" for a byte a code.
    """
    named: dict[Scheme, list[str]] = {}
    for name, other in others.items():
        named.setdefault(other, []).append(name)
    groups = [_group(other, names, packer) for other, names in named.items()]
    if experts:
        group = _group(scheme, [f"re:.*{re.escape(experts)}\\d+\\..*"], packer)
        groups.append({**group, "input_activations": None})
    groups.append(_group(scheme, ["Linear"], packer))
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(reversed(groups))},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, targets: list[str], packer: str) -> dict[str, Any]:
    channel = scheme.group_size == CHANNEL
    return {
        # of int4 layers transformers would infer int-quantized, since their inputs are quantized
        "format": "pack-quantized" if scheme.weight_bits == 4 and packer == "int4" else "int-quantized",
        "targets": targets,
        "weights": {
            "num_bits": scheme.weight_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        },
        "input_activations": {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
            "observer": None,
        },
        "output_activations": None,
    }


def is_token_int8(activations: Mapping[str, Any] | None) -> bool:
    """Say whether ``input_activations`` of a config group mean int8, symmetric, one dynamic scale a token."""
    return (
        activations is not None
        and activations.get("num_bits") == 8
        and activations.get("type", "int") == "int"
        and activations.get("symmetric", True) is True
        and activations.get("dynamic") is True
        and activations.get("strategy") in (None, "token")
    )
