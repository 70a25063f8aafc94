"""The chained grid: int8 weights that a GPU kernel holds in four bits and unpacks with one shift for eight of them.

Eight neighbouring inputs of a row form a word. A weight is ``16 * code + below``, where code is -8..7 and below is the
four low bits of the code before it in the word, 0 for the first: the low nibble of every int8 weight repeats the high
nibble of its neighbour. The steps are as wide as those of int4, and each weight's grid is moved by a known part of a
step, so rounding in the word's order loses no accuracy (``kernels/chained.py`` says what the kernel gains). What is
stored is a plain int8 weight, which anything can run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.calibration.sweep import sweep

WORD, STEP = 8, 16  # inputs of a word; a code's weight in the integers
LOW, HIGH = -8, 7


def in_words(order: Tensor) -> Tensor:
    """Return ``order``, a permutation of the inputs int64 [k], with whole words: each where its first input stood."""
    words = order // WORD
    first = torch.full((len(order) // WORD,), len(order), device=order.device)
    first.scatter_reduce_(0, words, torch.arange(len(order), device=order.device), "amin")
    inside = torch.arange(WORD, device=order.device)
    return (first.argsort().unsqueeze(1) * WORD + inside).flatten()


def rounded(grouped: Tensor, step: Tensor) -> Tensor:
    """Round weights [..., k] to the nearest of the chained grid with int4 steps ``step`` [..., 1], word after word."""
    words = (grouped / step).unflatten(-1, (-1, WORD))
    made = torch.empty_like(words)
    below = torch.zeros_like(words[..., 0])
    for i in range(WORD):
        code = (words[..., i] - below / STEP).round_().clamp_(LOW, HIGH)
        made[..., i] = code + below / STEP
        below = code.remainder(STEP)
    return made.flatten(-2).mul_(step)


def integers(weight: Tensor, step: Tensor) -> Tensor:
    """Return weight [n, k] rounded to the nearest of the chained grid: int8, in sixteenths of ``step`` [n, 1]."""
    return (rounded(weight, step) / step * STEP).round_().to(torch.int8)


def round_in_order(weight: Tensor, factor: Tensor, step: Tensor, order: Tensor) -> Tensor:
    """Round weight [n, k] column by column in ``order``, spreading each error over the columns still to come.

    Args:
        weight: float32 [n, k], k a multiple of 8.
        factor: float32 [k, k], upper Cholesky factor of the inverse Hessian, rows and columns in ``order``.
        step: float32 [n, 1], the width of an int4 step.
        order: int64 [k] permutation of the inputs that ``in_words`` made.

    Returns:
        int8 weights [n, k] on the chained grid, in sixteenths of ``step``, in the weight's own column order.
    """
    n, k = weight.shape
    work = weight[:, order].T.contiguous()  # [k, n]
    integers = torch.zeros(k, n, device=weight.device)
    places = order.tolist()
    width = step.flatten()

    def decide(column: int, rest: Tensor) -> Tensor:
        place = places[column]
        below = (integers[place - 1] / STEP).floor_().remainder_(STEP) if place % WORD else 0.0
        code = (rest[0] / width - below / STEP).round_().clamp_(LOW, HIGH)
        integers[place] = code * STEP + below
        return integers[place] / STEP * width

    sweep(work, factor, decide)
    return integers.T.to(torch.int8).contiguous()
