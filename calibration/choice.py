"""Choice by measurement: whether a model is smoothed, rotated, both or neither, judged on held-out text before the run.

A few blocks are quantized in every way. What comes out is carried through the float blocks behind, and the way with the
least divergence of the next token wins. Rotation harms some models (published for Qwen3-14B at int4) and saves others,
so that no fixed choice is right. First weights are only rounded to nearest, which is cheap and tells ways apart that
outliers tell apart; where that leaves it open, the ways that are near are tried again by the recipe's own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit import memory
from qtoolkit.architecture import Skeleton
from qtoolkit.calibration import capture, experts, grid, halves, trial
from qtoolkit.calibration.rotation import Rotated
from qtoolkit.calibration.smoothing import Smooth
from qtoolkit.checkpoint import Choice
from qtoolkit.source import Source
from qtoolkit.stages import Block, Context, Stream, Transform

LIGHT = {  # options in a trial: what costs most of a step's time and is the same for every candidate
    "smooth": {"grid": 24, "tokens": 256},
    "gptq": {"aim": False, "refine": 0, "starts": 1},
}
MARGIN = 1.05  # a simpler way wins up to so many times the least: trials are short and differ by chance
TRIED, SHARE = 2, 8  # blocks that are tried at most, and of a model for each: the choice stays cheap beside the run
APART = 2.0  # times the least, rounded to nearest: a way this bad is not tried again


@dataclass(frozen=True)
class Candidate:
    """One way to treat a model: the float model that its blocks are read from, and the transforms of a block."""

    weights: Source
    transforms: Mapping[str, Transform]

    def enter(self, stream: Stream) -> Stream:
        """Return the float stream as this model has it."""
        return _mapped(stream, self.weights.hidden.turn) if isinstance(self.weights, Rotated) else stream

    def leave(self, stream: Stream) -> Stream:
        """Return a stream of this model as the float model has it."""
        return _mapped(stream, self.weights.hidden.back) if isinstance(self.weights, Rotated) else stream


Treatment = Callable[[Candidate, Block, Stream, Context], None]  # quantizes a block, given what it receives


@torch.inference_mode()
def choose(
    skeleton: Skeleton,
    source: Source,
    candidates: Mapping[str, Candidate],
    load: Callable[[Source, int], Block],
    tokens: Tensor,
    blocks: int | None,
    context: Context,
) -> Choice:
    """Measure every candidate on held-out text and return the best with the numbers behind it.

    Args:
        skeleton: the empty model.
        source: the float model.
        candidates: the ways, the simplest first.
        load: gives block i of a source with what the recipe says about its layers.
        tokens: int64 [sequences, length], the calibration text.
        blocks: how many blocks are tried; None: ``TRIED``, but at most one of ``SHARE`` where the model is shallow.
        context: as in the run.
    """
    places = tried(len(skeleton.blocks), blocks)
    fit, held = trial.split(tokens)

    def measured(some: Mapping[str, Candidate], treat: Treatment) -> dict[str, float]:
        before, judged = (capture.embed(skeleton, source, part) for part in (fit, held))
        return _measured(skeleton, source, some, load, before, judged, places, context, treat)

    glance = measured(candidates, _round)
    left = contenders(glance)
    again = measured({name: candidates[name] for name in left}, _quantize) if len(left) > 1 else {}
    return Choice(
        chosen=simplest(again, MARGIN) if again else left[0],
        divergence=glance,
        compensated=again,
        blocks=tuple(f"{skeleton.architecture.blocks}.{index}" for index in places),
        held_out_tokens=held.numel(),
    )


def tried(depth: int, wanted: int | None) -> list[int]:
    """Return the indices of the blocks that are tried of ``depth``, spread over it."""
    return trial.spread(depth, wanted or min(TRIED, max(1, depth // SHARE)))


def contenders(glance: Mapping[str, float]) -> list[str]:
    """Return which ways may be the best, by their divergence with weights rounded to nearest, the simplest first.

    Where the simplest is about as good as any, nothing has to be done about outliers: it is the only one.
    """
    first = next(iter(glance))
    if simplest(glance, MARGIN) == first:
        return [first]
    least = min(glance.values())
    return [name for name, value in glance.items() if value <= least * APART]


def simplest(divergences: Mapping[str, float], margin: float) -> str:
    """Return the first way whose divergence is at most ``margin`` times the least."""
    least = min(divergences.values())
    return next(name for name, value in divergences.items() if value <= least * margin)


def _measured(
    skeleton: Skeleton,
    source: Source,
    candidates: Mapping[str, Candidate],
    load: Callable[[Source, int], Block],
    fit: Stream,
    held: Stream,
    places: Sequence[int],
    context: Context,
    treat: Treatment,
) -> dict[str, float]:
    """Return every candidate's divergence, summed over the blocks at ``places``, each quantized alone by ``treat``."""
    carried: dict[tuple[str, int], Stream] = {}
    for index in range(len(skeleton.blocks)):
        block = halves.narrow(load(source, index))
        carried = trial.advance_all(block, carried)
        behind = capture.advance(block, fit) if index < places[-1] else fit
        held_behind = capture.advance(block, held)
        del block  # before those that are tried
        if index in places:
            for name, candidate in candidates.items():  # each reads the block anew: memory holds one
                carried[name, index] = _tried(candidate, load(candidate.weights, index), fit, held, context, treat)
                memory.trim()
        fit, held = behind, held_behind
    memory.trim()
    found = trial.divergence(skeleton, source, held, carried)
    return {name: sum(found[name, index] for index in places) for name in candidates}


def _tried(candidate: Candidate, block: Block, fit: Stream, held: Stream, context: Context, treat: Treatment) -> Stream:
    """Return the held-out stream of the float model behind ``block``, quantized in the candidate's way."""
    treat(candidate, block, candidate.enter(fit), context)
    return candidate.leave(trial.served(block, candidate.enter(held), context.scheme.activation_bits))


def _quantize(candidate: Candidate, block: Block, inputs: Stream, context: Context) -> None:
    """Quantize ``block`` by the recipe's steps."""
    for transform in candidate.transforms.values():
        experts.apply(transform, block, inputs, context)


def _round(candidate: Candidate, block: Block, inputs: Stream, context: Context) -> None:
    """Smooth ``block`` where that is a part of the way, and round its weights to nearest."""
    for transform in candidate.transforms.values():
        if isinstance(transform, Smooth):
            experts.apply(transform, block, inputs, context)
    for name, layer in block.linears():
        layer.weight.data = grid.rounded(layer.weight.data, block.schemes.get(name, context.scheme))


def _mapped(stream: Stream, change: Callable[[Tensor], Tensor]) -> Stream:
    return Stream([change(batch) for batch in stream.batches], stream.kwargs, device=stream.device)
