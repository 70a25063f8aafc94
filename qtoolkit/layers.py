"""What a decoder layer computes beside its products, in float32: by the native loops, each in one pass.

Here for the reason given in ``columns``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.rounding import library as native


def runs(device: torch.device) -> bool:
    """Tell whether ``normed`` and ``gated`` do on ``device``; the first call may compile them."""
    return native.runs(device, 1)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x [..., k] over the root of its mean square and ``epsilon``, times weight [k]: float32 all."""
    return native.normed(x, weight, epsilon)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) times up, float32 of one shape."""
    return native.gated(gate, up)


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether ``causal`` takes these, [sequences, heads, tokens, width], and is faster than torch."""
    return native.attends(query, key, value) and native.load().path != "portable"


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Return the attention of tokens to themselves and those before them, float32 [sequences, tokens, heads, width].

    Args:
        query: float32 [sequences, heads, tokens, width].
        key: float32 [sequences, sources, tokens, width]; several heads may read one source.
        value: of its shape.
        scale: of the products of queries and keys; width^-1/2 without.

    Raises:
        ValueError: they are none that it ``attends``.
    """
    return native.attend(query, key, value, query.shape[3] ** -0.5 if scale is None else scale)
