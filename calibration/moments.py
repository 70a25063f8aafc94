"""What compensation has to know of a layer's inputs: second moments, for fitting and, apart, for checking the fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qtoolkit.calibration import products
from qtoolkit.calibration.hessian import Hessian
from qtoolkit.calibration.twin import Inputs

HELD_OUT = 4  # the last token in so many of every batch checks what the others were fitted to
CHECKED = 2048  # tokens held out at most: they are kept as they are
AT_ONCE = 512  # of them that are taken to float32 at once
SAMPLE = 128  # the first batch's last tokens, kept in float to split the error into its parts


class Moments:
    """Sums over tokens of what layers get, ``x``, against what they lack: W (y - x) + d for y of the float network.

    All layers read the same inputs. Where they have more outputs than inputs, the sum of (y - x) x^T [k, k] is kept,
    which all of them share, elsewhere that of what they lack: whichever is smaller.

    Attributes:
        hessian: ``2 / tokens * sum x x^T`` [k, k].
    """

    def __init__(self, weights: Sequence[Tensor], shrinkage: float = 0.0) -> None:
        """Take the float ``weights`` [n, k] of the layers, of one with a drift d alone, and the Hessian's option."""
        self.weights = list(weights)
        k = self.weights[0].shape[1]
        self.hessian = Hessian(k, self.weights[0].device, shrinkage)
        self.whole = sum(len(weight) for weight in weights) <= k
        self._shift: Tensor | None = None  # [k, k], or [n, k] with the outputs of all layers
        self._drift: Tensor | None = None  # [n, k], beside a shift of the inputs

    @property
    def tokens(self) -> int:
        """Return how many tokens were added."""
        return self.hessian.tokens

    def update(self, x: Tensor, wanted: Tensor, drift: Tensor | None) -> None:
        """Add tokens: what the layers get as served and in the float network [tokens, k], and their drift."""
        self.add(x, *self.lack(x, wanted, drift))

    def lack(self, x: Tensor, wanted: Tensor, drift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what is summed of tokens beside their inputs: lack of the outputs, or of the inputs, and the drift."""
        lack = wanted - x
        if self.whole:
            given = lack.new_empty(len(lack), sum(len(weight) for weight in self.weights))
            for part, weight in zip(given.split([*map(len, self.weights)], dim=1), self.weights, strict=True):
                products.accumulated(part, lack, weight.T, keep=0.0)
            lack = given
            return (lack if drift is None else lack.add_(drift)), None
        return lack, drift

    def add(self, x: Tensor, lack: Tensor, drift: Tensor | None) -> None:
        """Add tokens' inputs x [tokens, k] and what they lack."""
        before = self.tokens
        self.hessian.update(x)
        keep, share = before / self.tokens, 2.0 / self.tokens
        self._shift = _added(self._shift, keep, lack, x, share)
        if drift is not None:
            self._drift = _added(self._drift, keep, drift, x, share)

    def pull(self, index: int, rows: Tensor | None = None) -> Tensor:
        """Return ``2 / tokens * sum (W y + d - W x) x^T`` [n, k] of a layer: the gradient that its lack gives.

        ``rows`` [m, n] takes so many combinations of its outputs instead: [m, k].
        """
        assert self._shift is not None
        weight = self.weights[index]
        with products.rough():
            if self.whole:
                first = sum(len(each) for each in self.weights[:index])
                own = self._shift[first : first + len(weight)]
                return own.clone() if rows is None else products.times(rows, own)
            found = products.times(weight if rows is None else products.times(rows, weight), self._shift)
        if self._drift is not None:
            found += self._drift if rows is None else rows @ self._drift
        return found


class HeldOut:
    """Tokens held out, as they are: inputs as int8 with a scale each, what they lack in bfloat16.

    They have one place from the first on: pieces that stay, between those that come and go, would hold memory apart.
    """

    def __init__(self, moments: Moments, room: int) -> None:
        """Take the moments that these tokens check and then join, and about how many will come."""
        self.moments, self.room = moments, max(1, room)
        self.tokens = 0
        self._kept: list[Tensor] = []

    def update(self, x: Tensor, wanted: Tensor, drift: Tensor | None) -> None:
        """Add tokens as ``Moments.update`` has them; x is rounded per token to at most 8 bits."""
        scale = (x.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
        lack, drift = self.moments.lack(x, wanted, drift)
        found = [
            (x / scale).round_().to(torch.int8),
            scale,
            lack.bfloat16(),
            *([] if drift is None else [drift.bfloat16()]),
        ]
        if self.tokens + len(x) > self.room or not self._kept:
            self.room = max(self.room, self.tokens + len(x))
            before, self._kept = self._kept, [part.new_empty(self.room, part.shape[1]) for part in found]
            for kept, old in zip(self._kept, before, strict=False):  # nothing was there at first
                kept[: self.tokens] = old[: self.tokens]
        for kept, part in zip(self._kept, found, strict=True):
            kept[self.tokens : self.tokens + len(x)] = part
        self.tokens += len(x)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield inputs, what they lack, and the drift, in float32."""
        for first in range(0, self.tokens, AT_ONCE):
            codes, scale, lack, *drift = (kept[first : min(first + AT_ONCE, self.tokens)] for kept in self._kept)
            yield codes * scale, lack.float(), drift[0].float() if drift else None

    def pull(self, index: int, rows: Tensor) -> Tensor:
        """Return what ``Moments.pull`` does, for combinations ``rows`` [m, n] of a layer's outputs: [m, k]."""
        weights = self.moments.weights
        weight, first = weights[index], sum(len(each) for each in weights[:index])
        found = rows.new_zeros(len(rows), weight.shape[1])
        with products.rough():
            for x, lack, drift in self.batches():
                own = lack[:, first : first + len(weight)] if self.moments.whole else products.times(lack, weight.T)
                own = own if drift is None else own + drift
                products.add(found, products.times(own, rows.T).T, x, alpha=2.0 / self.tokens)
        return found

    def bend(self, step: Tensor) -> float:
        """Return tr(S H S^T) for a step S [m, k] and the Hessian H of these inputs."""
        with products.rough():
            moved = (products.times(x, step.T) for x, _, _ in self.batches())
            return 2.0 / self.tokens * sum(float(each.square_().sum()) for each in moved)

    def hand_over(self) -> None:
        """Add these tokens to the moments; they are gone here afterwards."""
        for part in self.batches():
            self.moments.add(*part)
        self.tokens, self._kept = 0, []


class Seen:
    """Everything kept of one layer's calibration inputs: moments to fit and to check with, and a sample of tokens."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        batches: Iterable[Inputs],
        tokens: int,
        shrinkage: float = 0.0,
        lacking: bool = True,
    ) -> None:
        """Sum over ``batches`` of about ``tokens`` tokens, as the layers with ``weights`` [n, k] receive them.

        Where nothing is ``lacking``, only the Hessian is summed.
        """
        self.fit = Moments(weights, shrinkage)
        self.check = HeldOut(self.fit, min(CHECKED, tokens // HELD_OUT) if lacking else 0)
        self.sample: Inputs | None = None
        for part in batches:
            count = len(part.served)
            if not lacking and count:
                self.fit.hessian.update(part.served)
            cut = count - min(count // HELD_OUT, count * CHECKED // max(tokens, count))
            for moments, rows in ((self.fit, slice(0, cut)), (self.check, slice(cut, None))):
                if lacking and len(part.served[rows]):
                    drift = None if part.drift is None else part.drift[rows]
                    moments.update(part.served[rows], part.wanted[rows], drift)
            if self.sample is None:
                self.sample = part.cut(max(0, count - SAMPLE), SAMPLE)
            del part  # before the next batch is computed

    def all(self) -> Moments:
        """Return the moments of all tokens; those for fitting and checking are gone then."""
        self.check.hand_over()
        return self.fit


def _added(total: Tensor | None, keep: float, left: Tensor, right: Tensor, share: float) -> Tensor:
    """Return ``keep * total + share * left^T right``, in the total's place."""
    if total is None:
        total, keep = left.new_empty(left.shape[1], right.shape[1]), 0.0
    return products.accumulated(total, left.T, right, keep=keep, share=share)
