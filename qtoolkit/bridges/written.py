"""What config.json says of quantized weights, in the words of the layout that they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qtoolkit.bridges import compressed, gptq, qqq
from qtoolkit.errors import RequestError
from qtoolkit.scheme import Scheme

COMPRESSED = ("int4", "int8")  # the layouts of compressed-tensors, whose config can name a scheme for each layer
LAYOUTS = (*COMPRESSED, "qqq", "gptq")


def quantization_config(
    layout: str,
    scheme: Scheme,
    floats: list[str],
    others: Mapping[str, Scheme] = MappingProxyType({}),
    experts: str = "",
) -> dict[str, Any]:
    """Return the entry for config.json.

    Args:
        layout: name of the packer that stored the layers of ``scheme``.
        scheme: of every linear layer that is named nowhere else.
        floats: linear layers that stay in float.
        others: layers with another scheme.
        experts: what stands in the name of every expert's layer, see ``compressed.config``.

    Raises:
        RequestError: the layout has no words for ``others``.
    """
    if layout not in COMPRESSED and others:
        raise mixed(layout)
    if layout == "gptq":
        return gptq.config(scheme, floats)
    if layout == "qqq":
        return qqq.config(scheme)
    return compressed.config(scheme, floats, others, experts if layout == "int4" else "", layout)


def mixed(layout: str) -> RequestError:
    """Return the error of layers with several schemes in a layout that knows one."""
    return RequestError(
        f"Files of the layout {layout} cannot say that some layers have int8 weights.",
        "Use the packer int4, or leave out what gives layers int8 weights (--budget, gptq.chained).",
    )
