"""GPTQ's ``quantization_config``, as AutoGPTQ and GPTQModel write it and as vLLM and transformers read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from qtoolkit.bridges.described import SYMMETRIC, Described, Shapes, Tensors, group_size, int4_bits, named
from qtoolkit.errors import RequestError
from qtoolkit.packed import PackedLayer
from qtoolkit.scheme import Scheme

FORMATS = ("gptq", "gptq_v2")  # v2 stores zero points as they are, the older format minus 1
ONE_OF_EACH = 0x11111111  # eight times 1
DECIDES = ("bits", "group_size", "sym", "desc_act")


def read(config: Mapping[str, Any], shapes: Shapes) -> Described:
    """Return what a GPTQ config and its tensors' shapes say.

    Raises:
        RequestError: what they say is no symmetric int4.
        CheckpointError: there are no such tensors.
    """
    layout = str(config.get("checkpoint_format") or "gptq")
    if layout not in FORMATS:
        raise RequestError(f"Its GPTQ checkpoint_format is {layout!r}.", f"These can be read: {', '.join(FORMATS)}.")
    int4_bits(config, "bits")
    if config.get("sym") is not True:
        raise RequestError("Its GPTQ weights have zero points (sym is not true).", SYMMETRIC)
    for pattern, rule in (config.get("dynamic") or {}).items():
        changed = [key for key in DECIDES if (rule or {}).get(key, config.get(key)) != config.get(key)]
        if changed and not str(pattern).startswith("-:"):
            raise RequestError(f"Its dynamic rule {pattern!r} changes {changed[0]} for some layers.", SYMMETRIC)
    scheme = Scheme(group_size=group_size(config, "group_size"))
    layers = tuple(PackedLayer(name, scheme, "gptq") for name in named(shapes, "qweight"))
    return Described(layout, layers, declared=False, neutral=_from_v2 if layout == "gptq_v2" else dict)


def _from_v2(tensors: Tensors) -> Tensors:
    qzeros = tensors.get("qzeros")
    return tensors if qzeros is None else {**tensors, "qzeros": (qzeros - ONE_OF_EACH).to(torch.int32)}


def config(scheme: Scheme, floats: list[str]) -> dict[str, Any]:
    """Return the entry for config.json; ``floats`` are linear layers without codes."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": "lm_head" not in floats,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in floats if name != "lm_head"},
    }
