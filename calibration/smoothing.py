"""Adaptive smoothing: move activation outliers into the weights, by the scale vector that a search finds best.

Source: QQQ (Zhang et al. 2024, section 3.2, "adaptive smoothing"): only channels beyond a threshold t are scaled, down
to t, and t is searched for each group of layers so that the quantized group's output is nearest to the float one's.
Scales are then rounded to powers of two, so that channels end within a factor of 1.4 of t and the smoothed block
computes the same bits, but for numbers too small for a dtype's normal range, and for products of whole numbers, whose
scale channels share (``halves``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from qtoolkit.calibration import grid, halves
from qtoolkit.calibration.capture import Reached, layer_inputs, round_tokens
from qtoolkit.calibration.options import Options
from qtoolkit.stages import Block, ChannelGroup, Context, Stream

COARSE = 16  # thresholds, each the same part of the one before, that the search tries before it nears the best of them
LOWEST = 0.1  # the official search stops at this threshold; models with smaller activations go lower
BIAS, MANTISSA = 127, 23  # of a float32's exponent, and bits behind it


class SmoothOptions(Options):
    """Options of the step ``smooth``."""

    grid: int = Field(100, ge=1, description="thresholds from the largest to the least, of which the search finds one")
    tokens: int = Field(1024, ge=1, description="calibration tokens on which each threshold is judged")


@dataclass(frozen=True)
class Call:
    """One recorded call of the module that a group is judged by, with the float output to compare with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Tensor


class Smooth:
    """The transform: for each channel group search the scales, then fold them into producers and consumers."""

    Options = SmoothOptions
    keeps_function = True  # what the block computes in float stays
    rounds = False

    def __init__(self, options: SmoothOptions) -> None:
        self.options = options

    @torch.inference_mode()
    def apply(self, block: Block, stream: Stream, context: Context) -> dict[str, dict[str, float]]:
        """Smooth every group of ``block`` in place; return threshold, losses and the largest scale per group."""
        report = {}
        groups = [g for g in block.groups if g.producers and not any(name in block.refused for name in g.consumers)]
        with halves.narrowed(block.module):
            ranges = input_ranges(block, groups, stream)  # folding a group changes no other's
        for group in groups:
            scales, report[group.name] = self._search(block, group, ranges[group.name], stream, context)
            fold(block, group, scales)
        return report

    def _search(
        self, block: Block, group: ChannelGroup, largest: Tensor, stream: Stream, context: Context
    ) -> tuple[Tensor, dict[str, float]]:
        calls = record(block, group, stream, self.options.tokens)
        consumers = [block.linear(name) for name in group.consumers]
        start = float(largest.max())
        steps = max(self.options.grid, int(start / 0.5))
        lowest = min(LOWEST, start / 100)
        losses: dict[int, float] = {}
        room = {name: rounded_room(layer) for name, layer in zip(group.consumers, consumers, strict=True)}
        known: dict[bytes, float] = {}  # powers of two change in jumps: neighbours often ask for the same scales

        def scales_at(step: int) -> Tensor:
            threshold = start - (start - lowest) * step / steps
            return powers((largest / threshold).clamp_min(1.0)) if start else torch.ones_like(largest)

        def judge(some: Iterable[int]) -> int:
            with halves.narrowed(block.layer(group.inside or group.consumers[0]), but=consumers):
                for step in some:
                    if step not in losses and 0 <= step < steps:
                        scales = scales_at(step)
                        same = scales.cpu().numpy().tobytes()
                        if same not in known:
                            known[same] = group_loss(block, group, calls, scales, context, room)
                        losses[step] = known[same]
            return min(losses, key=lambda step: (losses[step], step))

        some = coarse(start, lowest, steps)
        best = judge(some)
        stride = max(abs(best - step) for step in some[max(0, some.index(best) - 1) : some.index(best) + 2])
        while stride > 1:
            stride = (stride + 1) // 2
            best = judge((best - stride, best + stride))
        scales = scales_at(best)
        return scales, {
            "threshold": start - (start - lowest) * best / steps,
            "largest_input": start,
            "loss": losses[best],
            "loss_unsmoothed": losses[0],  # every scale is 1
            "largest_scale": float(scales.max()),
        }


def coarse(start: float, lowest: float, steps: int) -> list[int]:
    """Return the steps, out of ``steps`` equal ones from ``start`` to ``lowest``, nearest to a geometric sequence."""
    if start <= lowest:
        return [0]
    count = min(COARSE, 1 + steps // 6)  # a trial's search of few steps begins with fewer
    ratio = (lowest / start) ** (1 / count)
    places = (round(steps * start * (1 - ratio**i) / (start - lowest)) for i in range(count))
    return sorted({min(place, steps - 1) for place in places})


def input_ranges(block: Block, groups: Sequence[ChannelGroup], stream: Stream) -> dict[str, Tensor]:
    """Return, by group, the largest absolute input [k] of its channels over ``stream``, tied where they must be.

    The channels of a value head are read by several query heads under grouped-query attention; the producer has one
    row for all of them, so they share the largest value.
    """
    readers = {group.name: (group.floats or group.consumers)[0] for group in groups}  # a router sees every token
    sizes = {name: block.linear(reader).weight for name, reader in readers.items()}
    found = {name: torch.zeros(weight.shape[1], device=weight.device) for name, weight in sizes.items()}

    def update(name: str, x: Tensor) -> None:
        tokens = x.flatten(0, -2)  # two readings take half the time of absolute values written down
        torch.maximum(found[name], torch.maximum(tokens.amax(dim=0), -tokens.amin(dim=0)), out=found[name])

    if groups:
        seen = {reader: partial(update, name) for name, reader in readers.items()}
        layer_inputs(block, stream, seen, raw=True, once=True)
    for group in groups:
        if group.heads:
            heads = found[group.name].view(-1, block.kv_repeats, block.head_dim)  # [kv heads, repeats, head_dim]
            found[group.name] = heads.amax(dim=1, keepdim=True).expand_as(heads).reshape(-1)
    return found


def record(block: Block, group: ChannelGroup, stream: Stream, tokens: int) -> list[Call]:
    """Record calls of the module that ``group`` is judged by, and their outputs, on sequences from all of ``stream``.

    About ``tokens`` tokens are taken, at least one sequence, evenly from the batches: memory is bounded, and what is
    read is not the beginning of the text alone.
    """
    module = block.layer(group.inside or group.consumers[0])
    recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.append((args, kwargs))
        raise Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    for hidden, kwargs in sequences(stream, tokens):
        with suppress(Reached):
            block.module(hidden, **kwargs)
    handle.remove()
    return [Call(args, kwargs, observe(block, group, args, kwargs)) for args, kwargs in recorded]


def sequences(stream: Stream, tokens: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield calls with about ``tokens`` tokens, at least one sequence, taken evenly from all batches, early ones first.

    So a few are all of text, which random tokens follow.
    """
    shapes = stream.shapes()
    every = sum(size for size, _ in shapes)
    wanted = min(every, max(1, tokens // shapes[0][1]))
    seen = 0
    for number, (size, _) in enumerate(shapes):
        count = -(-(seen + size) * wanted // every) + (-seen * wanted // every)
        seen += size
        if count:
            hidden, kwargs = stream.call(number)
            yield hidden[:count], {name: _first(value, size, count) for name, value in kwargs.items()}


def _first(value: Any, size: int, count: int) -> Any:
    """Return a keyword of a call with ``size`` sequences as its first ``count`` have it."""
    if isinstance(value, tuple):
        return tuple(_first(part, size, count) for part in value)
    return value[:count] if isinstance(value, Tensor) and value.dim() and len(value) == size else value


def observe(block: Block, group: ChannelGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run the group's module and return what the group is judged by: a layer's input inside it, or its output."""
    module = block.layer(group.inside or group.consumers[0])
    if not group.observe:
        return module(*args, **kwargs)
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise Reached

    handle = block.layer(group.observe).register_forward_pre_hook(hook)
    with suppress(Reached):
        module(*args, **kwargs)
    handle.remove()
    return seen[0]


def group_loss(
    block: Block,
    group: ChannelGroup,
    calls: list[Call],
    scales: Tensor,
    context: Context,
    room: Mapping[str, Tensor] | None = None,
) -> float:
    """Return the mean over tokens of the squared output difference when the group runs quantized under ``scales``.

    ``room`` takes the rounded weights of the consumers, so that trials need no new memory.
    """
    total, tokens = 0.0, 0
    with smoothed_and_rounded(block, group, scales, context, room or {}):
        for call in calls:
            difference = observe(block, group, call.args, call.kwargs) - call.expected
            total += float(difference.square().sum())
            tokens += difference.numel() // difference.shape[-1]
    return total / max(tokens, 1)


@contextmanager
def smoothed_and_rounded(
    block: Block, group: ChannelGroup, scales: Tensor, context: Context, room: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside, the group's consumers compute ``Q(x / s) @ Q(W * s).T``: int8 per token, int4 by rounding to nearest."""
    bits = context.scheme.activation_bits
    with ExitStack() as stack:
        for name in group.consumers:
            layer = block.linear(name)
            original = layer.weight.data
            stack.callback(setattr, layer.weight, "data", original)
            made = room[name] if name in room else rounded_room(layer)
            layer.weight.data = grid.rounded(original, context.scheme, scales, made)
            hook = layer.register_forward_pre_hook(lambda module, args: (round_tokens(args[0], bits, 1 / scales),))
            stack.callback(hook.remove)
        yield


def rounded_room(layer: nn.Linear) -> Tensor:
    """Return memory for a rounded weight of ``layer``, in the dtype it multiplies in."""
    return torch.empty_like(layer.weight, dtype=halves.dtype(layer), memory_format=torch.contiguous_format)


def powers(scales: Tensor) -> Tensor:
    """Return the powers of two nearest to positive float32 ``scales``, by their ratio.

    Folded in and multiplied, they move exponents only: products of floats have the same bits, and gains are stored
    exactly.
    """
    return ((scales.log2().round().to(torch.int32) + BIAS) << MANTISSA).view(torch.float32)


def fold(block: Block, group: ChannelGroup, scales: Tensor) -> None:
    """Divide the producers' channels by ``scales`` [k] and multiply the consumers' columns: the block's function stays.

    A norm's gain and a linear layer's rows (and bias) are divided; for value heads shared by several query heads the
    producer's row takes the scale that all of them were given. ``block.smoothed`` remembers it.
    """
    block.smoothed[group.name] = scales * block.smoothed.get(group.name, 1.0)
    for name in (*group.consumers, *group.floats):
        block.linear(name).weight.data.mul_(scales)
    if group.heads:
        scales = scales.view(-1, block.kv_repeats, block.head_dim)[:, 0].reshape(-1)  # [kv heads * head_dim]
    for name in group.producers:
        for parameter in block.layer(name).parameters():  # a linear layer's rows, a norm's gain, either's bias
            parameter.data.div_(scales.view(-1, *[1] * (parameter.dim() - 1)))
        if name in block.metrics:  # the loss asks more of what is smaller now
            block.metrics[name] = block.metrics[name] * (scales * scales.unsqueeze(1))  # it may lie on the disk


def fold_again(block: Block, scales: Mapping[str, Tensor]) -> None:
    """Smooth ``block``, as it was loaded, by the scales [k] of each of its groups in ``Block.smoothed``."""
    for group in block.groups:
        if group.name in scales:
            fold(block, group, scales[group.name].to(block.linear(group.consumers[0]).weight.device))
