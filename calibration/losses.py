"""Where a layer's loss comes from: its int4 weights, its int8 inputs, both, and what earlier layers have changed.

Products may be rough: these are shares of an energy, for a reader.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.calibration import products
from qtoolkit.calibration.twin import Inputs


def inherited(sample: Inputs, weight: Tensor, aim: Tensor) -> dict[str, float]:
    """Return ``inherited_error``: |W x - W y|^2 over |A x|^2, what quantizing earlier layers has changed.

    W is the float ``weight`` [n, k], A the ``aim`` it was to have, which makes up for a part of it, x the layer's input
    and y the float network's, of a sample of tokens.
    """
    with products.rough():
        seen = products.times(sample.seen, aim.T)
        return _shares(seen, {"inherited_error": products.times(sample.seen - sample.wanted, weight.T)})


def parts(sample: Inputs, aim: Tensor, gap: Tensor) -> dict[str, float]:
    """Return three parts of the squared output error over the output's energy, on a sample of tokens.

    With A the ``aim`` [n, k] the weight was to have, ``gap`` what is served less A, x the layer's input and x' the same
    rounded:

    - ``weight_error``: |gap x|^2, from the weights alone;
    - ``activation_error``: |A x' - A x|^2, from the rounded inputs alone;
    - ``both_error``: |(A + gap) x' - A x|^2, what the layer loses when it is served; about the sum of the two.
    """
    with products.rough():
        exact = products.times(sample.seen, aim.T)  # [tokens, n]
        rounded = products.times(sample.served - sample.seen, aim.T)
        found = {
            "weight_error": products.times(sample.seen, gap.T),
            "activation_error": rounded,
            "both_error": products.times(sample.served, gap.T).add_(rounded),
        }
    return _shares(exact, found)


def _shares(exact: Tensor, found: dict[str, Tensor]) -> dict[str, float]:
    energy = exact.square().sum().clamp_min(torch.finfo(exact.dtype).tiny)
    return {name: float(lost.square().sum() / energy) for name, lost in found.items()}
