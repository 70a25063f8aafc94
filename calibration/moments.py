"""What compensation has to know of a layer's inputs: second moments, for fitting and, apart, for checking the fit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qtoolkit.calibration.hessian import Hessian
from qtoolkit.calibration.twin import Inputs

HELD_OUT = 4  # the last token in so many of every batch checks what the others were fitted to
SAMPLE = 1024  # held-out tokens kept as they are, to split the error into its parts


class Moments:
    """Sums over tokens of what a layer gets, ``x``, against what it should get, ``y``, both float32.

    Attributes:
        hessian: ``2 / tokens * sum x x^T`` [k, k].
        shift: ``2 / tokens * sum (y - x) x^T`` [k, k]: how the float network's inputs differ.
        drift: ``2 / tokens * sum d x^T`` [n, k] for d, what the hidden stream lacks; None away from it.
    """

    def __init__(self, k: int, device: torch.device | None = None) -> None:
        self.hessian = Hessian(k, device)
        self.shift = torch.zeros(k, k, device=device)
        self.drift: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Return how many tokens were added."""
        return self.hessian.tokens

    def update(self, part: Inputs, rows: slice) -> None:
        """Add the tokens ``rows`` of a batch."""
        x = part.served[rows]
        if not len(x):
            return
        before = self.tokens
        self.hessian.update(x)
        keep, weight = before / self.tokens, 2.0 / self.tokens
        self.shift.mul_(keep).addmm_((part.wanted[rows] - x).T, x, alpha=weight)
        if part.drift is not None:
            if self.drift is None:
                self.drift = x.new_zeros(part.drift.shape[1], x.shape[1])
            self.drift.mul_(keep).addmm_(part.drift[rows].T, x, alpha=weight)

    def pull(self, weight: Tensor) -> Tensor:
        """Return ``2 / tokens * sum (W y + d - W x) x^T`` [n, k]: the gradient that the layer's lack gives."""
        found = weight @ self.shift
        return found if self.drift is None else found.add_(self.drift)

    def merge(self, other: Moments) -> None:
        """Add the tokens of ``other``."""
        total = self.tokens + other.tokens
        if not other.tokens:
            return
        mine, theirs = self.tokens / total, other.tokens / total
        self.hessian.merge(other.hessian)
        self.shift.mul_(mine).add_(other.shift, alpha=theirs)
        if self.drift is not None and other.drift is not None:
            self.drift.mul_(mine).add_(other.drift, alpha=theirs)


class Seen:
    """Everything kept of one layer's calibration inputs: moments to fit and to check with, and a sample of tokens."""

    def __init__(self, k: int, batches: Iterable[Inputs], device: torch.device | None = None) -> None:
        self.fit, self.check = Moments(k, device), Moments(k, device)
        self.sample: Inputs | None = None
        for part in batches:
            cut = len(part.served) - len(part.served) // HELD_OUT
            self.fit.update(part, slice(0, cut))
            self.check.update(part, slice(cut, None))
            if self.sample is None:
                self.sample = part.cut(cut, SAMPLE)

    def all(self) -> Moments:
        """Return the moments of all tokens; those for fitting are gone then."""
        self.fit.merge(self.check)
        self.check = Moments(0, self.fit.hessian.matrix.device)
        return self.fit
