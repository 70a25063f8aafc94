"""QQQ's ``quantization_config``, as its own code and GPTQModel write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtoolkit.bridges.described import Described, Shapes, group_size, int4_bits, named
from qtoolkit.errors import RequestError
from qtoolkit.packed import PackedLayer
from qtoolkit.packing.qqq import GROUP
from qtoolkit.scheme import CHANNEL, Scheme


def read(config: Mapping[str, Any], shapes: Shapes) -> Described:
    """Return what a QQQ config and its tensors' shapes say.

    Raises:
        RequestError: what they say cannot be read.
        CheckpointError: there are no such tensors.
    """
    int4_bits(config, "wbits", "bits")
    size = group_size(config, "group_size", "q_group_size")
    if size not in (CHANNEL, GROUP):
        raise RequestError(
            f"Its QQQ group size is {size}.", f"QQQ files have groups of {GROUP} or one scale a channel."
        )
    if size != CHANNEL and config.get("desc_act") and not config.get("static_groups"):
        raise RequestError(
            "Its QQQ config says desc_act with groups, which permutes groups that its layout cannot hold.",
            "Quantize with static_groups=True or desc_act=False.",
        )
    layers = tuple(PackedLayer(name, Scheme(group_size=size), "qqq") for name in named(shapes, "B"))
    return Described("qqq", layers, declared=True)


def config(scheme: Scheme) -> dict[str, Any]:
    """Return the entry for config.json; which layers have codes is told by the tensors alone."""
    return {"quant_method": "qqq", "wbits": 4, "group_size": scheme.group_size}
