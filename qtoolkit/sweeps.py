"""Whole sweeps over a weight's columns by native loops, on CPUs with AVX512-VNNI; ``columns`` goes by blocks.

Here for the reason given there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.rounding import library as native

Packed = native.Packed
BLOCKS = (native.MOST_SWEPT, 64, 32)  # columns that are decided before others are told


def packed(matrix: Tensor, size: int = 0) -> Packed | None:
    """Return symmetric ``matrix`` [k, k] for ``descended``, or None where that does not run.

    ``size`` is that of the weight's groups, no two of which are decided at once; 0: there are none.
    """
    block = next((each for each in BLOCKS if not size or size % each == 0), 0)
    return native.Packed(matrix, ahead=False, block=block) if block and _runs(matrix) else None


def packed_factor(factor: Tensor) -> Packed | None:
    """Return the upper ``factor`` [k, k] for ``rounded``, or None where that does not run."""
    return native.Packed(factor, ahead=True) if _runs(factor) else None


def _runs(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32 and native.sweeps()


def rounded(factor: Packed, weight: Tensor, steps: Tensor, groups: Tensor, code_range: tuple[int, int]) -> Tensor:
    """Return int8 codes [n, k]: columns of ``weight`` rounded in turn, each making up for those before.

    Args:
        factor: upper Cholesky factor of the inverse Hessian.
        weight: float32 [n, k].
        steps: float32 [n, groups], the scales.
        groups: int64 [k], the group of each column.
        code_range: least and largest code.
    """
    return native.sweep_rounding(factor, weight, steps, groups, code_range)


def times(matrix: Packed, numbers: Tensor) -> Tensor:
    """Return ``numbers`` [n, k] times the matrix that is packed for ``descended``: float32 [n, k]."""
    return native.swept_product(matrix, numbers)


def descended(
    matrix: Packed, gap: Tensor, codes: Tensor, steps: Tensor, code_range: tuple[int, int], sweeps: int = 1
) -> Tensor:
    """Return int8 codes [n, k] after so many ``sweeps``, every column given the code that lowers the error most.

    Args:
        matrix: the Hessian.
        gap: float32 [n, k], what codes stand for less what they should.
        codes: int8 [n, k] to begin with.
        steps: float32 [n, groups], the scales.
        code_range: least and largest code.
        sweeps: at least one.
    """
    return native.sweep_descent(matrix, gap, steps, codes, code_range, sweeps=sweeps)[0]


def descended_with_slopes(
    matrix: Packed, gap: Tensor, codes: Tensor, steps: Tensor, code_range: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``descended`` does in one sweep, and the gap times the matrix before and after, float32 [n, k]."""
    return native.sweep_descent(matrix, gap, steps, codes, code_range, slopes=True)
