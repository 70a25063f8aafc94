"""Running one block twice: in the network as it will be served and in the float one, up to a layer's input.

What a layer should give is known from the float network; what it gets is known from the one already quantized. The
difference of the two is what compensation can still make up for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.calibration.capture import quantized_activations, round_tokens
from qtoolkit.errors import NumericError
from qtoolkit.stages import Block, QuantizedWeight, Stream


@dataclass(frozen=True)
class Inputs:
    """What one layer receives in one batch, all float32.

    Attributes:
        seen: [tokens, k] in the quantized network, before rounding.
        served: [tokens, k], the same rounded per token as it will be served.
        wanted: [tokens, k] in the float network.
        drift: [tokens, n], what the hidden stream the layer adds to lacks (float minus quantized); None elsewhere.
    """

    seen: Tensor
    served: Tensor
    wanted: Tensor
    drift: Tensor | None

    def cut(self, start: int, count: int) -> Inputs:
        """Return a copy of at most ``count`` tokens from ``start`` on."""
        rows = slice(start, start + count)
        drift = None if self.drift is None else self.drift[rows].clone()
        return Inputs(self.seen[rows].clone(), self.served[rows].clone(), self.wanted[rows].clone(), drift)


@torch.inference_mode()
def inputs(
    block: Block, name: str, stream: Stream, originals: Mapping[str, Tensor], bits: int, *, both: bool = True
) -> Iterator[Inputs]:
    """Yield what layer ``name`` receives, batch by batch; the block stops at the layer.

    Args:
        block: some of its targets are quantized already.
        name: the layer.
        stream: what the block receives in the quantized network and, in ``floats``, in the float one.
        originals: float weights of the block's targets.
        bits: of the activations.
        both: False leaves the float network out: ``wanted`` is ``seen`` then, without drift.

    Raises:
        NumericError: an input holds NaN or Inf.
    """
    norm = block.residual.get(name, "")
    for (hidden, kwargs), exact in zip(stream.calls(), stream.floats or stream.batches, strict=True):
        with quantized_activations(block, bits):
            seen, carried = _reach(block, name, norm, hidden, kwargs)
        served = round_tokens(seen, bits)
        if not both:
            yield Inputs(seen, served, seen, None)
            continue
        with weights(block, originals):
            wanted, right = _reach(block, name, norm, exact.to(hidden.device), kwargs)
        drift = None if carried is None or right is None else right - carried
        found = Inputs(seen, served, wanted, drift)
        del seen, served, wanted, drift, carried, right  # nobody but the caller keeps them through the next batch
        yield found
        del found


@contextmanager
def weights(block: Block, given: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the block's targets compute with the ``given`` weights."""
    before = {name: block.linear(name).weight.data for name in given}
    for name, weight in given.items():
        block.linear(name).weight.data = weight
    try:
        yield
    finally:
        for name, weight in before.items():
            block.linear(name).weight.data = weight


@contextmanager
def packed(layer: nn.Linear, weight: QuantizedWeight) -> Iterator[None]:
    """Inside, ``layer`` has its weight only while it computes, made of ``weight``'s codes; afterwards for good.

    Float weights that it is given meanwhile count before that.
    """
    empty = torch.empty(0, device=layer.weight.device)
    made: list[bool] = []

    def unpack(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not layer.weight.numel():
            layer.weight.data = weight.dequantize()
            made.append(True)

    def let_go(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if made:
            made.clear()
            layer.weight.data = empty

    layer.weight.data = empty
    handles = [layer.register_forward_pre_hook(unpack), layer.register_forward_hook(let_go)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        layer.weight.data = weight.dequantize()


class _Reached(Exception):
    """Ends the block's forward pass at the layer that is looked at."""


def _reach(block: Block, name: str, norm: str, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the layer's input [tokens, k] before any rounding, and what the norm ``norm`` read [tokens, hidden]."""
    caught: dict[str, Tensor] = {}

    def catch_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught["input"] = args[0]
        raise _Reached

    def catch_stream(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught["stream"] = args[0]

    handles = [block.layer(name).register_forward_pre_hook(catch_input, prepend=True)]
    if norm:
        handles.append(block.layer(norm).register_forward_pre_hook(catch_stream))
    try:
        block.module(hidden, **kwargs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not caught["input"].isfinite().all():
        raise NumericError(
            f"The input of {block.name}.{name} holds NaN or Inf on the calibration text.",
            "The weights or the calibration data are damaged.",
        )
    return caught["input"].flatten(0, -2), caught["stream"].flatten(0, -2) if norm else None
