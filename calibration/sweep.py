"""The loop of SparseGPT and the chained grid: change a weight column by column, and let later ones make up for it.

Sources: GPTQ (Frantar et al. 2022, algorithm 1), SparseGPT (Frantar and Alistarh 2023).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

COLUMNS = 128  # columns changed before the rest of the matrix is updated in one product


def sweep(work: Tensor, factor: Tensor, decide: Callable[[int, Tensor], Tensor], columns: int = COLUMNS) -> None:
    """Replace every row of ``work`` by what ``decide`` says and spread the error over the rows still to come.

    Args:
        work: float32 [k, n], the transposed weight in the order of the sweep; changed in place.
        factor: float32 [k, k], upper Cholesky factor of the inverse Hessian in the same order.
        decide: gets the row's index and the rows of its part from it on [.., n], already compensated; returns the
            new row [n].
        columns: size of a part; a pattern that needs several columns at once wants a multiple of its size.
    """
    k, n = work.shape
    for start in range(0, k, columns):
        stop = min(start + columns, k)
        part, errors = work[start:stop], work.new_empty(stop - start, n)
        inside = factor[start:stop, start:stop].contiguous()
        for i in range(stop - start):
            new = decide(start + i, part[i:])
            errors[i] = (part[i] - new) / inside[i, i]
            part[i] = new
            part[i + 1 :].addr_(inside[i, i + 1 :], errors[i], alpha=-1.0)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
