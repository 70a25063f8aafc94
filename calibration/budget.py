"""A size budget: which layers get int8 weights or stay in float, because int4 would cost the model most there.

Bits a weight: everything that the quantizable layers store (codes and scales; floats where a layer stays in float),
divided by their number of weights. Quantizable is every target that the recipe does not keep and the layout can hold.
Embeddings, head and norms do not count. W4A8-g128 with 16-bit scales takes 4.125, int8 a little over 8, bfloat16 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtoolkit.architecture import Skeleton
from qtoolkit.calibration import capture, experts, grid, trial
from qtoolkit.calibration.hessian import shared_inputs
from qtoolkit.checkpoint import BudgetRecord, BudgetRow
from qtoolkit.errors import RequestError
from qtoolkit.scheme import INT8
from qtoolkit.source import Source
from qtoolkit.stages import Block, Context, Stream, Transform

FLOAT = "float"
PROBES = 8  # blocks whose divergence at the model's end is measured; those between take what lies between


@dataclass(frozen=True)
class Unit:
    """Layers that share an input and become the same thing (engines fuse them), and what each kind costs and loses.

    Attributes:
        layers: full names.
        weights: number of weights.
        bits: kind (a scheme's name, or ``float``) to stored bits, in ascending order.
        loss: kind to divergence in nats that this unit alone would cause.
    """

    layers: tuple[str, ...]
    weights: int
    bits: Mapping[str, float]
    loss: Mapping[str, float]


def allocate(units: Sequence[Unit], bits_per_weight: float) -> list[str]:
    """Return each unit's kind: again and again the step that saves most divergence a bit, while one fits the budget.

    Raises:
        RequestError: the budget does not hold every unit's smallest kind.
    """
    kinds = [next(iter(unit.bits)) for unit in units]
    weights = sum(unit.weights for unit in units)
    left = bits_per_weight * weights - sum(unit.bits[kind] for unit, kind in zip(units, kinds, strict=True))
    if left < 0:
        raise _too_small(bits_per_weight, kinds[0], bits_per_weight - left / weights)
    while True:
        best, step = 0.0, None
        for index, (unit, kind) in enumerate(zip(units, kinds, strict=True)):
            for other, bits in unit.bits.items():
                extra = bits - unit.bits[kind]
                if 0 < extra <= left:
                    gain = (unit.loss[kind] - unit.loss[other]) / extra
                    if gain > best:
                        best, step = gain, (index, other, extra)
        if step is None:
            return kinds
        index, kind, extra = step
        kinds[index] = kind
        left -= extra


def check(blocks: Iterable[Block], bits_per_weight: float, context: Context) -> None:
    """Refuse, before anything is measured, a budget that the layers' shapes alone tell to be too small or too large.

    Raises:
        RequestError: it does not hold every layer in the recipe's scheme, or it holds all of them in float.
    """
    layers = [(linear, bool(block.experts)) for block in blocks for _, linear in block.linears()]
    width, weights = 8 * context.scale_dtype.itemsize, sum(linear.weight.numel() for linear, _ in layers)
    least = sum(linear.weight.numel() * context.scheme.bits(linear.in_features, width) for linear, _ in layers)
    if least > bits_per_weight * weights:
        raise _too_small(bits_per_weight, context.scheme.name, least / weights)
    if bits_per_weight >= width and not any(mixture for _, mixture in layers):  # experts have the recipe's scheme
        raise too_large(bits_per_weight, context)


def _too_small(bits_per_weight: float, kind: str, least: float) -> RequestError:
    return RequestError(
        f"A budget of {bits_per_weight:g} bits a weight is too small: {kind} alone takes {least:.3f}.",
        "Give more, or a larger --group-size.",
    )


def too_large(bits_per_weight: float, context: Context) -> RequestError:
    """Return the error of a budget under which nothing would be quantized."""
    return RequestError(
        f"A budget of {bits_per_weight:g} bits a weight leaves every layer in float.",
        f"Give less: floats take {8 * context.scale_dtype.itemsize}.",
    )


def spend(units: Sequence[Unit], bits_per_weight: float) -> BudgetRecord:
    """Return what the budget gives each unit, for the manifest.

    Raises:
        RequestError: the budget does not hold every unit's smallest kind.
    """
    kinds = allocate(units, bits_per_weight)
    used = sum(unit.bits[kind] for unit, kind in zip(units, kinds, strict=True)) / sum(unit.weights for unit in units)
    rows = tuple(
        BudgetRow(layers=unit.layers, kind=kind, loss=dict(unit.loss)) for unit, kind in zip(units, kinds, strict=True)
    )
    return BudgetRecord(bits=bits_per_weight, used=used, rows=rows)


@torch.inference_mode()
def measure(
    skeleton: Skeleton,
    weights: Source,
    transforms: Mapping[str, Transform],
    load: Callable[[Source, int], Block],
    tokens: Tensor,
    context: Context,
) -> list[Unit]:
    """Return every unit of the model with the divergence that each kind would cause on held-out text.

    A block is quantized by the run's own steps, but on less text; then one unit at a time is put in its float place. A
    unit's share in what its block's output loses is its share in the block's divergence, which is measured by carrying
    the block's output through the float blocks behind, for ``PROBES`` blocks.
    """
    fit, held = (capture.embed(skeleton, weights, part) for part in trial.split(tokens))
    places = trial.spread(len(skeleton.blocks), PROBES)
    carried: dict[int, Stream] = {}
    found: list[list[Unit]] = []  # of each block, with relative errors of its output for losses
    whole: list[float] = []
    for index in range(len(skeleton.blocks)):
        block = load(weights, index)
        carried = trial.advance_all(block, carried)
        next_fit, next_held = capture.advance(block, fit), capture.advance(block, held)
        units, out = _units(block, fit, held, transforms, context)
        found.append(units)
        whole.append(relative_error(out, next_held))
        if index in places:
            carried[index] = out
        fit, held = next_fit, next_held
    ends = trial.divergence(skeleton, weights, held, carried)
    slopes = {index: max(ends[index], 0.0) / max(whole[index], 1e-30) for index in places}
    return [
        replace(unit, loss={kind: between(slopes, index) * error for kind, error in unit.loss.items()})
        for index, units in enumerate(found)
        for unit in units
    ]


def between(values: Mapping[int, float], index: int) -> float:
    """Return the value at ``index``, on a line between the nearest known ones in the logarithm."""
    known = sorted(values)
    after = next((place for place in known if place >= index), known[-1])
    before = next((place for place in reversed(known) if place <= index), known[0])
    if after == before:
        return values[after]
    part = (index - before) / (after - before)
    low, high = (math.log(max(values[place], 1e-30)) for place in (before, after))
    return math.exp(low + part * (high - low)) if before < after else values[after]


def relative_error(stream: Stream, truth: Stream) -> float:
    """Return the mean over tokens of |y' - y|^2 / |y|^2: tokens with huge states count as the others do."""
    total, tokens = 0.0, 0
    for some, exact in zip(stream.batches, truth.batches, strict=True):
        size = exact.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        total += float(((some - exact).square().sum(dim=-1) / size).sum())
        tokens += size.numel()
    return total / tokens


def _units(
    block: Block, fit: Stream, held: Stream, transforms: Mapping[str, Transform], context: Context
) -> tuple[list[Unit], Stream]:
    """Return the block's units with the relative error of its output for each kind, and its output as served."""
    names = [name for name, _ in block.linears()]
    exact: dict[str, Tensor] = {}
    for transform in transforms.values():
        if not block.quantized:  # what the transform before made of the float weights
            exact = {name: block.linear(name).weight.data.clone() for name in names}
        given = dict(block.schemes)
        experts.apply(transform, block, fit, context)
        if block.schemes != given:
            raise RequestError(
                "A size budget chooses each layer's scheme, and gptq.chained has chosen one.", "Drop one of the two."
            )
    out = trial.served(block, held, context.scheme.activation_bits)
    int4 = {name: block.linear(name).weight.data for name in names}
    for name, weight in exact.items():
        block.linear(name).weight.data = weight
    truth = capture.advance(block, held)
    units = []
    for mates in shared_inputs(experts.around(block)).values():
        int8 = {name: grid.rounded(exact[name], INT8) for name in mates}
        errors = {FLOAT: 0.0}
        for kind, made in ((context.scheme.name, int4), (INT8.name, int8)):
            with _in_place(block, {name: made[name] for name in mates}, context.scheme.activation_bits):
                errors[kind] = relative_error(capture.advance(block, held), truth)
        k, width = block.linear(mates[0]).in_features, 8 * context.scale_dtype.itemsize
        each = {scheme.name: scheme.bits(k, width) for scheme in (context.scheme, INT8)} | {FLOAT: float(width)}
        weights = sum(block.linear(name).weight.numel() for name in mates)
        bits = {kind: weights * value for kind, value in each.items()}
        units.append(Unit(tuple(f"{block.name}.{name}" for name in mates), weights, bits, errors))
    return [*units, *_of_experts(block, context)], out


def _of_experts(block: Block, context: Context) -> Iterator[Unit]:
    """Yield the experts of ``block`` as one unit, which has the recipe's scheme: engines run all of a model's alike."""
    layers = [(f"{part.name}.{name}", linear) for _, part in experts.parts(block) for name, linear in part.linears()]
    if layers:
        kind, width = context.scheme.name, 8 * context.scale_dtype.itemsize
        bits = sum(linear.weight.numel() * context.scheme.bits(linear.in_features, width) for _, linear in layers)
        weights = sum(linear.weight.numel() for _, linear in layers)
        yield Unit(tuple(name for name, _ in layers), weights, {kind: bits}, {kind: 0.0})


@contextmanager
def _in_place(block: Block, weights: Mapping[str, Tensor], bits: int) -> Iterator[None]:
    """Inside, the named layers have other weights and round their inputs; the rest of the block is float."""
    handles, before = [], {name: block.linear(name).weight.data for name in weights}
    for name, weight in weights.items():
        block.linear(name).weight.data = weight
        hook = block.linear(name).register_forward_pre_hook(lambda _, args: (capture.round_tokens(args[0], bits),))
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in before.items():
            block.linear(name).weight.data = weight
