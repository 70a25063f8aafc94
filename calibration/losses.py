"""Where a layer's loss comes from: its int4 weights, its int8 inputs, both, and what earlier layers have changed."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.calibration.twin import Inputs


def parts(sample: Inputs, weight: Tensor, aim: Tensor, served: Tensor) -> dict[str, float]:
    """Return four parts of the squared output error over the output's energy, on a sample of held-out tokens.

    With W the ``weight`` [n, k], A the ``aim`` it was to have, Q what is ``served``, x the layer's input, x' the same
    rounded and y the float network's:

    - ``weight_error``: |Q x - A x|^2, from the weights alone;
    - ``activation_error``: |A x' - A x|^2, from the rounded inputs alone;
    - ``both_error``: |Q x' - A x|^2, what the layer loses when it is served; about the sum of the two;
    - ``inherited_error``: |W x - W y|^2, what quantizing earlier layers has changed; A makes up for a part of it.
    """
    exact = sample.seen @ aim.T  # [tokens, n]
    energy = exact.square().sum().clamp_min(torch.finfo(exact.dtype).tiny)
    found = {
        "weight_error": sample.seen @ served.T - exact,
        "activation_error": sample.served @ aim.T - exact,
        "both_error": sample.served @ served.T - exact,
        "inherited_error": (sample.seen - sample.wanted) @ weight.T,
    }
    return {name: float(lost.square().sum() / energy) for name, lost in found.items()}
