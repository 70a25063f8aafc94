"""Attention of tokens to themselves and those before them, in float32: by the native loops where they are faster.

Here for the reason given in ``columns``.
"""

from __future__ import annotations

from torch import Tensor

from qtoolkit.kernels.cpu.rounding import library as native


def runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether ``causal`` takes these, [sequences, heads, tokens, width]; the first call may compile it."""
    return native.attends(query, key, value) and native.load().path != "portable"


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Return the attention float32 [sequences, tokens, heads, width].

    Args:
        query: float32 [sequences, heads, tokens, width].
        key: float32 [sequences, sources, tokens, width]; several heads may read one source.
        value: of its shape.
        scale: of the products of queries and keys; width^-1/2 without.

    Raises:
        ValueError: they are none for which it ``runs``.
    """
    return native.attend(query, key, value, query.shape[3] ** -0.5 if scale is None else scale)
