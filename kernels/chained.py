"""The chained grid: int4 weights whose packed word is, unmasked, an int8 operand; unpacking is one shift a word.

Eight neighbouring inputs of a row share a 32-bit word, low nibble first, in two's complement. Read as four int8, the
word holds the odd inputs' weights, each 16 times its code plus whatever stands in the nibble below; shifted up by one
nibble it holds the even ones. So input i of a word stands for ``16 * code[i] + (code[i - 1] mod 16)`` sixteenths of
its scale, and the first for ``16 * code[0]``: the step is that of plain int4, only each grid is moved by a known part
of a step. A quantizer that rounds the eight in order loses no accuracy; one that does not know about it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels import reference

WORD = 8  # inputs of a chain
STEP = 16  # a code's weight in the integers below


def values(codes: Tensor) -> Tensor:
    """Return the int8 weights [n, k] that chained int4 codes [n, k] stand for, in sixteenths of their scale.

    k is a multiple of 8.
    """
    words = codes.reshape(codes.shape[0], -1, WORD)
    below = words.roll(1, dims=-1) & 15  # two's complement nibbles
    below[..., 0] = 0
    return (words.to(torch.int16) * STEP + below).to(torch.int8).flatten(1)


def codes_of(weights: Tensor) -> Tensor | None:
    """Invert ``values``: return the int4 codes [n, k] of int8 weights [n, k], or None if these are no chained ones.

    Such weights are stored as plain int8, which anything can run; they tell what they are by themselves.
    """
    if weights.dtype != torch.int8 or weights.shape[1] % WORD:
        return None
    codes = weights >> 4
    return codes if torch.equal(values(codes), weights) else None


def w4a8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Multiply as ``reference.w4a8_linear`` does, with chained codes int8 [n, k]: exact in int32 like there."""
    return reference.w4a8_linear(x, values(codes), scales.float() / STEP, bias, group_size, reference.EXACT_K_INT8)
