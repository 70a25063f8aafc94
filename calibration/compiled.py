"""Networks in training, compiled by torch: batch norms, activations and sums of a pass are computed where they meet.

Of a step of ResNet-20 on a CPU more than half is spent on reading and writing what lies between convolutions. Compiling
takes up to half a minute, so it is for trainings that take several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qtoolkit.errors import RequestError, said

Pass = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def training_pass(network: nn.Module, *, compiled: bool) -> Pass:
    """Return what computes ``network``'s answers to images x with some of its weights, by name, replaced.

    Raises:
        RequestError, from the first call: compiling is asked for and fails, for want of a C++ compiler, say.
    """

    def passed(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, dict(weights), (x,)) if weights else network(x)

    return _told(torch.compile(passed)) if compiled else passed


def answering_pass(network: nn.Module, *, compiled: bool) -> Callable[[Tensor], Tensor]:
    """Return what computes the answers of a network that does not learn, to be called without gradients.

    Compiled, its batch norms are part of its convolutions, whose weights are kept as the processor wants them.

    Raises:
        RequestError, from the first call: compiling is asked for and fails.
    """
    if not compiled:
        return network
    from torch._inductor import config as inductor  # takes a second

    call = _told(torch.compile(network))

    def answers(x: Tensor) -> Tensor:
        with inductor.patch(freezing=True):  # as an option of torch.compile it does nothing
            return call(x)

    return answers


def _told(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``call``, whose failure to compile is one sentence."""

    def told(*inputs: Mapping[str, Tensor] | Tensor) -> Tensor:
        try:
            return call(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise RequestError(
                f"torch.compile fails on this machine: {said(error)}.", "Leave recover.compile out."
            ) from error

    return told
