"""Running a block backwards: from the gradient behind it to those at its inputs and at its layers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qtoolkit.stages import Block, Probe


def backward(
    block: Block, probe: Probe, names: tuple[str, ...], *, inputs: bool = True
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, batch by batch, the gradient at the block's ``inputs`` and at the output of every layer in ``names``."""
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            caught[name] = out

        return hook

    handles = [block.layer(name).register_forward_hook(catch(name)) for name in names]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            own = {name: _kept(tensor) for name, tensor in block.module.state_dict().items()}
            for number, gradient in enumerate(probe.gradients):
                hidden, kwargs = probe.stream.call(number)
                leaf = hidden.clone().requires_grad_()
                out = functional_call(block.module, own, (leaf,), _cloned(kwargs))
                out = out[0] if isinstance(out, tuple) else out
                wanted = [*([leaf] if inputs else []), *(caught.pop(name) for name in names)]
                found = [passed_back(out, wanted, gradient.to(out, copy=True))]
                del hidden, leaf, out, wanted  # nobody holds one batch's while the next goes by
                yield found.pop()
    finally:
        for handle in handles:
            handle.remove()


def _kept(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as autograd may keep it: what was made in inference mode must be copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def _cloned(value: Any) -> Any:
    """Return tensors that autograd may keep, in whatever they are."""
    if isinstance(value, Tensor):
        return _kept(value)
    if isinstance(value, dict):
        return {name: _cloned(part) for name, part in value.items()}
    return tuple(_cloned(part) for part in value) if isinstance(value, tuple) else value


def passed_back(out: Tensor, inputs: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients at ``inputs``, by ``gradient`` at ``out``, of its shape and dtype.

    As ``torch.autograd.grad(out, inputs, gradient)``, which loads PyTorch's compiler's symbols to compare two shapes.
    """
    return torch.autograd.grad(_Behind.apply(out, gradient), inputs)


class _Behind(torch.autograd.Function):
    """A scalar that has the given gradient at its input."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None
